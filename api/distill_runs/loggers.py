"""Where a training run writes its numbers and samples: a CSV file, TensorBoard, Weights & Biases, or your own class."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.solvers.files import write_whole


class Logger(Protocol):
    """What a run calls: `log` every few steps, `samples` when it has drawn some. Only the first process does."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note the numbers after `step` steps."""

    def samples(self, step: int, name: str, x: NDArray[np.float32]) -> None:
        """Note samples (B, ...) of a student after `step` steps."""


class CsvLogger:
    """A CSV file with one row every few steps. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, after: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if after and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= after]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row, in the place of one for this step or a later one: a run that diverged goes back."""
        self.rows = [row for row in self.rows if int(row["step"]) < step]
        self.rows.append({"step": str(step), **{key: repr(float(value)) for key, value in values.items()}})

    def samples(self, step: int, name: str, x: NDArray[np.float32]) -> None:
        """A table has no place for samples."""

    def write(self) -> None:
        """Write the file whole."""
        names = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, lambda to: to.write_text(text.getvalue(), encoding="utf-8"))


class TensorBoardLogger:
    """Scalars and images in a TensorBoard folder; needs the package tensorboard.

    Samples of (B, 1 or 3, H, W) become an image grid; others are not written.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoardLogger needs tensorboard ({error}): pip install tensorboard") from None

        self.writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def samples(self, step: int, name: str, x: NDArray[np.float32]) -> None:
        if is_image(x):
            self.writer.add_images(name, as_picture(x[:64]), step, dataformats="NCHW")


class WandbLogger:
    """Scalars and images in a Weights & Biases run; needs the package wandb.

    settings  of `wandb.init`: project=, name=, mode="offline" ...
    """

    def __init__(self, **settings: Any) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(f"WandbLogger needs wandb ({error}): pip install wandb") from None

        self.wandb: Any = wandb
        self.run: Any = wandb.init(**settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def samples(self, step: int, name: str, x: NDArray[np.float32]) -> None:
        if is_image(x):
            pictures = [self.wandb.Image(image.transpose(1, 2, 0).squeeze()) for image in as_picture(x[:64])]
            self.run.log({name: pictures}, step=step)


def is_image(x: NDArray[np.float32]) -> bool:
    """Whether samples (B, ...) are grey or colour images."""
    return x.ndim == 4 and x.shape[1] in (1, 3)


def as_picture(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images in -1 .. 1 as images in 0 .. 1."""
    return np.asarray(np.clip(0.5 * x + 0.5, 0.0, 1.0), np.float32)
