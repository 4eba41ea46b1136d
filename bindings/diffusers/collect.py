"""A pipeline's network with its real conditions, as a denoiser.

The pipeline runs once per prompt, for two calls of a plan; where prompts are of several kinds, each kind first runs up
to the network, so that what it lacks shows at once. Hooks keep what its network was called with and what it
returned, and the scheduler keeps what became of that: the guided prediction. Everything else follows from comparing
them: which argument is the sample and which the time (they change from call to call), which rows of a batched call
belong to which branch of guidance, and the scale of guidance. Nothing is assumed of names. The denoiser made from it
must give the recorded predictions again, or the pipeline is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.diffusers import PlanScheduler
from fewstep.bindings.diffusers.pipeline import DENOISERS, _components
from fewstep.bindings.diffusers.plan_scheduler import described
from fewstep.bindings.maps import Mapped, output_of, process_of
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Flow

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec
    from torch.utils.hooks import RemovableHandle

# The relative difference that rounding explains between the pipeline's own prediction and that of the denoiser.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
COARSE = 5e-2

Cond = tuple[Mapping[str, Tensor], ...]


class Called(NamedTuple):
    """One call of the network: its arguments as leaves of their tree, and the output without its wrapper."""

    module: str
    leaves: list[Any]
    spec: TreeSpec
    output: Tensor


class Seen(NamedTuple):
    """One step of the pipeline: the calls of the network, and what the scheduler got of them."""

    calls: list[Called]
    prediction: Tensor
    t: float
    sample: Tensor


@dataclass(frozen=True)
class Collected:
    """A pipeline's network as a denoiser.

    denoiser  with the guidance that the pipeline was seen to use
    cond      its condition: one mapping per branch, the null branch first; arrays with one entry per prompt
    shape     of one latent, without the batch axis
    scale     of guidance; None for one branch
    name      of the network's component; network: the module
    watchers  called with the number of rows after each call of the network
    """

    denoiser: Denoiser
    cond: Cond
    shape: tuple[int, ...]
    scale: float | None
    name: str
    network: torch.nn.Module
    watchers: list[Callable[[int], object]]


def collect(pipe: Any, prompts: Sequence[Mapping[str, Any]]) -> Collected:
    """Run the pipeline on each prompt, for two calls of its network, and make a denoiser of what is seen.

    prompts  the pipeline's arguments, one mapping per prompt, each for one image

    Raises ValueError for a pipeline whose prediction is not a linear combination of one or two branches of one network
    on the latents, such as one with guidance rescale, extra input channels or a ControlNet, and for one that lacks a
    component, such as a tokenizer, that these arguments need.
    """
    components = _components(pipe)
    old = components.get("scheduler")
    if old is None:
        raise ValueError(f"pipe must have a component 'scheduler', {type(pipe).__name__} has {sorted(components)}")
    asked = _asked(pipe)
    process, predicts = process_of(old)
    flow = isinstance(process, Flow)
    times = (1.0, 0.5, 0.0) if flow else (process.t_first, round(0.5 * process.t_first), -1.0)
    plan = make_plan("ddim", Grid.from_times(process, times))
    seen: list[Seen] = []
    calls: list[Called] = []
    recorder = _recording(seen, calls).from_config(described(old), plan=plan)
    networks = {n: m for n in DENOISERS if isinstance(m := components.get(n), torch.nn.Module)}
    training = [n for n, m in networks.items() if m.training]
    if training:
        raise ValueError(
            f"pipe.{training[0]} is in training mode, where it may be random: call pipe.{training[0]}.eval()"
        )
    steps: list[list[Seen]] = []

    def run(given: Mapping[str, Any]) -> None:
        seen.clear()
        calls.clear()
        generator = torch.Generator().manual_seed(len(steps))
        try:
            with torch.no_grad():
                pipe(**{**asked, "generator": generator, **given})
        except (AttributeError, TypeError) as error:
            if not calls and not seen:
                _explain(pipe, components, error)
            raise

    kinds = {frozenset(given): given for given in prompts}  # texts, embeddings
    hooks: list[RemovableHandle] = []
    pipe.scheduler = recorder
    try:
        if networks and len(kinds) > 1:  # what another kind lacks shows before the network runs for the first
            hooks = [m.register_forward_pre_hook(_stop, prepend=True) for m in networks.values()]
            for given in kinds.values():
                with contextlib.suppress(_ReachedError):
                    run(given)
            while hooks:
                hooks.pop().remove()
        hooks = [
            m.register_forward_hook(functools.partial(_note, calls, name), with_kwargs=True)
            for name, m in networks.items()
        ]
        for given in prompts:
            run(given)
            if len(seen) != 2:
                raise ValueError(f"pipe made {len(seen)} scheduler steps in a run of 2 calls: its loop cannot be tuned")
            steps.append(list(seen))
    finally:
        pipe.scheduler = old
        for hook in hooks:
            hook.remove()
    return _made(networks, steps, process, predicts)


class _ReachedError(Exception):
    """A run that only showed whether its arguments lead to the network."""


def _stop(*args: object) -> None:
    raise _ReachedError


def _asked(pipe: Any) -> dict[str, Any]:
    """What every run is asked for, of what the pipeline's call takes.

    Raises ValueError for a pipeline whose runs cannot be cut to two steps of known noise.
    """
    parameters = inspect.signature(pipe).parameters if callable(pipe) else {}
    every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    needed = () if every else [n for n in ("num_inference_steps", "generator") if n not in parameters]
    if needed:
        raise _refused(f"a call of {type(pipe).__name__} takes no {' and no '.join(needed)}")
    latent = every or "output_type" in parameters
    return {"num_inference_steps": 2, **({"output_type": "latent"} if latent else {})}


def _explain(pipe: Any, components: Mapping[str, Any], error: Exception) -> None:
    """Raises ValueError where a pipeline used a component that it has not got, such as the tokenizer of a text."""
    absent = [name for name, component in components.items() if component is None]
    optional = getattr(pipe, "_optional_components", ())
    missing = [name for name in absent if name not in optional] or absent
    if not missing or "'NoneType' object" not in str(error):
        return
    made = [name for name in inspect.signature(pipe).parameters if name.endswith("embeds")]
    instead = f", or give mappings of arguments that need none of it, such as {', '.join(made)}" if made else ""
    raise ValueError(
        f"prompts need a component that {type(pipe).__name__} lacks ({error}): it has no {', '.join(missing)}; load it "
        f"with its components{instead}"
    ) from error


def _recording(seen: list[Seen], calls: list[Called]) -> Any:
    """A PlanScheduler that keeps what its steps are given."""

    class Recorder(PlanScheduler):  # type: ignore[misc]
        @functools.wraps(PlanScheduler.step)
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> object:
            seen.append(Seen(list(calls), model_output.clone(), float(timestep), sample.clone()))
            calls.clear()
            return super().step(model_output, timestep, sample, *args, **kwargs)

    return Recorder


def _note(calls: list[Called], name: str, module: object, args: Any, kwargs: Any, output: Any) -> None:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    calls.append(Called(name, kept, spec, output_of(output).clone()))


def _refused(why: str) -> ValueError:
    return ValueError(f"pipe cannot be tuned: {why}")


# --- what the recorded calls show ---


class Layout(NamedTuple):
    """How a network is called: the leaves of its arguments that are the sample, the time, and its conditions.

    copies  rows of one call at a batch of one
    time    the network's time input over the process's
    """

    x: int
    t: int
    varying: tuple[tuple[int, str], ...]
    fixed: list[Any]
    spec: TreeSpec
    copies: int
    time: float


def _made(networks: Mapping[str, torch.nn.Module], steps: list[list[Seen]], process: Any, predicts: str) -> Collected:
    names = {call.module for run in steps for step in run for call in step.calls}
    if len(names) != 1:
        raise _refused(f"it calls {sorted(names) or 'none of its networks'}, and a plan belongs to one network")
    (name,) = names
    module = networks[name]
    scale = 1000.0 if isinstance(process, Flow) else 1.0
    layout = _layout(steps[0], scale)
    branches: list[list[dict[str, Tensor]]] = []  # of each prompt
    for run in steps:
        branches.append(_branches(run, layout))
    weights = _weights(steps, layout)
    order = [int(i) for i in torch.tensor(weights).argsort()]  # the null branch has the smaller weight
    cond = tuple(_stacked([own[b] for own in branches]) for b in order)
    guidance = None if len(order) == 1 else float(f"{weights[order[-1]]:.5g}")
    watchers: list[Callable[[int], object]] = []
    channels = steps[0][0].sample.shape[1]
    denoiser = Denoiser(
        Mapped(module, _network(module, layout, channels, watchers)),
        process,
        predicts,
        guidance=guidance,
        time_scale=layout.time,
    )
    made = Collected(denoiser, cond, tuple(steps[0][0].sample.shape[1:]), guidance, name, module, watchers)
    _verify(made, steps, scale)
    return made


def _layout(run: list[Seen], scale: float) -> Layout:
    """From the two steps of one prompt."""
    first, second = run
    if len(first.sample) != 1:
        raise _refused(f"a prompt must make one latent, it made {len(first.sample)}: give one prompt at a time")
    a, b = first.calls[0], second.calls[0]
    if a.spec != b.spec:
        raise _refused("its network gets other arguments in the second call than in the first")
    changed = [i for i, (p, q) in enumerate(zip(a.leaves, b.leaves, strict=True)) if not _equal(p, q)]
    xs = [i for i in changed if isinstance(a.leaves[i], Tensor) and _is_sample(a.leaves[i], first.sample)]
    if len(xs) != 1:
        raise _refused(
            "no argument of its network is the latents as the scheduler has them (extra channels, or another scale)"
        )
    (x,) = xs
    times = [i for i in changed if i != x]
    if len(times) != 1:
        raise _refused(
            f"{len(times)} arguments of its network besides the latents change from call to call, and the time is one "
            "(a ControlNet, or conditions that depend on the time)"
        )
    (t,) = times
    ratios = [_number(call.leaves[t]) * scale / step.t for call, step in ((a, first), (b, second))]
    if abs(ratios[0] - ratios[1]) > 1e-2 * abs(ratios[0]):
        raise _refused(f"its network's time is not proportional to the scheduler's: {ratios[0]:g} and {ratios[1]:g}")
    ratio = next((r for r in (1.0, 1000.0) if abs(ratios[0] - r) < 1e-2 * r), ratios[0])
    copies = len(a.leaves[x])
    paths = [_path(path) for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(a.leaves, a.spec))[0]]
    varying = tuple(
        (i, paths[i])
        for i, leaf in enumerate(a.leaves)
        if i not in (x, t) and isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == copies
    )
    return Layout(x, t, varying, a.leaves, a.spec, copies, ratio)


def _branches(run: list[Seen], layout: Layout) -> list[dict[str, Tensor]]:
    """The conditions of each branch of one prompt, each with a batch axis of 1."""
    found: list[dict[str, Tensor]] = []
    own = {layout.x, layout.t, *(i for i, _ in layout.varying)}
    for step in run:
        now: list[dict[str, Tensor]] = []
        for call in step.calls:
            if call.spec != layout.spec or len(call.leaves[layout.x]) != layout.copies:
                raise _refused("the calls of its network differ in their arguments")
            for i, leaf in enumerate(call.leaves):
                if i not in own and not _equal(leaf, layout.fixed[i]):
                    raise _refused(f"the argument {_name(layout, i)} differs between prompts or branches")
            for j in range(layout.copies):
                now.append({name: call.leaves[i][j : j + 1] for i, name in layout.varying})
        if found and not all(
            _equal(p[name], q[name]) for p, q in zip(found, now, strict=True) for _, name in layout.varying
        ):
            raise _refused("its conditions change from call to call")
        found = now
    return found


def _raws(step: Seen, layout: Layout) -> Tensor:
    """(branches, elements) of one step, float64."""
    channels = step.sample.shape[1]
    rows = [call.output[j : j + 1, :channels] for call in step.calls for j in range(layout.copies)]
    if any(row.shape != step.sample.shape for row in rows):
        raise _refused(f"its network returns {tuple(rows[0].shape)} for latents of {tuple(step.sample.shape)}")
    return torch.stack([row.double().reshape(-1) for row in rows])


def _weights(steps: list[list[Seen]], layout: Layout) -> list[float]:
    """The weight of each branch in the pipeline's prediction."""
    pairs = [(_raws(step, layout), step.prediction.double().reshape(-1)) for run in steps for step in run]
    count = len(pairs[0][0])
    if count > 2:
        raise _refused(f"its guidance has {count} branches, and a fit covers one or two")
    weights = [1.0]
    if count == 2:
        apart = torch.cat([raws[1] - raws[0] for raws, _ in pairs])
        moved = torch.cat([out - raws[0] for raws, out in pairs])
        size = float(apart.square().sum())
        if size == 0.0:
            raise _refused("its two branches of guidance agree: give prompts that differ from the negative one")
        share = float((moved * apart).sum()) / size
        # The standard error of the share, from the rounding of the pipeline's predictions.
        error = float((moved - share * apart).square().sum() / size / len(apart)) ** 0.5
        share = _written(share, 5.0 * error + 1e-5 * abs(share))
        weights = [1.0 - share, share]
    for raws, out in pairs:
        whole = (torch.tensor(weights, dtype=torch.float64, device=raws.device)[:, None] * raws).sum(0)
        away = float((whole - out).norm() / out.norm().clamp_min(1e-12))
        if not away <= _tolerance(steps[0][0].calls[0].output.dtype):
            raise _refused(
                f"its prediction is not a fixed combination of its network's outputs (relative difference {away:.2g}): "
                "turn off guidance rescale, perturbed attention and other changes of the prediction"
            )
    return weights


