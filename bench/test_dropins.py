"""The time of a drop-in scheduler's `step()` compared with diffusers', for a caller who changes one import.

Both make the same call with the same arguments on one thread; the gate compares their results first.
"""

import inspect
import statistics
import warnings

import pytest

from fewstep.cli.microbench import SCHEDULE, close
from fewstep.cli.timing import Side, clock, interleaved

REPEATS, STEPS = 60, 20

# Required ratios of diffusers' time at (1, 4, 64, 64); the others are reported only.
CASES = {
    "2M": ("DPMSolverMultistepScheduler", {}, 5),
    "UniPC": ("UniPCMultistepScheduler", {}, 15),
    "SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 2),
    "Euler": ("EulerDiscreteScheduler", {}, 2),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, None),
    "DDPM": ("DDPMScheduler", {}, None),
    "LCM": ("LCMScheduler", {}, None),
    "FlowMatch Euler": ("FlowMatchEulerDiscreteScheduler", {}, None),
}
SHAPES = [(1, 4, 8, 8), (1, 4, 64, 64), (1, 4, 128, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_step_of_a_drop_in(name, shape, benchmark, report, one_thread):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from fewstep.bindings import diffusers as twins

    kind, config, budget = CASES[name]
    betas = {} if kind.startswith("FlowMatch") else SCHEDULE
    raw, x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    sides, ends = [], []
    for library in (twins, diffusers):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers' own deprecations
            scheduler = getattr(library, kind)(**betas, **config)
            scheduler.set_timesteps(STEPS)
        generator = torch.Generator()
        drawn = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

        def run(scheduler=scheduler, drawn=drawn):
            sample = x
            with torch.no_grad():
                for t in scheduler.timesteps:
                    if hasattr(scheduler, "scale_model_input"):
                        scheduler.scale_model_input(sample, t)
                    sample = scheduler.step(raw, t, sample, return_dict=False, **drawn)[0]
            return sample

        generator.manual_seed(0)
        ends.append(run().double().numpy())
        sides.append(Side(library.__name__, run, STEPS, lambda scheduler=scheduler: scheduler.set_timesteps(STEPS)))
    close(f"{name} and diffusers", *ends, 1e-5)
    a, b = (1e6 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    wanted = (">=", budget) if budget and shape == (1, 4, 64, 64) else None
    report(f"drop-in {name} {'x'.join(map(str, shape))}", a, b, b / a, wanted, "us/step")
    benchmark.pedantic(sides[0].run, setup=sides[0].prepare, rounds=5)
