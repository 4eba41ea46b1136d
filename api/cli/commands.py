"""The application with every command, in the order of `fewstep --help`."""

from fewstep.cli.app import app as app
from fewstep.cli.audit import OPTIONS, audit
from fewstep.cli.bench import bench
from fewstep.cli.compare import compare
from fewstep.cli.distill import distill
from fewstep.cli.doctor import doctor
from fewstep.cli.gallery.command import gallery
from fewstep.cli.recommend import recommend
from fewstep.cli.sample import sample
from fewstep.cli.sample_plan import sample_plan
from fewstep.cli.solvers import solvers
from fewstep.cli.tune import tune
from fewstep.cli.tune_pipeline import tune_pipeline
from fewstep.cli.warmup import warmup

for command in (
    sample,
    compare,
    bench,
    recommend,
    solvers,
    tune,
    tune_pipeline,
    sample_plan,
    distill,
    gallery,
    doctor,
    warmup,
):
    app.command()(command)
app.command(context_settings=OPTIONS)(audit)
