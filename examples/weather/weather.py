"""Weather: GenCast's sampler, DPM-Solver++ 2S with churn, on JAX arrays and on torch's.

    python examples/weather/weather.py

GenCast (Price et al. 2024) draws the residual to the next state of the weather: 20 noise levels from 80 to 0.03 with
rho 7, churn 2.5 at levels of 0.75 and more with noise 1.05 times as large, then a second-order step by the geometric
mean of two levels. Here the weather is a field on a sphere of 32 x 64 points, driven round by a wind, and the network a
small convolution. The oracle is a plain loop in NumPy.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep.bindings.maps import InLibrary

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fields import Table, options, outside, read_options, shares, show

LAT, LON = 32, 64
LEVELS, TOP, BOTTOM, RHO = 20, 80.0, 0.03, 7.0
CHURN, CHURN_MIN, INFLATION = 2.5, 0.75, 1.05
PROCESS = fs.EDM(sigma_min=BOTTOM, sigma_max=TOP, sigma_data=1.0)


# --- the weather and the network ---


def states(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(n, 1, LAT, LON) smooth fields, and the residuals to the next: a wind moves a field by 2 or by 6 points."""
    lat, lon = np.linspace(-1.0, 1.0, LAT)[:, None], 2.0 * np.pi * np.arange(LON) / LON
    wave = np.arange(1, 5)
    size, phase = rng.standard_normal((n, 4, 1, 1)), rng.uniform(0.0, 2.0 * np.pi, (n, 4, 1, 1))
    bend = rng.uniform(-1.0, 1.0, (n, 4, 1, 1))
    moved = (2.0 * np.pi / LON * rng.choice([2.0, 6.0], n))[:, None, None, None]

    def field(shift: np.ndarray | float) -> np.ndarray:
        angle = wave[:, None, None] * (lon - shift) + phase + 2.0 * bend * lat
        total: np.ndarray = (size * np.cos(angle) * (1.0 - lat * lat)).sum(1, keepdims=True)
        return total

    now = field(0.0)
    return now.astype(np.float32), (1.25 * (field(moved) - now)).astype(np.float32)


class Network(torch.nn.Module):
    """F inside EDM's preconditioning: (B, 1, LAT, LON), t = ln(sigma) / 4 (B,) and the state before, as two channels.

    Convolutions that go round in longitude and end at the poles.
    """

    def __init__(self, width: int = 24, layers: int = 4) -> None:
        super().__init__()
        self.enter = torch.nn.Conv2d(2, width, 1)
        self.time = torch.nn.Linear(6, width * layers)
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3) for _ in range(layers))
        self.leave = torch.nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * torch.tensor([0.5, 1.0, 2.0])
        shifts = self.time(torch.cat([angle.sin(), angle.cos()], 1)).chunk(len(self.blocks), 1)
        h = self.enter(torch.cat([x, before.expand_as(x)], 1))
        for block, shift in zip(self.blocks, shifts, strict=True):
            around = torch.nn.functional.pad(h, (1, 1, 0, 0), "circular")
            around = torch.nn.functional.pad(around, (0, 0, 1, 1))
            h = h + torch.nn.functional.silu(block(around) + shift[:, :, None, None])
        out: torch.Tensor = self.leave(h)
        return out


