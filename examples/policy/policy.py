"""Action policies: DDPM, DDIM and a flow policy on chunks of 16 x 7 actions, beside a network of about 3 ms.

    python examples/policy/policy.py

A toy task has two right answers: reach a goal with seven joints, around an obstacle on either side. A small network
learns it as a diffusion policy (Chi et al. 2023: 100 cosine steps, epsilon, clip_sample) and as a flow policy of ten
Euler steps (Black et al. 2024). The next chunk of the flow policy begins with the actions that are still to be executed
(real-time chunking, Black et al. 2025). The oracles are plain loops in NumPy.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep.bindings import diffusers as twins

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fields import Table, options, outside, read_options, shares, show

HORIZON, ACTIONS, OBSERVED = 16, 7, 2  # actions in a chunk, numbers in each, observations before it
CHUNK = (1, HORIZON, ACTIONS)
TRAINED = 100  # diffusion steps in training

# What such policies construct, recorded from lerobot: the arguments and the calls.
CALLS: dict[str, Any] = json.loads(Path(__file__).with_name("lerobot_calls.json").read_text())

FLOW = fs.Flow()
EULER = fs.grid(FLOW, 10, "linspace")


# --- the task and the network ---


def expert(observed: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """(B, 16, 7) a smooth reach from the state to the goal, (B, 2, 7), that swerves to one side (B,) of the middle."""
    s = torch.linspace(0.0, 1.0, HORIZON)[None, :, None]
    smooth = s * s * s * (10.0 - 15.0 * s + 6.0 * s * s)  # least jerk
    start, goal = observed[:, :1], observed[:, 1:]
    return start + smooth * (goal - start) + 0.4 * side[:, None, None] * torch.sin(math.pi * s)


def observations(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, 2, 7): the joints and their goal, such that no action leaves [-1, 1]."""
    return 1.1 * torch.rand(n, OBSERVED, ACTIONS, generator=generator) - 0.55


class Network(torch.nn.Module):
    """A chunk (B, 16, 7), its time (B,) and an observation (B, 2, 7) to a prediction (B, 16, 7).

    blocks of residual layers, each scaled and shifted by the time and the observation
    """

    def __init__(self, width: int = 256, blocks: int = 2, top: float = TRAINED) -> None:
        super().__init__()
        self.top = top  # the largest time
        size = HORIZON * ACTIONS
        self.enter, self.leave = torch.nn.Linear(size, width), torch.nn.Linear(width, size)
        self.told = torch.nn.Linear(OBSERVED * ACTIONS + 16, width)
        self.films = torch.nn.ModuleList(torch.nn.Linear(width, 2 * width) for _ in range(blocks))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: torch.Tensor, t: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        angle = (t.float() / self.top)[:, None] * math.pi * torch.arange(1, 9)
        told = torch.nn.functional.silu(self.told(torch.cat([observed.flatten(1), angle.sin(), angle.cos()], 1)))
        h = self.enter(x.flatten(1))
        for film, block in zip(self.films, self.blocks, strict=True):
            scale, shift = film(told).chunk(2, 1)
            h = h + torch.nn.functional.silu(block(h) * (1.0 + scale) + shift)
        h = torch.nn.functional.layer_norm(h, h.shape[1:])
        out: torch.Tensor = self.leave(h).view(x.shape)
        return out


def trained(flow: bool, updates: int, batch: int = 256, seed: int = 0) -> Network:
    """The network after training on the expert, by epsilon prediction on the cosine schedule or by flow matching."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network(top=1.0 if flow else TRAINED)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    bars = scheduler("DDPM").alphas_cumprod
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1.0 + math.cos(math.pi * update / updates))
        observed = observations(batch, generator)
        side = torch.randint(0, 2, (batch,), generator=generator) * 2.0 - 1.0
        data, noise = expert(observed, side), torch.randn(batch, HORIZON, ACTIONS, generator=generator)
        if flow:
            t = torch.rand(batch, generator=generator)
            alpha, sigma, target = 1.0 - t, t, noise - data
        else:
            t = torch.randint(0, TRAINED, (batch,), generator=generator)
            alpha, sigma, target = bars[t].sqrt(), (1.0 - bars[t]).sqrt(), noise
        x = alpha[:, None, None] * data + sigma[:, None, None] * noise
        loss = (network(x, t, observed) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def miss(actions: torch.Tensor, observed: torch.Tensor) -> tuple[float, float]:
    """The median distance of an action from the nearer of the two right chunks, and the share of the left ones."""
    ways = [(actions - expert(observed, torch.full((len(actions),), s))).square().mean((1, 2)).sqrt() for s in (1, -1)]
    left, right = ways
    return float(torch.minimum(left, right).median()), float((left < right).float().mean())


# --- three loops: the policy's with a scheduler object, fewstep's, and the oracle ---


def scheduler(kind: str, home: Any = twins) -> Any:
    """The scheduler object that a policy constructs; home: diffusers, or its twins for a drop-in."""
    return getattr(home, f"{kind}Scheduler")(**CALLS[kind]["new"])


def policy_loop(
    network: Any, noise_scheduler: Any, x: torch.Tensor, observed: torch.Tensor, steps: int, seed: int | None = None
) -> torch.Tensor:
    """A diffusion policy's loop, unchanged but for the object that it holds: the calls of `lerobot_calls.json`."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    noise_scheduler.set_timesteps(steps)
    for t in noise_scheduler.timesteps:
        out = network(x, torch.full(x.shape[:1], t, dtype=torch.long), observed)
        x = noise_scheduler.step(out, t, x, generator=generator).prev_sample
    return x


