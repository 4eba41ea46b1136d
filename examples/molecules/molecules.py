"""Molecules: the sampler of AlphaFold 3 and its open versions, on a small network, without a wait for the device.

    python examples/molecules/molecules.py

Abramson et al. 2024, Algorithms 18 and 19: EDM's churn (gamma_0 0.8 where a step ends above 1, noise scale 1.003),
Euler steps 1.5 times as long, sigma_data 16, and before each step a random rigid motion of the molecule; in the open
versions the prediction and the sample are then aligned. The molecules are chains of 12 and 16 atoms that fold in one of
two ways, padded with a mask. The oracle is a plain loop in NumPy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fields import Table, options, outside, read_options, shares, show

ATOMS, SHORT = 16, 12  # of the longer and the shorter chain
DATA, GAMMA, GAMMA_MIN, NOISE, SCALE = 16.0, 0.8, 1.0, 1.003, 1.5
AF3 = fs.EDM(sigma_min=4e-4 * DATA, sigma_max=160.0 * DATA, sigma_data=DATA)


# --- the molecules and the network ---


def folds() -> torch.Tensor:
    """(2, ATOMS, 3): a helix of either hand, in the units of the data, of which sigma_data is the spread."""
    i = torch.arange(ATOMS) - (ATOMS - 1) / 2.0
    helix = torch.stack([16.0 * torch.cos(1.1 * i), 16.0 * torch.sin(1.1 * i), 4.0 * i], 1)
    mirrored = helix * torch.tensor([1.0, -1.0, 1.0])
    return torch.stack([helix, mirrored])


def masks(n: int) -> torch.Tensor:
    """(n, ATOMS): 1 for atoms, 0 for padding; every second chain is the shorter one."""
    mask = torch.ones(n, ATOMS)
    mask[1::2, SHORT:] = 0.0
    return mask


class Network(torch.nn.Module):
    """F inside EDM's preconditioning, from coordinates (B, ATOMS, 3), t = ln(sigma) / 4 (B,) and a mask (B, ATOMS).

    Each atom moves along the lines to all others, by weights that a small network has from the two and their distance:
    so the output turns with its input, and padding is not seen.
    """

    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.names = torch.nn.Parameter(torch.randn(ATOMS, 8))
        self.weigh = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(8 + 8 + 8 + 6, width),
                torch.nn.SiLU(),
                torch.nn.Linear(width, width),
                torch.nn.SiLU(),
                torch.nn.Linear(width, 2),
            )
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, atoms = mask.shape
        both = (mask[:, :, None] * mask[:, None, :])[..., None]
        angle = t[:, None] * torch.tensor([0.5, 1.0, 2.0])
        time = torch.cat([angle.sin(), angle.cos()], 1)[:, None, None].expand(-1, atoms, atoms, -1)
        names = self.names[None, :, None].expand(batch, -1, atoms, -1)
        count = mask.sum(1)[:, None, None]
        y = x
        for weigh in self.weigh:
            lines = y[:, :, None] - y[:, None]
            squares = lines.square().sum(-1, keepdim=True)
            scales = torch.exp(-squares / 4.0 ** torch.arange(-3, 5))
            w = weigh(torch.cat([scales, names, names.transpose(1, 2), time], -1)) * both
            # A cross product tells the two hands apart.
            mean = (lines * w[..., :1]).sum(2)
            turn = torch.linalg.cross(mean, (lines * w[..., 1:]).sum(2), dim=-1)
            y = y + (mean + turn) / count
        return y - x


def trained(updates: int, seed: int = 0) -> Network:
    """After training on turned and moved folds, with EDM's weights and the noise levels of AlphaFold 3."""
    torch.manual_seed(seed)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1.0 - update / updates)
        mask = masks(32)
        data = folds()[torch.randint(0, 2, (32,))]
        data = data - (data * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        turns = torch.linalg.qr(torch.randn(32, 3, 3)).Q
        data = data @ (turns * torch.linalg.det(turns)[:, None, None].sign())
        sigma = DATA * torch.exp(-1.2 + 1.5 * torch.randn(32))[:, None, None]
        x = data + sigma * torch.randn_like(data)
        norm = (sigma**2 + DATA**2).sqrt()
        out = network(x / norm, sigma.flatten().log() / 4.0, mask)
        target = (data - DATA**2 / norm**2 * x) * norm / (sigma * DATA)
        loss = ((out - target).square() * mask[..., None]).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


# --- two loops ---


def plan(steps: int) -> fs.Plan:
    """AlphaFold 3's Algorithm 18. A step has churn where it ends above GAMMA_MIN: s_tmin is the lowest such start."""
    grid = fs.grid(AF3, steps, "karras")
    lowest = float(grid.sigma[:-1][grid.sigma[1:] > GAMMA_MIN].min())
    return fs.plan(
        "edm",
        grid,
        method="euler",
        s_churn=GAMMA * steps,
        gamma_max=GAMMA,
        s_tmin=lowest,
        s_tmax=math.inf,
        s_noise=NOISE,
        step_scale=SCALE,
    )


def sampler(network: Any, batch: int, steps: int, **how: Any) -> fs.Sampler:
    """Call it with edit=rigid, edit_x0=rigid for the random motions and the alignment."""
    return fs.Sampler(fs.Denoiser(network, AF3, "edm"), plan(steps), (batch, ATOMS, 3), **{"device": "cpu", **how})


Draws = Callable[[int], np.ndarray]
Turns = Callable[[int, np.ndarray], np.ndarray]


def by_hand(
    denoise: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
    mask: np.ndarray,
    steps: int,
    turns: Turns,
    shifts: Draws,
    noises: Draws,
) -> np.ndarray:
    """The oracle, in the published order: centre, turn, move, add noise, call, align x to the prediction, step.

    x                 (B, ATOMS, 3) at the largest noise level
    turns(k, undo)    (B, 3, 3) the rotation before step k, applied as x @ turns(k, undo). `undo` takes the alignment of
                      step k - 1 back: with undo @ R in place of R, which is as random, the path is that of aligning the
                      prediction to the sample
    shifts, noises    (B, 1, 3) and (B, ATOMS, 3)
    """
    ramp = np.arange(steps) / (steps - 1)
    top, low = (160.0 * DATA) ** (1 / 7), (4e-4 * DATA) ** (1 / 7)
    levels = np.append((top + ramp * (low - top)) ** 7, 0.0)
    weights = mask[..., None] / mask.sum(1)[:, None, None]

    def mean(y: np.ndarray) -> np.ndarray:
        found: np.ndarray = (weights * y).sum(1, keepdims=True)
        return found

    undo = np.broadcast_to(np.eye(3), (len(x), 3, 3))
    for k in range(steps):
        now, after = levels[k], levels[k + 1]
        t_hat = now * (1.0 + (GAMMA if after > GAMMA_MIN else 0.0))
        x = (x - mean(x)) @ turns(k, undo) + shifts(k)
        x = x + NOISE * math.sqrt(t_hat**2 - now**2) * noises(k)
        clean = denoise(x, t_hat)
        undo = np.stack([_rotation(*pair) for pair in zip(weights * (x - mean(x)), clean - mean(clean), strict=True)])
        x = (x - mean(x)) @ undo.swapaxes(1, 2) + mean(clean)
        x = x + SCALE * (after - t_hat) * (x - clean) / t_hat
    return x


def _rotation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """R with R a nearest to b, for (atoms, 3) points around 0: from the top eigenvector of Horn's (1987) matrix."""
    s = a.T @ b
    d = np.array([s[1, 2] - s[2, 1], s[2, 0] - s[0, 2], s[0, 1] - s[1, 0]])
    n = np.block([[s.trace()[None, None], d[None]], [d[:, None], s + s.T - s.trace() * np.eye(3)]])
    w, *v = np.linalg.eigh(n)[1][:, -1]
    cross = np.array([[0.0, -v[2], v[1]], [v[2], 0.0, -v[0]], [-v[1], v[0], 0.0]])
    rotation: np.ndarray = np.eye(3) + 2.0 * w * cross + 2.0 * cross @ cross
    return rotation


def published(network: Any, x: torch.Tensor, mask: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The same in torch as in open versions: the levels are on the device, and a step reads three numbers from it."""
    gammas = torch.where(levels > GAMMA_MIN, GAMMA, 0.0)
    weights = mask[..., None] / mask.sum(1)[:, None, None]
    for now, after, gamma in zip(levels[:-1], levels[1:], gammas[1:], strict=True):
        q = torch.nn.functional.normalize(torch.randn(len(x), 4), dim=1)
        w, v = q[:, :1, None], q[:, 1:]
        cross = torch.linalg.cross(v[:, None].expand(-1, 3, -1), torch.eye(3).expand(len(x), -1, -1), dim=-1)
        turn = torch.eye(3) + 2.0 * w * cross + 2.0 * cross @ cross
        x = (x - (weights * x).sum(1, keepdim=True)) @ turn + torch.randn(len(x), 1, 3)
        sigma, sigma_after, gamma_now = now.item(), after.item(), gamma.item()
        t_hat = sigma * (1.0 + gamma_now)
        x = x + NOISE * math.sqrt(t_hat**2 - sigma**2) * torch.randn_like(x)
        norm = math.sqrt(t_hat**2 + DATA**2)
        out = network(x / norm, torch.full((len(x),), math.log(t_hat) / 4.0), mask)
        clean = DATA**2 / norm**2 * x + t_hat * DATA / norm * out
        centre, aim = (weights * x).sum(1, keepdim=True), (weights * clean).sum(1, keepdim=True)
        u, _, vh = torch.linalg.svd((weights * (x - centre)).mT @ (clean - aim))
        signs = torch.ones(len(x), 3)
        signs[:, 2] = torch.linalg.det(u @ vh)
        x = (x - centre) @ (u * signs[:, None]) @ vh + aim
        x = x + SCALE * (sigma_after - t_hat) * (x - clean) / t_hat
    return x


# --- figures ---


class Waits(TorchDispatchMode):
    """Counts operators for which the host waits where their tensors are on a device: numbers read, and SVDs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"_local_scalar_dense": 0, "linalg_svd": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name in self.counts:
            self.counts[name] += name in func.name()
        return func(*args, **(kwargs or {}))


def misfit(x: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B,) the RMS distance from the nearer fold after superposition, and which fold that is."""
    found = np.empty((2, len(x)))
    for j, fold in enumerate(folds().double().numpy()):
        for i, (own, m) in enumerate(zip(x, mask.astype(bool), strict=True)):
            a, b = own[m] - own[m].mean(0), fold[m] - fold[m].mean(0)
            found[j, i] = np.sqrt(np.square(a @ _rotation(a, b).T - b).sum(1).mean())
    return found.min(0), found.argmin(0)


def figures(updates: int, steps: int, repeats: int) -> list[Table]:
    network, batch = trained(updates), 5
    mask = masks(batch)
    levels = torch.tensor(fs.grid(AF3, steps, "karras").sigma, dtype=torch.float32)
    x = levels[0] * torch.randn(batch, ATOMS, 3)
    ours, rigid = sampler(network, batch, steps), fs.edits.RigidAugment(mask)
    loops = {
        "published": lambda: published(network, x, mask, levels),
        "Sampler": lambda: ours(x, seed=0, cond={"mask": mask}, edit=rigid, edit_x0=rigid),
    }

    def alone() -> None:
        for _ in range(steps):
            network(x, x[:, 0, 0], mask)

    ms, above = outside(alone, steps, loops, steps, max(3, repeats // 5))
    with Waits() as waits, torch.no_grad():
        published(network, x, mask, levels)
    numbers, decompositions = (count // steps for count in waits.counts.values())
    rows = [
        [*row, waited]
        for row, waited in zip(
            shares(ms, above, "published"), (f"{numbers} numbers, {decompositions} SVD", "none"), strict=True
        )
    ]
    columns = (
        "loop",
        "us a step outside the network",
        "% of the latency",
        "published over it",
        "waits a step on a GPU",
    )
    speed = Table(f"{steps} steps of {batch} chains beside a network of {ms:.1f} ms", columns, rows)

    many = 32
    mask = masks(many)
    rigid = fs.edits.RigidAugment(mask)
    found = sampler(network, many, steps)(seed=0, cond={"mask": mask}, edit=rigid, edit_x0=rigid)
    with torch.no_grad():
        theirs = published(network, levels[0] * torch.randn(many, ATOMS, 3), mask, levels)
    quality: list[list[str | float]] = []
    for name, y in (("published", theirs), ("Sampler", found)):
        distance, hand = misfit(np.asarray(y, np.float64), mask.numpy())
        quality.append([name, float(np.median(distance)), float(hand.mean())])
    columns = ("loop", "median RMSD from the nearer fold (sigma_data is 16)", "share of mirrored helices")
    return [speed, Table(f"{many} chains of the trained network", columns, quality)]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--updates", type=int, default=1000, help="of the training")
    parser.add_argument("--steps", type=int, default=200, help="of the sampler; AlphaFold 3 has 200")
    given = read_options(parser, updates=30, steps=20, repeats=3)
    torch.set_num_threads(1)
    show(figures(given.updates, given.steps, given.repeats), given.json)


if __name__ == "__main__":
    main()
