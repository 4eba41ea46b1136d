"""Train the digits U-Net that ships in fewstep/weights: `make weights`.

The data are scikit-learn's 1797 handwritten 8x8 digits, scaled to x / 8 - 1; 297 of them are held out. The network
(`fewstep.bindings.unet.UNet`) learns v = alpha eps - sigma x0 for `VP.linear()` at continuous t ~ U(0, 999) under the
plain squared error. The class is dropped at random for classifier-free guidance. The result is an exponential moving
average of the weights.

Two files are written at the end: digits.safetensors, and digits.json with the settings, the losses and an evaluation of
DDIM samples. Those that they replace are kept as digits.previous.*. The result depends only on the seed, the number of
threads and the torch build. Ctrl-C stops early, writes the weights so far, without the evaluation, and exits with 130.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from fewstep.bindings.unet import NO_CLASS, UNet
from fewstep.digits_data import Split, load_split
from fewstep.distill_runs.training import clip_gradients
from fewstep.problems import energy_distance
from fewstep.solvers.files import keep_previous, write_whole
from fewstep.solvers.schedule.process import VP

BANDS = (0.0, 50.0, 200.0, 400.0, 600.0, 800.0, 999.0)  # edges in t of the noise bands of the validation loss
VALIDATION_DRAWS = 4  # noisy versions of each held-out image per band

_PROCESS = VP.linear()
_T_MAX = _PROCESS.t_first
_VALIDATE_EVERY = 250


@dataclass(frozen=True)
class TrainingSettings:
    """All that a training run depends on, besides the library versions."""

    steps: int = 8000
    seed: int = 0
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    dropout: float = 0.1
    label_dropout: float = 0.12
    ema: float = 0.999
    samples: int = 1500
    threads: int = 2

    def lr_at(self, step: int) -> float:
        """A linear warm-up, then half a cosine to 0."""
        warm = min(1.0, (step + 1) / min(self.warmup, 1 + self.steps // 10))
        return self.lr * warm * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


def noised(x0: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(x, v) at times t (B,): x = alpha x0 + sigma eps and v = alpha eps - sigma x0."""
    alpha, sigma = levels(t)
    eps = torch.randn(x0.shape, generator=generator)
    return alpha * x0 + sigma * eps, alpha * eps - sigma * x0


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at times t (B,), as (B, 1, 1, 1) float32."""
    point = _PROCESS.point(t.double().numpy())
    alpha, sigma = torch.from_numpy(np.stack([point.alpha, point.sigma])).float()[..., None, None, None]
    return alpha, sigma


def stratified(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """`count` times in [low, high): one uniform draw in each of `count` equal parts, in random order."""
    part = torch.randperm(count, generator=generator)
    inside = torch.rand(count, generator=generator, dtype=torch.float64)
    return low + (high - low) * (part + inside) / count


@torch.no_grad()
def validation_loss(net: UNet, held: Split) -> list[float]:
    """Mean squared error of v in each noise band, on the same times and noise in every call."""
    generator = torch.Generator().manual_seed(1)
    x, label = held.x.repeat(VALIDATION_DRAWS, 1, 1, 1), held.label.repeat(VALIDATION_DRAWS)
    losses = []
    for low, high in pairwise(BANDS):
        t = stratified(len(x), low, high, generator)
        noisy, v = noised(x, t, generator)
        losses.append(float((net(noisy, t, label) - v).square().mean()))
    return losses


def overall(bands: list[float]) -> float:
    """The loss under t ~ U(0, 999), from the losses in the bands."""
    return float(np.average(bands, weights=np.diff(BANDS)))


@torch.no_grad()
def ddim(net: UNet, label: Tensor, guidance: float, steps: int, generator: torch.Generator) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12, eta = 0) from t = 999 over `steps` uniform times to clean data."""
    x = torch.randn((len(label), 1, 8, 8), generator=generator)
    times = torch.linspace(_T_MAX, -1.0, steps + 1, dtype=torch.float64)
    for t, after in pairwise(times[:, None]):
        v = net(x, t.expand(len(x)), label)
        if guidance != 1.0:
            none = net(x, t.expand(len(x)), torch.full_like(label, NO_CLASS))
            v = none + guidance * (v - none)
        (alpha, sigma), (alpha_after, sigma_after) = levels(t), levels(after)
        x = alpha_after * (alpha * x - sigma * v) + sigma_after * (sigma * x + alpha * v)
    return x


def evaluate(net: UNet, train: Split, held: Split, count: int, seed: int) -> dict[str, Any]:
    """Evaluate DDIM samples of 50 steps with the classes of the first `count` training images.

    The energy distance is to the held-out images; its floor is that of equally many training images. `nearest` is the
    median distance to the nearest training image: far below that of the held-out images, it would mean copying.
    """
    flat = {name: split.x.flatten(1).double().numpy() for name, split in (("train", train), ("held", held))}
    judge = SVC(gamma=0.02).fit(flat["train"], train.label)
    label = train.label[:count]
    result: dict[str, Any] = {
        "steps": 50,
        "samples": len(label),
        "classifier_held_out_accuracy": float(judge.score(flat["held"], held.label)),
        "floor": {
            "energy_distance": energy_distance(flat["train"][:count], flat["held"], unbiased=False),
            "nearest": _nearest(flat["held"], flat["train"]),
        },
    }
    for guidance in (1.0, 2.0):
        generator = torch.Generator().manual_seed(seed)
        made = ddim(net, label, guidance, 50, generator).flatten(1).double().numpy()
        result[f"guidance_{guidance:g}"] = {
            "accuracy": float(judge.score(made, label)),
            "energy_distance": energy_distance(made, flat["held"], unbiased=False),
            "nearest": _nearest(made, flat["train"]),
        }
    return result


