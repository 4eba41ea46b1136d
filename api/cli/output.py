"""Samples of the command line: drawn as NumPy arrays, and written to pictures and archives."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.solvers.files import check_target, write_whole
from fewstep.solvers.options import counted
from fewstep.solvers.run.arrays import no_grad

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fewstep.solvers.run.sampler import Sampler

NO_MATPLOTLIB = "pictures and plots need matplotlib: pip install 'fewstep[plot]'"
SUFFIXES = (".png", ".npz")


def check_out(path: Path, suffixes: tuple[str, ...] = SUFFIXES, flag: str = "--out") -> None:
    """Raises an error unless the file can be written (`check_target`) and matplotlib is there for a picture."""
    check_target(path, suffixes, flag)
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(NO_MATPLOTLIB)


def draw(sampler: Sampler, **given: Any) -> np.ndarray:
    """A batch of a sampler as a NumPy array, from any device and without a graph of gradients."""
    with no_grad(sampler.frame):
        x = sampler(**given)
    return x if isinstance(x, np.ndarray) else np.asarray(x.cpu())


def drawable(shape: Sequence[int]) -> bool:
    """Whether samples of that shape are images or points in a plane."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or (len(shape) == 1 and shape[0] <= 2)


def check_drawable(path: Path, shape: Sequence[int]) -> None:
    """Raises ValueError for a picture of what is neither an image nor a point in a plane.

    shape  of one sample
    """
    if path.suffix == ".png" and not drawable(shape):
        raise ValueError(
            f"--out {path}: samples of shape {tuple(shape)} are neither images, (1, H, W) or (3, H, W), nor points in "
            "a plane: write them to an .npz archive"
        )


def write_samples(
    path: Path,
    x: np.ndarray,
    labels: np.ndarray | None,
    settings: Mapping[str, object],
    data: np.ndarray | None = None,
) -> None:
    """Write a sheet of images (B, 1 or 3, H, W), a scatter plot of points (B, 2), or, to .npz, samples and settings.

    data  points to draw beneath
    """
    if path.suffix == ".npz":
        record = np.array(json.dumps(dict(settings)))
        if labels is None:
            write_whole(path, lambda to: np.savez_compressed(to, x=x, settings=record))
        else:
            write_whole(path, lambda to: np.savez_compressed(to, x=x, settings=record, labels=labels))
        return
    pyplot = plotting()
    if x.ndim == 4:
        shades = shades_of(contact_sheet(x))
        write_whole(path, lambda to: pyplot.imsave(to, shades, cmap="gray_r", vmin=-1.0, vmax=1.0))
        return
    figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
    scatter(axes, x, data)
    beneath = "" if data is None else "; grey: data"
    calls = counted(settings["nfe"], "call")
    axes.set_title(f"{settings.get('model')}, {settings.get('solver')}, {calls}{beneath}")
    write_whole(path, lambda to: figure.savefig(to, dpi=120))
    pyplot.close(figure)


def scatter(axes: Axes, x: np.ndarray, data: np.ndarray | None = None) -> None:
    """Points (B, 1) or (B, 2), over those of the data in grey. Few points are drawn larger."""

    def plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return points[:, 0], points[:, 1] if points.shape[1] > 1 else np.zeros(len(points))

    if data is not None:
        axes.scatter(*plane(data), s=6, color="0.82", linewidths=0, zorder=1)
    axes.scatter(*plane(x), s=float(np.clip(2000.0 / len(x), 4.0, 40.0)), alpha=0.6, linewidths=0, zorder=2)
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)


def contact_sheet(x: np.ndarray, columns: int | None = None, enlarge: int = 8) -> np.ndarray:
    """Images (B, C, H, W) in rows of `columns`, a line between them, small ones `enlarge` times as wide.

    By default there are about as many columns as rows, in tens: digits come in the order of their classes.

    Returns (height, width) for one channel, else (height, width, C), in -1 .. 1.
    """
    count, channels, height, width = x.shape
    enlarge = max(1, min(enlarge, 64 // max(height, width)))
    columns = 10 * max(1, round(math.sqrt(count) / 10)) if columns is None else columns
    rows = -(-count // columns)
    gap = 1
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), -1.0)
    for i, image in enumerate(x.transpose(0, 2, 3, 1)):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        sheet[top : top + height, left : left + width] = np.clip(image, -1.0, 1.0)
    large = sheet.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    return large[..., 0] if channels == 1 else large


def shades_of(sheet: np.ndarray) -> np.ndarray:
    """A contact sheet as matplotlib takes it: colours, which take no map, in 0 .. 1."""
    return sheet if sheet.ndim == 2 else (sheet + 1.0) / 2.0


def plotting() -> ModuleType:
    """matplotlib's pyplot on a canvas that needs no screen. Raises ImportError if matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise ImportError(NO_MATPLOTLIB) from None
    return pyplot
