"""The time of a whole run of a drop-in scheduler beside diffusers', for a caller who changes one import.

A run is what a pipeline pays on each image: `set_timesteps`, then `scale_model_input` and `step` at every timestep.
Both sides make the same calls with the same arguments on one thread; the gate compares their results first. Twins with
fewstep's noise are gated with torch's.
"""

import inspect
import statistics
import warnings

import pytest

from fewstep.cli.microbench import SCHEDULE, close
from fewstep.cli.timing import Side, clock, interleaved

REPEATS, STEPS, FEW = 25, 20, 4

FEWSTEP = {"noise": "fewstep"}
FLOW = "FlowMatchEulerDiscreteScheduler"

# Scheduler, configuration of both, options of the twin, and the wanted ratios of diffusers' time at both shapes. Where
# `accelerate` leaves a scheduler alone unless fewstep draws, it does so here.
CASES = {
    "FlowMatch Euler": (FLOW, {}, {}, (3, 2)),
    "FlowMatch Euler, mu": (FLOW, {"use_dynamic_shifting": True}, {}, (3, 2)),
    "FlowMatch Euler, stochastic, fewstep's noise": (FLOW, {"stochastic_sampling": True}, FEWSTEP, (3, 2)),
    "Euler": ("EulerDiscreteScheduler", {}, {}, (4, 3)),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}, (1.2, 1.2)),
    "Euler ancestral, fewstep's noise": ("EulerAncestralDiscreteScheduler", {}, FEWSTEP, (3, 2)),
    "LCM": ("LCMScheduler", {}, {}, (1.2, 1.2)),
    "LCM, fewstep's noise": ("LCMScheduler", {}, FEWSTEP, (3, 2)),
    "DDPM": ("DDPMScheduler", {}, {}, (1.2, 1.2)),
    "DDPM, fewstep's noise": ("DDPMScheduler", {}, FEWSTEP, (4, 3)),
    "2M": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}, (8, 9)),
    "2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, (1.2, 1.2)),
    "2M SDE, fewstep's noise": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, FEWSTEP, (3, 2)),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, {}, (7, 5)),
    "UniPC": ("UniPCMultistepScheduler", {}, {}, (20, 15)),
    "CM": ("CMStochasticIterativeScheduler", {}, {}, (1.2, 1.2)),
    "DDIM inverse": ("DDIMInverseScheduler", {}, {}, (1.2, 1.2)),
    "DEIS": ("DEISMultistepScheduler", {}, {}, (1.2, 1.2)),
    "2M inverse": ("DPMSolverMultistepInverseScheduler", {}, {}, (1.2, 1.2)),
    "DPM-Solver SDE, fewstep's noise": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}, FEWSTEP, (1.2, 1.2)),
    "DPM-Solver singlestep": ("DPMSolverSinglestepScheduler", {}, {}, (1.2, 1.2)),
    "EDM 2M": ("EDMDPMSolverMultistepScheduler", {}, {}, (1.2, 1.2)),
    "EDM Euler": ("EDMEulerScheduler", {}, {}, (1.2, 1.2)),
    "FlowMatch Heun": ("FlowMatchHeunDiscreteScheduler", {}, {}, (1.2, 1.2)),
    "FlowMatch LCM, fewstep's noise": ("FlowMatchLCMScheduler", {}, FEWSTEP, (1.2, 1.2)),
    "Heun": ("HeunDiscreteScheduler", {}, {}, (1.2, 1.2)),
    "iPNDM": ("IPNDMScheduler", {}, {}, (1.2, 1.2)),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, {}, (1.2, 1.2)),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}, (1.2, 1.2)),
    "LMS": ("LMSDiscreteScheduler", {}, {}, (1.2, 1.2)),
    "PNDM": ("PNDMScheduler", {}, {}, (1.2, 1.2)),
    "SA": ("SASolverScheduler", {}, {}, (1.2, 1.2)),
    "TCD": ("TCDScheduler", {}, {}, (1.2, 1.2)),
}
SHAPES = [(1, 4, 64, 64), (1, 16, 128, 128)]
SIXTEEN_BITS = ("FlowMatch Euler", "Euler", "LCM", "DDPM", "2M", "DDIM", "UniPC")

