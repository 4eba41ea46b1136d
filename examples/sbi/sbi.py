"""Simulation-based inference with a tiny network, and tabular data with boosted trees as the denoiser.

    python examples/sbi/sbi.py

A network of 10^4 weights learns the posterior of a simulator from its simulations, theta given x, as neural posterior
score estimation does (Geffner et al. 2023). 10^5 samples and their log-probabilities are compared with the posterior,
which is known. Then scikit-learn's gradient-boosted trees learn the noise in a table's column, as treeffuser's do
(Beltran-Velez et al. 2024: VE noise from 0.01 to 20, 50 steps). The oracles are plain loops in NumPy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fields import Table, options, outside, read_options, show

SPREADS = (1.0, 0.1)  # of the simulator's noise: one of them, at equal odds
EDM = fs.EDM(sigma_min=0.005, sigma_max=40.0, sigma_data=1.0)
OBSERVED = (0.8, -0.4)

LOW, HIGH = 0.01, 20.0  # treeffuser's levels
TREES = fs.VE(LOW, HIGH)


# --- the simulator, its posterior and the network ---


def simulate(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """theta (n, 2) from N(0, 1) and x (n, 2) = theta + noise, which is wide or narrow in both places."""
    theta = torch.randn(n, 2, generator=generator)
    spread = torch.tensor(SPREADS)[torch.randint(0, 2, (n, 1), generator=generator)]
    return theta, theta + spread * torch.randn(n, 2, generator=generator)


class Posterior:
    """p(theta | x), two Gaussians: of mean x / (1 + s^2) and variance s^2 / (1 + s^2) for each spread s."""

    def __init__(self, x: tuple[float, float] = OBSERVED) -> None:
        squares = np.square(SPREADS)
        at = np.asarray(x)
        evidence = np.exp(-0.5 * np.square(at).sum() / (1.0 + squares)) / (1.0 + squares)
        self.weights = evidence / evidence.sum()
        self.means = at / (1.0 + squares[:, None])
        self.stds = np.sqrt(squares / (1.0 + squares))

    def log_prob(self, theta: np.ndarray) -> np.ndarray:
        """(n,) nats."""
        squares = np.square((theta[:, None] - self.means) / self.stds[:, None]).sum(2)
        parts = np.log(self.weights / (2.0 * math.pi * self.stds**2)) - 0.5 * squares
        found: np.ndarray = np.logaddexp(parts[:, 0], parts[:, 1])
        return found

    def distance(self, theta: np.ndarray) -> float:
        """Kolmogorov's, of the first coordinate: the largest difference of two distribution functions."""
        from scipy.special import ndtr

        sorted_ = np.sort(theta[:, 0].astype(np.float64))
        exact = (self.weights * ndtr((sorted_[:, None] - self.means[:, 0]) / self.stds)).sum(1)
        steps = np.arange(len(sorted_) + 1) / len(sorted_)
        return float(max(np.abs(exact - steps[1:]).max(), np.abs(exact - steps[:-1]).max()))


class Network(torch.nn.Module):
    """F inside EDM's preconditioning: theta (B, 2), t = ln(sigma) / 4 (B,), and x (B or 1, 2)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (2 + 2 + 8, width, width, width, 2)
        parts: list[torch.nn.Module] = []
        for a, b in pairwise(sizes):
            parts += [torch.nn.Linear(a, b), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*parts[:-1])

    def forward(self, theta: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        found: torch.Tensor = self.layers(torch.cat([theta, x.expand(len(theta), -1), angle.sin(), angle.cos()], 1))
        return found


def trained(updates: int, seed: int = 0, size: int = 1024) -> Network:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1.0 - update / updates)
        theta, x = simulate(size, generator)
        sigma = torch.exp(-1.5 + 1.6 * torch.randn(size, 1, generator=generator))
        norm = (sigma**2 + 1.0).sqrt()
        noisy = theta + sigma * torch.randn(size, 2, generator=generator)
        target = (theta - noisy / norm**2) * norm / sigma
        loss = (network(noisy / norm, sigma[:, 0].log() / 4.0, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


# --- loops by hand ---


def by_2m(denoise: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The oracle: DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) where alpha is 1; levels end at 0."""
    before, h_before = None, 0.0
    for now, after in pairwise(levels.tolist()):
        clean = denoise(x, now)
        if after == 0.0:
            return clean
        h = math.log(now / after)
        slope = 0.0 if before is None else 0.5 * h / h_before * (clean - before)
        x = after / now * x + (1.0 - after / now) * (clean + slope)
        before, h_before = clean, h
    raise ValueError("levels must end at 0")


def by_euler_maruyama(
    score: Callable[[Any, float], Any], x: Any, steps: int, draw: Callable[[], Any], low: float, high: float
) -> Any:
    """The reverse of the VE SDE with sigma(t) = low (high / low)^t, from t = 1 to 0: sbi's and treeffuser's sampler."""
    rate = 2.0 * math.log(high / low)
    for k in range(steps):
        sigma = low * (high / low) ** (1.0 - k / steps)
        x = x + rate * sigma**2 / steps * score(x, sigma) + sigma * math.sqrt(rate / steps) * draw()
    return x


