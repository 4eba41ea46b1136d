"""Odd arguments and what may come of them, for test_fuzz.py.

`TARGETS` lists the public callables with a valid base call each; their parameters are read from their signatures.
`attempt` replaces one or two arguments of the base call. The oracle: a finite result of the right kind, or one
ValueError, TypeError or ImportError that names a replaced argument, before the model is called.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.maps import from_edm, from_k_diffusion
from fewstep.solvers.plans.registry import get_solver
from fewstep.solvers.schedule.spacings import SPACINGS

LONG = os.environ.get("FUZZ") == "long"
_SHARED = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("fuzz-short", derandomize=True, database=None, **_SHARED)
settings.register_profile("fuzz-long", **_SHARED)
PROFILE = settings.get_profile("fuzz-long" if LONG else "fuzz-short")


def examples(short: int, long: int) -> settings:
    """The settings of a test, by the profile."""
    return settings(PROFILE, max_examples=long if LONG else short)


# --- the model ---


class CalledError(Exception):
    """Raised by a model that is too slow to be run: the arguments were accepted."""


class Model:
    """x0 is bounded, so that a result is finite. Counts its calls."""

    def __init__(self, limit: int = 3000, runs: bool = True) -> None:
        self.calls, self.limit, self.runs = 0, limit, runs

    def __call__(self, x: Any, t: Any, **cond: Any) -> Any:
        self.calls += 1
        if not self.runs:
            raise CalledError
        assert self.calls <= self.limit, f"the model was called more than {self.limit} times"
        return 0.5 * x / (1.0 + x * x)


MODEL, SLOW = Model(), Model(runs=False)
VP, FLOW, EDM = fs.VP.linear(), fs.Flow(), fs.EDM()
GRID = fs.grid(VP, 3)
PLAN = fs.plan("euler", GRID)
DENOISER = fs.Denoiser(MODEL, VP)
TUNED = fs.Denoiser(SLOW, VP)
LATENT = np.linspace(-2.0, 2.0, 6, dtype=np.float32).reshape(2, 3)
FOLDER = Path(tempfile.mkdtemp(prefix="fewstep-fuzz-"))
fs.save_plan(PLAN, FOLDER / "plan.json")


# --- odd values ---


class Odd:
    """An object that is nothing of what a parameter takes."""

    def __repr__(self) -> str:
        return "Odd()"


NUMBERS = [
    *(0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400),
    *(math.nan, math.inf, -math.inf, -0.0, 0.0, 0.5, -0.5, 1.0, 1.5, 1e-320, 1e-30, 1e300, 2.0**-1074, 3 + 0j),
    *(True, False),
    *(np.float32(0.5), np.float64(math.nan), np.int64(2), np.int8(-1), np.bool_(True), np.float16(math.inf)),
]
TEXTS = ["", " ", "auto", "karras", "numba", "float32", "0", "-1", "nan", "\0", "é\u202e", "x" * 300, b"", b"\1\2"]
ARRAYS = [
    np.zeros(()),
    np.zeros(0),
    np.zeros(3),
    np.ones((2, 3)),
    np.full((2, 3), math.inf, np.float32),
    np.zeros((2, 3), np.float16),
    np.zeros((2, 3), np.complex64),
    np.zeros((2, 3), bool),
    np.zeros((2, 3), "U1"),
    np.zeros((2, 3), object),
    np.zeros((3, 2), np.float32).T,
    np.zeros((2, 6), np.float32)[:, ::2],
    np.ma.masked_array(np.zeros((2, 3), np.float32), True),
    np.array([3.0, 2.0, 1.0]),
    np.array([1.0, math.nan, 0.0]),
]
OBJECTS = [
    *(None, ..., NotImplemented, Odd(), Odd, int, object(), {}, {1: 2}, {"c": np.zeros(3)}, {"c": Odd()}),
    *([], (), [None], [[]], [0.0, 1.0], (1.0, 0.0), (3, -1), (2, 2.5), (True, 3), [1, 2, 3], ["a"], {1, 2}),
    *(range(3), iter(()), fs.Flow(2.0), PLAN, GRID, DENOISER, fs.CFG(2.0), fs.APG(2.0), fs.DynamicThreshold()),
]
VALUES: list[Any] = [*NUMBERS, *TEXTS, *ARRAYS, *OBJECTS]
odd_values = st.one_of(
    st.sampled_from(VALUES),
    st.sampled_from(NUMBERS),
    st.floats() if LONG else st.nothing(),
    st.integers(-(2**70), 2**70) if LONG else st.nothing(),
    st.text(max_size=6) if LONG else st.nothing(),
)


# --- targets ---


@dataclass(frozen=True)
class Target:
    """A callable and a valid call of it.

    name     of the public name, then "/" and the variant
    call     takes the arguments by name
    base     the valid call's arguments
    odd      the parameters to replace
    check    raises AssertionError unless the result is right
    aliases  other words that name a parameter in a message
    """

    name: str
    call: Callable[..., Any]
    base: Mapping[str, Any]
    odd: tuple[str, ...]
    check: Callable[[Any], None]
    aliases: Mapping[str, str] = field(default_factory=dict)


TARGETS: list[Target] = []


def target(
    name: str,
    call: Callable[..., Any],
    base: Mapping[str, Any],
    check: Callable[[Any], None],
    *,
    of: Callable[..., Any] | None = None,
    more: Mapping[str, Any] | None = None,
    skip: tuple[str, ...] = (),
    **aliases: str,
) -> None:
    """Add a target. of: whose signature `call` has. more: options outside of the signature. skip: parameters."""
    parameters = inspect.signature(of or call).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [p.name for p in parameters if p.kind not in kinds and p.name not in (*skip, "self")]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names.append("no_such_option")
    TARGETS.append(Target(name, call, dict(base), (*names, *(more or ())), check, aliases))


def finite(*arrays: Any) -> None:
    for array in arrays:
        assert np.isfinite(np.asarray(array, np.float64)).all(), f"not finite: {array!r}"


def is_grid(grid: Any) -> None:
    assert isinstance(grid, fs.Grid)
    assert grid.steps >= 1
    finite(grid.t, grid.alpha, grid.sigma)


def is_process(process: Any) -> None:
    for t in (process.t_first, process.t_last):
        finite(*process.point(t))
    assert 0.0 < process.sigma_min < process.sigma_max < math.inf


def is_plan(plan: Any) -> None:
    assert isinstance(plan, fs.Plan)
    for stage in plan.stages:
        for row in stage.rows.values():
            finite(list(row.values()))


def is_sample(x: Any) -> None:
    assert tuple(x.shape) in ((2, 3), (3, 2)) or x.shape[0] in (1, 2, 3)
    finite(x)


def anything(result: Any) -> None:
    """The call's result is not looked into."""


