"""What MeanFlow's weight does to the velocity that is learnt, without any training: docs/distill/mean_flow_weight.png.

Data are eight modes in D elements, for which the velocities v that noised data x_t may come from can be drawn. The
plain square has its minimum at their mean, the flow's velocity. The papers' weight 1 / (|u - v|^2 + floor) acts as the
logarithm of that square, whose minimum is found by reweighting. `make mean-flow-report` draws the distance of the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MODES, STD, FLOOR = 8, 0.05, 1e-3
ELEMENTS, TIMES = (2, 4, 8, 16, 32, 128), (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
POINTS, DRAWS, ROUNDS = 200, 400, 60


def possible_velocities(x: Array, t: float, means: Array, g: np.random.Generator) -> Array:
    """Draws (DRAWS, D) of v = (x_t - x0) / t given x_t on a rectified flow from data of these modes (MODES, D)."""
    variance = (1.0 - t) ** 2 * STD**2 + t**2
    logits = -((x - (1.0 - t) * means) ** 2).sum(axis=1) / (2.0 * variance)
    weights = np.exp(logits - logits.max())
    mode = g.choice(MODES, DRAWS, p=weights / weights.sum())
    gain = (1.0 - t) * STD**2 / variance
    centre = means[mode] + gain * (x - (1.0 - t) * means[mode])
    x0 = centre + STD * t / np.sqrt(variance) * g.normal(size=centre.shape)
    return np.asarray((x - x0) / t)


def weighted_minimum(v: Array) -> Array:
    """The minimum over u of the mean of log(|u - v|^2 + FLOOR), from the mean of v on."""
    u = v.mean(axis=0)
    for _ in range(ROUNDS):
        w = 1.0 / (((u - v) ** 2).sum(axis=1) + FLOOR)
        u = (w[:, None] * v).sum(axis=0) / w.sum()
    return np.asarray(u)


def distances(elements: int, seed: int = 0) -> list[float]:
    """RMS distance of the two minima over the RMS velocity, at each of TIMES."""
    g = np.random.default_rng(seed)
    means = 0.5 * g.normal(size=(MODES, elements))
    found = []
    for t in TIMES:
        gaps, sizes = [], []
        for _ in range(POINTS):
            x0 = means[g.integers(MODES)] + STD * g.normal(size=elements)
            v = possible_velocities((1.0 - t) * x0 + t * g.normal(size=elements), t, means, g)
            gaps.append(((weighted_minimum(v) - v.mean(axis=0)) ** 2).mean())
            sizes.append((v.mean(axis=0) ** 2).mean())
        found.append(float(np.sqrt(np.mean(gaps) / np.mean(sizes))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/distill/mean_flow_weight.png"))
    given = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 3.4))
    for shade, elements in zip(np.linspace(0.0, 0.85, len(ELEMENTS)), ELEMENTS, strict=True):
        found = distances(elements)
        print(elements, *(f"{value:.3f}" for value in found), flush=True)
        axes.plot(TIMES, found, "o-", color=pyplot.get_cmap("viridis")(shade), label=f"{elements} elements")
    axes.set(xlabel="t (1 is noise)", ylabel="error of the velocity, relative", ylim=(0.0, None))
    axes.set_title("The minimum of the weighted loss against the flow's velocity", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(given.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