VIDEO = (1, 4, 4, 32, 32)


def with_earlier_prediction(scheduler, raw, k, x, earlier, drawn):
    """A step as CogVideoX's pipelines make it. earlier: what the last step returned."""
    times = scheduler.timesteps
    back = times[k - 1] if k else None
    return scheduler.step(raw, earlier and earlier[1], times[k], back, x, return_dict=False, **drawn)


def to_the_next(scheduler, raw, k, x, earlier, drawn):
    """A step as unCLIP's pipelines make it: told where it ends."""
    times = scheduler.timesteps
    after = times[k + 1] if k + 1 < len(times) else None
    return scheduler.step(raw, times[k], x, prev_timestep=after, return_dict=False, **drawn)


def at_each_sample(scheduler, raw, k, x, earlier, drawn):
    """A step as Wuerstchen's pipelines make it: a time for each sample."""
    return scheduler.step(raw, scheduler.timesteps[k].expand(len(x)), x, return_dict=False, **drawn)


# Schedulers of single models: the scheduler, and what its pipelines do differently: its configuration, the number of
# steps, the shape, more arguments of set_timesteps, timesteps at the end from which none steps, another call of `step`.
SINGLE = {
    "CogVideoX DDIM": ("CogVideoXDDIMScheduler", {"shape": VIDEO}),
    "CogVideoX DPM": ("CogVideoXDPMScheduler", {"shape": VIDEO, "call": with_earlier_prediction}),
    "consistency decoder": ("ConsistencyDecoderScheduler", {"steps": 2}),
    "cosine DPM-Solver": ("CosineDPMSolverMultistepScheduler", {}),
    "DDIM parallel": ("DDIMParallelScheduler", {}),
    "DDPM parallel": ("DDPMParallelScheduler", {}),
    "DDPM Wuerstchen": ("DDPMWuerstchenScheduler", {"beyond": 1, "call": at_each_sample}),
    "FlowMap Euler": ("FlowMapEulerDiscreteScheduler", {}),
    "Helios (UniPC)": ("HeliosScheduler", {"shape": VIDEO, "setting": {"stage_index": 1}}),
    "LTX Euler ancestral": ("LTXEulerAncestralRFScheduler", {}),
    "MiniMax H3": ("MiniMaxH3Scheduler", {}),
    "SCM": ("SCMScheduler", {"beyond": 1, "setting": {"intermediate_timesteps": None}}),
    "unCLIP, with `prev_timestep`": (
        "UnCLIPScheduler",
        {"config": {"beta_schedule": "squaredcos_cap_v2"}, "call": to_the_next},
    ),
}
# These draw nothing, and take no `noise`.
NOISELESS = {"CogVideoX DDIM", "DDIM parallel", "FlowMap Euler", "Helios (UniPC)", "MiniMax H3"}
# A run of the parent takes a third of a second and more.
SLOW = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
ROUNDING = {"SASolverScheduler": 2e-4, "KDPM2AncestralDiscreteScheduler": 1e-4, "DPMSolverSDEScheduler": 1e-4}


