"""A consistency model as a denoiser, so that every sampler and every objective takes it."""

from __future__ import annotations

from typing import Any

from fewstep.bindings.denoiser import CFG, Denoiser
from fewstep.solvers.distill.boundary import Boundary, ConsistencyBoundary, LatentBoundary
from fewstep.solvers.schedule.process import Point, Process


class ConsistencyDenoiser(Denoiser):
    """A network under a boundary scaling: its "x0 prediction" is the consistency function f.

        ConsistencyDenoiser(model, EDM())                                       a consistency model
        ConsistencyDenoiser(unet, VP.scaled_linear(), "epsilon",
                            boundary=LatentBoundary())                          a latent consistency model

    boundary  a `ConsistencyBoundary` (by default with the process's sigma_min and sigma_data; predicts="edm") or a
              `LatentBoundary`, under which `predicts` says what the network is
    The rest as for `Denoiser`. Sample with solver="consistency", "lcm" or "tcd".
    """

    def __init__(
        self,
        model: Any,
        process: Process,
        predicts: str = "edm",
        guidance: float | CFG | None = None,
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
                f"predicts={predicts!r} under a ConsistencyBoundary, which takes predicts='edm'; a network that "
                "predicts something goes under a LatentBoundary"
            )
        self.boundary = boundary

    def prologue(self, at: Point) -> tuple[float, float]:
        return self.boundary(at, super().prologue)