def trained(updates: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1.0 - update / updates)
        before, data = map(torch.from_numpy, states(8, rng))
        # As in GenCast the levels of training have the law of those of sampling, rho and all.
        place = torch.rand(8, 1, 1, 1)
        sigma = (TOP ** (1 / RHO) + place * (BOTTOM ** (1 / RHO) - TOP ** (1 / RHO))) ** RHO
        norm = (sigma**2 + 1.0).sqrt()
        x = data + sigma * torch.randn_like(data)
        target = (data - x / norm**2) * norm / sigma
        loss = (network(x / norm, sigma.flatten().log() / 4.0, before) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


# --- the loops ---


def grid() -> fs.Grid:
    return fs.grid(PROCESS, LEVELS, "karras", rho=RHO)


def plan() -> fs.Plan:
    """GenCast's sampler: 39 calls, two a step and one in the step to clean data."""
    return fs.plan("dpmpp_2s", grid(), s_churn=CHURN, s_tmin=CHURN_MIN, s_tmax=math.inf, s_noise=INFLATION)


def by_hand(
    denoise: Callable[[Any, float], Any],
    x: Any,
    draw: Callable[[int], Any],
) -> Any:
    """The oracle, for arrays of any library: x at the top level, draw(k) the normals of step k's churn."""
    places = np.linspace(1.0, 0.0, LEVELS)
    levels = (BOTTOM ** (1 / RHO) + places * (TOP ** (1 / RHO) - BOTTOM ** (1 / RHO))) ** RHO
    for k, (level, after) in enumerate(pairwise([*levels.tolist(), 0.0])):
        rate = min(CHURN / LEVELS, math.sqrt(2.0) - 1.0) if level >= CHURN_MIN else 0.0
        now = level * (1.0 + rate)
        if rate:
            x = x + INFLATION * math.sqrt(now**2 - level**2) * draw(k)
        clean = denoise(x, now)
        if after == 0.0:
            return clean
        middle = math.sqrt(now * after)
        between = middle / now * x + (1.0 - middle / now) * clean
        x = after / now * x + (1.0 - after / now) * denoise(between, middle)
    return x


def denoised(network: Callable[..., Any], full: Callable[[int, float], Any], cond: Any) -> Callable[[Any, float], Any]:
    """x0 prediction from F, by EDM's preconditioning with sigma_data 1; full(n, value) makes an array."""

    def call(x: Any, sigma: float) -> Any:
        norm = math.sqrt(sigma**2 + 1.0)
        return x / norm**2 + sigma / norm * network(x / norm, full(len(x), math.log(sigma) / 4.0), cond)

    return call


def in_jax(network: Network) -> Callable[..., Any]:
    """The same network in JAX, compiled."""
    import jax
    import jax.numpy as jnp

    values = {name: jnp.asarray(value.detach().numpy()) for name, value in network.named_parameters()}
    layers = len(network.blocks)

    def convolve(x: Any, name: str, padding: str = "VALID") -> Any:
        out = jax.lax.conv(x, values[f"{name}.weight"], (1, 1), padding)
        return out + values[f"{name}.bias"][:, None, None]

    @jax.jit
    def call(x: Any, t: Any, before: Any) -> Any:
        angle = t[:, None] * jnp.array([0.5, 1.0, 2.0])
        told = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 1)
        shifts = jnp.split(told @ values["time.weight"].T + values["time.bias"], layers, 1)
        h = convolve(jnp.concatenate([x, jnp.broadcast_to(before, x.shape)], 1), "enter")
        for i, shift in enumerate(shifts):
            around = jnp.pad(h, ((0, 0), (0, 0), (0, 0), (1, 1)), mode="wrap")
            around = jnp.pad(around, ((0, 0), (0, 0), (1, 1), (0, 0)))
            h = h + jax.nn.silu(convolve(around, f"blocks.{i}") + shift[:, :, None, None])
        return convolve(h, "leave")

    return call