def make(library, kind, config, options):
    """A scheduler, and a run of it: `run()` returns the last sample of the given noise."""
    known = inspect.signature(getattr(library, kind).__init__).parameters
    betas = {name: value for name, value in SCHEDULE.items() if name in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own deprecations
        return getattr(library, kind)(**{**betas, **config, **options})


def timed(name, kind, config, options, shape, steps, times=None, beyond=0, call=None, dtype="float32"):
    """Microseconds of a run of the twin and of its parent, after both have ended at the same sample."""
    import torch
    from diffusers import schedulers

    from fewstep.bindings import diffusers as twins

    raw, x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    parent = getattr(schedulers, kind)
    drawn = {"generator": torch.Generator()} if "generator" in inspect.signature(parent.step).parameters else {}
    scales = hasattr(parent, "scale_model_input")

    def runner(scheduler):
        def run():
            sample, result = x, None
            with torch.no_grad():
                scheduler.set_timesteps(steps, **(times or {}))
                for k, t in enumerate(scheduler.timesteps):
                    if k == len(scheduler.timesteps) - beyond:
                        break
                    if scales:
                        scheduler.scale_model_input(sample, t)
                    if call is None:
                        result = scheduler.step(raw, t, sample, return_dict=False, **drawn)
                    else:
                        result = call(scheduler, raw, k, sample, result, drawn)
                    sample = result[0]
            return sample

        return run

    ends = []
    for library in (twins, schedulers):
        for generator in drawn.values():
            generator.manual_seed(0)
        ends.append(runner(make(library, kind, config, {}))().double().numpy())
    # Of 16 bits diffusers rounds each operation.
    rounding = ROUNDING.get(kind, 1e-5) if dtype == "float32" else steps * torch.finfo(x.dtype).eps
    close(f"{name} and diffusers", *ends, rounding)
    sides = [
        Side(library.__name__, runner(make(library, kind, config, options if library is twins else {})))
        for library in (twins, schedulers)
    ]
    repeats = 2 if kind in SLOW else REPEATS
    ours, theirs = (1e6 * statistics.median(s) for s in interleaved(sides, repeats, clock(1)))
    return ours, theirs, sides[0].run


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")  # torchsde's, of what it has rounded itself
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_run_of_a_drop_in(name, shape, benchmark, report, one_thread):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    kind, config, options, budgets = CASES[name]
    steps = FEW if "LCM" in name or name == "TCD" else STEPS
    times = {"mu": 0.8} if config.get("use_dynamic_shifting") else {}
    a, b, run = timed(name, kind, config, options, shape, steps, times)
    budget = (">=", budgets[SHAPES.index(shape)])
    report(f"drop-in {name} {'x'.join(map(str, shape))}", a, b, b / a, budget, f"us/run of {steps}")
    benchmark.pedantic(run, rounds=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_run_of_a_drop_in_in_sixteen_bits(name, dtype, shape, benchmark, report, one_thread):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    kind, config, options, _ = CASES[name]
    steps = FEW if "LCM" in name else STEPS
    a, b, run = timed(name, kind, config, options, shape, steps, dtype=dtype)
    report(f"sixteen-bit {name}, {dtype} {'x'.join(map(str, shape))}", a, b, b / a, (">=", 1.2), f"us/run of {steps}")
    benchmark.pedantic(run, rounds=2)


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
@pytest.mark.parametrize("name", SINGLE)
def test_run_of_a_drop_in_for_a_single_model(name, benchmark, report, one_thread):
    """The cosine solver's twin gains only by fewstep's noise: `accelerate` leaves it alone without."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    kind, how = SINGLE[name]
    if not hasattr(diffusers.schedulers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    shape, steps = how.get("shape", SHAPES[0]), how.get("steps", STEPS)
    rest = (shape, steps, how.get("setting"), how.get("beyond", 0), how.get("call"))
    config = how.get("config", {})
    a, b, run = timed(name, kind, config, {}, *rest)
    budget = None if name == "cosine DPM-Solver" else (">=", 1.2)
    report(f"single-model {name}", a, b, b / a, budget, f"us/run of {steps}")
    if name not in NOISELESS:
        a, b, _ = timed(name, kind, config, FEWSTEP, *rest)
        report(f"single-model {name}, fewstep's noise", a, b, b / a, (">=", 1.2), f"us/run of {steps}")
    benchmark.pedantic(run, rounds=2)
