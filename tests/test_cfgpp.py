"""CFG++ under guidance, where its two predictions differ: against the papers' loops, on every backend."""

import numpy as np
import pytest
from oracles import cfgpp as paper

import fewstep as fs
from fewstep.problems import Gaussian

SCALE = 2.5
COND, NULL = Gaussian(np.array([0.4, -0.6]), np.array([0.3, 0.5])), Gaussian(np.zeros(2), np.array([0.7, 0.6]))
GRIDS = {
    "vp-8": fs.grid(fs.VP.linear(), 8, "karras"),
    "edm-5-open": fs.grid(fs.EDM(), 5, "karras", final_zero=False),
    "flow-7": fs.grid(fs.Flow(3.0), 8, "linspace").tail(0.125),
}
CASES = [
    ("euler_cfg_pp", {}),
    ("euler_ancestral_cfg_pp", {"eta": 0.7}),
    ("dpmpp_2m_cfg_pp", {}),
    ("dpmpp_2m_cfg_pp", {"difference": "guided"}),
    ("dpmpp_2s_ancestral_cfg_pp", {}),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.0}),
    ("dpmpp_2s_ancestral_cfg_pp", {"released": True}),
    ("dpmpp_2s_ancestral_cfg_pp", {"released": True, "frame": "flow"}),
    ("euler_ancestral_cfg_pp", {"eta": 0.7, "released": True}),
    ("res_multistep_cfg_pp", {"eta": 0.7}),
    ("res_multistep_cfg_pp", {"released": True}),
    ("gradient_estimation_cfg_pp", {}),
    ("cfgpp_ud10_ab", {}),
    ("cfgpp_ud10_ab", {"frame": "sigma"}),
]


# From a flow's sigma 1, where alpha is 0 and the sigma of x / alpha is infinite.
FROM_ONE = [
    ("euler_cfg_pp", {}),
    ("euler_ancestral_cfg_pp", {"eta": 0.7}),
    ("euler_ancestral_cfg_pp", {"eta": 0.7, "released": True}),
    ("euler_ancestral_cfg_pp", {"eta": 0.0, "released": True}),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.5}),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.5, "released": True}),
    ("gradient_estimation_cfg_pp", {}),
    ("cfgpp_ud10_ab", {}),
]


def model(process):
    """A network that predicts x0, conditional where which = 1."""

    def call(x, t, which):
        points = [process.point(float(v)) for v in t]
        rows = [
            (COND if w else NULL).denoise(x[i : i + 1], p.alpha, p.sigma)
            for i, (p, w) in enumerate(zip(points, which, strict=True))
        ]
        return np.concatenate(rows)

    return call


def guided(process, guidance=SCALE):
    return fs.Denoiser(
        model(process), process, "sample", guidance=guidance, null={"which": np.zeros(4)}, time_dtype="float64"
    )


def both(x, alpha, sigma):
    cond, null = (p.denoise(x, alpha, sigma) for p in (COND, NULL))
    return null + SCALE * (cond - null), null


@pytest.mark.parametrize("backend", ["naive", "numba"])
@pytest.mark.parametrize(
    ("solver", "options", "grid"),
    [(*case, grid) for case in CASES for grid in GRIDS] + [(*case, "flow from one") for case in FROM_ONE],
)
def test_guided_cfg_pp_is_the_papers_loop(solver, options, grid, backend):
    grid = GRIDS[grid] if grid in GRIDS else fs.grid(fs.Flow(), 7)
    first = grid.points[0]
    x = first.sigma * np.random.default_rng(0).standard_normal((4, 2))
    draws = {}

    def noise(draw, at, to, shape):
        return draws.setdefault(draw, np.random.default_rng(100 + draw).standard_normal(shape))

    found = fs.sample(
        guided(grid.process),
        x,
        solver=solver,
        grid=grid,
        noise=noise,
        cond={"which": np.ones(4)},
        backend=backend,
        dtype="float64",
        **options,
    )
    wanted = getattr(paper, solver)(both, grid, x, [draws[k] for k in sorted(draws)], **options)
    np.testing.assert_allclose(found, wanted, atol=1e-10, rtol=0)


def test_without_guidance_it_is_the_solver_itself():
    grid = GRIDS["vp-8"]
    x = np.random.default_rng(0).standard_normal((4, 2))
    cond = {"which": np.ones(4)}

    def run(solver, guidance):
        return fs.sample(guided(grid.process, guidance), x, solver=solver, grid=grid, cond=cond, dtype="float64")

    np.testing.assert_allclose(run("euler_cfg_pp", None), run("ddim", None), atol=1e-12)
    # At scale 1 the step uses the conditional prediction, and renoises with the null branch.
    assert np.abs(run("euler_cfg_pp", 1.0) - run("ddim", None)).max() > 0.05
    assert np.abs(run("euler_cfg_pp", SCALE) - run("ddim", SCALE)).max() > 0.1


def test_cfg_pp_overshoots_less_than_guidance():
    """The paper's claim (Chung et al. 2024, section 3): at a high scale plain guidance leaves the data."""
    grid = fs.grid(fs.VP.linear(), 30, "logsnr")
    x = np.random.default_rng(0).standard_normal((200, 2))
    cond = {"which": np.ones(200)}

    def spread(solver):
        denoiser = fs.Denoiser(model(grid.process), grid.process, "sample", guidance=7.5, null={"which": np.zeros(200)})
        return np.abs(fs.sample(denoiser, x, solver=solver, grid=grid, cond=cond) - COND.mean).max()

    assert spread("euler_cfg_pp") < 0.8 * spread("ddim")
