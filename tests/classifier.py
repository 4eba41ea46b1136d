"""docs/frameworks.md's classifier guidance on a problem whose guided sample is known: a Gaussian and a Gaussian label.

x0 ~ N(0, 1) and p(y | x0) = N(y; x0, TAU^2). Then p(x0 | y) is a Gaussian, too, and the exact noise prediction of the
first, guided by the exact slope of log p(y | x_t), is the exact noise prediction of the second.
"""

from __future__ import annotations

import math

import torch
from pages import run_page

import fewstep as fs

TAU, LABEL, SHAPE = 0.5, 1.5, (3, 4)
process = fs.VP.linear()


def _at(t: torch.Tensor) -> tuple[float, float]:
    at = process.point(float(t[0]))
    return float(at.alpha), float(at.sigma)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[eps | x_t] of N(0, 1): sigma x / (alpha^2 + sigma^2)."""
    alpha, sigma = _at(t)
    return sigma / (alpha**2 + sigma**2) * x


def log_probability(x: torch.Tensor, t: torch.Tensor, label: float) -> torch.Tensor:
    """log N(y; E[x0 | x_t], Var[x0 | x_t] + TAU^2) up to a constant."""
    alpha, sigma = _at(t)
    norm = alpha**2 + sigma**2
    return -((label - alpha / norm * x) ** 2) / (2.0 * (sigma**2 / norm + TAU**2))


def guided_and_exact(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The page's sample, and that of the exact denoiser of p(x0 | y)."""
    plan = fs.plan("dpmpp_2m", fs.grid(process, 6))
    latent = plan.start.sigma * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    names = {
        "torch": torch, "fs": fs, "process": process, "network": network, "log_probability": log_probability,
        "plan": plan, "shape": SHAPE, "backend": backend, "latent": latent, "label": LABEL,
    }  # fmt: skip
    run_page("docs/frameworks.md", names, "classifier")
    share = 1.0 / (1.0 + TAU**2)
    posterior = fs.problems.Gaussian(share * LABEL, TAU * math.sqrt(share))
    exact = fs.Sampler(posterior.denoiser(process), plan, SHAPE, dtype="float64")(latent.double().numpy())
    return names["images"], torch.from_numpy(exact).float()  # type: ignore[return-value]
