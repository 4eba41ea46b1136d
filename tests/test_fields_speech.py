"""examples/speech: the decoder's loop against the one by hand and torchdiffeq's, and without torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_examples import EXAMPLES, loaded

import fewstep as fs

torch = pytest.importorskip("torch")
for needed in ("onnx", "onnxruntime"):
    pytest.importorskip(needed)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's exporter
    pytest.mark.filterwarnings("ignore:You are using the legacy:UserWarning"),
]
TOLERANCE = 1e-5  # of the largest element, for 32 float32 steps


@pytest.fixture(scope="module")
def speech() -> ModuleType:
    return loaded("speech/speech.py")


@pytest.fixture(scope="module")
def network(speech: ModuleType) -> Any:
    return speech.make_network(width=32, seed=4)


@pytest.fixture(scope="module")
def written(speech: ModuleType, network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("speech") / "decoder.onnx"
    speech.write_network(network, path)
    return path


def inputs(speech: ModuleType) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    given = speech.phrases(2, np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((2, speech.FRAMES, speech.MEL)).astype(np.float32)
    return x, {name: given[name] for name in ("reference", "letters")}


def close(found: np.ndarray, by_hand: np.ndarray) -> None:
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=TOLERANCE * np.abs(by_hand).max())


def test_sway(speech: ModuleType) -> None:
    """With a coefficient of -1 the times are 1 - cos(pi t / 2); 0 leaves them equal."""
    expected = [1.0 - math.cos(math.pi / 2.0 * k / 32) for k in range(33)]
    np.testing.assert_allclose(speech.sway(), expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(speech.sway(4, 0.0), [0.0, 0.25, 0.5, 0.75, 1.0], rtol=0, atol=0)
    np.testing.assert_allclose(1.0 - fs.grid(fs.Flow(), 32, "sway").t, expected, rtol=0, atol=1e-15)


def test_on_onnx_runtime(speech: ModuleType, written: Path) -> None:
    session = speech.OnnxModel(written, threads=1)
    x, cond = inputs(speech)
    by_hand = speech.by_hand(session, x.astype(np.float64), cond)
    close(speech.decoder(session, 2)(x, cond=(speech.null(2), cond)), by_hand)
    # The conditions and their strength count.
    assert np.abs(speech.by_hand(session, x.astype(np.float64), speech.null(2)) - by_hand).max() > 1e-2


def test_without_torch(speech: ModuleType, written: Path, tmp_path: Path) -> None:
    """The same frames in a process that cannot import torch."""
    x, cond = inputs(speech)
    np.savez(tmp_path / "in.npz", x=x, **cond)
    code = f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(EXAMPLES / "speech")!r})
import numpy as np
import speech
given = np.load("in.npz")
cond = {{name: given[name] for name in ("reference", "letters")}}
session = speech.OnnxModel({str(written)!r}, threads=1)
np.save("out.npy", speech.decoder(session, 2)(given["x"], cond=(speech.null(2), cond)))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    session = speech.OnnxModel(written, threads=1)
    close(np.load(tmp_path / "out.npy"), speech.by_hand(session, x.astype(np.float64), cond))


def test_beside_torchdiffeq(speech: ModuleType, network: Any) -> None:
    pytest.importorskip("torchdiffeq", reason="torchdiffeq, F5-TTS's integrator, is not installed")
    x, cond = inputs(speech)
    tensors = {name: torch.from_numpy(value) for name, value in cond.items()}
    nothing = {name: torch.from_numpy(value) for name, value in speech.null(2).items()}
    with torch.no_grad():
        theirs = speech.by_torchdiffeq(network, torch.from_numpy(x), tensors)
    close(speech.decoder(network, 2)(torch.from_numpy(x), cond=(nothing, tensors)).numpy(), theirs.numpy())


def test_the_program(speech: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["speech.py", "--json", "--repeats", "2", "--updates", "25"])
    threads = torch.get_num_threads()
    try:
        speech.main()
    finally:
        torch.set_num_threads(threads)
    *latencies, quality = json.loads(capsys.readouterr().out)
    assert [table["rows"][-1][0] for table in latencies] == ["Sampler", "Sampler"]
    assert [row[0] for row in quality["rows"]] == ["noise", "the mean", "32 steps"]