def jax_loops(network: Network, x: np.ndarray, before: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The loops in JAX: step by step, the whole of it compiled, and a `Sampler`."""
    import jax
    import jax.numpy as jnp

    model, cond, start = in_jax(network), jnp.asarray(before), jnp.asarray(x)
    denoise = denoised(model, lambda n, value: jnp.full(n, value, jnp.float32), cond)
    keys = jax.random.split(jax.random.key(0), LEVELS)

    def loop(y: Any) -> Any:
        return by_hand(denoise, y, lambda k: jax.random.normal(keys[k], y.shape))

    whole, sampler = jax.jit(loop), jax_sampler(model, x.shape)
    return {
        "step by step": lambda: jax.block_until_ready(loop(start)),
        "the whole loop compiled": lambda: jax.block_until_ready(whole(start)),
        "Sampler": lambda: jax.block_until_ready(sampler(start, seed=0, cond={"before": cond})),
    }


def jax_sampler(model: Callable[..., Any], shape: tuple[int, ...]) -> fs.Sampler:
    """It takes and gives JAX arrays, in the same memory as the loop's."""
    import jax.numpy as jnp

    return fs.Sampler(fs.Denoiser(InLibrary(model, jnp), PROCESS, "edm"), plan(), shape)


def torch_loops(network: Network, x: np.ndarray, before: np.ndarray) -> tuple[Callable[[], Any], dict[str, Any]]:
    cond, start = torch.from_numpy(before), torch.from_numpy(x)
    denoise = denoised(network, lambda n, value: torch.full((n,), value), cond)
    generator = torch.Generator()
    sampler = sampler_of(network, x.shape)

    def loop() -> torch.Tensor:
        generator.manual_seed(0)
        found: torch.Tensor = by_hand(denoise, start, lambda k: torch.randn(start.shape, generator=generator))
        return found

    given, t = start / TOP, torch.zeros(len(start))

    def alone() -> None:
        for _ in range(39):
            network(given, t, cond)

    return alone, {"by hand": loop, "Sampler": lambda: sampler(start, seed=0, cond={"before": cond})}


def sampler_of(network: Any, shape: tuple[int, ...], **how: Any) -> fs.Sampler:
    return fs.Sampler(fs.Denoiser(network, PROCESS, "edm"), plan(), shape, **{"device": "cpu", **how})


# --- figures ---


def skill(network: Network, n: int = 8, members: int = 16) -> Table:
    """The mean of an ensemble and its spread, beside the truth. Of two equally likely winds none is in the mean."""
    before, truth = states(n, np.random.default_rng(1))
    many = before.repeat(members, 0)
    found = sampler_of(network, many.shape)(seed=0, cond={"before": torch.from_numpy(many)}).numpy()
    found = found.reshape(n, members, LAT, LON)

    def rms(values: np.ndarray) -> float:
        return float(np.sqrt(np.square(values).mean()))

    rows: list[list[str | float]] = [
        ["residual itself", rms(truth)],
        ["error of the ensemble's mean", rms(found.mean(1) - truth[:, 0])],
        ["spread of the ensemble", rms(found - found.mean(1, keepdims=True)) * math.sqrt(members / (members - 1.0))],
        ["error of the best member", rms(_best(found, truth[:, 0]))],
    ]
    return Table(f"Forecasts of the trained network, {members} members", ("RMS of the", "value"), rows)


def _best(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    errors = found - truth[:, None]
    return errors[np.arange(len(errors)), np.square(errors).mean((2, 3)).argmin(1)]


def figures(updates: int, repeats: int) -> list[Table]:
    network = trained(updates)
    before = states(1, np.random.default_rng(1))[0]
    x = (TOP * np.random.default_rng(2).standard_normal(before.shape)).astype(np.float32)
    alone, loops = torch_loops(network, x, before)
    ms, above = outside(alone, 39, loops, LEVELS, repeats)
    columns = ("loop", "us a step outside the network", "% of the latency", "by hand over it")
    title = f"{LEVELS} steps of {LAT} x {LON} points on torch, a network of {ms:.1f} ms"
    tables = [Table(title, columns, shares(ms, above, "by hand", 39 / LEVELS))]
    if importlib.util.find_spec("jax"):
        loops = jax_loops(network, x, before)
        # JAX computes in the background: the network has no time of its own, only a forecast has.
        _, whole = outside(lambda: None, 1, loops, 1, repeats)
        rows = [[name, us / 1e3, whole["step by step"] / us] for name, us in whole.items()]
        tables.append(Table("The same on JAX", ("loop", "ms a forecast", "step by step over it"), rows))
    return [*tables, skill(network)]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--updates", type=int, default=300, help="of the training")
    given = read_options(parser, updates=20, repeats=3)
    torch.set_num_threads(1)
    show(figures(given.updates, given.repeats), given.json)


if __name__ == "__main__":
    main()
