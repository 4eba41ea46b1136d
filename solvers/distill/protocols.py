"""What the objectives use of a denoiser, as types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fewstep.solvers.run.arrays import Frame
from fewstep.solvers.schedule.process import Point, Process

Cond = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""The network's keyword arguments; one mapping per branch where the denoiser is guided."""


class DenoiserLike(Protocol):
    """A network, and what its output means: `fewstep.Denoiser`, or anything with these members."""

    model: Any  # model(x, t, **cond) -> raw; a torch module, or any callable
    batched: bool

    @property
    def process(self) -> Process: ...

    @property
    def predicts(self) -> str: ...

    @property
    def sigma_data(self) -> float: ...

    @property
    def clip(self) -> object: ...

    @property
    def rescale(self) -> float: ...

    @property
    def time_dtype(self) -> str | None: ...

    def time(self, at: Point) -> float: ...

    def c_in(self, at: Point) -> float: ...

    def prologue(self, at: Point) -> tuple[float, float]: ...

    def weights(self, progress: float) -> tuple[float, ...]: ...

    def model_dtype(self, state: str) -> str: ...

    def bind(self, frame: Frame, batch: int, cond: Cond) -> Callable[[tuple[int, ...], Any, Any], tuple[Any, ...]]: ...
