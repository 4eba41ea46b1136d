"""examples/policy: the loops of the policies against those by hand, and against the recorded calls of lerobot."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_examples import loaded

import fewstep as fs

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:the samples have an RMS:RuntimeWarning"),  # of untrained networks
]

X = torch.randn(3, 16, 7, generator=torch.Generator().manual_seed(5))
OBSERVED = 0.3 * torch.ones(3, 2, 7)


@pytest.fixture(scope="module")
def policy() -> ModuleType:
    return loaded("policy/policy.py")


def network(policy: ModuleType, top: float = 100.0) -> Any:
    torch.manual_seed(2)
    made = policy.Network(64, 2, top).eval()
    with torch.no_grad():
        made.leave.weight *= 3.0  # predictions of the size of noise, so that some are clipped and some are not
    return made


def by_numpy(made: Any) -> Any:
    """The network on (B, 16, 7) of NumPy and one time."""

    def call(x: np.ndarray, t: float) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = made(torch.from_numpy(x).float(), torch.full((len(x),), float(t)), OBSERVED).numpy()
        return found.astype(np.float64)

    return call


def draws() -> Any:
    generator = torch.Generator().manual_seed(3)
    return lambda k: torch.randn(X.shape, generator=generator).double().numpy()


@pytest.mark.parametrize(("kind", "steps"), [("DDPM", 100), ("DDIM", 10)])
def test_diffusion_policies(policy: ModuleType, kind: str, steps: int) -> None:
    """The twin in the policy's loop and the `Sampler` are the oracle to float32, with the same noise."""
    made = network(policy)
    call, start = by_numpy(made), X.double().numpy()
    noisy = kind == "DDPM"
    with torch.no_grad():
        twin = policy.policy_loop(made, policy.scheduler(kind), X, OBSERVED, steps, 3).numpy()
    oracle = policy.diffusion_by_hand(call, start, steps, draws() if noisy else None)
    np.testing.assert_allclose(twin, oracle, rtol=0, atol=5e-5)

    sampler = policy.diffusion_sampler(made, kind, steps, X.shape)
    noise = draws()
    found = sampler(X, noise=lambda k, at, to, shape: torch.from_numpy(noise(k)).float(), cond={"observed": OBSERVED})
    clipped = policy.diffusion_by_hand(call, start, steps, draws() if noisy else None, reuse=True)
    np.testing.assert_allclose(found.numpy(), clipped, rtol=0, atol=5e-5)
    if not noisy:  # the page says that they differ where the clip acts
        assert np.abs(oracle - clipped).max() > 1e-2


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_the_recorded_calls(policy: ModuleType, kind: str) -> None:
    """The scheduler object that the policy constructs, called as recorded, beside diffusers' own."""
    import diffusers

    calls = policy.CALLS[kind]
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(len(calls["step"]["timesteps"]), *calls["step"]["shape"], generator=generator)
    ends = []
    for home in (diffusers, policy.twins):
        scheduler, own = policy.scheduler(kind, home), torch.Generator().manual_seed(1)
        scheduler.set_timesteps(*calls["set_timesteps"])
        assert scheduler.timesteps.tolist() == calls["step"]["timesteps"]
        x = X[:1]
        for t, out in zip(scheduler.timesteps, outs, strict=True):
            result = scheduler.step(out, t, x, **dict.fromkeys(calls["step"]["keywords"], own))
            x = getattr(result, calls["step"]["result"])
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    assert issubclass(getattr(policy.twins, f"{kind}Scheduler"), getattr(diffusers, f"{kind}Scheduler"))


@pytest.mark.parametrize(("n", "delay"), [(0, 0), (10, 4), (16, 16)])
def test_a_flow_policy_with_a_prefix(policy: ModuleType, n: int, delay: int) -> None:
    made = network(policy, 1.0)
    left = np.random.default_rng(0).standard_normal((n, 7)) if n else None
    prefix = fs.edits.Prefix(left, delay) if left is not None else None
    found = policy.flow_sampler(made, X.shape)(X, cond={"observed": OBSERVED}, edit_x0=prefix).numpy()
    by_hand = policy.flow_by_hand(by_numpy(made), X.double().numpy(), left, delay)
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=2e-5)
    if left is not None:
        np.testing.assert_array_equal(found[:, :delay], np.broadcast_to(np.float32(left[:delay]), (3, delay, 7)))


def test_the_policies_learn(policy: ModuleType) -> None:
    """In 200 small updates: an untrained network is as far from the expert as noise is, at a distance of about 1."""
    rows = policy.quality(updates=200, n=32, batch=32).rows
    assert len(rows) == 5
    for name, distance, left in rows:
        assert distance < 0.8, name
        assert 0.1 < left < 0.9, name


def test_the_program(policy: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["policy.py", "--json", "--repeats", "3", "--network-ms", "0.1", "--updates", "2"])
    threads = torch.get_num_threads()
    try:
        policy.main()
    finally:
        torch.set_num_threads(threads)
    tables = json.loads(capsys.readouterr().out)
    assert [len(table["rows"]) for table in tables] == [3, 3, 3, 3, 4, 4, 5]
    for table in tables[:6]:
        for name, us, _, _ in table["rows"]:
            assert us > 0.0 or "costs nothing" not in table["title"], name
