"""Every objective with a network that the package has never seen: nested conditions, video latents, 16 bits.

The loss and the gradient are those of the same weights in float64 with plain strides, to the rounding of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.solvers.distill import (
    adversarial,
    consistency,
    continuous,
    distribution_matching,
    flow_maps,
    guided,
    latent_adversarial,
    latent_consistency,
    mean_flow,
    moment_matching,
    progressive,
    rectified,
    regularised,
    score_identity,
    shortcut,
)
from fewstep.solvers.distill.boundary import LatentBoundary
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.network import points_of, predict

# torch's own set-up, at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

EDM, VP, FLOW = fs.EDM(0.002, 80.0), fs.VP.linear(), fs.Flow()
SHAPE = (4, 2, 3, 4, 4)  # batch, channels, frames, height, width


class Foreign(torch.nn.Module):
    """A video network with its own names, which modulates by a pooled text, two sizes and the time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = torch.nn.Conv3d(2, 6, 3, padding=1)
            self.mix = torch.nn.Linear(6, 6)
            self.leave = torch.nn.Conv3d(6, 2, 3, padding=1)

    def forward(
        self, latents: Tensor, timestep: Tensor, *, added: Any, w: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        dtype = self.mix.weight.dtype
        assert latents.dtype == dtype
        height, width = added["sizes"]
        numbers = [0.3 * timestep / (1.0 + timestep.abs()), height, width, 0.1 * (0.0 * height if w is None else w)]
        numbers += [0.5 * (0.0 * height if s is None else s)]
        told = torch.stack([n.to(dtype) for n in numbers], dim=1)
        told = self.mix(torch.cat([told, added["text"]["pooled"].to(dtype)], dim=1))
        h = self.enter(latents) * (1.0 + told[:, :, None, None, None])
        return self.leave(torch.tanh(h))


def condition(sign: float, dtype: torch.dtype) -> dict[str, Any]:
    """Nested mappings and a list, as SDXL's and video transformers' conditions."""
    one = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
    return {"added": {"text": {"pooled": sign * one[:, None].to(dtype)}, "sizes": [one.abs().to(dtype), one.to(dtype)]}}


class Setting:
    """All that the objectives take: networks of one dtype and layout, data, noise and conditions."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        g = torch.Generator().manual_seed(3)
        draws = torch.randn((5, *SHAPE), generator=g, dtype=torch.float64).to(self.wide)
        if dtype == torch.bfloat16:
            draws = torch.stack(list(draws))
        self.x0, self.noise, self.latent, self.fresh, self.again = (self.laid(0.5 * d) for d in draws)
        self.cond, self.null = condition(1.0, dtype), condition(-0.5, dtype)
        self.student_net = self.net(1).requires_grad_(True)

    def laid(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d) if self.dtype == torch.bfloat16 else x

    def net(self, seed: int) -> Foreign:
        net = Foreign(seed).requires_grad_(False).to(self.dtype)
        return net.to(memory_format=torch.channels_last_3d) if self.dtype == torch.bfloat16 else net  # type: ignore[call-overload]

    def denoiser(self, process: Any, predicts: str, **options: Any) -> fs.Denoiser:
        return fs.Denoiser(self.net(2), process, predicts, **options)

    def student(self, process: Any, predicts: str) -> fs.Denoiser:
        return fs.Denoiser(self.student_net, process, predicts)

    def map(self) -> FlowMapDenoiser:
        return FlowMapDenoiser(self.student_net, FLOW)

    def consistency(self, process: Any, predicts: str, **options: Any) -> ConsistencyDenoiser:
        return ConsistencyDenoiser(self.student_net, process, predicts, **options)


AT = points_of(EDM, [0.1, 0.5, 2.0, 10.0])
WHICH = np.array([0, 1, 2, 1])
TIMES, ENDS = np.array([1.0, 0.8, 0.6, 0.3]), np.array([0.0, 0.5, 0.6, 0.1])


def _progressive(o: Setting) -> Tensor:
    targets = progressive.targets(o.denoiser(VP, "v"), fs.grid(VP, 6, "trailing"))
    return progressive.loss(o.student(VP, "v"), targets, o.x0, o.noise, WHICH, cond=o.cond)


def _guided(o: Setting) -> Tensor:
    teacher = o.denoiser(EDM, "edm", guidance=2.0)
    w = [0.0, 1.0, 2.0, 4.0]
    pair = (o.null, o.cond)
    return guided.loss(o.student(EDM, "edm"), teacher, o.x0, o.noise, AT, w, cond=pair, student_cond=o.cond)


def _distilled(o: Setting) -> Tensor:
    jumps = Jumps.over(o.denoiser(EDM, "edm"), fs.grid(EDM, 3, "karras", final_zero=False), "heun")
    student = o.consistency(EDM, "edm")
    return consistency.distillation_loss(student, student, jumps, o.x0, o.noise, WHICH, cond=o.cond)


def _trained(o: Setting) -> Tensor:
    student, end = o.consistency(EDM, "edm"), points_of(EDM, 0.5 * np.asarray(AT.sigma))
    return consistency.training_loss(student, student, o.x0, o.noise, AT, end, cond=o.cond)


def _latent(o: Setting) -> Tensor:
    jumps = Jumps.over(o.denoiser(VP, "v", guidance=2.0), latent_consistency.grid(VP, 4), "ddim")
    student = o.consistency(VP, "v", boundary=LatentBoundary())
    return latent_consistency.loss(
        student, student, jumps, o.x0, o.noise, WHICH, w=[5.0, 6.0, 7.0, 8.0], cond=(o.null, o.cond),
        student_cond=o.cond,
    )  # fmt: skip


def _continuous(o: Setting) -> Tensor:
    return continuous.loss(o.student(EDM, "edm"), o.x0, o.noise, AT, teacher=o.denoiser(EDM, "edm"), cond=o.cond)


def _adversarial(o: Setting) -> Tensor:
    fake = predict(o.student(EDM, "edm"), o.x0 + 10.0 * o.noise, points_of(EDM, [10.0] * 4), o.cond)
    torch.manual_seed(0)
    heads = adversarial.Heads([2], 4).to(o.wide)
    return adversarial.generator_loss(
        fake, lambda x: [x.flatten(2)], heads, o.denoiser(EDM, "edm"), o.fresh, AT, cond=o.cond
    )


def _rectified(o: Setting) -> Tensor:
    return rectified.matching_loss(o.student(FLOW, "flow"), o.x0, o.noise, TIMES, cond=o.cond)


def _matching(o: Setting) -> Tensor:
    few = distribution_matching.FewSteps(o.student(EDM, "edm"), fs.Grid.from_sigmas(EDM, [80.0, 1.0, 0.0]))
    stops = few.stops(4)
    fake = few.generate(few.inputs(80.0 * o.latent, stops, cond=o.cond), stops, o.cond)
    critic = fs.Denoiser(o.net(4), EDM, "edm")
    return distribution_matching.generator_loss(
        fake, o.denoiser(EDM, "edm"), critic, o.fresh, AT, cond=o.cond, weight=few.weights(stops)
    ).loss


def _critic(o: Setting) -> Tensor:
    return distribution_matching.critic_loss(o.student(EDM, "edm"), o.x0, o.noise, AT, cond=o.cond)


def _mean_flow(o: Setting) -> Tensor:
    return mean_flow.loss(
        o.map(), o.x0, o.noise, TIMES, ENDS, teacher=o.denoiser(FLOW, "flow"), cond=o.cond, teacher_cond=o.cond
    )


def _improved_mean_flow(o: Setting) -> Tensor:
    return mean_flow.loss(o.map(), o.x0, o.noise, TIMES, ENDS, cond=o.cond, improved=True)


def _shortcut(o: Setting) -> Tensor:
    return shortcut.consistency_loss(o.map(), o.map(), o.x0, o.noise, TIMES, ENDS, cond=o.cond)


def _flow_maps(o: Setting) -> Tensor:
    teacher = o.denoiser(FLOW, "flow", guidance=1.5)
    return flow_maps.loss(
        o.map(), teacher, o.x0, o.noise, TIMES, ENDS, cond=o.cond, teacher_cond=(o.null, o.cond), floor=10.0
    )


def _moments(o: Setting) -> Tensor:
    at, middle, to = (points_of(FLOW, np.repeat(v, 4)) for v in ([0.9], [0.5], [0.1]))
    return moment_matching.loss(o.map(), o.map(), o.x0, o.noise, at, middle, to, cond=o.cond)


def _identity(o: Setting) -> Tensor:
    student = o.student(EDM, "edm")
    fake = predict(student, 80.0 * o.latent, points_of(EDM, [80.0] * 4), o.cond)
    critic = fs.Denoiser(o.net(4), EDM, "edm")
    return score_identity.generator_loss(fake, o.denoiser(EDM, "edm"), critic, o.fresh, AT, cond=o.cond)


def _latent_adversarial(o: Setting) -> Tensor:
    fake = predict(o.student(EDM, "edm"), 80.0 * o.latent, points_of(EDM, [80.0] * 4), o.cond)
    torch.manual_seed(0)
    heads = adversarial.Heads([2], 4).to(o.wide)
    return latent_adversarial.generator_loss(fake, lambda x, at: [torch.tanh(x)], heads, o.fresh, AT)


def _regularised(o: Setting) -> Tensor:
    critic = fs.Denoiser(o.net(4), EDM, "edm")
    return regularised.loss(
        o.student(EDM, "edm"), o.denoiser(EDM, "edm"), critic, o.x0, o.noise, AT, 80.0 * o.latent,
        points_of(EDM, [80.0] * 4), o.fresh, AT, cond=o.cond,
    ).loss  # fmt: skip


OBJECTIVES: dict[str, Callable[[Setting], Tensor]] = {
    "progressive": _progressive,
    "guided": _guided,
    "consistency distillation": _distilled,
    "consistency training": _trained,
    "latent consistency": _latent,
    "continuous": _continuous,
    "adversarial": _adversarial,
    "rectified": _rectified,
    "distribution matching": _matching,
    "critic": _critic,
    "mean flow": _mean_flow,
    "improved mean flow": _improved_mean_flow,
    "shortcut": _shortcut,
    "flow maps": _flow_maps,
    "moment matching": _moments,
    "score identity": _identity,
    "latent adversarial": _latent_adversarial,
    "regularised": _regularised,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_takes_a_foreign_network_of_16_bits(name: str) -> None:
    found, gradients = [], []
    for dtype in (torch.float64, torch.bfloat16):
        setting = Setting(dtype)
        loss = OBJECTIVES[name](setting)
        own = torch.autograd.grad(loss, list(setting.student_net.parameters()), allow_unused=True)
        assert all(g is not None and bool(g.isfinite().all()) for g in own)
        found.append(loss.double().detach())
        gradients.append(torch.cat([g.double().flatten() for g in own if g is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=1e-3)
    # By direction: a 16-bit network rounds its own gradient.
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.97
