"""A network that takes the end of its step as an input, as a denoiser: flow maps, MeanFlow, shortcut models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from fewstep.bindings.denoiser import Around, Cond, Denoiser
from fewstep.bindings.guidance import Guidance
from fewstep.solvers.plans.ends import step_ends
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.run.arrays import Array, Frame, NumpyFrame, TorchFrame, frame_of
from fewstep.solvers.run.denoising import Call, Condition, time_dtype
from fewstep.solvers.schedule.process import Point, Process, points


class FlowMapDenoiser(Denoiser):
    """A network of two times, model(x_in, t, s=s, **cond): t where a step starts, s (B,) where it ends.

        student = FlowMapDenoiser(net, Flow(), "flow")
        fewstep.sample(student, shape=..., solver="euler", steps=2)

    Its x0 prediction is the one with which a single first-order step lands at s on the flow, so that every one-call
    step samples it: "euler" and "ddim" jump from point to point of the grid, "tcd" with gamma goes lower and back up
    with noise, "lcm" always goes to clean data. With `Flow` and predicts="flow" the output is the average velocity from
    s to t, x_s = x_t - (t - s) u. The plan says where each step ends, and the sampler tells the network (`for_plan`).

    end  the name of s, the network's keyword

    s is in the units of the network's time input t. Under predicts="edm", where clean data would be -inf, s is at least
    the process's sigma_min. Other arguments as for `Denoiser`. A `Sampler` keeps the network and `null` that the
    denoiser has when it is made; `fewstep.sample` takes those of each call.
    """

    def __init__(
        self,
        model: Callable[..., Array],
        process: Process,
        predicts: str = "flow",
        guidance: float | Guidance | None = None,
        *,
        end: str = "s",
        **options: Any,
    ) -> None:
        super().__init__(model, process, predicts, guidance, **options)
        if not (isinstance(end, str) and end.isidentifier()):
            raise ValueError(f"end = {end!r:.80}: it must be the name of one of the model's keyword arguments")
        self.end = end

    def end_time(self, to: Point) -> float:
        """The network's second time input for a step that ends at `to`, one point or arrays of points."""
        low = self.process.sigma_min
        if self.predicts == "edm" and np.any(below := to.sigma < low * to.alpha):
            least = self.process.point_at_sigma(low)
            to = points(*(np.where(below, *pair)[()] for pair in zip(least, to, strict=True)))
        return self.time(to)

    def for_plan(self, plan: Plan) -> Self:
        """The denoiser with the ends of this plan's steps; samplers call this.

        Raises ValueError for a solver whose steps are no jumps by one prediction, and for a plan that calls the network
        at one time for steps to different ends.
        """
        ends: dict[float, float] = {}
        kind = time_dtype(self, self.model_dtype("float32"))
        own: Frame = TorchFrame() if kind == "bfloat16" else NumpyFrame()
        # As they reach the network, which tells steps apart by them; float64 to single precision.
        times = own.to_numpy(own.array([self.time(stage.at) for stage in plan.stages], kind)).astype(np.float32)
        for t, to in zip(times.tolist(), step_ends(plan), strict=True):
            s = self.end_time(to)
            if abs(ends.setdefault(t, s) - s) > 1e-6 * max(1.0, abs(s)):
                raise ValueError(
                    f"solver {plan.solver!r} calls the network at t = {t:g} ({kind}) for steps that end at {ends[t]:g} "
                    f"and {s:g}: a flow map needs one end for each time"
                )
        other = copy.copy(self)
        other.model = WithEnds(self.model, self.end, ends)
        return other

    def bind(self, frame: Frame, batch: int, cond: Cond | Condition) -> Call:
        call = super().bind(frame, batch, cond)
        if isinstance(self.model, WithEnds) or all(self.end in own for own in self.conditions(cond)):
            return call

        def refuse(branches: tuple[int, ...], x_in: Array, t: Array) -> tuple[Array, ...]:
            raise ValueError(
                f"a FlowMapDenoiser is called without the end of its step, cond[{self.end!r}]: sample it with "
                "fewstep.sample or a Sampler, which take it from the plan, or give it"
            )

        return refuse


class WithEnds(Around):
    """A network of two times as a function of t alone: model(x, t, s=ends[t]), the end of the step looked up by t."""

    def __init__(self, network: Callable[..., Array], name: str, ends: dict[float, float]) -> None:
        super().__init__(network)
        self.name = name
        self.table = np.array(sorted(ends.items())).T  # (2, steps): t, s
        self._tables: dict[object, tuple[Array, Array]] = {}  # by device and dtype, kept for CUDA graphs

    def __call__(self, x: Array, t: Array, /, **cond: Any) -> Array:
        where = frame_of(t)
        if where is None:
            raise TypeError(f"t is {type(t).__name__}, and a FlowMapDenoiser takes arrays of NumPy or torch")
        key = (where.name, str(where.device), str(t.dtype))
        tables = self._tables.get(key)
        if tables is None:
            tables = where.array(self.table[0], where.dtype_of(t)), where.array(self.table[1], where.dtype_of(t))
            if type(tables[0]).__name__ != "FakeTensor":  # made during an export, and of no use after it
                self._tables[key] = tables
        times, ends = tables
        return self.network(x, t, **{**cond, self.name: ends[abs(t[:, None] - times).argmin(1)]})