target("VP", fs.VP, {"alphas_cumprod": VP.alphas_cumprod}, is_process)
for make in (fs.VP.linear, fs.VP.scaled_linear, fs.VP.cosine):
    target(f"VP/{make.__name__}", make, {}, is_process, max_beta="max_beta|alphas_cumprod", s="s|alphas_cumprod")
target("VE", fs.VE, {"sigma_min": 0.01, "sigma_max": 50.0}, is_process)
target("EDM", fs.EDM, {}, is_process)
target("Flow", fs.Flow, {}, is_process)
target("Flow/dynamic", fs.Flow.dynamic, {"mu": 0.7}, is_process, mu="mu|shift")
target("Flow/mu_of", fs.Flow.mu_of, {"image_seq_len": 1024}, finite)

for spacing, (_, rule, _) in SPACINGS.items():
    for process in (VP, FLOW, EDM):
        own = dict.fromkeys(list(inspect.signature(rule).parameters)[1:])
        target(
            f"grid/{spacing}",
            fs.grid,
            {"process": process, "steps": 4, "spacing": spacing} | ({"variant": "sd15"} if spacing == "ays" else {}),
            is_grid,
            more=own,
            round_times="round_times|coordinates|shape",
        )
target("Grid", fs.Grid, {"process": VP, "t": GRID.t, "alpha": GRID.alpha, "sigma": GRID.sigma}, is_grid)
target("Grid/from_sigmas", fs.Grid.from_sigmas, {"process": VP, "ratios": [3.0, 1.0, 0.0]}, is_grid, ratios="ratios?")
target("Grid/from_times", fs.Grid.from_times, {"process": VP, "t": [90.0, 50.0, -1.0]}, is_grid,
       process="process|t")  # fmt: skip
