"""The documented path of `fewstep.solvers.plans.plan_file`."""

from fewstep.solvers.plans.plan_file import dumps as dumps
from fewstep.solvers.plans.plan_file import plan_as_json as plan_as_json
from fewstep.solvers.plans.plan_file import plan_from_json as plan_from_json
