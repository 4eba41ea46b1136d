"""examples/molecules: AlphaFold 3's sampler against a loop by hand in the published order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_edits_made import drawn, edit_noise, kabsch, rotation
from test_examples import loaded

import fewstep as fs
from fewstep.kernels import philox

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def molecules() -> ModuleType:
    return loaded("molecules/molecules.py")


def network(x: Any, t: Any, mask: Any) -> Any:
    """EDM's raw output. It does not turn with its input, as those networks do not."""
    lib = torch if isinstance(x, torch.Tensor) else np
    y = 0.6 * x + 0.2 * lib.roll(x, 1, 1) * mask[..., None]
    return y / (1.0 + y * y) + 0.1 * t[:, None, None]


@pytest.mark.parametrize("steps", [7, 25])
def test_the_sampler_of_alphafold_3(molecules: ModuleType, steps: int) -> None:
    """Equal up to a rigid motion, because the last augmentation comes after the last step here."""
    batch, atoms = 3, molecules.ATOMS
    mask = molecules.masks(batch).double()
    rigid = fs.edits.RigidAugment(mask)
    sampler = molecules.sampler(network, batch, steps, dtype="float64")
    found = sampler(seed=11, cond={"mask": mask}, edit=rigid, edit_x0=rigid).numpy()

    weights = mask.numpy()[..., None] / mask.numpy().sum(1)[:, None, None]
    spread = np.sqrt((weights**2).sum(1, keepdims=True))

    def own(k: int) -> np.ndarray:
        return edit_noise((batch, 10), k)

    def turns(k: int) -> np.ndarray:
        return np.stack([rotation(q) for q in own(k)[:, :4]])

    def noises(k: int) -> np.ndarray:
        """The step's draw, turned with the molecule, its mean drawn again."""
        z = drawn((batch, atoms, 3), k, philox.STEP)
        z = z - (weights * z).sum(1, keepdims=True)
        return z @ turns(k).swapaxes(1, 2) + spread * own(k)[:, None, 7:]

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        norm = np.sqrt(sigma**2 + 256.0)
        out = network(x / norm, np.full(batch, np.log(sigma) / 4.0), mask.numpy())
        return 256.0 / norm**2 * x + 16.0 * sigma / norm * out

    x = 2560.0 * drawn((batch, atoms, 3), 0, philox.LATENT)
    by_hand = molecules.by_hand(
        denoise,
        x,
        mask.numpy(),
        steps,
        lambda k, undo: undo @ turns(k).swapaxes(1, 2),
        lambda k: own(k)[:, None, 4:7],
        noises,
    )
    assert np.ptp(by_hand) > 10.0
    for i in range(batch):
        moved = kabsch(found[i], by_hand[i], mask[i].numpy())
        np.testing.assert_allclose(moved, by_hand[i], rtol=0, atol=1e-7)


def test_the_calls_of_boltz(molecules: ModuleType) -> None:
    """The loop by hand and the plan make the calls that boltz made, and end where it ended.

    Its draws in their order: the latent, then before each step a quaternion, a shift and the noise.
    """
    path = Path(molecules.__file__).with_name("boltz_calls.json")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    steps, draws = recorded["steps"], [np.array(draw) for draw in recorded["draws"]]
    latent, before = draws[0], [draws[i : i + 3] for i in range(1, len(draws), 3)]
    assert [draw.shape for draw in before[0]] == [(2, 4), (2, 1, 3), (2, 16, 3)]
    assert len(before) == steps
    inputs, times = [], []

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        norm = np.sqrt(sigma**2 + 256.0)
        inputs.append(x / norm)
        times.append(np.log(sigma / 16.0) / 4.0)  # of boltz: divided by sigma_data
        y = 0.6 * x / norm + 0.2 * np.roll(x / norm, 1, 1)
        return 256.0 / norm**2 * x + 16.0 * sigma / norm * (y / (1.0 + y * y) + 0.1 * times[-1])

    def turns(k: int, undo: np.ndarray) -> np.ndarray:
        return np.stack([rotation(q) for q in before[k][0]])

    found = molecules.by_hand(
        denoise,
        recorded["levels"][0] * latent,
        np.ones((2, 16)),
        steps,
        turns,
        lambda k: before[k][1],
        lambda k: before[k][2],
    )
    np.testing.assert_allclose(times, np.array(recorded["times"])[:, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(inputs, recorded["inputs"], rtol=1e-5, atol=1e-5)  # its float32
    result = np.array(recorded["result"])
    np.testing.assert_allclose(found, result, rtol=0, atol=1e-5 * result.std())

    plan = molecules.plan(steps)
    np.testing.assert_allclose(plan.grid.sigma, recorded["levels"], rtol=3e-6, atol=0)  # its float32
    sampled_at = []

    def noted(x: Any, t: Any, mask: Any) -> Any:
        sampled_at.append(float(t[0]) - np.log(16.0) / 4.0)
        return network(x, t, mask)

    molecules.sampler(noted, 2, steps)(seed=0, cond={"mask": molecules.masks(2)})
    np.testing.assert_allclose(sampled_at, np.array(recorded["times"])[:, 0], rtol=0, atol=1e-6)


def test_the_waits_of_the_published_loop(molecules: ModuleType) -> None:
    """Three numbers a step and an SVD; that the edits have none, test_edits_made.py shows."""
    levels = torch.tensor(fs.grid(molecules.AF3, 6, "karras").sigma, dtype=torch.float32)
    with molecules.Waits() as waits:
        molecules.published(network, levels[0] * torch.randn(2, 16, 3), molecules.masks(2), levels)
    assert waits.counts == {"_local_scalar_dense": 18, "linalg_svd": 6}


def test_the_network_turns_with_the_molecule_and_sees_no_padding(molecules: ModuleType) -> None:
    torch.manual_seed(0)
    made, mask = molecules.Network(16).double(), molecules.masks(2).double()
    x, t = torch.randn(2, 16, 3).double(), torch.tensor([0.1, 0.7]).double()
    turn = torch.from_numpy(rotation(np.array([0.3, -1.0, 0.2, 0.8])))
    with torch.no_grad():
        out = made(x, t, mask)
        torch.testing.assert_close(made(x @ turn.T + 2.0, t, mask), out @ turn.T, rtol=0, atol=1e-12)
        padded = x + (1.0 - mask)[..., None]
        torch.testing.assert_close(made(padded, t, mask) * mask[..., None], out * mask[..., None], rtol=0, atol=1e-12)
        mirror = torch.tensor([1.0, 1.0, -1.0]).double()
        assert (made(x * mirror, t, mask) - out * mirror).abs().max() > 1e-6  # it tells the two hands apart


def test_the_program(
    molecules: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["molecules.py", "--json", "--repeats", "3", "--updates", "5", "--steps", "6"])
    threads = torch.get_num_threads()
    try:
        molecules.main()
    finally:
        torch.set_num_threads(threads)
    speed, quality = json.loads(capsys.readouterr().out)
    assert [row[-1] for row in speed["rows"]] == ["3 numbers, 1 SVD", "none"]
    assert all(0.0 < row[1] < 100.0 and 0.0 <= row[2] <= 1.0 for row in quality["rows"])
