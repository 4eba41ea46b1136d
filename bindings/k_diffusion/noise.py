"""Noise sources of the samplers: the field's own, and two of fewstep's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from fewstep.solvers.schedule.brownian import BrownianTree
from fewstep.solvers.schedule.process import VE, Flow, Process

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KernelNoise", "brownian_noise", "gaussian_noise", "torchsde_noise"]

BARE: Process = VE(0.002, 80.0)  # x = x0 + sigma noise; the range only matters for grids that are not given
FLOW: Process = Flow()

NoiseSampler: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"  # (sigma, sigma_next) -> normals like x
Noise: TypeAlias = "NoiseSampler | KernelNoise | None"


class KernelNoise(NamedTuple):
    """As `noise_sampler`: the step kernel draws, sample i from stream (seed, first_sample + i) (`fewstep.sample`)."""

    seed: int | Sequence[int]
    first_sample: int = 0


def gaussian_noise(x: Tensor, seed: int | None = None) -> NoiseSampler:
    """Independent normals like x, from torch's global generator or one seeded as in ComfyUI (seed + 1 on a CPU)."""
    import torch

    generator = None
    if seed is not None:
        # ComfyUI draws the latent on the CPU from the seed itself.
        generator = torch.Generator(x.device).manual_seed(int(seed) + (x.device.type == "cpu"))
    return lambda sigma, sigma_next: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def brownian_noise(x: Tensor, seed: int | Sequence[int], flow: bool = False) -> NoiseSampler:
    """Normalised increments of fewstep's virtual Brownian tree: the path depends only on each sample's seed."""
    tree, process = BrownianTree(seed), FLOW if flow else BARE

    def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        if float(sigma) == float(sigma_next):  # no step: ComfyUI's SEEDS at r = 1 asks, and discards it
            return x.new_zeros(x.shape)
        z = tree(0, process.point(float(sigma)), process.point(float(sigma_next)), tuple(x.shape))
        return x.new_tensor(z)

    return sampler


def torchsde_noise(
    x: Tensor,
    sigma_min: Tensor | float,
    sigma_max: Tensor | float,
    seed: int | Sequence[int] | None = None,
    *,
    cpu: bool = True,
) -> NoiseSampler:
    """k-diffusion's BrownianTreeNoiseSampler: a torchsde tree over sigma.

    seed  one int, one int per sample, or None: drawn from torch's generator
    cpu   whether the tree is kept on the CPU, as ComfyUI's is except in the samplers named _gpu; on x's device the same
          seed draws other noise
    """
    try:
        torchsde = importlib.import_module("torchsde")
    except ImportError:
        raise ImportError(
            "the default noise of this sampler is a Brownian tree of torchsde, which is not installed: pip install "
            "torchsde, or pass noise_sampler=KernelNoise(seed) or brownian_noise(x, seed)"
        ) from None
    import torch

    with torch.device("cpu"):  # whatever the default device is
        low, high = (torch.as_tensor(s).cpu() for s in (sigma_min, sigma_max))
        # torchsde rounds the ends of its tree, to this tolerance, and moves what is asked beyond them there with a
        # warning.
        tolerance, digits = 1e-6, 6
        first, last = (round(float(s), digits) for s in (low, high))
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []))
        shared = isinstance(seed, int)
        seeds: Sequence[int] = [seed] if isinstance(seed, int) else seed
        start = torch.zeros(x.shape if shared else x.shape[1:], dtype=x.dtype, device="cpu" if cpu else x.device)
        trees = [torchsde.BrownianTree(low, start, high, entropy=int(s), tol=tolerance) for s in seeds]

    def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        with torch.device("cpu"):
            t0, t1 = (torch.as_tensor(s).cpu() for s in (sigma, sigma_next))
            # The tree only takes rising intervals; a falling one has the opposite increment.
            sign, a, b = (1.0, t0, t1) if t0 < t1 else (-1.0, t1, t0)
            begin, end = (min(max(float(t), first), last) for t in (a, b))
            w = torch.stack([tree(begin, end) for tree in trees]) * sign
            return ((w[0] if shared else w) / (t1 - t0).abs().sqrt()).to(x.device)

    return sampler