def diffusion_sampler(network: Any, kind: str, steps: int, shape: Sequence[int] = CHUNK, **how: Any) -> fs.Sampler:
    """The same policy as a `Sampler`: the scheduler's own noise levels, its timesteps, and the clip in the kernel."""
    process = fs.VP(scheduler(kind).alphas_cumprod.numpy())
    spaced = TRAINED // steps
    grid = fs.Grid.from_times(process, np.arange(TRAINED - spaced, -1 - spaced, -spaced).clip(-1))
    return fs.Sampler(
        fs.Denoiser(network, process, "epsilon", clip=1.0), fs.plan(kind.lower(), grid), shape, device="cpu", **how
    )


def flow_sampler(network: Any, shape: Sequence[int] = CHUNK, **how: Any) -> fs.Sampler:
    return fs.Sampler(fs.Denoiser(network, FLOW, "flow"), fs.plan("euler", EULER), shape, device="cpu", **how)


def diffusion_by_hand(
    network: Callable[[np.ndarray, int], np.ndarray],
    x: np.ndarray,
    steps: int,
    draw: Callable[[int], np.ndarray] | None,
    reuse: bool = False,
) -> np.ndarray:
    """The oracle: DDPM (Ho et al. 2020, eq. 7 and 15) if `draw` gives its normals by step, else DDIM (eq. 12), clipped.

    reuse  DDIM's direction comes from the clipped prediction, and not from the network's epsilon
    """
    at = np.arange(TRAINED + 1) / TRAINED
    bar = np.cos((at + 0.008) / 1.008 * math.pi / 2.0) ** 2
    bars = np.cumprod(1.0 - np.minimum(1.0 - bar[1:] / bar[:-1], 0.999))
    spaced = TRAINED // steps
    for k, t in enumerate(range(TRAINED - spaced, -1, -spaced)):
        now, before = bars[t], bars[t - spaced] if t >= spaced else 1.0
        eps = network(x, t)
        x0 = np.clip((x - math.sqrt(1.0 - now) * eps) / math.sqrt(now), -1.0, 1.0)
        if draw is None:
            eps = (x - math.sqrt(now) * x0) / math.sqrt(1.0 - now) if reuse else eps
            x = math.sqrt(before) * x0 + math.sqrt(1.0 - before) * eps
            continue
        beta = 1.0 - now / before
        x = math.sqrt(before) * beta / (1.0 - now) * x0 + math.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - now) * x
        if t:
            x = x + math.sqrt((1.0 - before) / (1.0 - now) * beta) * draw(k)
    return x


def flow_by_hand(
    network: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
    left: np.ndarray | None = None,
    delay: int = 0,
) -> np.ndarray:
    """The oracle of the flow policy: ten Euler steps from t = 1 to 0; `left` (n, 7) are the actions of the last chunk.

    Their weights are those of real-time chunking (Black et al. 2025, eq. 5) with H - s = n.
    """
    weights, known = np.zeros((HORIZON, 1)), np.zeros((HORIZON, ACTIONS))
    if left is not None:
        n = len(left)
        known[:n] = left
        for i in range(n):
            c = (n - i) / (n - delay + 1)
            weights[i] = 1.0 if i < delay else c * (math.exp(c) - 1.0) / (math.e - 1.0)
    for k in range(10):
        t = 1.0 - k / 10
        clean = x - t * network(x, t)
        clean = weights * known + (1.0 - weights) * clean
        x = x - 0.1 * (x - clean) / t
    return x


# --- figures ---


