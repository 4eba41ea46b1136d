"""Training data of one's own: arrays, data sets, functions that draw, folders; batches that are loaded in part.

A sample is x0, or (x0, condition). A condition may nest mappings, lists and tuples of arrays, whose first axis is that
of the samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from fewstep.solvers.files import shown
from fewstep.solvers.run.conditions import leaves, mapped, name_of

Cond: TypeAlias = dict[str, Any]
Drawn: TypeAlias = tuple[Tensor, Cond]

ARRAYS = (".npy", ".npz", ".safetensors")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NAMES = ("x0", "x", "images", "latents")  # under which an archive may hold the samples


class Source(Protocol):
    """Samples by number, or drawn by a generator. size: how many there are, or None for no end."""

    size: int | None

    def chosen(self, count: int, g: torch.Generator) -> Callable[[slice], Drawn]:
        """Draw which samples a batch has. Returns what loads a part of it."""


class Batch:
    """The batch of all processes. batch[part] loads (x0, noise, condition) of a part, on the device."""

    def __init__(self, load: Callable[[slice], Drawn], noise: Tensor, device: torch.device) -> None:
        self._load, self._noise, self._device = load, noise, device

    def __getitem__(self, part: slice) -> tuple[Tensor, Tensor, Cond]:
        x0, cond = self._load(part)
        return x0.float().to(self._device), self._noise[part].to(self._device), on_device(cond, self._device)


def on_device(tree: Any, device: torch.device) -> Any:
    """A tree of conditions with its tensors on a device."""
    return mapped(lambda v: v.to(device) if isinstance(v, Tensor) else v, tree)


class Arrays:
    """Samples in memory. x0: (N, ...); cond: arrays of N, nested or not."""

    def __init__(self, x0: Tensor, cond: Cond | None = None) -> None:
        self.x0, self.cond = x0, cond or {}
        self.size: int | None = len(x0)
        for path, value in leaves(self.cond):
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(x0):
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"data: {name_of(path)} is {found}; it must be an array of the {len(x0)} samples")

    def chosen(self, count: int, g: torch.Generator) -> Callable[[slice], Drawn]:
        pick = torch.randint(len(self.x0), (count,), generator=g)
        return lambda part: self.at(pick[part])

    def at(self, index: Tensor) -> Drawn:
        """The samples of these numbers."""
        return self.x0[index], mapped(lambda v: v[index], self.cond)


class Items:
    """A data set with `len` and numbered samples, such as a `torch.utils.data.Dataset`."""

    def __init__(self, items: Sequence[object]) -> None:
        self.items = items
        self.size: int | None = len(items)

    def chosen(self, count: int, g: torch.Generator) -> Callable[[slice], Drawn]:
        pick = torch.randint(len(self.items), (count,), generator=g)

        def load(part: slice) -> Drawn:
            return as_drawn(default_collate([self.items[int(i)] for i in pick[part]]), "data")

        return load


class Stream:
    """A function draw(count, generator) -> x0 (count, ...), or (x0, condition)."""

    size: int | None = None

    def __init__(self, draw: Callable[[int, torch.Generator], object]) -> None:
        self.draw = draw

    def chosen(self, count: int, g: torch.Generator) -> Callable[[slice], Drawn]:
        x0, cond = as_drawn(self.draw(count, g), "data(count, generator)")
        if len(x0) != count:
            raise ValueError(f"data(count, generator) returned {len(x0)} samples for count = {count}")
        return lambda part: (x0[part], mapped(lambda v: v[part], cond))


def as_drawn(value: object, what: str) -> Drawn:
    """x0 and its condition. Raises TypeError for anything else."""
    cond: object = {}
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Mapping):
        value, cond = value
    value, cond = as_tensors(value), as_tensors(cond)
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} gives {type(value).__name__}; it must give x0, or (x0, a mapping of conditions)")
    return value, dict(cast(Mapping[str, Any], cond))


def as_tensors(tree: object) -> Any:
    """NumPy arrays of a tree as tensors."""
    return mapped(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) and v.dtype.kind in "fiub" else v, tree)


def as_source(data: object) -> Source:
    """Any accepted form of training data as a source.

    data  an array (N, ...) or (array, mapping of conditions), a data set with `len` and numbered samples, a function
          draw(count, generator), or a folder (`read_folder`)

    Raises TypeError for anything else, and ValueError for data that no run can train on.
    """
    if isinstance(data, (str, os.PathLike)):
        data = read_folder(Path(data))
    if isinstance(data, SOURCES):
        return cast(Source, data)
    pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Mapping)
    if isinstance(data, (Tensor, np.ndarray)) or pair:
        x0, cond = as_drawn(data, "data")
        if x0.ndim < 2 or len(x0) == 0:
            raise ValueError(f"data has shape {tuple(x0.shape)}; it must be (N, ...), N samples of at least one axis")
        check_samples(x0, "data")
        return Arrays(x0, cond)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items = cast(Sequence[object], data)
        if len(items) == 0:
            raise ValueError("data has no samples")
        return Items(items)
    if callable(data) and not isinstance(data, type):
        return Stream(data)
    raise TypeError(
        f"data is {type(data).__name__}; it must be an array (N, ...), (array, conditions), a data set with len and "
        "numbered samples, a function draw(count, generator), or a folder"
    )


SOURCES = (Arrays, Items, Stream)


def check_samples(x0: Tensor, what: str) -> None:
    """Raises ValueError for samples that are no finite numbers, or are still 8-bit pixels."""
    if not x0.is_floating_point():
        hint = "scale pixels to -1 .. 1, x / 127.5 - 1" if x0.dtype == torch.uint8 else "convert them to float32"
        raise ValueError(f"{what} has dtype {str(x0.dtype).removeprefix('torch.')}; samples must be floats: {hint}")
    bad = ~torch.isfinite(x0.flatten(1)).all(dim=1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{what} has {int(bad.sum())} samples that are not finite, the first of them number {first}")
    if len(x0) > 1 and float(x0.abs().max()) > 100.0:
        largest = float(x0.abs().max())
        raise ValueError(f"{what} has values up to {largest:.4g}; scale the samples to a standard deviation near 1")


def read_folder(folder: Path) -> Arrays:
    """The samples of a folder, or of one file in it.

    One .npy file holds the samples; an .npz or .safetensors file holds them as "x0" (or "x", "images", "latents") and
    everything else as conditions by name. Otherwise the folder holds pictures of one size, scaled to -1 .. 1; those in
    subfolders get the number of their folder, in the order of the names, as the condition "label".

    Raises FileNotFoundError; ValueError for a folder that holds none of these.
    """
    if folder.is_file():
        return _read_array(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data {shown(folder)}: there is no such file or folder")
    arrays = sorted(p for p in folder.iterdir() if p.suffix in ARRAYS)
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    if len(arrays) == 1 and not pictures:
        return _read_array(arrays[0])
    if arrays or not pictures:
        have = f"{len(arrays)} arrays and {len(pictures)} pictures"
        raise ValueError(
            f"data {shown(folder)} holds {have}: it must hold one {', '.join(ARRAYS)} file, or pictures alone "
            f"({', '.join(PICTURES)})"
        )
    return _read_pictures(folder, pictures)


def _read_array(path: Path) -> Arrays:
    what = f"data {shown(path)}"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: dict[str, Any] = load_file(path)
        elif path.suffix in (".npy", ".npz"):
            loaded = np.load(path, allow_pickle=False)
            found = {"x0": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
        else:
            raise ValueError(f"the file must end in {', '.join(ARRAYS)}")
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    name = next((n for n in NAMES if n in found), None)
    if name is None:
        have = ", ".join(found) or "nothing"
        raise ValueError(f"{what} holds {have}; the samples must be called {' or '.join(NAMES)}")
    x0 = as_tensors(found.pop(name))
    if not isinstance(x0, Tensor) or x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"{what}: {name} must be an array (N, ...) of N samples")
    check_samples(x0, what)
    return Arrays(x0, as_tensors(found))


def _read_pictures(folder: Path, paths: Sequence[Path]) -> Arrays:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("pictures as data need pillow: pip install pillow") from None
    read, size = [], None
    for path in paths:
        with Image.open(path) as image:
            mode = "L" if image.mode in ("1", "L", "I;16") else "RGB"
            pixels = np.asarray(image.convert(mode), np.float32)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if size is not None and pixels.shape != size:
            raise ValueError(f"data: {shown(path)} is {pixels.shape}, {shown(paths[0])} {size}: make them one size")
        size = pixels.shape
        read.append(torch.from_numpy(pixels / 127.5 - 1.0))
    classes = sorted({path.parent.relative_to(folder).as_posix() for path in paths})
    if classes == ["."]:
        return Arrays(torch.stack(read))
    labels = [classes.index(path.parent.relative_to(folder).as_posix()) for path in paths]
    return Arrays(torch.stack(read), {"label": torch.tensor(labels)})
