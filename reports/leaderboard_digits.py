"""The digits of the leaderboard: the teacher is a perceptron on the 64 pixels, and every student starts as it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fewstep import Trainer
from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.cli.output import contact_sheet, plotting
from fewstep.digits_data import HELD_OUT
from fewstep.distill_runs import training
from fewstep.distill_runs.digits import judge
from fewstep.distill_runs.metrics import sliced_wasserstein
from fewstep.distill_runs.networks import Points
from fewstep.distill_runs.pinwheel import train_denoiser
from fewstep.problems import energy_distance
from fewstep.solvers.files import write_whole
from fewstep.solvers.schedule.process import EDM, Flow

PIXELS, CLASSES = 64, 10
PROCESS = EDM(0.02, 40.0, 0.75)  # the pixels' standard deviation is 0.75
OCTAVES = 2  # few: the derivative in time is part of some methods' targets
WIDTH, DEPTH = 256, 3
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 4000, 256, 2e-3
BATCH, RATE = 128, 1e-3
SAMPLES = 5 * HELD_OUT  # of the held-out images' classes
KEPT, PICTURE = Path("build/leaderboard"), "leaderboard_digits.png"
ON_FLOW = ("rectified", "mean_flow", "flow_maps", "shortcut", "moment_matching")  # methods of a rectified flow


def training_data() -> tuple[Tensor, Tensor]:
    """The training images (N, 64) and their classes (N,)."""
    train = judge().train
    return train.x.flatten(1), train.label


@cache
def teacher() -> Denoiser:
    """A denoiser with the class as condition, trained once per process and always the same."""
    images, classes = training_data()

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.randint(len(images), (TEACHER_BATCH,), generator=g)
        return images[pick], classes[pick]

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = new_network()
        optimiser = torch.optim.AdamW(net.parameters(), TEACHER_RATE, weight_decay=0.01)
        return train_denoiser(net, PROCESS, optimiser, draw, steps=TEACHER_STEPS, levels=(-0.8, 1.4))


def new_network(*, ends: bool = False) -> Points:
    return Points(PIXELS, WIDTH, DEPTH, octaves=OCTAVES, classes=CLASSES, ends=ends)


class Velocity(nn.Module):
    """The velocity of a rectified flow, written with a network of EDM's scalings: it starts as the teacher's own.

    The denoiser D(x / alpha; sigma / alpha) with sigma_data = d gives, with alpha = 1 - t and q = (alpha d)^2 + t^2,

        (x - D) / t = x (t - alpha d^2) / q - d / sqrt(q) net(x / sqrt(q), ln(t / alpha) / 4).

    ends  whether forward takes s, the end of the step, which begins without effect
    """

    def __init__(self, teacher: Denoiser, *, ends: bool) -> None:
        super().__init__()
        assert isinstance(teacher.model, Points)
        self.net, self.deviation = new_network(ends=ends), teacher.sigma_data
        weights = dict(teacher.model.state_dict())
        first = weights["hidden.0.weight"]
        more = self.net.hidden[0].in_features - first.shape[1]  # the inputs of the end come before those of the class
        at = first.shape[1] - CLASSES
        weights["hidden.0.weight"] = torch.cat([first[:, :at], first.new_zeros(len(first), more), first[:, at:]], dim=1)
        self.net.load_state_dict(weights)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, s: Tensor | None = None) -> Tensor:
        alpha, d = 1.0 - t, self.deviation
        q = (alpha * d) ** 2 + t**2
        least = PROCESS.sigma_min / (1.0 + PROCESS.sigma_min)
        most = PROCESS.sigma_max / (1.0 + PROCESS.sigma_max)
        inside = t.clamp(least, most)
        level = (inside / (1.0 - inside)).log() / 4.0
        end = None if s is None else level - (t - s)  # the network sees the step's length
        raw = self.net(x / q.sqrt()[:, None], level, label=label, s=end)
        out: Tensor = x * ((t - alpha * d**2) / q)[:, None] - (d / q.sqrt())[:, None] * raw
        return out


def networks_for(method: str, *, data: bool) -> tuple[Denoiser | None, Denoiser]:
    """(teacher, student) of a method; data: without the teacher."""
    own = teacher()
    if method not in ON_FLOW:
        return None if data else own, own
    flow = Denoiser(own.model, Flow(), "edm", sigma_data=own.sigma_data)
    two_times = method != "rectified"
    kind = FlowMapDenoiser if two_times else Denoiser
    return None if data else flow, kind(Velocity(own, ends=two_times), Flow(), "flow")


def trained(
    method: str, steps: int, seed: int, options: dict[str, float], *, data: bool = False, rate: float = RATE
) -> training.Samplers:
    """The samplers of a method's student after `steps` steps."""
    images, classes = training_data()
    taught, student = networks_for(method, data=data)
    trainer = Trainer(
        method, teacher=taught, student=student, data=(images, {"label": classes}), steps=steps, batch=BATCH, lr=rate,
        seed=seed, device="cpu", options=options,
    )  # fmt: skip
    return trainer.fit().samplers


