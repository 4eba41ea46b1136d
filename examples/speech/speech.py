"""Speech: a flow-matching decoder of mel frames, by Euler's method with guidance and sway sampling, without torch.

    python examples/speech/speech.py

F5-TTS (Chen et al. 2024) draws the frames of a text after those of a reference: 32 Euler steps from t = 0 (noise) to 1
on the times of sway sampling, its network called with and without the conditions, guidance strength 2. It integrates
with torchdiffeq. Here a small network of the same inputs, trained on a toy language, runs on ONNX Runtime alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fewstep as fs
from fewstep.bindings.onnx import OnnxModel, export_onnx

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fields import Table, options, outside, read_options, shares, show

if TYPE_CHECKING:
    import torch

MEL, FRAMES, REFERENCE = 100, 128, 32  # channels, frames, and how many of these are the reference's
LETTERS = 12  # of the toy language; 0 is no letter
STEPS, STRENGTH, SWAY = 32, 2.0, -1.0  # F5-TTS's own
FLOW = fs.Flow()


def sway(steps: int = STEPS, coefficient: float = SWAY) -> np.ndarray:
    """(steps + 1,) times of the loops by hand, noise at 0: t + s (cos(pi t / 2) - 1 + t) (Chen et al. 2024, eq. 7)."""
    t = np.linspace(0.0, 1.0, steps + 1)
    return t + coefficient * (np.cos(math.pi / 2.0 * t) - 1.0 + t)


# --- the network, which needs torch to be made and not to be run ---


def spoken(letters: np.ndarray, voice: np.ndarray) -> np.ndarray:
    """Frames (B, F, MEL) of letters (B, F) in the toy language, in voices (B,): a bump whose place is the letter's."""
    at = MEL * (letters[..., None] - 0.5) / (LETTERS - 1) + 6.0 * voice[:, None, None]
    frames: np.ndarray = 2.0 * np.exp(-0.5 * ((np.arange(MEL) - at) / 5.0) ** 2) - 0.5
    return frames.astype(np.float32)


