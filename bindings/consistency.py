"""A consistency model as a denoiser, accepted by every sampler and objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.guidance import Guidance
from fewstep.solvers.distill.boundary import Boundary, ConsistencyBoundary, LatentBoundary
from fewstep.solvers.run.arrays import Array
from fewstep.solvers.schedule.process import Point, Process


class ConsistencyDenoiser(Denoiser):
    """A network with a boundary scaling: its "x0 prediction" is the consistency function f.

        ConsistencyDenoiser(model, EDM())                                       a consistency model
        ConsistencyDenoiser(unet, VP.scaled_linear(), "epsilon",
                            boundary=LatentBoundary())                          a latent consistency model

    boundary  a `ConsistencyBoundary` (the default, with the process's sigma_min and sigma_data), which needs
              predicts="edm", or a `LatentBoundary`, which takes any prediction type

    Other arguments as for `Denoiser`. Sample with solver="consistency", "lcm" or "tcd".
    """

    def __init__(
        self,
        model: Callable[..., Array],
        process: Process,
        predicts: str = "edm",
        guidance: float | Guidance | None = None,
        *,
        boundary: Boundary | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, process, predicts, guidance, **options)
        if boundary is None:
            boundary = ConsistencyBoundary(self.sigma_data, process.sigma_min)
        if not isinstance(boundary, (ConsistencyBoundary, LatentBoundary)):
            raise TypeError(
                f"boundary must be a ConsistencyBoundary or a LatentBoundary, got {type(boundary).__name__}"
            )
        if isinstance(boundary, ConsistencyBoundary) and predicts != "edm":
            raise ValueError(
                f"predicts={predicts!r} does not fit a ConsistencyBoundary, which needs predicts='edm': use a "
                "LatentBoundary for a network of another prediction type"
            )
        self.boundary = boundary

    def prologue(self, at: Point) -> tuple[float, float]:
        return self.boundary(at, super().prologue)
