"""A pretrained network that no one here trained: the consistency U-Net in the wheel of adaptive-terrain-diffusion."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra fewstep[onnx]")
if importlib.util.find_spec("terrain_diffusion") is None:
    pytest.skip(
        "the network is not installed: pip install --no-deps adaptive-terrain-diffusion", allow_module_level=True
    )

from pages import run_page  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.kernels import philox  # noqa: E402

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "terrain" / "terrain.py"
# A noisy field reaches 4 x 80, and float32 rounds it to 2^-24 of that; the network's slope is below 1.
ROUNDED = 4.0 * 80.0 * 2.0**-24


@pytest.fixture(scope="module")
def terrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("terrain", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def denoiser(terrain: ModuleType) -> fs.Denoiser:
    made: fs.Denoiser = terrain.denoiser(threads=1)
    return made


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def by_hand(run: onnxruntime.InferenceSession, levels: list[float], difficulty: np.ndarray, seed: int) -> np.ndarray:
    """Song et al. 2023, Algorithm 1, around the network's own file: denoise, and add noise up to the next level."""
    shape = (len(difficulty), 1, 128, 128)

    def normals(draw: int, domain: int) -> np.ndarray:
        return np.stack([philox.normals(128 * 128, seed, i, draw, domain) for i in range(len(difficulty))]).reshape(
            shape
        )

    x = levels[0] * normals(0, philox.LATENT)
    for k, sigma in enumerate(levels):
        feeds = {"noisy": x.astype(np.float32), "sigma": np.full(len(x), sigma, np.float32), "difficulty": difficulty}
        (x,) = run.run(["denoised"], feeds)
        if k + 1 < len(levels):
            x = x + np.sqrt(levels[k + 1] ** 2 - 0.002**2) * normals(k + 1, philox.STEP)
    return np.asarray(x)


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_the_fields_are_those_of_the_loop_by_hand(terrain: ModuleType, denoiser: fs.Denoiser, calls: int) -> None:
    cond = terrain.condition([70])
    got = fs.Sampler(denoiser, terrain.plan(denoiser.process, calls), (1, *terrain.SHAPE))(seed=3, cond=cond)
    want = by_hand(session(terrain.weights()), terrain.LEVELS[calls], cond["difficulty"], 3)
    assert 0.05 < want.std() < 1.0
    np.testing.assert_allclose(got, want, atol=ROUNDED)


def test_two_calls_in_one_file(terrain: ModuleType, denoiser: fs.Denoiser, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra fewstep[onnx]")
    from fewstep.bindings.onnx_loop import save_loop

    plan, cond = terrain.plan(denoiser.process, 2), terrain.condition([40])
    path = save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=terrain.SHAPE)
    assert path.stat().st_size < 1.05 * terrain.weights().stat().st_size  # the weights are there once
    streams = philox.streams(5, 1).astype(np.int64)
    (got,) = session(path).run(["sample"], {"streams": streams, **cond})
    want = fs.Sampler(denoiser, plan, (1, *terrain.SHAPE))(seed=5, cond=cond)
    np.testing.assert_allclose(got, want, atol=ROUNDED)


def test_difficult_fields_are_rougher(terrain: ModuleType, denoiser: fs.Denoiser) -> None:
    cond = terrain.condition([1, 100])
    x = fs.Sampler(denoiser, terrain.plan(denoiser.process, 1), (2, *terrain.SHAPE))(seed=0, cond=cond)
    easy, hard = np.abs(np.diff(terrain.heights(x))).mean(axis=(1, 2))
    assert hard > 1.5 * easy > 0.0


def test_the_page(terrain: ModuleType) -> None:
    """docs/recipes/terrain.md: its plan is the example's, and so are its fields."""
    names = run_page("docs/recipes/terrain.md", {"path": str(terrain.weights())}, "terrain")
    plan = terrain.plan(names["denoiser"].process, 2)
    assert [stage.rows for stage in names["plan"].stages] == [stage.rows for stage in plan.stages]
    assert names["fields"].shape == (2, 1, 128, 128)
    assert 0.05 < names["fields"].std() < 1.0
