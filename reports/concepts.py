"""Draws the pictures of docs/concepts from runs of the engine: `make concept-plots`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fewstep as fs
from fewstep.solvers.schedule.process import Process

OUT = Path(__file__).resolve().parent.parent / "docs" / "concepts"
BLUE, ORANGE, GREEN, GREY = "#2c6fbb", "#d9822b", "#2f8f5b", "0.55"


def stage() -> None:
    """A sample of the ring in three Euler steps: x, the predictions m, and the lines on which x moves."""
    problem = fs.problems.Mixture.ring()
    denoiser = problem.denoiser(fs.EDM())
    grid = fs.Grid.from_sigmas(denoiser.process, [1.2, 0.5, 0.2, 0.0])
    seen: list[fs.StepInfo] = []
    x = np.array([[-0.9, 1.35]])
    end = fs.sample(denoiser, x, solver="euler", grid=grid, callback=seen.append)
    states = [x[0], *(info.x[0] for info in seen)]
    means = [info.x0[0] for info in seen]
    assert np.allclose(states[-1], end[0])

    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    data = problem.draw(1500, seed=0)
    axes.scatter(data[:, 0], data[:, 1], s=3, color="0.8", linewidths=0, label="data", zorder=0)
    calls = range(1, 4)  # from 1: x0 is the clean sample everywhere else
    for k, start, mean, after in zip(calls, states, means, states[1:], strict=False):
        axes.plot(*np.transpose([start, mean]), "--", color=ORANGE, lw=0.9, zorder=1)
        axes.annotate(
            "", after, start, arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 1.8, "shrinkA": 3, "shrinkB": 3}
        )
        axes.plot(*mean, "o", color=ORANGE, ms=6, label="m: what the network predicts" if k == 1 else None)
        beside = {1: (6, 4), 2: (6, -10), 3: (-3, -15)}[k]
        axes.annotate(f"$m_{k}$", mean, beside, textcoords="offset points", color=ORANGE)
    for k, state, sigma in zip(calls, states, grid.sigma, strict=False):
        axes.plot(*state, "o", color=BLUE, ms=7, label="x: the sample" if k == 1 else None)
        text = f"$x_{k}$ at $\\sigma = {sigma:g}$"
        axes.annotate(text, state, (8, 2), textcoords="offset points", color=BLUE)
    axes.set_aspect("equal")
    axes.legend(loc="upper right", frameon=False)
    axes.set_xlim(-1.05, 0.75)
    axes.set_ylim(0.1, 1.45)
    axes.set_title("Euler in three calls: $x' = r\\,x + (1 - r)\\,m$,  $r = \\sigma' / \\sigma$")
    figure.tight_layout()
    save(figure, "stage.png")


def processes() -> None:
    """alpha and sigma of the four processes over their own time, at the points of a grid of ten steps."""
    kinds: list[tuple[str, Process, str]] = [
        ("VP (DDPM, Stable Diffusion)", fs.VP.linear(), "t"),
        ("Flow (SD3, Flux)", fs.Flow(), "t"),
        ("EDM, VE", fs.EDM(), "t = sigma"),
    ]
    figure, rows = plt.subplots(1, 3, figsize=(10, 3.1))
    for axes, (name, process, label) in zip(rows, kinds, strict=True):
        fine = fs.grid(process, 300, "linspace" if name[0] != "E" else "exponential")
        coarse = fs.grid(process, 10)
        for values, points, colour, text in (
            (fine.alpha, coarse.alpha, BLUE, "alpha, times the data"),
            (fine.sigma, coarse.sigma, ORANGE, "sigma, times the noise"),
        ):
            axes.plot(fine.t[:-1], values[:-1], color=colour, label=text)
            axes.plot(coarse.t[:-1], points[:-1], "o", ms=4, color=colour)
        axes.set_title(name)
        axes.set_xlabel(label)
        if name[0] == "E":
            axes.set_xscale("log")
            axes.set_yscale("log")
    rows[2].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, "processes.png")


def spacings() -> None:
    """Where ten steps stand on the scale of sigma / alpha, for each spacing, on VP."""
    process = fs.VP.linear()
    names = [name for name in fs.list_spacings() if name != "lcm"]
    figure, axes = plt.subplots(figsize=(8, 4.8))
    for row, name in enumerate(reversed(names)):
        ratios = fs.grid(process, 10, name).ratio[:-1]
        axes.plot(ratios, np.full(len(ratios), row), "o-", color=BLUE, ms=4, lw=0.6)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("sigma / alpha of the ten calls: noise on the left, data on the right")
    axes.set_title("Ten steps by each spacing (VP)")
    figure.tight_layout()
    save(figure, "spacings.png")


def noise() -> None:
    """One seed alone, in a batch and in another order: the same sample, up to the network's rounding."""
    import torch

    from fewstep.bindings.unet import digits_model

    process = fs.VP.linear()
    denoiser = fs.Denoiser(digits_model(), process, "v", guidance=2.0, null={"label": torch.tensor([10])})
    plan = fs.plan("dpmpp_2m_sde", fs.grid(process, 15, "logsnr"))

    def draw(seeds: list[int]) -> list[np.ndarray]:
        labels = torch.tensor([seed % 10 for seed in seeds])
        return list(fs.Sampler(denoiser, plan, (len(seeds), 1, 8, 8))(seed=seeds, cond={"label": labels}).numpy()[:, 0])

    batches = {"a batch of six": [3, 17, 42, 58, 64, 79], "another order": [79, 42, 3, 64, 17, 58], "alone": [42]}
    drawn = {name: draw(seeds) for name, seeds in batches.items()}
    first = drawn["a batch of six"][2]
    worst = max(np.abs(drawn[name][seeds.index(42)] - first).max() for name, seeds in batches.items())
    print(f"seed 42 in three batches differs by {worst:.1e}")

    figure, grid = plt.subplots(3, 6, figsize=(6.6, 4.0))
    for row, (name, seeds) in zip(grid, batches.items(), strict=True):
        for axes in row:
            axes.axis("off")
        row[0].text(-0.35, 0.5, name, transform=row[0].transAxes, ha="right", va="center")
        for axes, seed, image in zip(row, seeds, drawn[name], strict=False):
            show(axes, image, seed)
    figure.subplots_adjust(left=0.22, right=0.99, top=0.93, bottom=0.02, hspace=0.35)
    save(figure, "noise.png")


def show(axes: Axes, image: np.ndarray, seed: int) -> None:
    axes.axis("on")
    axes.imshow(image, cmap="gray_r", vmin=-1.0, vmax=1.0)
    axes.set_xticks([])
    axes.set_yticks([])
    chosen = seed == 42
    axes.set_title(f"seed {seed}", fontsize=9, color=ORANGE if chosen else "0.3")
    for spine in axes.spines.values():
        spine.set(color=ORANGE if chosen else "0.8", linewidth=2.5 if chosen else 0.8)


def save(figure: Figure, name: str) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / name, dpi=110)
    plt.close(figure)


def main() -> None:
    stage()
    processes()
    spacings()
    noise()


if __name__ == "__main__":
    main()
