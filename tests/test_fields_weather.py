"""examples/weather: GenCast's sampler against a loop by hand, on torch and on JAX."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_edits_made import drawn
from test_examples import loaded

from fewstep.kernels import philox

torch = pytest.importorskip("torch")

SEED = 11  # of `drawn`


@pytest.fixture(scope="module")
def weather() -> ModuleType:
    return loaded("weather/weather.py")


@pytest.fixture(scope="module")
def network(weather: ModuleType) -> Any:
    torch.manual_seed(1)
    return weather.Network(8, 2).eval()


def inputs(weather: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    before = weather.states(2, np.random.default_rng(0))[0]
    return 80.0 * np.random.default_rng(1).standard_normal(before.shape), before


def by_hand(weather: ModuleType, call: Any, x: np.ndarray, before: np.ndarray) -> np.ndarray:
    """With the draws of a `Sampler`: the churn of step k is drawn in the call before it, of two a step."""
    denoise = weather.denoised(call, lambda n, value: np.full(n, value, x.dtype), before)
    found: np.ndarray = weather.by_hand(denoise, x, lambda k: drawn(x.shape, 2 * k, philox.STEP, SEED))
    return found


def test_on_torch(weather: ModuleType, network: Any) -> None:
    x, before = inputs(weather)
    made = torch.nn.Module.double(weather.Network(8, 2).eval())
    made.load_state_dict(network.state_dict())
    cond = torch.from_numpy(before).double()

    def call(x: np.ndarray, t: np.ndarray, before: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out: np.ndarray = made(torch.from_numpy(x), torch.from_numpy(t), cond).numpy()
        return out

    sampler = weather.sampler_of(made, x.shape, dtype="float64")
    found = sampler(torch.from_numpy(x), seed=SEED, cond={"before": cond}).numpy()
    np.testing.assert_allclose(found, by_hand(weather, call, x, before), rtol=0, atol=1e-9 * np.abs(found).max())


def test_the_plan(weather: ModuleType) -> None:
    """39 calls; the levels are GenCast's, raised by an eighth from 0.75 on."""
    plan = weather.plan()
    ramp = np.linspace(80.0 ** (1 / 7), 0.03 ** (1 / 7), 20) ** 7
    np.testing.assert_allclose(weather.grid().sigma, [*ramp, 0.0], rtol=1e-12)
    starts = [stage.at.sigma for stage in plan.stages][::2]
    np.testing.assert_allclose(starts, np.where(ramp >= 0.75, 1.125, 1.0) * ramp, rtol=1e-12)
    assert plan.nfe == 39


def test_on_jax(weather: ModuleType, network: Any) -> None:
    """The same forecast as the loop by hand, as a JAX array, from a network that is torch's to rounding."""
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    jax = sys.modules["jax"]
    x, before = inputs(weather)
    x = x.astype(np.float32)
    model, t = weather.in_jax(network), np.array([0.1, 0.4], np.float32)
    with torch.no_grad():
        theirs = network(*map(torch.from_numpy, (x / 80.0, t, before))).numpy()
    np.testing.assert_allclose(model(x / 80.0, t, before), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    found = weather.jax_sampler(model, x.shape)(jnp.asarray(x), seed=SEED, cond={"before": jnp.asarray(before)})
    assert isinstance(found, jax.Array)

    def call(x: np.ndarray, t: np.ndarray, before: np.ndarray) -> np.ndarray:
        return np.asarray(model(x.astype(np.float32), t.astype(np.float32), before), np.float64)

    oracle = by_hand(weather, call, x.astype(np.float64), before)
    np.testing.assert_allclose(found, oracle, rtol=0, atol=2e-5 * np.abs(oracle).max())


def test_the_program(weather: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["weather.py", "--json", "--repeats", "2", "--updates", "5"])
    monkeypatch.setattr(weather, "skill", lambda network: weather.Table("none", ("a",), []))  # 128 forecasts
    threads = torch.get_num_threads()
    try:
        weather.main()
    finally:
        torch.set_num_threads(threads)
    first, *_ = json.loads(capsys.readouterr().out)
    assert [row[0] for row in first["rows"]] == ["by hand", "Sampler"]


def test_the_ensemble_knows_its_error(weather: ModuleType) -> None:
    """A network that knows the answer gives it back, whatever the noise."""
    _, truth = weather.states(2, np.random.default_rng(1))
    many = torch.from_numpy(truth.repeat(3, 0))

    class Exact(torch.nn.Module):
        def forward(self, x: Any, t: Any, before: Any) -> Any:
            sigma = torch.exp(4.0 * t)[:, None, None, None]
            norm = (sigma**2 + 1.0).sqrt()
            return (many - x / norm) * norm / sigma

    rows = dict(weather.skill(Exact(), 2, 3).rows)
    assert rows["residual itself"] == pytest.approx(float(np.sqrt(np.square(truth).mean())))
    for name in ("error of the ensemble's mean", "spread of the ensemble", "error of the best member"):
        assert rows[name] < 1e-3, name
