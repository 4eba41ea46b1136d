"""Runs of a diffusers scheduler and of its fused twin, for the tests of the twins."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch

from fewstep.bindings import diffusers as twins
from fewstep.bindings.diffusers.noise import Streams
from fewstep.bindings.diffusers.probe import places
from fewstep.bindings.diffusers.update import Bound, Update

SHAPE = (2, 3, 4, 4)

# Relative to the largest element so far: both round in float32, but in different orders.
ROUNDING = 2e-5
# The parent's float32 run differs that much from its float64 run: terms cancel.
OWN_ROUNDING = {
    "SASolverScheduler": 2e-4,
    "DPMSolverMultistepInverseScheduler": 1e-4,
    "KDPM2AncestralDiscreteScheduler": 1e-4,  # sigmas of 20000 under cosine betas
}
# In float64 these compute in float32 regardless; all others agree to the last digits.
UPCASTS = {
    "DPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosScheduler",
    "LTXEulerAncestralRFScheduler",
    "SCMScheduler",  # its noise
}


# Schedulers of single models, with what their pipelines pass: the only number of steps, other arguments of
# set_timesteps, the shape of a sample, the timesteps that are stepped from, the time that a step is given.
SHAPE_5D = (1, 2, 2, 3, 3)


def _with_earlier_prediction(
    scheduler: Any, raw: torch.Tensor, k: int, x: torch.Tensor, earlier: Any, options: Any
) -> Any:
    """A step as CogVideoX's pipelines make it. earlier: the result of the last."""
    times = scheduler.timesteps
    back = times[k - 1] if k > 0 else None
    return scheduler.step(raw, None if earlier is None else earlier[1], times[k], back, x, **options)


SPECIAL: dict[str, dict[str, Any]] = {
    "CogVideoXDDIMScheduler": {"shape": SHAPE_5D},
    "CogVideoXDPMScheduler": {"shape": SHAPE_5D, "call": _with_earlier_prediction},
    "ConsistencyDecoderScheduler": {"steps": 2},
    "CosineDPMSolverMultistepScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMWuerstchenScheduler": {"stop": -1, "at": lambda t, x: t.expand(len(x))},
    "FlowMapEulerDiscreteScheduler": {},
    "HeliosScheduler": {"setting": {"stage_index": 1}, "shape": SHAPE_5D},
    "LTXEulerAncestralRFScheduler": {},
    "MiniMaxH3Scheduler": {},
    "SCMScheduler": {"setting": {"intermediate_timesteps": None}, "stop": -1},
    "UnCLIPScheduler": {},
}
# Older releases lack some.
PRESENT = [name for name in twins.SCHEDULERS if hasattr(diffusers.schedulers, name)]
GENERAL = [name for name in PRESENT if name not in SPECIAL]


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """The parent and its twin under one configuration."""
    if name == "DPMSolverSDEScheduler":
        config = {"noise_sampler_seed": 0, **config}  # its Brownian path takes no generator
    return make(diffusers, name, **config), make(twins, name, **config)


