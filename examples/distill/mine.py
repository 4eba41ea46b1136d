r"""Data and a network of one's own for `fewstep distill`: a pinwheel of five arms, and a network that is told the arm.

    python examples/distill/mine.py
    fewstep distill consistency --data examples/distill/mine.py:make_data \
        --teacher examples/distill/mine.py:make_teacher --steps 4000 --batch 256 --lr 2e-3 --samples 1000 \
        --out build/pinwheel
    fewstep sample --model build/pinwheel --steps 4 --n 500 --out pinwheel.png
    python examples/distill/mine.py --student build/pinwheel --plot pinwheel.png

The first line trains the teacher. The last one draws teacher and student at 1, 2 and 4 calls and prints their sliced
Wasserstein distance to the data.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fewstep as fs

ARMS = 5
PROCESS = fs.EDM(sigma_min=0.01, sigma_max=20.0, sigma_data=0.5)
WEIGHTS = Path(os.environ.get("PINWHEEL", "build/pinwheel-teacher.safetensors"))


class Net(nn.Module):
    """network(x, t, arm) -> raw: three layers, to which time and arm are added."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.enter = nn.Linear(2, width)
        self.time = nn.Sequential(nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width))
        self.arm = nn.Embedding(ARMS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, arm: Tensor) -> Tensor:
        t = t.to(x.dtype)[:, None]
        told = self.time(torch.cat([t, t.sin(), t.cos(), (2 * t).sin(), (2 * t).cos()], dim=1)) + self.arm(arm)
        h = self.enter(x)
        for layer in self.layers:
            h = h + nn.functional.silu(layer(h + told))
        out: Tensor = self.leave(h)
        return out


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Points (count, 2) of a pinwheel (Johnson et al. 2016), and the arm of each."""
    arm = torch.randint(ARMS, (count,), generator=generator)
    radius = 0.6 + 0.18 * torch.randn((count,), generator=generator)
    across = 0.05 * torch.randn((count,), generator=generator)
    angle = 2 * math.pi * arm / ARMS + 1.2 * radius
    x, y = radius * angle.cos() - across * angle.sin(), radius * angle.sin() + across * angle.cos()
    return torch.stack([x, y], dim=1), {"arm": arm}


def make_data() -> Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
    """Fresh points at every step: a function of their number and a generator."""
    return draw


def make_student() -> Net:
    """The network of teacher and student, with weights from one seed in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def make_teacher() -> fs.Denoiser:
    """The trained teacher."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"there is no {WEIGHTS}: run python examples/distill/mine.py first")
    network = make_student()
    network.load_state_dict(load_file(WEIGHTS))
    return fs.Denoiser(network, PROCESS, "edm")


def train_teacher(steps: int = 6000, batch: int = 256) -> float:
    """Train the teacher by denoising, and write it. Returns its last losses' mean."""
    from fewstep.solvers.distill.losses import edm_weight, squared, weighted
    from fewstep.solvers.distill.network import noised, points_of, predict

    network = make_student()
    teacher = fs.Denoiser(network, PROCESS, "edm")
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    weight, losses = edm_weight(PROCESS.sigma_data), []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        x0, cond = draw(batch, g)
        sigma = (1.4 * torch.randn((batch,), generator=g) - 1.0).exp().clamp(PROCESS.sigma_min, PROCESS.sigma_max)
        at = points_of(PROCESS, sigma.double().numpy())
        x = noised(x0, torch.randn((batch, 2), generator=g), at)
        loss = weighted(squared(predict(teacher, x, at, cond), x0), weight(at))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), WEIGHTS)
    return sum(losses[-100:]) / len(losses[-100:])


def compare(folder: str, picture: str | None, count: int = 2000) -> dict[str, float]:
    """Distances of samples to the data, over the floor: that of a second draw of the data."""
    from fewstep.distill_runs.metrics import sliced_wasserstein

    held, cond = draw(count, torch.Generator().manual_seed(1))
    student, teacher = fs.load_student(folder, make_student()), make_teacher()
    again, arms = draw(count, torch.Generator().manual_seed(2))
    sets = {"data": again}
    for calls in (1, 2, 4, 50):
        plan = fs.plan("ddim", fs.grid(PROCESS, calls, "karras"))
        sets[f"teacher, {calls}"] = fs.Sampler(teacher, plan, (count, 2))(seed=0, cond=cond)
    for calls in student.calls:
        sets[f"student, {calls}"] = student.sample(count, calls, seed=0, cond=cond)
    distances = {name: sliced_wasserstein(x.numpy(), held.numpy()) for name, x in sets.items()}
    if picture is not None:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(2, 4, figsize=(12, 6), layout="constrained", sharex=True, sharey=True)
        for ax, (name, x) in zip(axes.flat, sets.items(), strict=False):
            ax.scatter(*x.T, c=(arms if name == "data" else cond)["arm"], s=2, cmap="tab10", vmax=9)
            calls = "" if name == "data" else " call" if name.endswith(" 1") else " calls"
            ax.set_title(f"{name}{calls}: SWD {distances[name]:.3f}", fontsize=12)
            ax.set_aspect("equal")
        axes[0, 0].set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        figure.savefig(picture, dpi=90)
    return distances


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6000, help="of the teacher's training")
    parser.add_argument("--student", help="the folder of a student: compare it instead of training the teacher")
    parser.add_argument("--plot", help="a .png file")
    given = parser.parse_args(words)
    if given.student is None:
        print(f"{WEIGHTS}: loss {train_teacher(given.steps):.3f}")
        return
    for name, distance in compare(given.student, given.plot).items():
        print(f"{name:12} {distance:.3f}")


if __name__ == "__main__":
    main()