def _nearest(x: NDArray[Any], data: NDArray[Any]) -> float:
    squared = (x**2).sum(1)[:, None] + (data**2).sum(1) - 2.0 * x @ data.T
    return float(np.median(np.sqrt(np.maximum(squared.min(1), 0.0))))


def train(settings: TrainingSettings, out: Path) -> dict[str, Any]:
    """Train and write both files into `out`. Returns the log that digits.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    data, held = load_split()
    start = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)  # it decides the order of sums
    try:
        net, curve, bands = _train_network(settings, data, held)
    finally:
        torch.set_num_threads(threads)
    done = curve[-1]["step"]
    log: dict[str, Any] = {
        "architecture": "fewstep.bindings.unet.UNet",
        "parameters": sum(p.numel() for p in net.parameters()),
        "process": "VP.linear()",
        "prediction": "v",
        "data": "sklearn.datasets.load_digits, x / 8 - 1",
        "data_mean": float(data.x.mean()),
        "data_std": float(data.x.std()),
        "images": {"train": len(data.x), "held_out": len(held.x)},
        "settings": asdict(settings),
        "steps_done": done,
        "training_seconds": round(time.perf_counter() - start, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "validation": {
            "loss": overall(bands),
            "bands": [
                {"t": [low, high], "loss": loss} for low, high, loss in zip(BANDS[:-1], BANDS[1:], bands, strict=True)
            ],
        },
        "curve": curve,
    }
    metadata = {key: log[key] for key in ("architecture", "process", "prediction", "data")}
    weights = safetensors.torch.save(net.state_dict(), metadata)
    for name in ("digits.safetensors", "digits.json"):
        keep_previous(out / name)
    write_whole(out / "digits.safetensors", lambda path: path.write_bytes(weights))
    if settings.samples and done == settings.steps:
        log["evaluation"] = evaluate(net, data, held, settings.samples, settings.seed)
    write_whole(out / "digits.json", lambda path: path.write_text(json.dumps(log, indent=2) + "\n"))
    return log


def _train_network(
    settings: TrainingSettings, data: Split, held: Split
) -> tuple[UNet, list[dict[str, Any]], list[float]]:
    """The averaged network, the losses over time and the last validation losses. Ctrl-C ends the training early."""
    torch.manual_seed(settings.seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(settings.seed)  # batches, times, noise, dropped labels
    net = UNet(dropout=settings.dropout)
    mean = UNet().eval().requires_grad_(False)
    mean.load_state_dict(net.state_dict())
    optimiser = torch.optim.AdamW(net.parameters(), settings.lr, weight_decay=settings.weight_decay)

    curve: list[dict[str, Any]] = []
    recent: list[float] = []
    done = 0

    def validate() -> list[float]:
        bands = validation_loss(mean, held)
        average = float(np.mean(recent)) if recent else None
        entry = {"step": done, "train": average, "validation": overall(bands)}
        recent.clear()
        curve.append(entry)
        bar.set_postfix(train=entry["train"], validation=entry["validation"])
        return bands

    with tqdm(total=settings.steps, desc="training", unit="step") as bar:
        try:
            while done < settings.steps:
                pick = torch.randint(len(data.x), (settings.batch,), generator=generator)
                drop = torch.rand(settings.batch, generator=generator) < settings.label_dropout
                label = data.label[pick].masked_fill(drop, NO_CLASS)
                t = stratified(settings.batch, 0.0, _T_MAX, generator)
                x, v = noised(data.x[pick], t, generator)
                for group in optimiser.param_groups:
                    group["lr"] = settings.lr_at(done)
                optimiser.zero_grad()
                loss = (net(x, t, label) - v).square().mean()
                loss.backward()
                clip_gradients([p.grad for p in net.parameters() if p.grad is not None])
                optimiser.step()
                done += 1
                memory = min(settings.ema, done / (done + 9))  # short at first, to forget the initial weights
                with torch.no_grad():
                    torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1.0 - memory)
                recent.append(float(loss.detach()))
                bar.update()
                if done % _VALIDATE_EVERY == 0 and done < settings.steps:
                    validate()
        except KeyboardInterrupt:
            bar.write(f"stopped after {done} of {settings.steps} steps: writing what there is")
        bands = validate()
    return mean, curve, bands


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    default = TrainingSettings()
    parser = argparse.ArgumentParser(
        prog="python -m reports.train_digits",
        description="Train the 8x8 digits U-Net and write digits.safetensors and digits.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    weights = Path(__file__).parent.parent / "api" / "weights"
    parser.add_argument("--out", type=Path, default=weights, help="folder to write to")
    parser.add_argument("--steps", type=_positive_steps, default=default.steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=default.seed, help="of everything but the held-out split")
    parser.add_argument("--samples", type=int, default=default.samples, help="images to evaluate, 0 for none")
    args = parser.parse_args(argv)
    log = train(TrainingSettings(steps=args.steps, seed=args.seed, samples=args.samples), args.out)
    print(f"validation loss {log['validation']['loss']:.4f} after {log['steps_done']} steps -> {args.out}")
    for name, value in log.get("evaluation", {}).items():
        print(f"  {name}: {value}")
    if log["steps_done"] < args.steps:
        raise SystemExit(130)


def _positive_steps(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number of steps")
    return value


if __name__ == "__main__":
    main()
