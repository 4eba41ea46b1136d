"""f-distill (Xu, Nie & Vahdat 2025, arXiv 2502.15681): distribution matching for any f-divergence.

The gradient of D_f(data | generator) is that of distribution matching, which is the reverse KL divergence, with the
weight h(r) = f''(r) r^2 of the density ratio r = p_data / p_generator at x_t. A discriminator on noised data and
samples knows r: its logit is ln r. Divergences with a growing h cover all modes, the reverse KL divergence seeks some.

    weight = f_divergence.weights(logits, "jensen_shannon")
    loss = distribution_matching.generator_loss(fake, teacher, critic, noise, at, weight=weight).loss
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fewstep.solvers.options import unknown
from fewstep.solvers.schedule.process import FloatArray as Array

Ratio = Callable[[Tensor], Tensor]

# D_f(p | q) = E_q f(p / q); the names of the paper's Table 1.
DIVERGENCES: dict[str, tuple[Ratio, Ratio]] = {
    # name: (f, h = f'' r^2)
    "reverse_kl": (lambda r: -r.log(), torch.ones_like),
    "softened_reverse_kl": (lambda r: (r + 1.0) * (0.5 + 0.5 / r).log(), lambda r: 1.0 / (r + 1.0)),
    "jensen_shannon": (lambda r: r * r.log() - (r + 1.0) * ((r + 1.0) / 2.0).log(), lambda r: r / (r + 1.0)),
    "squared_hellinger": (lambda r: 1.0 - r.sqrt(), lambda r: 0.25 * r.sqrt()),
    "forward_kl": (lambda r: r * r.log(), lambda r: r),
    "jeffreys": (lambda r: (r - 1.0) * r.log(), lambda r: r + 1.0),
}


def weights(logits: Tensor, divergence: str, *, normalised: bool = True, largest: float = 1e3) -> Array:
    """h(r) of each sample, float64 (B,), for `distribution_matching.generator_loss(weight=...)`.

    logits      (B,) or (B, heads) of a discriminator trained by `distribution_matching.gan_critic_loss` on x_t; heads
                are averaged
    divergence  one of `DIVERGENCES`
    normalised  divide by the mean over the batch, so that the step size stays that of the reverse KL divergence
    largest     bound of r and 1 / r

    Raises ValueError for an unknown divergence.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(unknown("divergence", divergence, tuple(DIVERGENCES)))
    with torch.no_grad():
        bound = float(np.log(largest))
        ratio = logits.detach().double().reshape(len(logits), -1).mean(dim=1).clamp(-bound, bound).exp()
        h = DIVERGENCES[divergence][1](ratio)
        return np.asarray((h / h.mean() if normalised else h).cpu().numpy())