def labels(count: int) -> Tensor:
    """The classes of that many samples: those of the held-out images, again and again."""
    return repeated(judge().held.label, count)


def repeated(x: Tensor, count: int) -> Tensor:
    return torch.cat([x] * -(-count // len(x)))[:count]


def distances(x: Tensor) -> dict[str, float]:
    """SWD and energy distance of samples (n, 64) with these labels to the held-out images."""
    held = judge().held.x.flatten(1)
    return {"swd": sliced_wasserstein(x, repeated(held, len(x))), "energy distance": energy_distance(x, held)}


def other(count: int, seed: int) -> Tensor:
    """That many training images, of which there are few more than the measures take."""
    images = training_data()[0]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]


# --- the picture ---


def keep(title: str, drawn: Mapping[int, Tensor]) -> None:
    """Keep two digits of each class by number of calls, for the picture."""
    label = labels(SAMPLES)
    index = [int(i) for turn in range(2) for c in range(CLASSES) for i in (label == c).nonzero()[turn]]
    KEPT.mkdir(parents=True, exist_ok=True)
    for calls, x in drawn.items():
        training.write_array(kept_file(title, calls), x[index].float().numpy())


def kept_file(title: str, calls: int) -> Path:
    return KEPT / f"{title.replace(' ', '-')}-{calls}.npy"


def write_picture(folder: Path, titles: Sequence[str]) -> None:
    """Draw the digits of every row in its fewest calls, and the teacher's in all, if they are kept."""
    rows: list[tuple[str, int]] = []
    for title in titles:
        found = [(title, n) for n in (1, 2, 4, 50) if kept_file(title, n).exists()]
        rows += found if "Teacher" in title else found[:1]
    if not rows:
        return
    pyplot = plotting()
    columns = 4
    lines = -(-len(rows) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(12, 0.98 * lines), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for panel, (title, calls) in zip(axes.flat, rows, strict=False):
        x = np.load(kept_file(title, calls), allow_pickle=False).reshape(-1, 1, 8, 8)
        sheet = contact_sheet(x, CLASSES, enlarge=1)
        panel.imshow(sheet, cmap="gray_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
        panel.set_title(f"{title}, {calls} call{'s' * (calls > 1)}", fontsize=10)
    figure.tight_layout(pad=0.4, h_pad=0.8)
    write_whole(folder / PICTURE, lambda to: figure.savefig(to, dpi=90))
    pyplot.close(figure)


REMARKS = f"""\
![Digits of every method in its fewest calls, and of the teacher]({PICTURE})

Two digits of each class from the same latents, of the first seed: each student in its fewest calls.

The teacher is a perceptron of {DEPTH} layers of {WIDTH} on the {PIXELS} pixels that has learned the training images in
about 25 s; the shipped U-Net costs about 40 times as much per image ([two of its students](results.md)). Students have
the teacher's size and start as it, also those marked (data): as a denoiser, or as the velocity of a rectified flow.
`fewstep.Trainer` trains them, at a rate of {RATE:g}; the few options that are not its own are in
`reports/leaderboard.py` and were tried on the first seed.

The distances are to images that no network has seen. The other draws are training images: a teacher that is exact for
them repeats them and has the values of that row, so a network was taken, which must generalise. Both distances are of
pixels: the class means that one call of the teacher makes are far by them, a slight blur is not.

An untrained student has an SWD of 141 and an energy distance of 123 in four calls: LADD ends above its start there, and
its seeds differ.
""".splitlines()