def phrases(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """n utterances: their frames (B, F, MEL), letters (B, F) that last eight frames each, and the reference frames."""
    letters = rng.integers(1, LETTERS, (n, FRAMES // 8)).repeat(8, 1)
    frames = spoken(letters, rng.uniform(-1.0, 1.0, n))
    reference = frames.copy()
    reference[:, REFERENCE:] = 0.0
    return {"frames": frames, "letters": letters, "reference": reference}


def make_network(updates: int = 0, width: int = 96, seed: int = 0) -> torch.nn.Module:
    """The velocity noise - data of frames (B, F, MEL) at t (B,), data at t = 0, trained by flow matching.

    F5-TTS's own has data at t = 1 and predicts data - noise: wrap it as -network(x, 1 - t).
    """
    import torch
    from torch import nn

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.letters = nn.Embedding(LETTERS, 32)
            self.enter = nn.Linear(2 * MEL + 32 + 16, width)
            self.blocks = nn.ModuleList(nn.Conv1d(width, width, 7, padding=3 * d, dilation=d) for d in (1, 2, 4))
            self.leave, self.skip = nn.Linear(width, MEL), nn.Linear(16, 1)

        def forward(
            self, x: torch.Tensor, t: torch.Tensor, reference: torch.Tensor, letters: torch.Tensor
        ) -> torch.Tensor:
            angle = t[:, None, None] * torch.arange(1, 9) * math.pi * 0.5
            time = torch.cat([angle.sin(), angle.cos()], 2).expand(-1, FRAMES, -1)
            h = self.enter(torch.cat([x, reference, self.letters(letters), time], 2)).transpose(1, 2)
            for block in self.blocks:
                h = h + nn.functional.silu(block(h))
            found: torch.Tensor = self.leave(h.transpose(1, 2)) + self.skip(time) * x
            return found

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = Decoder()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(updates):
        given = {name: torch.from_numpy(array) for name, array in phrases(16, rng).items()}
        dropped = torch.rand(16) < 0.2  # both conditions, for guidance
        given["reference"][dropped], given["letters"][dropped] = 0.0, 0
        data, noise, t = given["frames"], torch.randn(16, FRAMES, MEL), torch.rand(16)
        x = (1.0 - t[:, None, None]) * data + t[:, None, None] * noise
        loss = (network(x, t, given["reference"], given["letters"]) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def write_network(network: torch.nn.Module, path: Path, batch: int = 2) -> None:
    import torch

    letters = torch.zeros(batch, FRAMES, dtype=torch.int64)
    frames = torch.zeros(batch, FRAMES, MEL)
    export_onnx(network, path, frames, {"reference": frames, "letters": letters})


# --- three loops ---


def null(batch: int) -> dict[str, np.ndarray]:
    """The conditions dropped."""
    return {
        "reference": np.zeros((batch, FRAMES, MEL), np.float32),
        "letters": np.zeros((batch, FRAMES), np.int64),
    }


def decoder(network: Any, batch: int = 1, **how: Any) -> fs.Sampler:
    """The loop on any network, ONNX Runtime's or torch's: a `Sampler` that is called with x and cond=(null, cond)."""
    # null + scale (cond - null) is F5-TTS's cond + strength (cond - null).
    denoiser = fs.Denoiser(network, FLOW, "flow", guidance=1.0 + STRENGTH)
    plan = fs.plan("euler", fs.grid(FLOW, STEPS, "sway", sway=SWAY))
    return fs.Sampler(denoiser, plan, (batch, FRAMES, MEL), **how)


def by_hand(network: Callable[..., np.ndarray], x: np.ndarray, cond: dict[str, np.ndarray]) -> np.ndarray:
    """The oracle, and what a loop around an ONNX session looks like; the network takes data at t = 0."""
    both = {name: np.concatenate([value, cond[name]]) for name, value in null(len(x)).items()}
    times = sway()
    for t, after in itertools.pairwise(times):
        out = -network(np.concatenate([x, x]), np.full(2 * len(x), 1.0 - t, np.float32), **both)  # data - noise
        free, told = out[: len(x)], out[len(x) :]
        x = x + (after - t).astype(x.dtype) * (told + STRENGTH * (told - free))
    return x


def by_torchdiffeq(network: torch.nn.Module, x: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    """F5-TTS's loop: odeint with a function that batches both branches."""
    import torch
    from torchdiffeq import odeint

    both = {name: torch.cat([torch.from_numpy(value), cond[name]]) for name, value in null(len(x)).items()}

    def velocity(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = -network(torch.cat([y, y]), (1.0 - t).repeat(2 * len(y)), **both)
        free, told = out.chunk(2)
        return told + STRENGTH * (told - free)

    path: torch.Tensor = odeint(velocity, x, torch.from_numpy(sway()).float(), method="euler")
    return path[-1]


# --- figures ---


def error(frames: np.ndarray, truth: np.ndarray) -> float:
    """The RMS distance from what the letters sound like, of the frames after the reference."""
    return float(np.sqrt(np.square(frames[:, REFERENCE:] - truth[:, REFERENCE:]).mean()))


def figures(updates: int, repeats: int) -> list[Table]:
    import torch

    network = make_network(updates)
    given = phrases(1, np.random.default_rng(1))
    x = np.random.default_rng(2).standard_normal((1, FRAMES, MEL)).astype(np.float32)
    cond = {name: given[name] for name in ("reference", "letters")}
    tensors = {name: torch.from_numpy(value) for name, value in cond.items()}
    nothing = {name: torch.from_numpy(value) for name, value in null(1).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.onnx"
        write_network(network, path)
        session = OnnxModel(path, threads=1)
    ours, torchs, noise = decoder(session), decoder(network), torch.from_numpy(x)
    sides: dict[str, dict[str, Callable[[], Any]]] = {
        "torch": {"Sampler": lambda: torchs(noise, cond=(nothing, tensors))},
        "ONNX Runtime": {
            "by hand in NumPy": lambda: by_hand(session, x, cond),
            "Sampler": lambda: ours(x, cond=(null(1), cond)),
        },
    }
    if importlib.util.find_spec("torchdiffeq"):
        sides["torch"] = {"torchdiffeq": lambda: by_torchdiffeq(network, noise, tensors), **sides["torch"]}
    two = [np.concatenate([x, x]), np.ones(2, np.float32)]
    both = {name: np.concatenate([value, cond[name]]) for name, value in null(1).items()}
    calls: dict[str, Callable[[], Any]] = {
        "torch": lambda: network(*map(torch.from_numpy, two), **{n: torch.from_numpy(v) for n, v in both.items()}),
        "ONNX Runtime": lambda: session(*two, **both),
    }
    tables = []
    for library, loops in sides.items():

        def alone(call: Callable[[], Any] = calls[library]) -> None:
            for _ in range(STEPS):
                call()

        ms, above = outside(alone, STEPS, loops, STEPS, repeats)
        rival = next(iter(loops))
        columns = ("loop", "us a step outside the network", "% of the latency", f"{rival}'s over it")
        tables.append(
            Table(f"{STEPS} steps on {library}, {ms:.1f} ms a call of both branches", columns, shares(ms, above, rival))
        )
    rng = np.random.default_rng(3)
    many = phrases(8, rng)
    cond = {name: many[name] for name in ("reference", "letters")}
    x = rng.standard_normal((8, FRAMES, MEL)).astype(np.float32)
    found = decoder(session, 8)(x, cond=(null(8), cond))
    mean = np.full_like(x, many["frames"].mean())
    rows = [
        [name, error(frames, many["frames"])]
        for name, frames in (("noise", x), ("the mean", mean), (f"{STEPS} steps", found))
    ]
    return [*tables, Table("Speech of the trained network", ("frames", "RMS error after the reference"), rows)]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--updates", type=int, default=800, help="of the training")
    given = read_options(parser, updates=30, repeats=3)
    import torch

    torch.set_num_threads(1)
    show(figures(given.updates, given.repeats), given.json)


if __name__ == "__main__":
    main()
