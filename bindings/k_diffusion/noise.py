"""Noise sources of the samplers: the field's, and two of fewstep's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.solvers.schedule.brownian import BrownianTree
from fewstep.solvers.schedule.process import VE, Flow, Process

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KernelNoise", "brownian_noise", "gaussian_noise", "torchsde_noise"]

NoiseSampler = Callable[[Any, Any], Any]

BARE: Process = VE(0.002, 80.0)  # x = x0 + sigma noise at any sigma; its ends are for grids that are not given
FLOW: Process = Flow()


class KernelNoise(NamedTuple):
    """As `noise_sampler`: the step kernel draws, sample i from stream (seed, first_sample + i) (`fewstep.sample`)."""

    seed: int | Sequence[int]
    first_sample: int = 0


def gaussian_noise(x: Tensor, seed: int | None = None) -> NoiseSampler:
    """Independent normals like x: from torch's own generator, or one seeded as ComfyUI's (seed + 1 on a CPU)."""
    import torch

    generator = None
    if seed is not None:
        # ComfyUI draws the latent on the CPU with the seed itself.
        generator = torch.Generator(x.device).manual_seed(int(seed) + (x.device.type == "cpu"))
    return lambda sigma, sigma_next: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def brownian_noise(x: Tensor, seed: int | Sequence[int], flow: bool = False) -> NoiseSampler:
    """Normalised increments of fewstep's own virtual Brownian tree: the path depends on each sample's seed alone."""
    tree, process = BrownianTree(seed), FLOW if flow else BARE

    def sampler(sigma: Any, sigma_next: Any) -> Any:
        z = tree(0, process.point(float(sigma)), process.point(float(sigma_next)), tuple(x.shape))
        return x.new_tensor(z)

    return sampler


def torchsde_noise(x: Tensor, sigma_min: Any, sigma_max: Any, seed: int | Sequence[int] | None = None) -> NoiseSampler:
    """k-diffusion's BrownianTreeNoiseSampler: a tree of torchsde on the clock sigma, kept on the CPU.

    seed  one int, one int a sample, or None: drawn from torch's generator
    """
    try:
        torchsde = importlib.import_module("torchsde")
    except ImportError:
        raise ImportError(
            "the default noise of this sampler is a Brownian tree of torchsde, which is not installed: pip install "
            "torchsde, or pass noise_sampler=KernelNoise(seed) or brownian_noise(x, seed)"
        ) from None
    import torch

    low, high = (torch.as_tensor(s).cpu() for s in (sigma_min, sigma_max))
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, []))
    shared = isinstance(seed, int)
    seeds: Sequence[int] = [seed] if isinstance(seed, int) else seed
    start = torch.zeros(x.shape if shared else x.shape[1:], dtype=x.dtype)
    trees = [torchsde.BrownianTree(low, start, high, entropy=int(s)) for s in seeds]

    def sampler(sigma: Any, sigma_next: Any) -> Any:
        t0, t1 = (torch.as_tensor(s).cpu() for s in (sigma, sigma_next))
        # The tree knows rising intervals alone; a falling one has the opposite increment.
        sign, a, b = (1.0, t0, t1) if t0 < t1 else (-1.0, t1, t0)
        w = torch.stack([tree(a, b) for tree in trees]) * sign
        return ((w[0] if shared else w) / (t1 - t0).abs().sqrt()).to(x.device)

    return sampler


Noise = NoiseSampler | KernelNoise | None