target("Grid/tail", GRID.tail, {"start": 0.5}, is_grid)
target("Grid/split", GRID.split, {"step": 1}, lambda pair: [is_grid(one) for one in pair] and None)
target("Grid/extend", GRID.extend, {"steps": 2}, is_grid)
target("Grid/flip", GRID.flip, {}, is_grid)

for name in fs.list_solvers():
    options = get_solver(name).options
    target(f"plan/{name}", fs.plan, {"solver": name, "grid": fs.grid(EDM, 4)}, is_plan, more=options)


def denoise(**arguments: Any) -> Any:
    return fs.sample(fs.Denoiser(**arguments), LATENT, solver="euler", steps=2, seed=0, backend="naive")


def guide(make: Callable[..., Any], key: str, **arguments: Any) -> Any:
    denoiser = fs.Denoiser(MODEL, VP, **{key: make(**arguments)})
    return fs.sample(denoiser, LATENT, solver="euler", steps=2, seed=0, cond=({}, {}), backend="naive")


def sample(denoiser: Any, **arguments: Any) -> Any:
    return fs.sample(denoiser, **arguments)


def adaptive(denoiser: Any, **arguments: Any) -> Any:
    return fs.sample_adaptive(denoiser, **arguments)


def call_sampler(**arguments: Any) -> Any:
    return fs.Sampler(DENOISER, PLAN, (2, 3), backend="naive")(**arguments)


def make_sampler(**arguments: Any) -> Any:
    return fs.Sampler(**arguments)(seed=0)


def likelihood(denoiser: Any, x: Any, **arguments: Any) -> Any:
    return fs.log_likelihood(denoiser, x, **arguments)