def _written(value: float, most: float) -> float:
    """The number with the fewest decimals that is at most so far from a value, as its user wrote it."""
    return next((near for n in range(6) if abs((near := round(value, n)) - value) <= most), value)


def _network(
    module: torch.nn.Module, layout: Layout, channels: int, watchers: Sequence[Callable[[int], object]]
) -> Callable[..., Tensor]:
    """(x, t, **cond) -> raw, which calls the network as the pipeline does."""
    shape, dtype = layout.fixed[layout.t], None
    rest: tuple[int, ...] = tuple(shape.shape[1:]) if isinstance(shape, Tensor) else ()
    if isinstance(shape, Tensor) and shape.is_floating_point():
        dtype = shape.dtype

    def call(x: Tensor, t: Tensor, /, **cond: Tensor) -> Tensor:
        leaves = list(layout.fixed)
        given = t if dtype is None else t.to(dtype)
        leaves[layout.x] = x
        leaves[layout.t] = given.reshape(-1, *[1] * len(rest)).expand(-1, *rest)
        for i, name in layout.varying:
            leaves[i] = cond[name]
        args, kwargs = pytree.tree_unflatten(leaves, layout.spec)
        raw: Tensor = output_of(module(*args, **kwargs))[:, :channels]
        for watch in watchers:
            watch(len(x))
        return raw

    return call