def make(library: Any, name: str, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own deprecations
        return getattr(library if library is twins else diffusers.schedulers, name)(**config)


@contextlib.contextmanager
def only_fused(name: str) -> Iterator[None]:
    """Fails if a twin falls back on its parent's step."""
    twin = getattr(twins, name)
    parent = twin.__bases__[1]
    step = parent.step

    def guard(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(self, twin), f"{name} fell back on its parent's step"
        return step(self, *args, **kwargs)

    own = "step" in vars(parent)
    parent.step = guard
    try:
        yield
    finally:
        if own:
            parent.step = step
        else:
            del parent.step


@contextlib.contextmanager
def updated_by(update: Callable[..., list[torch.Tensor]]) -> Iterator[None]:
    """Another way to update on the CPU: `update(self, x, raw, z, memory)`, one of the twins of `Update._fused`."""
    fused, bound = Update._fused, Bound.run

    def unbound(self: Bound, x: torch.Tensor, raw: torch.Tensor, z: Any, memory: Any, _: Any) -> list[torch.Tensor]:
        return self.update.run(x, raw, z.draw(x.shape) if isinstance(z, Streams) else z, memory)

    Update._fused = update  # type: ignore[method-assign]
    Bound.run = unbound  # type: ignore[method-assign]
    try:
        yield
    finally:
        Update._fused, Bound.run = fused, bound  # type: ignore[method-assign]


def without_compiler() -> contextlib.AbstractContextManager[None]:
    """The naive update instead of the Numba kernel, which would be compiled for every structure."""
    return updated_by(Update._naive)


def same_bits(name: str, config: dict[str, Any], steps: int, dtype: torch.dtype) -> None:
    """The operator's update, as on a GPU, equals the naive one bit for bit: the same terms in the same order."""
    ends = []
    for update in (Update._naive, Update._operator):
        with updated_by(update):
            ends.append(run(make(twins, name, **config), steps, dtype=dtype))
    (naive, drawn), (found, drawn_too) = ends
    assert torch.equal(drawn, drawn_too)
    for a, b in zip(naive, found, strict=True):
        assert list(a) == list(b)
        for field, value in a.items():
            assert b[field].dtype == value.dtype
            assert torch.equal(b[field], value), field


def run(
    scheduler: Any,
    steps: int = 7,
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] | None = None,
    start: int = 0,
    setting: dict[str, Any] | None = None,
    begin_index: bool = False,
    **options: Any,
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Every output of a run with a fixed sequence of network outputs, and the generator's state at the end."""
    special = SPECIAL.get(type(scheduler).__name__, {})
    shape = special.get("shape", SHAPE) if shape is None else shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if setting is None:
            scheduler.set_timesteps(special.get("steps", steps), **special.get("setting", {}))
        else:
            scheduler.set_timesteps(**setting)
    network = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(2)
    torch.manual_seed(3)  # FlowMatch Euler drew from the global generator in diffusers 0.35
    if "generator" in inspect.signature(scheduler.step).parameters:
        options.setdefault("generator", noise)
    x = (torch.randn(shape, generator=network) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    times = scheduler.timesteps[start * getattr(scheduler, "order", 1) : special.get("stop")]
    if begin_index and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    outputs: list[dict[str, torch.Tensor]] = []
    result: Any = None
    for k, t in enumerate(times):
        if hasattr(scheduler, "scale_model_input"):
            x_in = scheduler.scale_model_input(x, t)
            assert x_in.dtype == dtype
        else:
            x_in = x
        wide = x_in.to(torch.promote_types(dtype, torch.float32))
        raw = (0.1 * wide.clamp(-3.0, 3.0) + torch.randn(shape, generator=network)).to(dtype)
        if "call" in special:
            result = special["call"](scheduler, raw, start + k, x, result, options)
        else:
            result = scheduler.step(raw, special["at"](t, x) if "at" in special else t, x, **options)
        named = {f"{i}": v for i, v in enumerate(result)} if type(result) is tuple else dict(result)
        named = {
            name: v if isinstance(v, torch.Tensor) else torch.tensor(-1 if v is None else v)
            for name, v in named.items()
        }
        outputs.append({"sample": x, "model_input": x_in, **named})
        x = result[0].to(dtype)
    return outputs, noise.get_state()


def compare(name: str, parent: Any, twin: Any, *args: Any, fused: bool = True, **kwargs: Any) -> None:
    """Both make the same run, or raise the same error."""
    try:
        expected, drawn = run(parent, *args, **kwargs)
    except Exception as error:  # the twin raises the parent's error for these options
        with pytest.raises(type(error), match=re.escape(str(error))):
            run(twin, *args, **kwargs)
        return
    finite = all(v.isfinite().all() for outputs in expected for v in outputs.values())
    with only_fused(name) if fused and finite else contextlib.nullcontext():
        found, drawn_too = run(twin, *args, **kwargs)
    assert torch.equal(drawn, drawn_too), "another number of draws"
    assert_same_state(name, parent, twin)
    dtype = kwargs.get("dtype", torch.float32)
    where = difference(name, expected, found, dtype)
    if where is not None:
        # The parent's float32 rounding can be the larger error: then its float64 run is the reference.
        deterministic = torch.equal(drawn, torch.Generator().manual_seed(2).get_state())
        assert dtype == torch.float32, where
        assert deterministic, where
        exact, _ = run(parent, *args, **{**kwargs, "dtype": torch.float64})
        for a, b, c in zip(expected, found, exact, strict=True):
            for field, value in c.items():
                ours, theirs = (float((x[field] - value).abs().max()) for x in (b, a))
                assert ours <= theirs + ROUNDING * float(value.abs().max()), (where, field)


def tolerance(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64 and name not in UPCASTS:
        return 1e-11
    return OWN_ROUNDING.get(name, ROUNDING)


def difference(name: str, expected: Any, found: Any, dtype: torch.dtype) -> tuple[int, str, float] | None:
    """Where two runs differ by more than rounding: the step, the output and by how much of the largest element."""
    scale = 1e-30
    for k, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert list(a) == list(b)
        for field, value in a.items():
            assert b[field].dtype == value.dtype, (k, field)
            assert b[field].shape == value.shape, (k, field)
            if not value.isfinite().all():
                assert not b[field].isfinite().all(), (k, field)
                return None  # the parent's values are meaningless from here on
            scale = max(scale, float(value.abs().max()))
            error = float((value.double() - b[field].double()).abs().max()) / scale
            if not error <= tolerance(name, dtype):
                return k, field, error
    return None


def assert_same_state(name: str, parent: Any, twin: Any) -> None:
    """The twin's attributes are the parent's, so that the parent's step can continue the run."""
    ours = {n: v for n, v in vars(twin).items() if n not in ("_cursor", "earlier")}  # CogVideoX DPM's argument
    assert places(vars(parent)) == places(ours)
    for attribute, value in vars(parent).items():
        if isinstance(value, (bool, int, float, str)):
            assert ours[attribute] == value, attribute
        elif isinstance(value, torch.Tensor) and value.ndim < 2:
            torch.testing.assert_close(ours[attribute], value, rtol=0.0, atol=0.0, equal_nan=True)
