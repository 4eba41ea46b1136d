"""The documented path of `fewstep.MixedRun`."""

from fewstep.solvers.run.mixed import MixedRun as MixedRun
