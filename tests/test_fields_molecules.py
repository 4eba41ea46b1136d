"""examples/molecules: AlphaFold 3's sampler against a loop by hand in the published order."""

from __future__ import annotations

import json
import sys
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
    by_hand = molecules.by_hand(denoise, x, mask.numpy(), steps, turns, lambda k: own(k)[:, None, 4:7], noises)
    assert np.ptp(by_hand) > 10.0
    for i in range(batch):
        moved = kabsch(found[i], by_hand[i], mask[i].numpy())
        np.testing.assert_allclose(moved, by_hand[i], rtol=0, atol=1e-7)


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