def predict(made: Collected, x: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
    """The guided prediction of the network, for the prompts of these numbers; t is the network's time input."""
    cond = [{name: value[list(prompts)] for name, value in one.items()} for one in made.cond]
    bound = made.denoiser.bind(TorchFrame(x.device), len(x), cond)
    copies = len(made.cond)
    with torch.no_grad():
        raws = bound(tuple(range(copies)), torch.cat([x] * copies), torch.cat([t] * copies))
    found: Tensor = raws[0] if made.scale is None else raws[0] + made.scale * (raws[1] - raws[0])
    return found


def seconds_per_prediction(made: Collected, batch: int) -> float:
    """The time of one guided prediction in batches of this size, from a few calls."""
    dtype = getattr(torch, made.denoiser.model_dtype("float32"))
    device = next((p.device for p in made.network.parameters()), torch.device("cpu"))
    x = torch.zeros(batch, *made.shape, dtype=dtype, device=device)
    point = made.denoiser.process.point(0.5 * made.denoiser.process.t_first)
    t = torch.full((batch,), made.denoiser.time(point), device=device)
    numbers = [i % len(next(iter(made.cond[0].values()), range(1))) for i in range(batch)]
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        predict(made, x, t, numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return min(taken) / batch


def _verify(made: Collected, steps: list[list[Seen]], scale: float) -> None:
    """Raises ValueError unless the denoiser, on two samples at once, predicts what the pipeline did."""
    runs = [0, min(1, len(steps) - 1)]
    for k in range(2):
        both = [steps[i][k] for i in runs]
        x = torch.cat([step.sample for step in both]).to(both[0].calls[0].output.dtype)
        t = torch.full((2,), both[0].t / scale * made.denoiser.time_scale, device=x.device)
        out = predict(made, x, t, runs).double()
        wanted = torch.cat([step.prediction for step in both]).double()
        away = float((out - wanted).norm() / wanted.norm().clamp_min(1e-12))
        if not away <= _tolerance(x.dtype):
            raise _refused(
                f"its network, called by fewstep on two samples, is {away:.2g} away from what the pipeline computed"
            )


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, COARSE)


def _stacked(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The conditions of all prompts, one entry each."""
    for name in parts[0]:
        shapes = {tuple(part[name].shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise _refused(f"the condition {name} has other shapes for other prompts, {sorted(shapes)}")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _is_sample(leaf: Tensor, sample: Tensor) -> bool:
    if leaf.shape[1:] != sample.shape[1:] or not leaf.is_floating_point():
        return False
    return bool(torch.equal(leaf, sample.to(leaf.dtype).expand_as(leaf)))


def _number(leaf: Any) -> float:
    return float(leaf.reshape(-1)[0]) if isinstance(leaf, Tensor) else float(leaf)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a is b or bool(a == b)


def _path(path: Sequence[Any]) -> str:
    """The name of a leaf: of a keyword argument, or of an entry in one."""
    keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    return ".".join(keys[1:] if keys[0] == "1" else ["argument", *keys[1:]])


def _name(layout: Layout, i: int) -> str:
    return _path(pytree.tree_flatten_with_path(pytree.tree_unflatten(layout.fixed, layout.spec))[0][i][0])
