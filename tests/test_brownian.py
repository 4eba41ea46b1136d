"""The virtual Brownian tree: one path for all grids, with the law of Brownian motion on the SNR clock."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.schedule.brownian import BrownianTree


class At(NamedTuple):
    alpha: float
    sigma: float


def level(log_snr: float, scale: float = 1.0) -> At:
    """A point of the given log-SNR; the clock must not depend on the common scale of alpha and sigma."""
    return At(scale * math.exp(0.25 * log_snr), scale * math.exp(-0.25 * log_snr))


def clock(at: At) -> float:
    return (at.alpha / at.sigma) ** 2


levels = st.floats(-30.0, 30.0)


@settings(max_examples=40, deadline=None)
@given(ends=st.tuples(levels, levels, levels), seed=st.integers(0, 2**64 - 1))
def test_increments_add_up(ends: tuple[float, float, float], seed: int) -> None:
    low, middle, high = sorted(ends)
    if min(middle - low, high - middle) < 1e-3:
        return
    a, b, c = level(low), level(middle), level(high)
    tree, shape = BrownianTree(seed), (2, 5)
    ab = tree(0, a, b, shape) * math.sqrt(clock(b) - clock(a))
    bc = tree(1, b, c, shape) * math.sqrt(clock(c) - clock(b))
    ac = tree(2, a, c, shape) * math.sqrt(clock(c) - clock(a))
    np.testing.assert_allclose(ab + bc, ac, rtol=1e-9, atol=1e-12 * math.sqrt(clock(c)))


def test_refinement_keeps_the_path() -> None:
    """A grid, the same grid refined, and single queries in any order give the same W, bit for bit."""
    shape = (2, 3, 7)
    coarse = [level(v) for v in np.linspace(-8.0, 12.0, 6)]
    fine = [level(v) for v in np.linspace(-8.0, 12.0, 31)]
    tree = BrownianTree(5)
    on_fine = [tree.path(at, shape) for at in fine]
    for k, at in enumerate(coarse):
        np.testing.assert_array_equal(BrownianTree(5).path(at, shape), on_fine[6 * k])
    for k in np.random.default_rng(0).permutation(31):
        np.testing.assert_array_equal(tree.path(fine[k], shape), on_fine[k])
    total = sum(
        tree(k, fine[k], fine[k + 1], shape) * math.sqrt(clock(fine[k + 1]) - clock(fine[k])) for k in range(30)
    )
    np.testing.assert_allclose(total, on_fine[-1] - on_fine[0], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("end", [8.0, 0.25])
@pytest.mark.parametrize("share", [-1.0, -0.146, 0.0, 0.042, 1.0])
def test_the_path_is_the_tree_of_bridges_written_out(share: float, end: float) -> None:
    """The textbook recursion on the clock itself: 64 leaves over log-SNR -end .. end, numbered as a heap.

    On a narrow range W at its noisiest level is a large part of W at its cleanest.
    """
    log_snr, n = share * end, 50

    def z(draw: int) -> NDArray[np.float64]:
        return philox.normals(n, 12, 0, draw, philox.BROWNIAN).astype(np.float64)

    def bridge(t: float, draw: int) -> NDArray[np.float64]:
        mean = w_a + (t - t_a) / (t_b - t_a) * (w_b - w_a)
        return np.asarray(mean + math.sqrt(max(0.0, (t - t_a) * (t_b - t) / (t_b - t_a))) * z(draw))

    low, high, node = -end, end, 1
    t_a, t_b = math.exp(low), math.exp(high)
    w_a = math.sqrt(t_a) * z(0)
    w_b = w_a + math.sqrt(t_b - t_a) * z(2**32 - 2)
    for _ in range(6):
        middle = 0.5 * (low + high)
        w = bridge(math.exp(middle), node)
        if log_snr < middle:
            high, t_b, w_b, node = middle, math.exp(middle), w, 2 * node
        else:
            low, t_a, w_a, node = middle, math.exp(middle), w, 2 * node + 1
    want = bridge(math.exp(log_snr), node)
    tree = BrownianTree(12, log_snr_range=(-end, end), tolerance=2.0 * end / 64)
    got = tree.path(level(log_snr), (1, n))[0]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * math.exp(0.5 * log_snr))


def test_alpha_and_sigma_matter_by_their_ratio_alone() -> None:
    shape = (1, 100)
    want = BrownianTree(1)(0, level(-3.0), level(2.0), shape)
    got = BrownianTree(1)(7, level(-3.0, scale=0.5), level(2.0, scale=4.0), shape)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


N = 200_000
# Levels on both sides of the first splits, pairs a few leaves apart, and the far ends of the range.
LAW = [-49.9, -9.0, -8.997, -2.5, -0.001, 0.001, 3.7, 3.71, 12.4, 49.9]


@pytest.fixture(scope="module")
def paths() -> NDArray[np.float64]:
    tree = BrownianTree(17)
    return np.stack([tree.path(level(v), (1, N))[0] for v in LAW])


def test_covariance_is_the_smaller_clock(paths: NDArray[np.float64]) -> None:
    """E W(s) W(t) = min(s, t): as correlations, within 5 standard errors sqrt((1 + rho^2) / N)."""
    tau = np.array([clock(level(v)) for v in LAW])
    scaled = paths / np.sqrt(tau)[:, None]
    rho = np.sqrt(np.minimum.outer(tau, tau) / np.maximum.outer(tau, tau))
    assert np.all(np.abs(scaled @ scaled.T / N - rho) < 5.0 * np.sqrt((1.0 + rho**2) / N))
    assert np.all(np.abs(scaled.mean(axis=1)) < 5.0 / math.sqrt(N))


def test_increments_are_independent_standard_normals() -> None:
    """z over consecutive intervals: unit variances, no correlations, normal tails, to 5 standard errors."""
    ends = [At(0.0, 1.0), *(level(v) for v in LAW[1:]), At(1.0, 0.0)]
    tree = BrownianTree(23)
    z = np.stack([tree(k, ends[k], ends[k + 1], (1, N))[0] for k in range(len(ends) - 1)])
    gram = z @ z.T / N
    eye = np.eye(len(z))
    assert np.all(np.abs(gram - eye) < 5.0 * np.sqrt((1.0 + eye) / N))
    assert np.all(np.abs(np.mean(z**4, axis=1) - 3.0) < 5.0 * math.sqrt(96.0 / N))
    assert np.all(np.abs(np.mean(z**3, axis=1)) < 5.0 * math.sqrt(15.0 / N))


def test_the_sde_step_has_the_right_noise() -> None:
    """sigma_t sqrt(1 - exp(-2 h)) = sigma_t exp(-lambda_t) sqrt(tau_t - tau_s): why the clock is the SNR."""
    s, t = At(0.3, 0.9), At(0.8, 0.5)
    lam_s, lam_t = (math.log(p.alpha / p.sigma) for p in (s, t))
    left = t.sigma * math.sqrt(1.0 - math.exp(-2.0 * (lam_t - lam_s)))
    assert math.isclose(left, t.sigma * math.exp(-lam_t) * math.sqrt(clock(t) - clock(s)), rel_tol=1e-12)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    a, b, n = level(-2.0), level(1.0), 4100
    whole = BrownianTree(9)(0, a, b, (4, n))
    np.testing.assert_array_equal(BrownianTree(9, first_sample=2)(0, a, b, (2, n)), whole[2:])
    seeds = BrownianTree([4, 9, 2**64 - 1])(0, a, b, (3, n))
    np.testing.assert_array_equal(BrownianTree([9])(0, a, b, (1, n))[0], seeds[1])
    np.testing.assert_array_equal(whole[0], seeds[1])
    np.testing.assert_array_equal(BrownianTree(9)(0, a, b, (4, 100)), whole[:, :100])
    assert len({row.tobytes() for row in (*whole, seeds[0], seeds[2])}) == 6


def test_a_sweep_walks_the_tree_once_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = BrownianTree(2)
    asked: list[float] = []
    descent = tree._descent

    def counted(at: float) -> Any:
        asked.append(at)
        return descent(at)

    monkeypatch.setattr(tree, "_descent", counted)
    grid = [level(v) for v in (-5.0, -1.0, 2.0, 6.0)]
    for k in range(3):
        tree(k, grid[k], grid[k + 1], (1, 8))
    assert len(asked) == 4


def test_ends() -> None:
    tree, shape = BrownianTree(3), (2, 50)
    assert not tree.path(At(0.0, 1.0), shape).any()
    first = tree(0, At(0.0, 1.0), level(-4.0), shape) * math.sqrt(clock(level(-4.0)))
    np.testing.assert_allclose(first, tree.path(level(-4.0), shape), rtol=1e-12)
    clean = tree(0, level(8.0), At(1.0, 0.0), shape)
    assert clean.dtype == np.float64
    np.testing.assert_array_equal(clean[1], philox.normals(50, 3, 1, 2**32 - 1, philox.BROWNIAN))


def test_results_are_the_callers_to_change() -> None:
    tree, at = BrownianTree(3), level(1.0)
    kept = tree.path(at, (1, 9))
    other = tree.path(at, (1, 9))
    other += 1.0
    z = tree(0, level(-1.0), at, (1, 9))
    z *= 2.0
    np.testing.assert_array_equal(tree.path(at, (1, 9)), kept)


def test_a_finer_tolerance_resolves_close_levels() -> None:
    a, b = level(1.0), level(1.0 + 1e-6)
    with pytest.raises(ValueError, match="nearer than the tree resolves"):
        BrownianTree(1)(0, a, b, (1, 4))
    z = BrownianTree(1, tolerance=2e-7)(0, a, b, (1, N))
    assert abs(z.var() - 1.0) < 5.0 * math.sqrt(2.0 / N)


def test_errors() -> None:
    tree, shape = BrownianTree(0), (1, 4)
    with pytest.raises(ValueError, match="needs a growing SNR"):
        tree(0, level(1.0), level(0.0), shape)
    with pytest.raises(ValueError, match="needs a growing SNR"):
        tree(0, level(1.0), level(1.0), shape)
    with pytest.raises(ValueError, match=r"log-SNR 60 is outside log_snr_range \(-50, 50\)"):
        tree(0, level(1.0), level(60.0), shape)
    with pytest.raises(ValueError, match="outside log_snr_range"):
        tree.path(At(1.0, 0.0), shape)
    for bad in (At(-1.0, 1.0), At(0.0, 0.0), At(math.nan, 1.0), At(1.0, math.inf)):
        with pytest.raises(ValueError, match="a point needs finite alpha"):
            tree.path(bad, shape)
    with pytest.raises(ValueError, match="seed must be"):
        BrownianTree(-1)
    for ends in ((3.0, -3.0), (1.0, 1.0), (-301.0, 0.0), (0.0, 301.0), (0.0, math.nan), (0.0,), 3.0):
        with pytest.raises(ValueError, match="log_snr_range must be"):
            BrownianTree(0, log_snr_range=ends)  # type: ignore[arg-type]
    for tolerance in (0.0, -1.0, math.nan, 1e-12):
        with pytest.raises(ValueError, match=r"tolerance must be at least 9.31e-08 for this range"):  # 100 / 2^30
            BrownianTree(0, tolerance=tolerance)
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        BrownianTree([1, 2])(0, level(0.0), level(1.0), (3, 4))