def slowed(milliseconds: float, top: float = TRAINED) -> Network:
    """A network of the same kind, random, as deep as it takes to need about that long for one chunk."""
    inputs = torch.zeros(CHUNK), torch.ones(1), torch.zeros(1, OBSERVED, ACTIONS)

    def made(blocks: int) -> Network:
        torch.manual_seed(0)
        return Network(384, blocks, top).eval()

    def latency(network: Network) -> float:
        network(*inputs)
        return 1e3 * statistics.median(_seconds(lambda: network(*inputs)) for _ in range(15))

    network = made(12)
    with torch.no_grad():
        for _ in range(3):  # the weights of a deep one leave the caches: its latency is no multiple of a shallow one's
            network = made(max(1, round(len(network.blocks) * milliseconds / latency(network))))
    return network


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def loops(network: Any, kind: str, steps: int) -> dict[str, Callable[[], Any]]:
    """The loops of a diffusion policy for one chunk, by name."""
    import diffusers

    x, observed = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)), torch.zeros(1, OBSERVED, ACTIONS)
    theirs, ours = scheduler(kind, diffusers), scheduler(kind)
    sampler = diffusion_sampler(network, kind, steps)
    return {
        "diffusers": lambda: policy_loop(network, theirs, x, observed, steps, 0),
        "twin": lambda: policy_loop(network, ours, x, observed, steps, 0),
        "Sampler": lambda: sampler(x, seed=0, cond={"observed": observed}),
    }


def flow_loops(network: Any) -> dict[str, Callable[[], Any]]:
    import diffusers

    x, observed = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)), torch.zeros(1, OBSERVED, ACTIONS)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    sampler, prefix = flow_sampler(network), fs.edits.Prefix(np.zeros((10, ACTIONS)), 4)

    def scheduled() -> torch.Tensor:
        theirs.set_timesteps(sigmas=EULER.sigma[:-1].tolist())
        y = x
        for t in theirs.timesteps:
            y = theirs.step(network(y, (t / 1000.0).expand(1), observed), t, y).prev_sample
        return y

    def plain() -> torch.Tensor:  # as pi0's and SmolVLA's sample_actions
        y, t = x, torch.tensor(1.0)
        while t >= 0.05:
            y = y - 0.1 * network(y, t.expand(1), observed)
            t = t - 0.1
        return y

    return {
        "diffusers": scheduled,
        "plain torch": plain,
        "Sampler": lambda: sampler(x, cond={"observed": observed}),
        "Sampler, prefix": lambda: sampler(x, cond={"observed": observed}, edit_x0=prefix),
    }


def figures(milliseconds: float, repeats: int) -> list[Table]:
    """The latency of one chunk, beside a network of about that long and beside one that costs nothing."""
    observed, x, t = torch.zeros(1, OBSERVED, ACTIONS), torch.zeros(CHUNK), torch.ones(1)
    columns = ("loop", "us a step outside the network", "% of the latency", "diffusers' over it")
    tables = []
    free = torch.zeros(CHUNK)
    diffusing, flowing = slowed(milliseconds), slowed(milliseconds, 1.0)
    for kind, steps in (("DDPM", 100), ("DDIM", 10), ("flow", 10)):
        flow = kind == "flow"
        made = flowing if flow else diffusing
        for network in (made, lambda x, t, observed: free):
            what = flow_loops(network) if flow else loops(network, kind, steps)

            def alone(network: Any = network, steps: int = steps) -> None:
                for _ in range(steps):
                    network(x, t, observed)

            ms, above = outside(alone, steps, what, steps, repeats)
            beside = f"a network of {ms:.1f} ms" if network is made else "a network that costs nothing"
            rows = shares(ms, above, "diffusers")
            if network is not made:
                rows = [[row[0], row[1], "", row[3]] for row in rows]
            tables.append(Table(f"{kind}, {steps} steps, {beside}", columns, rows))
    return tables


def quality(updates: int, n: int = 256, batch: int = 256) -> Table:
    """How far the trained policies are from the expert, with every loop."""
    generator = torch.Generator().manual_seed(1)
    observed, x = observations(n, generator), torch.randn(n, HORIZON, ACTIONS, generator=generator)
    cond = {"observed": observed}
    rows: list[list[str | float]] = []
    network, flowing = trained(False, updates, batch), trained(True, updates, batch)
    with torch.no_grad():
        for kind, steps in (("DDPM", 100), ("DDIM", 10)):
            twin = policy_loop(network, scheduler(kind), x, observed, steps, 0)
            own = diffusion_sampler(network, kind, steps, x.shape)(x, seed=0, cond=cond)
            rows += [
                [f"{kind}, {steps} steps, {name}", *miss(y, observed)] for name, y in (("twin", twin), ("Sampler", own))
            ]
        own = flow_sampler(flowing, x.shape)(x, cond=cond)
        rows.append(["flow, 10 steps, Sampler", *miss(own, observed)])
    return Table("Trained policies", ("loop", "median distance from the expert", "share that swerves left"), rows)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--network-ms", type=float, default=3.0, help="latency of the network beside which to measure")
    parser.add_argument("--updates", type=int, default=1500, help="of the training")
    given = read_options(parser, updates=50, repeats=3)
    torch.set_num_threads(1)
    show([*figures(given.network_ms, given.repeats), quality(given.updates)], given.json)


if __name__ == "__main__":
    main()
