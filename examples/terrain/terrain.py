"""Terrain from a pretrained consistency network in 1, 2 and 4 calls, on ONNX Runtime.

    pip install --no-deps adaptive-terrain-diffusion  # whose wheel holds the network, 45 MB of ONNX
    python examples/terrain/terrain.py --plot terrain.png

The network is a consistency model (sigma .002 to 80, sigma_data .5) on height fields of 128x128. It takes the noisy
field, sigma and a difficulty, and returns the x0 prediction itself. It was distilled for one call: from levels below
about 10 it leaves half of the noise, so more calls stay above them. --no-deps, because the package asks for
onnxruntime-gpu, which may not stand beside onnxruntime; only its file is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from pathlib import Path

import numpy as np

import fewstep as fs
from fewstep.bindings.onnx import OnnxModel

WEIGHTS = "weights/terrain_consistency_unet_difficulty100.onnx"
SHAPE = (1, 128, 128)
LEVELS = {1: [80.0], 2: [80.0, 30.0], 4: [80.0, 60.0, 40.0, 30.0]}  # sigma of each call
HIGHEST, SCALE = 22.16864013671875, 0.1  # metres: the network's range of heights, and where it turns logarithmic


def weights() -> Path:
    """The network's file in the installed package. Raises FileNotFoundError."""
    found = importlib.util.find_spec("terrain_diffusion")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        if (path := Path(folder) / WEIGHTS).is_file():
            return path
    raise FileNotFoundError("the network is not installed: pip install --no-deps adaptive-terrain-diffusion")


def denoiser(threads: int | None = None) -> fs.Denoiser:
    network = OnnxModel(weights(), x="noisy", t="sigma", threads=threads)
    return fs.Denoiser(network, fs.EDM(sigma_min=0.002, sigma_max=80.0), predicts="sample")


def plan(process: fs.EDM, calls: int) -> fs.Plan:
    """Consistency sampling (Song et al. 2023, Algorithm 1) over `LEVELS`."""
    return fs.plan("consistency", fs.Grid.from_sigmas(process, [*LEVELS[calls], process.sigma_min]))


def condition(difficulties: list[int]) -> dict[str, np.ndarray]:
    """Difficulties 1 .. 100, one per sample, as the network takes them."""
    return {"difficulty": (np.array(difficulties, np.float32) - 1.0) / 99.0}


def heights(x: np.ndarray) -> np.ndarray:
    """Metres (B, 128, 128) from the network's -1 .. 1, which is logarithmic in the height."""
    metres = SCALE * np.sinh(np.clip((x[:, 0] + 1.0) / 2.0, 0.0, 1.0) * math.asinh(HIGHEST / SCALE))
    return np.asarray(metres - metres.min(axis=(1, 2), keepdims=True))


def plot(fields: dict[int, np.ndarray], difficulties: list[int], path: Path) -> None:
    """A row per number of calls, a column per difficulty; shaded by a light from the north west."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LightSource

    light, top = LightSource(azdeg=315.0, altdeg=45.0), max(float(made.max()) for made in fields.values())
    figure, axes = pyplot.subplots(
        len(fields), len(difficulties), figsize=(2.2 * len(difficulties), 2.25 * len(fields)), squeeze=False
    )
    for row, (calls, made) in zip(axes, fields.items(), strict=True):
        for axis, field, difficulty in zip(row, made, difficulties, strict=True):
            colours = pyplot.get_cmap("gist_earth")
            shaded = light.shade(field, colours, blend_mode="soft", vert_exag=20.0, vmin=-0.4 * top, vmax=top)
            axis.imshow(shaded)
            axis.set_xticks([])
            axis.set_yticks([])
            if calls == min(fields):
                axis.set_title(f"difficulty {difficulty}", fontsize=10)
        row[0].set_ylabel(f"{calls} call{'s' * (calls > 1)}", fontsize=10)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=64)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plot", type=Path, help="a picture of the fields")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="of ONNX Runtime, by default its own number")
    given = parser.parse_args()
    difficulties = [1, 25, 50, 75, 100]
    made, network = {}, denoiser(given.threads)
    for calls in LEVELS:
        sampler = fs.Sampler(network, plan(network.process, calls), (len(difficulties), *SHAPE))
        before = time.perf_counter()
        made[calls] = heights(sampler(seed=given.seed, cond=condition(difficulties)))
        seconds = time.perf_counter() - before
        steps = [f"{1000.0 * np.abs(np.diff(field)).mean():.0f}" for field in made[calls]]
        print(f"calls: {calls}, seconds: {seconds:.2f}, mean step in mm by difficulty: {', '.join(steps)}")
    if given.plot is not None:
        plot(made, difficulties, given.plot)


if __name__ == "__main__":
    main()