def sampler(network: Any, n: int, steps: int = 20, solver: str = "dpmpp_2m", **how: Any) -> fs.Sampler:
    """n samples of the posterior: call it with seed= and cond={"x": (1, 2) tensor}."""
    plan = fs.plan(solver, fs.grid(EDM, steps, "karras"))
    return fs.Sampler(fs.Denoiser(network, EDM, "edm"), plan, (n, 2), **{"device": "cpu", **how})


def denoised(network: Any, x: torch.Tensor) -> Callable[[torch.Tensor, float], torch.Tensor]:
    def call(theta: torch.Tensor, sigma: float) -> torch.Tensor:
        norm = math.sqrt(sigma**2 + 1.0)
        out: torch.Tensor = network(
            theta / norm, torch.full((len(theta),), math.log(sigma) / 4.0, dtype=theta.dtype), x
        )
        return theta / norm**2 + sigma / norm * out

    return call


def scored(network: Any, x: torch.Tensor) -> Callable[[torch.Tensor, float], torch.Tensor]:
    denoise = denoised(network, x)
    return lambda theta, sigma: (denoise(theta, sigma) - theta) / sigma**2


# --- trees ---


def table(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, 5), the true mean of y given them, and y (n, 1), whose noise is uniform: scikit-learn's Friedman 1.

    y is scaled to spread 1, and its noise to [-0.35, 0.35].
    """
    from sklearn.datasets import make_friedman1

    features, mean = make_friedman1(n, 5, random_state=seed)
    mean = (mean - 14.4) / 4.9
    noise = np.random.default_rng(seed).uniform(-0.35, 0.35, n)
    return features, mean, (mean + noise)[:, None]


class Boosted:
    """Trees that predict the noise in y from y + sigma noise, the features and t in [0, 1]: (B, 1), (B,), features."""

    def __init__(self, features: np.ndarray, y: np.ndarray, repeats: int = 10, seed: int = 0) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        rng = np.random.default_rng(seed)
        features, y = np.tile(features, (repeats, 1)), np.tile(y, (repeats, 1))
        t, noise = rng.uniform(1e-5, 1.0, (len(y), 1)), rng.standard_normal(y.shape)
        noisy = y + LOW * (HIGH / LOW) ** t * noise
        self.trees = HistGradientBoostingRegressor(max_iter=300, learning_rate=0.1, random_state=seed)
        self.trees.fit(np.concatenate([noisy, features, t], 1), noise[:, 0])

    def __call__(self, y: np.ndarray, sigma: np.ndarray, features: np.ndarray) -> np.ndarray:
        t = np.log(sigma / LOW)[:, None] / math.log(HIGH / LOW)
        found: np.ndarray = self.trees.predict(np.concatenate([y, features, t], 1))
        return found[:, None]


def from_treeffuser(model: Any) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """A fitted `treeffuser.Treeffuser` with its VE levels as such a network, for features and y of mean 0 and spread 1.

    treeffuser scales both itself, which then changes nothing. At its time t the noise has the variance
    sigma(t)^2 - sigma(0)^2.
    """

    def call(y: np.ndarray, sigma: np.ndarray, features: np.ndarray) -> np.ndarray:
        t = 0.5 * np.log1p(np.square(sigma / LOW))[:, None] / math.log(HIGH / LOW)
        found: np.ndarray = -sigma[:, None] * model.score_model.score(y=y, X=features, t=t)
        return found

    return call


def column_sampler(trees: Any, n: int, steps: int = 20, solver: str = "euler_ancestral") -> fs.Sampler:
    """Draws of y for n rows of features: sampler(seed=..., cond={"features": (n, f)}).

    Trees are rough: what a call gets wrong, an ODE solver carries to the end, and fresh noise covers.
    """
    plan = fs.plan(solver, fs.grid(TREES, steps, "karras"), dtype="float64")
    return fs.Sampler(fs.Denoiser(trees, TREES, "epsilon"), plan, (n, 1), dtype="float64")


# --- figures ---


def inference(network: Network, n: int, repeats: int) -> list[Table]:
    posterior, x = Posterior(), torch.tensor([OBSERVED])
    start = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    score, steps = scored(network, x), 10
    ours = {name: sampler(network, n, steps, name) for name in ("dpmpp_2m", "euler_ancestral")}
    given = EDM.sigma_max * start

    def maruyama(steps: int = steps) -> torch.Tensor:
        found: torch.Tensor = by_euler_maruyama(
            score, given, steps, lambda: torch.randn(n, 2), EDM.sigma_min, EDM.sigma_max
        )
        return found

    loops = {
        "Euler-Maruyama by hand": maruyama,
        "Sampler, euler_ancestral": lambda: ours["euler_ancestral"](given, seed=0, cond={"x": x}),
        "Sampler, dpmpp_2m": lambda: ours["dpmpp_2m"](given, seed=0, cond={"x": x}),
    }

    def alone() -> None:
        t = torch.zeros(n)
        for _ in range(steps):
            network(start, t, x)

    # The network takes nearly all of the time, so its noise is larger than what the loops differ by.
    _, whole = outside(lambda: None, 1, {"the network alone": alone, **loops}, steps, max(3, repeats // 5))
    rows: list[list[str | float]] = [[name, us / 1e3] for name, us in whole.items()]
    tables = [Table(f"{n} samples at once, {steps} steps", ("loop", "ms a step, the network's call included"), rows)]

    quality: list[list[str | float]] = []
    with torch.no_grad():
        for name, calls, draw in (
            ("Euler-Maruyama by hand", 50, lambda: maruyama(50)),
            ("Euler-Maruyama by hand", 200, lambda: maruyama(200)),
            ("Sampler, dpmpp_2m", 20, lambda: sampler(network, n, 20)(given, cond={"x": x})),
            ("Sampler, dpmpp_2m", 40, lambda: sampler(network, n, 40)(given, cond={"x": x})),
        ):
            theta = draw().numpy()
            quality.append([name, str(calls), posterior.distance(theta), float(posterior.log_prob(theta).mean())])
    exact = posterior.log_prob(draws(posterior, n))
    quality.append(["the posterior itself", "", 0.0, float(exact.mean())])
    columns = ("samples of", "calls", "Kolmogorov's distance", "mean log-probability under the posterior")
    tables.append(Table(f"{n} samples beside the posterior", columns, quality))

    some = min(400, n)
    theta = draws(posterior, some).astype(np.float32)
    found = fs.log_likelihood(
        fs.Denoiser(network, EDM, "edm"), torch.from_numpy(theta), cond={"x": x}, rtol=1e-3
    ).log_prob
    error = np.abs(found - posterior.log_prob(theta))
    rows = [["the trained network", float(np.median(error)), float(np.quantile(error, 0.9))]]
    columns = ("log-probabilities of", "median error, nats", "nine tenths below")
    return [*tables, Table(f"fs.log_likelihood at {some} draws of the posterior", columns, rows)]


def draws(posterior: Posterior, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    which = rng.choice(2, n, p=posterior.weights)
    found: np.ndarray = posterior.means[which] + posterior.stds[which][:, None] * rng.standard_normal((n, 2))
    return found


def column_of_a_table(rows: int, repeats: int, tests: int = 50, members: int = 40) -> Table:
    """Trees learn `rows` rows and draw `members` times for each of `tests` others."""
    features, _, y = table(rows, 0)
    trees = Boosted(features, y)
    test, mean, _ = table(tests, 1)
    many = test.repeat(members, 0)
    rng = np.random.default_rng(2)

    def score(y: np.ndarray, sigma: float) -> np.ndarray:
        return -trees(y, np.full(len(y), sigma), many) / sigma

    def maruyama() -> np.ndarray:
        x = HIGH * rng.standard_normal((len(many), 1))
        found: np.ndarray = by_euler_maruyama(score, x, 50, lambda: rng.standard_normal(x.shape), LOW, HIGH)
        return found

    loops: dict[str, tuple[int, Callable[[], np.ndarray]]] = {"Euler-Maruyama by hand": (50, maruyama)}
    for solver, steps in (("euler_ancestral", 10), ("euler_ancestral", 20), ("dpmpp_2m", 20)):
        own = column_sampler(trees, len(many), steps, solver)
        loops[f"Sampler, {solver}, {steps} steps"] = (steps, lambda own=own: own(seed=0, cond={"features": many}))
    _, above = outside(lambda: None, 1, {name: run for name, (_, run) in loops.items()}, 1, max(1, repeats // 10))
    found = []
    for name, (calls, run) in loops.items():
        y = run().reshape(tests, members)
        found.append(
            [
                name,
                str(calls),
                above[name] / 1e3,
                float(np.abs(y.mean(1) - mean).mean()),
                float(y.std(1, ddof=1).mean()),
            ]
        )
    columns = (
        "loop",
        "calls",
        f"ms for {len(many)} draws",
        "error of the mean",
        f"spread (true: {0.7 / math.sqrt(12):.3f})",
    )
    return Table(f"A column of a table of {rows} rows, by boosted trees", columns, found)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--updates", type=int, default=3000, help="of the training")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=2000, help="of the table that the trees learn")
    given = read_options(parser, updates=100, samples=2000, rows=200, repeats=3)
    torch.set_num_threads(1)
    found = inference(trained(given.updates), given.samples, given.repeats)
    show([*found, column_of_a_table(given.rows, given.repeats)], given.json)


if __name__ == "__main__":
    main()
