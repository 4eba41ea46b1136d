"""Every distillation method on a problem of one's own, by name. The arithmetic is in `fewstep.solvers.distill`."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.distill_runs.own import OwnRecipe
from fewstep.distill_runs.own_adversarial import Adversarial, LatentAdversarial
from fewstep.distill_runs.own_generators import (
    DistributionMatching,
    FDistill,
    Regularised,
    ScoreIdentity,
    TrajectoryMatching,
)
from fewstep.distill_runs.own_maps import FlowMaps, MeanFlow, MomentMatching, Shortcut
from fewstep.distill_runs.own_teachers import (
    Consistency,
    ContinuousConsistency,
    Guided,
    ImprovedConsistency,
    LatentConsistency,
    Progressive,
    Rectified,
)

METHODS: Mapping[str, type[OwnRecipe]] = {
    "progressive": Progressive,
    "guided": Guided,
    "consistency": Consistency,
    "improved_consistency": ImprovedConsistency,
    "continuous_consistency": ContinuousConsistency,
    "latent_consistency": LatentConsistency,
    "rectified": Rectified,
    "distribution_matching": DistributionMatching,
    "adversarial": Adversarial,
    "score_identity": ScoreIdentity,
    "mean_flow": MeanFlow,
    "flow_maps": FlowMaps,
    "shortcut": Shortcut,
    "moment_matching": MomentMatching,
    "f_distill": FDistill,
    "latent_adversarial": LatentAdversarial,
    "trajectory_matching": TrajectoryMatching,
    "regularised": Regularised,
}