def sharded(**arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return fs.sample_sharded(folder=folder, **arguments)


def mixed(**arguments: Any) -> Any:
    run = fs.MixedRun(**arguments)
    run.admit(0, PLAN, seed=0)
    while not run.done(0):
        run.step()
    return run.result(0)


def admit(**arguments: Any) -> Any:
    run = fs.MixedRun(DENOISER, [PLAN], (2, 3), backend="naive", previews=True)
    run.admit(**arguments)
    while not run.done(arguments["place"]):
        run.step()
    return run.result(arguments["place"])


def engine(**arguments: Any) -> Any:
    with fs.Engine(**arguments) as made:
        return made.submit(PLAN, seed=0).result(60.0)


def submit(**arguments: Any) -> Any:
    with fs.Engine(DENOISER, (2, 3), [PLAN], backend="naive", previews=True) as made:
        return made.submit(**arguments).result(60.0)


def asubmit(**arguments: Any) -> Any:
    with fs.Engine(DENOISER, (2, 3), [PLAN], backend="naive", previews=True) as made:
        return asyncio.run(made.asubmit(**arguments))


def is_row(x: Any) -> None:
    assert x.ndim >= 1
    finite(x)


target("Denoiser", denoise, {"model": MODEL, "process": VP}, is_sample, of=fs.Denoiser, predicts="predict(s|ion)",
       null="null|cond|branches", dtype="dtype", guidance="guidance|branches")  # fmt: skip
target("CFG", partial(guide, fs.CFG, "guidance"), {"scale": 2.0}, is_sample, of=fs.CFG, scale="scale|guidance|branches")
target("APG", partial(guide, fs.APG, "guidance"), {"scale": 2.0}, is_sample, of=fs.APG, scale="scale|guidance")
target(
    "CFGZero", partial(guide, fs.CFGZero, "guidance"), {"scale": 2.0}, is_sample, of=fs.CFGZero, scale="scale|guidance"
)
target("AutoGuidance", partial(guide, fs.AutoGuidance, "guidance"), {"guide": MODEL, "scale": 2.0}, is_sample,
       of=fs.AutoGuidance, scale="scale|guidance")  # fmt: skip
target("Branches", partial(guide, fs.Branches, "guidance"), {"weights": (-1.0, 2.0)}, is_sample, of=fs.Branches,
       weights="weights|guidance|branches")  # fmt: skip
target("DynamicThreshold", partial(guide, fs.DynamicThreshold, "clip"), {}, is_sample, of=fs.DynamicThreshold)
_RUN = {"x": "x|latent|shape", "grid": "grid|process", "solver": "solver", "denoiser": "denoiser|cond"}
_CALL: dict[str, Any] = {"denoiser": DENOISER, "solver": "euler", "steps": 3, "seed": 0, "backend": "naive"}
target("sample/x", sample, {**_CALL, "x": LATENT}, is_sample, of=fs.sample, **_RUN)
target("sample/shape", sample, {**_CALL, "shape": (2, 3)}, is_sample, of=fs.sample, **_RUN)
target("sample/options", sample, {**_CALL, "x": LATENT, "solver": "dpmpp_2m_sde"}, is_sample,
       of=fs.sample, more=get_solver("dpmpp_2m_sde").options, **_RUN)  # fmt: skip
target("Sampler", make_sampler, {"denoiser": DENOISER, "plan": PLAN, "shape": (2, 3), "backend": "naive"}, is_sample,
       of=fs.Sampler, **_RUN)  # fmt: skip
target(
    "Sampler/call", call_sampler, {"x": LATENT, "seed": 0}, is_sample, of=fs.Sampler.__call__, skip=("first",), **_RUN
)
target("sample_adaptive", adaptive, {"denoiser": DENOISER, "x": LATENT, "seed": 0, "backend": "naive",
       "sigma_max": 2.0, "sigma_min": 0.1}, lambda r: is_sample(r.x), of=fs.sample_adaptive,
       **_RUN, sigma_min="sigma_min|ratios?", sigma_max="sigma_max|ratios?")  # fmt: skip
target("sample_sharded", sharded, {"denoiser": TUNED, "plan": PLAN, "shape": (2, 3), "n": 3, "backend": "naive"},
       anything, of=fs.sample_sharded, skip=("folder",), plan="plan", cond="cond|samples", **_RUN)  # fmt: skip
target("log_likelihood", likelihood, {"denoiser": DENOISER, "x": LATENT, "device": "cpu", "solver": "euler", "steps": 3,
       "seed": 0}, lambda r: finite(r.log_prob, r.latent), of=fs.log_likelihood, **_RUN, rtol="rtol|atol",
       atol="rtol|atol")  # fmt: skip
POLICY = fs.plan("flow_cps", GRID)
target("rollout", fs.rollout, {"denoiser": DENOISER, "plan": POLICY, "shape": (2, 3), "seed": 0, "backend": "naive"},
       lambda r: is_sample(r.x), of=fs.rollout, **_RUN)  # fmt: skip
target("sample/log_prob", sample, {**_CALL, "shape": (2, 3), "solver": "flow_cps", "log_prob": True},
       lambda r: is_sample(r if hasattr(r, "shape") else r.x), of=fs.sample, **_RUN)  # fmt: skip
target("log_prob", fs.log_prob, {"denoiser": DENOISER, "plan": POLICY, "states": [LATENT] * 4},
       lambda r: finite(r.log_prob), states="states", **_RUN)  # fmt: skip
target("MixedRun", mixed, {"denoiser": DENOISER, "plans": [PLAN], "shape": (2, 3), "backend": "naive"}, is_row,
       of=fs.MixedRun, plans="plans?", denoiser="denoiser")  # fmt: skip
target("MixedRun/admit", admit, {"place": 0, "plan": PLAN, "seed": 0}, is_row, of=fs.MixedRun.admit, x="x|latent",
       sample="sample|first_sample")  # fmt: skip


def edited(make: Callable[..., Any], *, both: bool = True, **arguments: Any) -> Any:
    edit = make(**arguments)
    return fs.sample(DENOISER, LATENT, solver="euler", steps=2, seed=0, edit=edit if both else None, edit_x0=edit,
                     backend="naive")  # fmt: skip


def molecule(**arguments: Any) -> Any:
    edit = fs.edits.RigidAugment(**arguments)
    return fs.sample(
        DENOISER, shape=(2, 3, 3), solver="euler", steps=2, seed=0, edit=edit, edit_x0=edit, backend="naive"
    )


target("edits/Inpaint", partial(edited, fs.edits.Inpaint), {"mask": np.zeros((1, 3)), "image": LATENT}, is_sample,
       of=fs.edits.Inpaint)  # fmt: skip
target("edits/Prefix", partial(edited, fs.edits.Prefix), {"actions": LATENT[:, :2], "delay": 1}, is_sample,
       of=fs.edits.Prefix)  # fmt: skip
target("edits/RigidAugment", molecule, {"mask": np.ones(3)}, is_sample, of=fs.edits.RigidAugment)
target("edits/Clamp", partial(edited, fs.edits.Clamp), {}, is_sample, of=fs.edits.Clamp)
target("edits/DynamicThreshold", partial(edited, fs.edits.DynamicThreshold, both=False), {}, is_sample,
       of=fs.edits.DynamicThreshold)  # fmt: skip
target("edits/resampled", fs.edits.resampled, {"plan": PLAN, "times": 2}, is_plan, of=fs.edits.resampled)
_REQUEST = {"plan": PLAN, "seed": 0}
target("Engine", engine, {"denoiser": DENOISER, "shape": (2, 3), "plans": [PLAN], "backend": "naive"}, is_row,
       of=fs.Engine, plans="plans?", denoiser="denoiser")  # fmt: skip
target("Engine/submit", submit, _REQUEST, is_row, of=fs.Engine.submit, x="x|latent", sample="sample|first_sample",
       deadline="deadline")  # fmt: skip
target("Engine/asubmit", asubmit, _REQUEST, is_row, of=fs.Engine.asubmit, x="x|latent", sample="sample|first_sample")
_TOKENS = {"denoiser": DENOISER, "plan": PLAN, "shape": (2, 2, 3), "seed": 0, "backend": "naive"}
target("sample_levels", fs.sample_levels, _TOKENS, is_row, known="known|levels", **_RUN)
target("rolling", lambda **given: [*islice(fs.rolling(**given), 3)][-1], _TOKENS, is_row, of=fs.rolling,
       context="context|window|frames|offset", **_RUN)  # fmt: skip
target("levels/uniform", fs.levels.uniform, {"steps": 3, "tokens": 2}, finite)
target("levels/staircase", fs.levels.staircase, {"steps": 3, "tokens": 2}, finite)
target("levels/pyramid", fs.levels.pyramid, {"steps": 3, "tokens": 2}, finite)
target("slerp", fs.slerp, {"a": LATENT, "b": LATENT[::-1].copy(), "weight": 0.3}, is_sample)
target("recommend", fs.recommend, {"nfe": 10}, anything, nfe="nfe|budget|evaluations", denoiser="denoiser|shape")
target("recommend/denoiser", fs.recommend, {"nfe": 10, "denoiser": TUNED, "shape": (3,), "cache": None}, anything,
       nfe="nfe|budget|evaluations")  # fmt: skip
target("tune", fs.tune, {"denoiser": TUNED, "nfe": 6, "shape": (3,), "cache": None, "progress": False}, anything)
target("tune_sde", fs.tune_sde, {"denoiser": TUNED, "nfe": 3, "shape": (3,), "seeds": 64, "cache": None,
       "progress": False}, anything)  # fmt: skip
target("tune_range", fs.tune_range, {"denoiser": fs.Denoiser(SLOW, VP, guidance=2.0), "nfe": 6, "scales": (1.0, 2.0),
       "shape": (3,), "cond": ({}, {}), "cache": None, "progress": False}, anything)  # fmt: skip
target("save_plan", fs.save_plan, {"plan": PLAN, "path": FOLDER / "saved.json"}, anything)
target("load_plan", fs.load_plan, {"path": FOLDER / "plan.json"}, is_plan, path="path|name|file|folder")
target("BrownianTree", lambda **a: fs.BrownianTree(**a)(0, GRID.points[0], GRID.points[1], (2, 3)), {"seed": 0},
       is_sample, of=fs.BrownianTree)  # fmt: skip


def run_mapped(make: Callable[..., fs.Denoiser], **arguments: Any) -> Any:
    denoiser = make(**arguments)
    plan = fs.plan("euler", fs.Grid.from_sigmas(denoiser.process, [2.0, 1.0, 0.5]))
    return fs.Sampler(denoiser, plan, (2, 3), backend="naive")(seed=0)


target("from_edm", partial(run_mapped, from_edm), {"network": MODEL}, is_sample, of=from_edm)
target("from_k_diffusion", partial(run_mapped, from_k_diffusion), {"model": MODEL}, is_sample, of=from_k_diffusion)
target("ConsistencyDenoiser", partial(run_mapped, ConsistencyDenoiser), {"model": MODEL, "process": EDM}, is_sample,
       of=ConsistencyDenoiser, predicts="predict(s|ion)", guidance="guidance|branches")  # fmt: skip


def torch_targets() -> None:
    """The samplers of k-diffusion's names, and the loop as a module, on torch tensors."""
    import torch

    from fewstep.bindings import k_diffusion
    from fewstep.bindings.export.sampler_module import SamplerModule

    class SigmaModel(Model):
        """Calls on torch tensors, with k-diffusion's sigma of each sample."""

        def __call__(self, x: Any, t: Any, **cond: Any) -> Any:
            return super().__call__(x, t)

    model, sigmas = SigmaModel(), torch.tensor([3.0, 1.5, 0.7, 0.0])
    x = 3.0 * torch.from_numpy(LATENT)
    for name in k_diffusion.__all__:
        call = getattr(k_diffusion, name)
        if not name.startswith("sample_") or "cfg" in name:  # these need ComfyUI's models
            continue
        parameters = inspect.signature(call).parameters
        levels = {"sigmas": sigmas} if "sigmas" in parameters else {"sigma_min": 0.1, "sigma_max": 3.0}
        steps = {"n": 4} if "n" in parameters else {}
        # What extra_args holds is the model's.
        target(f"k_diffusion/{name}", call, {"model": model, "x": x, **levels, **steps}, is_torch_sample,
               skip=("extra_args",), x="x|latent|shape|batch", sigmas="sigmas?|level",
               sigma_min="sigma_min|sigma", sigma_max="sigma_max|sigma",
               max_order="order", max_stage="order", predictor_order="order|predictor",
               corrector_order="order|corrector",
               noise_sampler="noise_sampler|noise", solver_type="solver_type|variant", deis_mode="deis_mode|variable",
               r="r1?", r_1="r_?1", r_2="r_?2", ge_gamma="ge_gamma|gamma")  # fmt: skip

    def as_module(x: Any, streams: Any = None, noise: Any = None, **made: Any) -> Any:
        return SamplerModule(**made)(x, streams=streams, noise=noise)

    target("SamplerModule", as_module, {"denoiser": DENOISER, "plan": PLAN, "x": x}, is_torch_sample,
           of=SamplerModule, more=dict.fromkeys(("x", "streams", "noise")))  # fmt: skip


def trainer_targets() -> None:
    import torch

    teacher = fs.Denoiser(torch.nn.Linear(3, 3), EDM, "edm")
    base = {"method": "consistency", "data": torch.zeros(4, 3), "teacher": teacher, "device": "cpu"}
    # Losses are not fuzzed: what networks and data do is test_trainer.py's.
    target("Trainer", fs.Trainer, base, anything, skip=("metrics", "loggers", "held", "network"),
           teacher="teacher|student", student="student(?:'s)?|teacher|process", seed="seed|lr", batch="batch|parts",
           steps="steps|warmup")  # fmt: skip


def is_torch_sample(result: Any) -> None:
    finite((result[0] if isinstance(result, tuple) else result).detach())


if importlib.util.find_spec("torch") is not None:
    torch_targets()
    trainer_targets()


def onnx_targets() -> None:
    """The loop as an ONNX file, of a network that only copies x."""
    from onnx import TensorProto, helper

    from fewstep.bindings.onnx import OnnxModel
    from fewstep.bindings.onnx_loop import save_loop

    sizes = {"x": ["batch", 3], "t": ["batch"], "raw": ["batch", 3]}
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    graph = helper.make_graph([helper.make_node("Tanh", ["x"], ["raw"])], "network", ports[:2], ports[2:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    denoiser = fs.Denoiser(OnnxModel(made.SerializeToString(), threads=1), VP)
    target("save_loop", save_loop, {"denoiser": denoiser, "plan": PLAN, "path": FOLDER / "loop.onnx"}, anything,
           denoiser="denoiser|ONNX network|process")  # fmt: skip


if importlib.util.find_spec("onnx") is not None and importlib.util.find_spec("onnxruntime") is not None:
    onnx_targets()

# Public names without a target, and why.
WITHOUT = {
    "__version__ problems": "no callables",
    "Point AdaptiveResult Likelihood LogProb Rollout Shards StepInfo EditInfo": "records that the package fills",
    "Measured Recommendation PlanRange Sampled Student": "records that the package fills",
    "Plan Stage Start PlanError": "what solvers build; their checks have test_plan_check.py",
    "solver": "a decorator: it would change the table of solvers",
    "list_solvers list_spacings": "no parameters",
    "warmup": "its one parameter is called between compilations; test_cold.py",
    "load_range load_student": "read with the functions of load_plan",
    "Mapped InLibrary": "what the functions below return and read",
    "from_diffusers": "takes a scheduler of diffusers: test_maps.py",
    "audit accelerate restore": "take any pipeline object; test_audit.py, test_diffusers_pipelines.py",
    "tune_pipeline": "takes a pipeline of diffusers; test_tune_pipeline.py",
}


# --- arguments that are not drawn: (target, parameter, which values, why) ---


def _any(value: Any) -> bool:
    return True


KNOWN: list[tuple[str, str, Callable[[Any], bool], str]] = [
    (".*", "callback|noise", lambda v: isinstance(v, type), "a class can be called; what it raises is the caller's"),
    ("Denoiser", "process", _any, "every process fits the class, and not every prediction type: test_errors.py"),
]


def known(name: str, parameter: str, value: Any) -> bool:
    return any(re.fullmatch(n, name) and re.fullmatch(p, parameter) and bad(value) for n, p, bad, _ in KNOWN)


# --- the oracle ---

WIDE = 1e6  # arguments beyond this may give results beyond float32


def attempt(target: Target, odd: Mapping[str, Any]) -> str:
    """Make the call. Returns "right" or the error's type; raises AssertionError for anything else."""
    MODEL.calls = SLOW.calls = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", ".*encountered in")  # NumPy's
            result = target.call(**{**target.base, **odd})
    except (ValueError, TypeError, ImportError) as error:
        if re.search("holds? NaN or inf", str(error)) and any(_wide(value) for value in odd.values()):
            return "right"  # beyond float32, and said so
        names = "|".join(target.aliases.get(name, re.escape(name)) for name in odd)
        if not re.search(rf"(?<![^\W_])({names})(?![^\W_])", str(error)):
            raise AssertionError(f"names none of {names}: {error!r}") from error
        if MODEL.calls + SLOW.calls:
            raise AssertionError(f"after {MODEL.calls + SLOW.calls} calls of the model: {error!r}") from error
        return type(error).__name__
    except CalledError:
        return "right"
    except RuntimeWarning as warning:
        if not any(_wide(value) for value in odd.values()):
            raise AssertionError(f"NumPy warns: {warning!r}") from warning
        return "right"
    except Exception as error:
        if isinstance(error, AssertionError) and "steps" in odd and "more than" in str(error):
            return "right"  # the caller asked for as many
        if isinstance(error, TimeoutError) and "deadline" in odd:
            return "right"  # it was missed
        if isinstance(error, FileNotFoundError) and "path" in odd:
            return "FileNotFoundError"
        if isinstance(error, RuntimeError) and any(f"in {name} = " in str(error) for name in odd):
            return "right"  # the limit that the caller set
        raise AssertionError(f"neither a result nor a ValueError that names the argument: {error!r}") from error
    try:
        target.check(result)
    except AssertionError:
        if not any(_wide(value) for value in odd.values()):
            raise
    except Exception as error:
        raise AssertionError(f"accepted, and the result is of no use: {error!r}") from error
    return "right"


def _wide(value: Any) -> bool:
    try:
        return bool(np.any(np.abs(np.asarray(value, np.complex128)) > WIDE))
    except (TypeError, ValueError, OverflowError):
        return False
