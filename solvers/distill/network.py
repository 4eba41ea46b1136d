"""A denoiser inside an objective: called with gradients on a batch in which each sample has its own point.

The network's inputs and the coefficients of its x0 prediction depend on the points alone and are computed in float64 on
the host, as in sampling.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.solvers.options import one_of
from fewstep.solvers.plans.guidance import Moment
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.denoising import DenoiserLike, NetworkInputs, call_at, inputs_of
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point, Process

D = TypeVar("D", bound=DenoiserLike)
AD: Any = forward_ad  # torch does not type it


def inputs_at(denoiser: DenoiserLike, at: Point) -> NetworkInputs:
    """(B,) of each for a point of arrays (B,).

    Raises ValueError where the denoiser's prediction type says nothing about x0.
    """
    points = np.stack(np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in at)))
    found = np.empty((4, points.shape[1]))
    inputs_of(denoiser, [Point(*points[:, i].tolist()) for i in (0, -1)])(Point(*points), list(found))
    return NetworkInputs(*found)


def points_of(process: Process, times: ArrayLike) -> Point:
    """The points at times (B,), as one point of float64 arrays (B,). Raises ValueError for a time out of range."""
    return process.point(np.atleast_1d(np.asarray(times, dtype=np.float64)))


def spread(values: ArrayLike, like: Tensor) -> Tensor:
    """Numbers per sample, (B,) or one for all, as a tensor that broadcasts with `like` (B, ...), in its dtype."""
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    return torch.tensor(array, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def noised(x0: Tensor, noise: Tensor, at: Point) -> Tensor:
    """alpha x0 + sigma noise, each sample at its own point.

    x0, noise  (B, ...)
    at         points of arrays (B,)
    """
    if x0.shape != noise.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 {tuple(x0.shape)}: they must be the same")
    return spread(at.alpha, x0) * x0 + spread(at.sigma, x0) * noise


def branch_weights(denoiser: DenoiserLike, batch: int, guidance: ArrayLike | None) -> Array:
    """The weight of each branch's output for each sample, (B, branches), null branch first.

    guidance  (B,) or one scale of classifier-free guidance instead of the denoiser's own
    """
    if denoiser.clip is not None or denoiser.reduces or denoiser.by_step is not None:
        raise ValueError(
            "an objective takes no clip and no guidance rescale, whose gradients vanish or couple elements, and no "
            "guidance by steps or by reductions: use a Denoiser without them, and add them when you sample"
        )
    if guidance is None:
        own = denoiser.shares(Moment(denoiser.process.point_at_sigma(1.0), 0.0)).weights
        return np.array(np.broadcast_to(own, (batch, denoiser.branches)))
    if denoiser.branches != 2:
        raise ValueError(
            f"guidance is given for each sample, but the denoiser has {denoiser.branches} branches: it needs "
            "Denoiser(guidance=...) of any scale, so that there are a null and a conditional branch"
        )
    scale = np.broadcast_to(np.asarray(guidance, dtype=np.float64), (batch,))
    return np.stack([1.0 - scale, scale], axis=1)


def raw_outputs(
    denoiser: DenoiserLike, x: Tensor, at: NetworkInputs, branches: tuple[int, ...], cond: Any
) -> list[Tensor]:
    """The network's output for each of `branches`, (B, ...) each, in x's dtype."""
    frame = TorchFrame(x.device)
    call = denoiser.bind(frame, len(x), cond)
    raws, _ = call_at(denoiser, frame, call, x, at, branches, denoiser.model_dtype(frame.dtype_of(x)))
    return [raw.to(x.dtype) for raw in raws]


def predict(
    denoiser: DenoiserLike, x: Tensor, at: Point, cond: Any = None, guidance: ArrayLike | None = None
) -> Tensor:
    """The denoiser's x0 prediction, (B, ...) like x; gradients flow to x, to the network and to the conditions.

    x         (B, ...) float32 or float64, sample i at point i
    at        a point of arrays (B,), see `points_of`
    cond      as for `fewstep.sample`
    guidance  (B,) scales in place of the denoiser's own, see `branch_weights`
    """
    numbers = inputs_at(denoiser, at)
    if len(numbers.t) != len(x):
        raise ValueError(f"at holds {len(numbers.t)} points for a batch of {len(x)}: give one for each sample")
    weights = branch_weights(denoiser, len(x), guidance)
    branches = tuple(int(j) for j in np.flatnonzero(weights.any(axis=0)))
    raws = raw_outputs(denoiser, x, numbers, branches, cond)
    p = np.concatenate([numbers.a[:, None], numbers.b[:, None] * weights[:, list(branches)]], axis=1)
    a, *shares = torch.tensor(p.T, dtype=x.dtype, device=x.device).reshape(-1, len(x), *[1] * (x.ndim - 1))
    x0: Tensor = a * x
    for share, raw in zip(shares, raws, strict=True):
        x0 = x0 + share * raw
    return x0


DERIVATIVES = ("forward", "differences")
"""How a network is differentiated along a direction: by forward-mode derivatives, or by central differences."""


@torch.no_grad()
def derivative_along(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], direction: Sequence[Tensor], derivative: str = "forward"
) -> tuple[Tensor, Tensor]:
    """call(*inputs), and its derivative along `direction`, a tensor for each input.

    derivative  "forward" is exact, but every operator needs a forward-mode derivative, which fused attention lacks;
                "differences" takes any network in float32 or wider: two more calls, and an error of about 1e-4 of the
                derivative in float32. It turns autocast off

    Raises NotImplementedError for an operator without a forward-mode derivative, ValueError for differences in 16 bits.
    """
    one_of("derivative", derivative, DERIVATIVES)
    if derivative == "forward":
        with AD.dual_level():  # and not torch.func.jvp, under which a DistributedDataParallel cannot share its buffers
            try:
                out = call(*(AD.make_dual(x, dx) for x, dx in zip(inputs, direction, strict=True)))
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{error}: pass derivative='differences', or run the network under "
                    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
                ) from error
            value, moved = AD.unpack_dual(out)
        # A network that does not read these inputs has no tangent.
        return value, torch.zeros_like(value) if moved is None else moved
    precision = max(torch.finfo(x.dtype).eps for x in inputs)
    if precision > 1e-6:
        raise ValueError(
            f"derivative='differences' with inputs of {', '.join(str(x.dtype) for x in inputs)}: their rounding hides "
            "the difference; call the network in float32, or take derivative='forward'"
        )
    h = precision ** (1.0 / 3.0)
    with torch.autocast(inputs[0].device.type, enabled=False), same_dropout(inputs[0].device) as again:
        value = call(*inputs)
        ends = []
        for sign in (h, -h):
            with again():
                ends.append(call(*(x + sign * dx for x, dx in zip(inputs, direction, strict=True))))
    return value, (ends[0] - ends[1]) / (2.0 * h)


def with_model(denoiser: D, model: Callable[..., Any]) -> D:
    """The same denoiser around another network of the same kind: a copy, an average, a wrapped module."""
    other = copy.copy(denoiser)
    other.model = model
    return other


def student_of(denoiser: D) -> D:
    """A student that starts as its teacher: the same denoiser around a trainable copy of its module."""
    return with_model(denoiser, copy.deepcopy(denoiser.model).train().requires_grad_(True))


@contextlib.contextmanager
def same_dropout(device: torch.device) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Yields `again()`, a context in which random numbers repeat from the start of this one.

        with same_dropout(x.device) as again:
            prediction = predict(student, x, at)
            with again(), torch.no_grad():
                target = predict(average, y, before)

    So student and target drop the same units (Song et al. 2023, appendix C). Afterwards the generators of the CPU and
    of the device are where the first call left them.
    """
    devices = [device] if device.type == "cuda" else []
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(states[0])
            for one, state in zip(devices, states[1:], strict=True):
                torch.cuda.set_rng_state(state, one)
            yield

    yield again
