"""Plans as k-diffusion samplers and ComfyUI nodes, against `Sampler` on the same network."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import run_page
from test_comfyui import CONST, Eps, comfy, run  # noqa: F401  # comfy is a fixture

import fewstep as fs
from fewstep.bindings import comfyui
from fewstep.bindings.k_diffusion import plan_sampler, plan_sigmas, sample_dpmpp_2m
from fewstep.solvers.plans.tail import begun

VP, FLOW = fs.VP.scaled_linear(), fs.Flow()


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A stand-in for a network of noise predictions or velocities."""
    return torch.tanh(0.8 * x + 0.3 * torch.roll(x, 1, -1) + 0.001 * t.reshape(-1, 1, 1, 1))


def as_k_diffusion(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """k-diffusion's wrapper of a noise predictor: its input is scaled, and its time is that of the level."""
    level = sigma.reshape(-1, 1, 1, 1)
    t = torch.tensor([VP.point_at_sigma(float(s)).t for s in sigma.double()], dtype=x.dtype)
    return x - level * network(x / (1.0 + level**2).sqrt(), t)


def as_flow(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x - sigma.reshape(-1, 1, 1, 1) * network(x, sigma)


def latent() -> torch.Tensor:
    return torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def decoupled() -> fs.Plan:
    """A plan whose calls are made a little off the level of the sample, as a tuned one's are."""
    plan = fs.plan("unipc", fs.grid(VP, 5, "logsnr"), order=3)
    moved = [fs.Point(*VP.point_at_sigma(1.05 * stage.at.ratio)) for stage in plan.stages[1:]]
    stages = [plan.stages[0], *(replace(s, at=at) for s, at in zip(plan.stages[1:], moved, strict=True))]
    return fs.Plan("tuned", plan.grid, tuple(stages))


PLANS = {
    "unipc": lambda: fs.plan("unipc", fs.grid(VP, 5, "logsnr"), order=3),
    "heun": lambda: fs.plan("heun", fs.grid(VP, 4, "karras")),
    "tuned": decoupled,
    "flow": lambda: fs.plan("dpmpp_2m", fs.grid(FLOW, 5)),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_same_sample_as_the_sampler(name: str) -> None:
    plan = PLANS[name]()
    flow = name == "flow"
    denoiser = fs.Denoiser(network, plan.grid.process, "flow" if flow else "epsilon", time_scale=1.0)
    x = latent()
    expected = fs.Sampler(denoiser, plan, tuple(x.shape), device="cpu", dtype="float64")(x)
    seen: list[dict[str, Any]] = []
    start = x if flow else x / plan.start.alpha
    found = plan_sampler(plan)(as_flow if flow else as_k_diffusion, start, callback=seen.append)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert [info["i"] for info in seen] == list(range(plan.steps))
    np.testing.assert_allclose([float(info["sigma"]) for info in seen], plan_sigmas(plan)[:-1], rtol=1e-6)


def test_the_same_sample_as_k_diffusions_own_name() -> None:
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 6, "karras"))
    x = latent().float() * 14.0
    found = plan_sampler(plan)(as_k_diffusion, x, plan_sigmas(plan))
    expected = sample_dpmpp_2m(as_k_diffusion, x, plan.grid.ratio)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_noise_and_the_last_sigmas() -> None:
    """An SDE plan asks its noise sampler for the levels of each step; with the last sigmas it begins there."""
    plan = fs.plan("dpmpp_2m_sde", fs.grid(VP, 6, "logsnr"))
    denoiser = fs.Denoiser(network, VP, "epsilon")
    x, asked = latent(), []

    def draws(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)

    draw = draws(5)

    def noise(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return draw()

    rest = begun(plan, 2)
    found = plan_sampler(plan)(as_k_diffusion, x / rest.start.alpha, plan_sigmas(plan)[2:], noise_sampler=noise)
    again = draws(5)
    expected = fs.Sampler(denoiser, rest, tuple(x.shape), device="cpu", dtype="float64")(x, noise=lambda *_: again())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    sigmas = plan_sigmas(plan)[2:].tolist()
    np.testing.assert_allclose(asked, list(pairwise(sigmas[:-1])), rtol=1e-6)


@pytest.mark.parametrize("solver", ["flow_sde", "flow_cps"])
def test_a_window_of_noise_stays_where_it_is(solver: str) -> None:
    """With the last sigmas, noise is drawn in the same steps as with all."""
    plan = fs.plan(solver, fs.grid(FLOW, 6), window=(2, 4))
    sigmas = plan_sigmas(plan)
    for first in range(5):
        asked: list[float] = []

        def noise(sigma: torch.Tensor, sigma_next: torch.Tensor, asked: list[float] = asked) -> torch.Tensor:
            asked.append(float(sigma))
            return torch.zeros_like(latent())

        plan_sampler(plan)(as_flow, latent(), sigmas[first:], noise_sampler=noise)
        np.testing.assert_allclose(asked, [float(sigmas[k]) for k in (2, 3) if k >= first], rtol=1e-6)


def test_a_resampled_plan() -> None:
    """Its repeated steps are called back with their own sigma, and it begins with the last sigmas as any plan."""
    plan = fs.edits.resampled(fs.plan("ddim", fs.grid(VP, 4, "logsnr"), eta=1.0), 3)
    sigmas = plan_sigmas(plan)
    for first in (0, 2):
        seen: list[tuple[int, float]] = []
        levels: list[float] = []

        def model(x: torch.Tensor, sigma: torch.Tensor, levels: list[float] = levels) -> torch.Tensor:
            levels.append(float(sigma[0]))
            return as_k_diffusion(x, sigma)

        def keep(info: dict[str, Any], seen: list[tuple[int, float]] = seen) -> None:
            seen.append((info["i"], float(info["sigma"])))

        plan_sampler(plan)(model, latent() * sigmas[first], None if first == 0 else sigmas[first:], callback=keep)
        steps = [k for k in range(first, 4) for _ in range(3 if k < 3 else 1)]  # the step to data is made once
        np.testing.assert_allclose(levels, sigmas[steps], rtol=1e-6)
        assert [i for i, _ in seen] == [k - first for k in steps]
        np.testing.assert_allclose([sigma for _, sigma in seen], sigmas[steps], rtol=1e-6)


def test_a_solver_with_levels_of_its_own() -> None:
    """They are called back, and the sigmas of the grid between them begin no step."""
    plan, seen = fs.plan("dpm_solver_fast", fs.grid(VP, 7, "logsnr")), []
    sigmas = plan_sigmas(plan)
    plan_sampler(plan)(as_k_diffusion, latent() * sigmas[0], callback=lambda info: seen.append(float(info["sigma"])))
    np.testing.assert_allclose(seen, [stage.at.ratio for stage in plan.stages], rtol=1e-6)
    with pytest.raises(ValueError, match="where this plan of solver 'dpm_solver_fast' begins no step"):
        plan_sampler(plan)(as_k_diffusion, latent() * sigmas[2], sigmas[2:])


def test_what_is_refused() -> None:
    sample, x = plan_sampler(fs.plan("ddim", fs.grid(VP, 4, "logsnr"))), latent()
    with pytest.raises(ValueError, match=r"sigmas = \[5.0, 1.0, 0.0\] are not the last of the plan's own"):
        sample(as_k_diffusion, x, [5.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="reads the unguided prediction"):
        plan_sampler(fs.plan("euler_cfg_pp", fs.grid(VP, 4, "logsnr")))
    with pytest.raises(ValueError, match="plan starts at alpha = 0"):
        plan_sampler(fs.plan("ddim", fs.grid(VP.zero_terminal_snr(), 4, "linspace")))
    with pytest.raises(TypeError, match="plan must be a Plan or the path"):
        plan_sampler(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be a torch tensor"):
        sample(as_k_diffusion, x.numpy())


def test_the_nodes(tmp_path: Path) -> None:
    """The sampler and the sigmas of a plan file on the stand-in for ComfyUI, all of it and the last half."""
    plan = fs.plan("unipc", fs.grid(VP, 6, "logsnr"), order=3)
    path = str(tmp_path / "plan.json")
    fs.save_plan(plan, path)
    nodes = [comfyui.NODE_CLASS_MAPPINGS[name]() for name in ("FewstepPlanSampler", "FewstepPlanSigmas")]
    assert [node.RETURN_TYPES for node in nodes] == [("SAMPLER",), ("SIGMAS",)]
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    (sampler,), (sigmas,) = nodes[0].get_sampler(path), nodes[1].get_sigmas(path)
    torch.testing.assert_close(sigmas, plan_sigmas(plan))

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # that of the stand-in, which takes the level
        return 0.6 * torch.tanh(x / (0.2 + t.reshape(-1, 1, 1, 1)))

    ratio = [stage.at.ratio for stage in plan.stages]
    for denoise, first in ((1.0, 0), (0.5, 3)):
        (some,) = nodes[1].get_sigmas(path, denoise)
        assert torch.equal(some, sigmas[first:])
        found, guider, steps = run(sampler, Eps(), some)
        np.testing.assert_allclose([level for level, *_ in guider.seen], ratio[first:], rtol=1e-5)
        assert len(steps) == 6 - first
        x = Eps().noise_scaling(some[0], torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2)), 0.0)
        plain = begun(plan, first)
        slots = {"x": x * plain.start.alpha}
        for stage in plain.stages:  # the rows in a plain loop
            level = torch.full((3,), stage.at.ratio)
            known = {**slots, "m": denoiser(slots["x"] / stage.at.alpha, level)}
            slots |= {slot: sum(c * known[s] for s, c in row.items()) for slot, row in stage.rows.items()}
        torch.testing.assert_close(found, slots["x"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"denoise = 0.05 leaves none of the plan's 6 steps"):
        nodes[1].get_sigmas(path, 0.05)


@pytest.mark.parametrize(
    ("plan", "sampling", "kind"), [("unipc", CONST, "a flow model"), ("flow", Eps, "a model of x0")]
)
def test_a_plan_for_the_other_kind_of_model(plan: str, sampling: type, kind: str) -> None:
    made = PLANS[plan]()

    class Model:
        model_sampling = sampling()

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the model was called")

    with pytest.raises(ValueError, match=f"and this is {kind}.* of class {sampling.__name__}"):
        plan_sampler(made)(Model(), latent(), plan_sigmas(made))


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = fs.plan("unipc", fs.grid(VP, 6, "logsnr"))
    fs.save_plan(plan, "plan.json")
    names = {"model": lambda x, sigma, cond: as_k_diffusion(x, sigma), "noise": latent(), "cond": None}
    found = run_page("docs/plans-in-pipelines.md", names, "k-diffusion")["x"]
    expected = plan_sampler(plan)(as_k_diffusion, latent() * plan_sigmas(plan)[0])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
