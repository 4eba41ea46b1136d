"""Plans as diffusers schedulers: the same numbers as `Sampler` on the pipeline's own network, wrapped by hand."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_cases import only_fused
from diffusers_pipelines import CASES, _embeddings, _image, _scheduler, _stable_diffusion
from pages import run_page
from plan_pipelines import flux, flux_arguments, wan, wan_arguments
from test_diffusers_gpu import test_a_step_on_cuda_is_one_operator as on_cuda

import fewstep as fs
from fewstep.bindings.diffusers import PlanScheduler, plan_scheduler
from fewstep.bindings.maps import from_diffusers
from fewstep.solvers.plans.tail import begun, starts

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity_warning()


def normals(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stable_diffusion(prediction: str = "epsilon") -> Any:
    return _stable_diffusion("StableDiffusionPipeline", _scheduler("DDIMScheduler", prediction_type=prediction))


def latents_of(pipe: Any, arguments: dict[str, Any], x: torch.Tensor, calls: int, **more: Any) -> torch.Tensor:
    out = pipe(**arguments, num_inference_steps=calls, latents=x.clone(), output_type="latent", **more)
    return out.frames if hasattr(out, "frames") else out.images  # type: ignore[no-any-return]


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in names}


Wrapped = tuple[Any, dict[str, Any], tuple[int, ...], fs.Denoiser, Any]


def wrapped_sd(prediction: str) -> Wrapped:
    pipe, given = stable_diffusion(prediction), _embeddings()
    cond = tuple({"encoder_hidden_states": given[f"{p}prompt_embeds"]} for p in ("negative_", ""))
    denoiser = from_diffusers(pipe.unet, pipe.scheduler, guidance=4.0)
    return pipe, {**given, "guidance_scale": 4.0}, (1, 4, 8, 8), denoiser, cond


def wrapped_sdxl() -> Wrapped:
    make, arguments = CASES["SDXL"]
    pipe, given = make(), without(arguments(), "num_inference_steps")
    ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    cond = tuple(
        {
            "encoder_hidden_states": given[f"{p}prompt_embeds"],
            "added_cond_kwargs": {"text_embeds": given[f"{p}pooled_prompt_embeds"], "time_ids": ids},
        }
        for p in ("negative_", "")
    )
    denoiser = from_diffusers(pipe.unet, pipe.scheduler, guidance=3.0)
    return pipe, {**given, "guidance_scale": 3.0}, (1, 4, 8, 8), denoiser, cond


def wrapped_sd3() -> Wrapped:
    make, arguments = CASES["SD3"]
    pipe, given = make(), without(arguments(), "num_inference_steps")
    cond = tuple(
        {"encoder_hidden_states": given[f"{p}prompt_embeds"], "pooled_projections": given[f"{p}pooled_prompt_embeds"]}
        for p in ("negative_", "")
    )
    denoiser = from_diffusers(pipe.transformer, pipe.scheduler, guidance=3.0)
    return pipe, {**given, "guidance_scale": 3.0}, (1, 4, 8, 8), denoiser, cond


def wrapped_flux() -> Wrapped:
    """Distilled guidance, an argument of the network, and true guidance over two calls of it."""
    pipe, given = flux(), flux_arguments(negative=True)
    fixed = {"txt_ids": torch.zeros(5, 3), "img_ids": pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)}

    def network(hidden_states: torch.Tensor, timestep: torch.Tensor, **cond: Any) -> Any:
        guidance = torch.full([len(hidden_states)], 3.5)
        return pipe.transformer(hidden_states=hidden_states, timestep=timestep, guidance=guidance, **fixed, **cond)

    cond = tuple(
        {"encoder_hidden_states": given[f"{p}prompt_embeds"], "pooled_projections": given[f"{p}pooled_prompt_embeds"]}
        for p in ("negative_", "")
    )
    denoiser = from_diffusers(network, pipe.scheduler, guidance=2.0, time_scale=1.0)
    return pipe, {**given, "guidance_scale": 3.5, "true_cfg_scale": 2.0}, (1, 16, 16), denoiser, cond


def wrapped_wan() -> Wrapped:
    pipe, given = wan(), wan_arguments()
    cond = tuple({"encoder_hidden_states": given[f"{p}prompt_embeds"]} for p in ("negative_", ""))
    denoiser = from_diffusers(pipe.transformer, pipe.scheduler, guidance=5.0)
    return pipe, {**given, "guidance_scale": 5.0}, (1, 4, 1, 2, 2), denoiser, cond


WRAPPED: dict[str, Callable[[], Wrapped]] = {
    "SD epsilon": lambda: wrapped_sd("epsilon"),
    "SD v": lambda: wrapped_sd("v_prediction"),
    "SDXL": wrapped_sdxl,
    "SD3": wrapped_sd3,
    "Flux": wrapped_flux,
    "Wan": wrapped_wan,
}

# Solvers of one call per step with a history, of two calls per step, and with a corrector.
SOLVERS = [("dpmpp_3m", {}), ("heun", {}), ("unipc", {"order": 3})]


@pytest.mark.parametrize("name", WRAPPED)
def test_the_same_sample_as_the_sampler(name: str) -> None:
    pipe, arguments, shape, denoiser, cond = WRAPPED[name]()
    x = normals(*shape)
    for solver, options in SOLVERS if name == "SD epsilon" else SOLVERS[:1]:
        plan = fs.plan(solver, fs.grid(denoiser.process, 4, "logsnr"), **options)
        expected = fs.Sampler(denoiser, plan, shape)(x, cond=cond)
        report = fs.accelerate(pipe, plan=plan)
        assert f"runs {solver} in {plan.nfe} calls" in str(report)
        with only_fused("PlanScheduler"):
            found = latents_of(pipe, arguments, x, plan.nfe)
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    fs.restore(pipe)
    assert type(pipe.scheduler).__module__.startswith("diffusers.")


def own_grid(scheduler: Any, process: Any, calls: int) -> fs.Grid:
    """The grid of a diffusers scheduler of integer timesteps, with its clean end."""
    scheduler.set_timesteps(calls)
    return fs.Grid.from_times(process, [*scheduler.timesteps.tolist(), -1.0])


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("calls", "strength"), [(8, 1.0), (8, 0.6), (16, 0.4)])
def test_the_same_sample_as_diffusers_own(order: int, calls: int, strength: float) -> None:
    """DPM-Solver++ from noise, and begun in the middle, where its order grows again.

    It falls again at the end of fewer than 15 calls, however many of them are left.
    """
    scheduler = _scheduler("DPMSolverMultistepScheduler", solver_order=order)
    pipe = _stable_diffusion("StableDiffusionImg2ImgPipeline", scheduler)
    given = {**_embeddings(), "image": _image(), "strength": strength, "guidance_scale": 3.0}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        found: torch.Tensor = pipe(**given, num_inference_steps=calls, output_type="latent", generator=generator).images
        return found

    expected = run()
    grid = own_grid(scheduler, from_diffusers(pipe.unet, scheduler).process, calls)
    options = {"final_order": "diffusers", **({"halve_d2": True, "variant": "midpoint"} if order == 3 else {})}
    fs.accelerate(pipe, plan=fs.plan(f"dpmpp_{order}m", grid, **options))
    with only_fused("PlanScheduler"):
        found = run()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


def test_whole_runs_and_begun_ones_take_turns() -> None:
    """A start in the middle leaves nothing behind in the scheduler."""
    scheduler = _scheduler("DPMSolverMultistepScheduler")
    pipe = _stable_diffusion("StableDiffusionImg2ImgPipeline", scheduler)
    plan = fs.plan("unipc", fs.grid(from_diffusers(pipe.unet, scheduler).process, 6, "logsnr"), order=3)
    fs.accelerate(pipe, plan=plan)
    given = {**_embeddings(), "image": _image(), "guidance_scale": 3.0, "output_type": "latent"}

    def run(strength: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        found: torch.Tensor = pipe(**given, strength=strength, num_inference_steps=6, generator=generator).images
        return found

    strengths = (1.0, 0.5, 1.0, 0.7, 0.5)
    found = [run(strength) for strength in strengths]
    for i, strength in enumerate(strengths):
        fs.accelerate(pipe, plan=plan)  # a new scheduler
        assert torch.equal(run(strength), found[i])
    assert not torch.equal(found[1], found[3])


def test_noise_is_drawn_as_the_plan_says() -> None:
    """An SDE plan draws from the generator in order; given normals replace the draws."""
    pipe, arguments, shape, denoiser, cond = wrapped_sd("epsilon")
    plan = fs.plan("dpmpp_2m_sde", fs.grid(denoiser.process, 5, "linspace"))
    x, generator = normals(*shape), torch.Generator().manual_seed(7)
    expected = fs.Sampler(denoiser, plan, shape)(
        x, cond=cond, noise=lambda draw, at, to, shape: torch.randn(shape, generator=generator)
    )
    fs.accelerate(pipe, plan=plan)
    with only_fused("PlanScheduler"):
        found = latents_of(pipe, arguments, x, 5, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    one, other = PlanScheduler(plan), PlanScheduler(plan)
    for scheduler in (one, other):
        scheduler.set_timesteps(5)
    raw, z = normals(*shape, seed=2), torch.randn(shape, generator=torch.Generator().manual_seed(3))
    a = one.step(raw, one.timesteps[0], x, generator=torch.Generator().manual_seed(3)).prev_sample
    b = other.step(raw, other.timesteps[0], x, variance_noise=z, return_dict=False)[0]
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2m_sde"])
def test_a_step_on_cuda_is_one_operator(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fs.plan(solver, fs.grid(fs.VP.scaled_linear(), 5, "logsnr"))
    on_cuda("PlanScheduler", {"plan": plan}, torch.bfloat16, monkeypatch)


# --- begun in the middle ---


def follow(plan: fs.Plan, x: np.ndarray, m: Callable[[int, np.ndarray], np.ndarray], first: int = 0) -> np.ndarray:
    """The plan's rows in a plain loop from stage `first`; m gives the x0 prediction of a call."""
    slots = {"x": x}
    for k, stage in enumerate(plan.stages[first:], first):
        known = {**slots, "m": m(k, slots["x"])}
        slots |= {slot: sum(c * known[source] for source, c in row.items()) for slot, row in stage.rows.items()}
    return slots["x"]


def tuned_by_hand(process: Any) -> fs.Plan:
    """Rows that no solver makes: UniPC's, with increments over two older predictions, which sum to zero."""
    base = fs.plan("unipc", fs.grid(process, 5, "logsnr"), order=2)
    stages = list(base.stages)
    for k in range(4):
        rows = {**stages[k].rows, "newest": {"m": 1.0}, **({"older": {"newest": 1.0}} if k else {})}
        x = dict(rows["x"])
        for slot, c in {1: {"newest": 0.2, "m": -0.2}, 2: {"newest": 0.3, "older": -0.3}}.get(min(k, 2), {}).items():
            x[slot] = x.get(slot, 0.0) + c
        stages[k] = replace(stages[k], rows={**rows, "x": x})
    return fs.Plan("tuned", base.grid, tuple(stages))


@pytest.mark.parametrize("process", [fs.VP.scaled_linear(), fs.Flow()], ids=["VP", "Flow"])
def test_a_fitted_plan_begun_in_the_middle(process: Any) -> None:
    """What it reads of earlier calls is what these leave if they predict what its first call predicts."""
    plan, rng = tuned_by_hand(process), np.random.default_rng(0)
    matrix = rng.standard_normal((6, 6)) / 3.0
    for first in range(1, plan.nfe):
        at = plan.stages[first - 1].to
        start = rng.standard_normal(6)

        def predict(k: int, x: np.ndarray) -> np.ndarray:
            return np.tanh(matrix @ x + 0.1 * k)

        m = predict(first, start)
        eps = (start - at.alpha * m) / at.sigma
        top = plan.start.alpha * m + plan.start.sigma * eps

        def held(k: int, x: np.ndarray, m: np.ndarray = m, first: int = first) -> np.ndarray:
            return m if k <= first else predict(k, x)

        expected = follow(plan, top, held)
        shorter = begun(plan, first)
        found = follow(shorter, start, lambda k, x, first=first: predict(k + first, x))  # type: ignore[misc]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_known_solver_begins_as_it_does_on_the_rest_of_the_grid() -> None:
    process = fs.VP.scaled_linear()
    grid = fs.grid(process, 6, "logsnr")
    for solver in ("dpmpp_3m", "deis", "heun"):
        plan = fs.plan(solver, grid)
        first = starts(plan)[2]
        again = begun(plan, first)
        assert again.stages == fs.plan(solver, grid.tail(2 / 6)).stages
    with pytest.raises(ValueError, match=r"call 1 of this plan is inside a step of 'heun'; it can begin at calls 0, 2"):
        begun(fs.plan("heun", grid), 1)


def test_a_begun_unipc_corrects_the_steps_of_the_whole() -> None:
    """diffusers counts `disable_corrector` from the first step of the schedule, wherever a run begins."""
    off, first = [0, 4, 6], 3
    other = _scheduler("UniPCMultistepScheduler", disable_corrector=off)
    grid = own_grid(other, fs.VP(other.alphas_cumprod.double().numpy()), 8)
    plan = fs.plan("unipc", grid, order=2, corrector=[k for k in range(8) if k not in off], final_order="unipc")
    x = start = np.random.default_rng(0).standard_normal(6)
    matrix = np.random.default_rng(1).standard_normal((6, 6)) / 3.0

    def noise(k: int, x: np.ndarray) -> np.ndarray:
        return np.tanh(matrix @ x + 0.1 * k)

    def predict(k: int, x: np.ndarray) -> np.ndarray:
        at = plan.stages[k].at
        return (x - at.sigma * noise(k, x)) / at.alpha

    other.set_begin_index(first)
    for k in range(first, 8):
        raw, sample = (torch.from_numpy(values).float().view(1, 6, 1, 1) for values in (noise(k, x), x))
        x = other.step(raw, other.timesteps[k], sample).prev_sample.double().numpy().ravel()
    found = follow(begun(plan, first), start, lambda k, x: predict(k + first, x))
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2s"])
def test_a_resampled_plan_begins_with_any_of_its_repeats(solver: str) -> None:
    """It keeps nothing between steps, so that what is left of it are its own rows."""
    plan = fs.edits.resampled(fs.plan(solver, fs.grid(fs.VP.scaled_linear(), 4, "logsnr")), 3, 2)
    z = np.random.default_rng(0).standard_normal((plan.nfe, 6))
    matrix = np.random.default_rng(1).standard_normal((6, 6)) / 3.0

    def run(own: fs.Plan, first: int, x: np.ndarray) -> np.ndarray:
        slots = {"x": x}
        for k, stage in enumerate(own.stages, first):
            known = {**slots, "m": np.tanh(matrix @ slots["x"] + 0.1 * k), "z": z[k]}
            slots |= {slot: sum(c * known[source] for source, c in row.items()) for slot, row in stage.rows.items()}
        return slots["x"]

    for first in starts(plan):
        start, short = np.random.default_rng(first).standard_normal(6), begun(plan, first)
        assert short.start == plan.stages[first].at == short.grid.points[0]
        rest = replace(plan, stages=plan.stages[first:], grid=short.grid)
        np.testing.assert_allclose(run(short, first, start), run(rest, first, start), rtol=1e-12)
    scheduler = PlanScheduler(plan)
    scheduler.set_timesteps(plan.nfe)
    first = starts(plan)[-2]
    scheduler.set_begin_index(first)
    x = normals(1, 4, 2, 2)
    raw, noise = normals(1, 4, 2, 2, seed=2), normals(1, 4, 2, 2, seed=3)
    found = scheduler.step(raw, scheduler.timesteps[first], x, variance_noise=noise).prev_sample
    at = plan.stages[first].at
    known = {"x": x, "m": (x - at.sigma * raw) / at.alpha, "z": noise}
    want = sum(c * known[source] for source, c in plan.stages[first].rows["x"].items())
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["dpm_solver_fast", "consistency", "dpmpp_2s", "ddpm"])
def test_the_image_is_noised_to_the_level_of_the_first_call(solver: str) -> None:
    """That is none of the grid's in a solver with levels of its own; then its rows are followed from there."""
    plan = fs.plan(solver, fs.grid(fs.VP.scaled_linear(), 7, "logsnr"))
    scheduler, image, noise = PlanScheduler(plan), normals(1, 4, 2, 2).double(), normals(1, 4, 2, 2, seed=2).double()
    for first in starts(plan):
        if solver == "dpm_solver_fast" and first % 3:  # within one of its steps of third order
            continue
        scheduler.set_timesteps(plan.nfe)
        scheduler.set_begin_index(first)
        at = plan.stages[first].at
        x = scheduler.add_noise(image, noise, scheduler.timesteps[first : first + 1])
        torch.testing.assert_close(x, at.alpha * image + at.sigma * noise, rtol=1e-9, atol=1e-9)
        slots = {"x": x}
        for k, stage in enumerate(plan.stages[first:], first):
            raw, z = normals(1, 4, 2, 2, seed=10 + k).double(), normals(1, 4, 2, 2, seed=50 + k).double()
            drawn = {"variance_noise": z} if stage.rows["x"].get("z") else {}
            x = scheduler.step(raw, scheduler.timesteps[k], x, **drawn).prev_sample
            known = {**slots, "m": (slots["x"] - stage.at.sigma * raw) / stage.at.alpha, "z": z}
            slots |= {slot: sum(c * known[source] for source, c in row.items()) for slot, row in stage.rows.items()}
            torch.testing.assert_close(x, slots["x"], rtol=1e-9, atol=1e-9)


def test_image_to_image_of_a_flow_model() -> None:
    """scale_noise, and a start in the middle of a plan that is not rebuilt, against the rows in a plain loop."""
    pipe, _, shape, denoiser, _ = wrapped_sd3()
    plan = tuned_by_hand(denoiser.process)
    scheduler = PlanScheduler.from_config(pipe.scheduler.config, plan=plan)
    scheduler.set_timesteps(5)
    times = scheduler.timesteps[2:]
    scheduler.set_begin_index(2)
    image, noise, at = normals(*shape), normals(*shape, seed=2), plan.stages[1].to
    x = scheduler.scale_noise(image, times[:1], noise)
    torch.testing.assert_close(x, at.alpha * image + at.sigma * noise, rtol=1e-6, atol=1e-6)
    start = x.double().numpy().ravel()
    matrix = np.random.default_rng(1).standard_normal((start.size, start.size)) / 30.0

    def velocity(x: np.ndarray, k: int) -> np.ndarray:
        return np.tanh(matrix @ x + 0.1 * k)

    def predict(k: int, x: np.ndarray) -> np.ndarray:
        return x - plan.stages[k].at.sigma * velocity(x, k)

    expected = follow(begun(plan, 2), start, lambda k, x: predict(k + 2, x))
    for k, t in enumerate(times, 2):
        raw = torch.from_numpy(velocity(x.double().numpy().ravel(), k)).float().view(shape)
        x = scheduler.step(raw, t, x).prev_sample
    np.testing.assert_allclose(x.numpy().ravel(), expected, rtol=1e-4, atol=1e-4)


# --- saving ---


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_in_the_middle_of_a_run(duplicate: Any) -> None:
    """Of a run that began in the middle: it goes on with the plan's rows, and its next run is a whole one."""
    plan, rng = tuned_by_hand(fs.VP.scaled_linear()), np.random.default_rng(0)
    matrix = rng.standard_normal((8, 8)) / 3.0

    def noise(k: int, x: np.ndarray) -> np.ndarray:
        return np.tanh(matrix @ x + 0.1 * k)

    def predict(k: int, x: np.ndarray) -> np.ndarray:
        at = plan.stages[k].at
        return (x - at.sigma * noise(k, x)) / at.alpha

    scheduler = PlanScheduler(plan)
    for first in (2, 0):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(first)
        x = start = rng.standard_normal(8)
        for k in range(first, 5):
            raw, sample = (torch.from_numpy(values).view(1, 2, 2, 2) for values in (noise(k, x), x))
            x = scheduler.step(raw, scheduler.timesteps[k], sample).prev_sample.numpy().ravel()
            scheduler = duplicate(scheduler)
        expected = follow(begun(plan, first), start, lambda k, x, first=first: predict(k + first, x))  # type: ignore[misc]
        np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-9)
    assert scheduler.plan == plan


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A pipeline with a plan gives the same images after it was saved; the plan is JSON in the configuration."""
    pipe, arguments, shape, denoiser, _ = wrapped_sd("v_prediction")
    plan = fs.plan("unipc", fs.grid(denoiser.process, 4, "logsnr"))
    fs.save_plan(plan, tmp_path / "plan.json")
    fs.accelerate(pipe, plan=tmp_path / "plan.json")
    assert pipe.scheduler.plan == plan
    x = normals(*shape)
    expected = latents_of(pipe, arguments, x, 4)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    assert [p.name for p in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]
    kept = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert kept["plan"] == json.loads((tmp_path / "plan.json").read_text())
    for again in (
        PlanScheduler.from_pretrained(tmp_path / "scheduler"),
        PlanScheduler.from_config(pipe.scheduler.config),
        PlanScheduler.from_config(pipe.scheduler.config, plan=plan),
    ):
        assert again.plan == plan
        assert again.config.prediction_type == "v_prediction"
        pipe.scheduler = again
        torch.testing.assert_close(latents_of(pipe, arguments, x, 4), expected, rtol=0.0, atol=0.0)
    fs.restore(pipe)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert pipe.scheduler.config.beta_end == 0.012
    assert pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_alone(duplicate: Any) -> None:
    """One made before a run, and one in the middle of it, which another thread finishes."""
    grid = fs.grid(fs.VP.scaled_linear(), 5)
    made, raws = PlanScheduler(fs.plan("unipc", grid)), normals(5, 1, 4, 8, 8)

    def steps(scheduler: Any, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        for k in range(first, last):
            x = scheduler.step(raws[k], scheduler.timesteps[k], x).prev_sample
        return x

    before = duplicate(made)
    ends, x = [], normals(1, 4, 8, 8, seed=2)
    for scheduler in (made, before):
        scheduler.set_timesteps(5)
        half = steps(scheduler, x, 0, 3)
        other = duplicate(scheduler)
        with ThreadPoolExecutor(1) as pool:
            ends.append(pool.submit(steps, other, half, 3, 5).result())
        ends.append(steps(scheduler, half, 3, 5))
        assert other.plan == made.plan
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0.0, atol=0.0)


def test_the_whole_pipeline_is_loaded(tmp_path: Path) -> None:
    make, _ = CASES["DDPM"]
    pipe = make()
    plan = fs.plan("dpmpp_2m", fs.grid(from_diffusers(pipe.unet, pipe.scheduler).process, 4, "logsnr"))
    assert str(fs.accelerate(pipe, plan=plan)).endswith("without the clip_sample of DDPMScheduler")
    pipe.save_pretrained(tmp_path / "pipe")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipe")
    assert again.scheduler.plan == plan
    images = [
        p(num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for p in (pipe, again)
    ]
    np.testing.assert_allclose(*images, atol=1e-3)  # loaded weights lie elsewhere, and torch adds in another order


def test_sixteen_bits() -> None:
    pipe, arguments, shape, denoiser, cond = wrapped_sd("epsilon")
    plan = fs.plan("dpmpp_2m", fs.grid(denoiser.process, 4, "logsnr"))
    expected = fs.Sampler(denoiser, plan, shape)(normals(*shape), cond=cond)
    pipe.to(torch.bfloat16)
    fs.accelerate(pipe, plan=plan)
    given = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    found = latents_of(pipe, given, normals(*shape).bfloat16(), 4)
    assert found.dtype == torch.bfloat16
    # The network and the latents are rounded to 8 bits in each of 4 steps.
    assert float((found.float() - expected).square().mean().sqrt()) < 0.03 * float(expected.square().mean().sqrt())


# --- what is refused ---


def test_another_number_of_steps() -> None:
    pipe, arguments, shape, denoiser, _ = wrapped_sd("epsilon")
    plan = fs.plan("dpmpp_2m", fs.grid(denoiser.process, 4, "logsnr"))
    fs.accelerate(pipe, plan=plan)
    with pytest.raises(ValueError, match=r"num_inference_steps = 50, .* makes 4 calls: pass num_inference_steps=4"):
        latents_of(pipe, arguments, normals(*shape), 50)
    scheduler = pipe.scheduler
    own = scheduler.timesteps.tolist()
    scheduler.set_timesteps(timesteps=own)
    with pytest.raises(ValueError, match=r"timesteps = \[900, .* are not the plan's own"):
        scheduler.set_timesteps(timesteps=[900.0, 500.0, 200.0, 1.0])
    scheduler.set_timesteps(sigmas=scheduler.sigmas[:-1].tolist())
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))
    with pytest.raises(ValueError, match=r"sigmas = \[9, 5, 2, 1\] are not the plan's own"):
        scheduler.set_timesteps(sigmas=[9.0, 5.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="a plan takes the prediction alone, without a learned variance"):
        scheduler.step(normals(1, 8, 8, 8), scheduler.timesteps[0], normals(1, 4, 8, 8))
    with pytest.raises(IndexError, match="timestep = 123 is none of the plan's"):
        scheduler.add_noise(normals(*shape), normals(*shape), torch.tensor([123.0]))


X = normals(2, 4, 8, 8)
T = torch.tensor([999.0, 444.0])
REFUSED = [
    ("step", {"model_output": None}, TypeError, "model_output must be a torch tensor, got NoneType"),
    ("step", {"model_output": X.numpy()}, TypeError, "model_output must be a torch tensor, got ndarray"),
    ("step", {"sample": 3.0}, TypeError, "sample must be a torch tensor, got float"),
    ("step", {"sample": X.int()}, ValueError, "sample must have a floating dtype, got torch.int32"),
    ("step", {"model_output": X > 0}, ValueError, "model_output of dtype torch.bool is not one of float64, float32"),
    ("step", {"sample": X + 0j}, ValueError, "sample of dtype torch.complex64 is not one of"),
    ("step", {"timestep": None}, TypeError, r"timestep must be one of the plan's, \[999, .*, got None"),
    ("step", {"timestep": "999"}, TypeError, r"timestep must be one of the plan's, \[999, .*, got '999'"),
    ("step", {"timestep": T}, TypeError, r"timestep must be one of the plan's, \[999, .*, got tensor\(\[999., 444."),
    ("step", {"variance_noise": "z"}, TypeError, "variance_noise must be a torch tensor, got str"),
    ("step", {"variance_noise": X[:1]}, ValueError, r"variance_noise has shape \(1, 4, .*: pass torch.randn_like"),
    ("add_noise", {"original_samples": None}, TypeError, "original_samples must be a torch tensor, got NoneType"),
    ("add_noise", {"original_samples": X.int()}, ValueError, "original_samples must have a floating dtype"),
    ("add_noise", {"noise": X.numpy()}, TypeError, "noise must be a torch tensor, got ndarray"),
    ("add_noise", {"noise": X[:, :3]}, ValueError, r"noise \(2, 3, 8, 8\), .*: pass noise like the samples"),
    ("add_noise", {"timesteps": None}, TypeError, r"timestep must be one of the plan's, \[999, .*, got None"),
    ("add_noise", {"timesteps": T[[0, 0, 0]]}, ValueError, "timesteps length 3: .* one timestep for all or one"),
    ("scale_noise", {"sample": None}, TypeError, "sample must be a torch tensor, got NoneType"),
    ("scale_noise", {"timestep": None}, TypeError, r"timestep must be one of the plan's, \[999, .*, got None"),
    ("set_timesteps", {"num_inference_steps": None}, ValueError, "give num_inference_steps, which is 4"),
    ("set_timesteps", {"num_inference_steps": X}, ValueError, r"num_inference_steps = tensor\(.*num_inference_steps=4"),
    ("set_timesteps", {"num_inference_steps": "4"}, ValueError, "num_inference_steps = '4', and .* makes 4 calls"),
    ("set_timesteps", {"timesteps": 3.0}, ValueError, "timesteps = 3.0 are not the plan's own"),
    ("set_timesteps", {"timesteps": ["a"] * 4}, ValueError, r"timesteps = \['a', .* is not a number or an array"),
    ("set_timesteps", {"sigmas": X}, ValueError, "sigmas = tensor.* are not the plan's own"),
]  # fmt: skip


@pytest.mark.parametrize("own", [True, False], ids=["twin", "plain"])
@pytest.mark.parametrize(("method", "changed", "error", "match"), REFUSED)
def test_arguments_that_are_no_tensors(
    method: str, changed: dict[str, Any], error: type[Exception], match: str, own: bool
) -> None:
    kind: Any = PlanScheduler if own else plan_scheduler.PlanScheduler
    scheduler = kind(fs.plan("ddpm", fs.grid(fs.VP.scaled_linear(), 4)))
    scheduler.set_timesteps(4)
    given = {
        "step": {"model_output": X, "timestep": scheduler.timesteps[0], "sample": X},
        "add_noise": {"original_samples": X, "noise": X, "timesteps": T},
        "scale_noise": {"sample": X, "timestep": T, "noise": X},
        "set_timesteps": {"num_inference_steps": 4},
    }
    with pytest.raises(error, match=f"(?s){match}"):
        getattr(scheduler, method)(**{**given[method], **changed})
    assert (scheduler.step_index, scheduler.num_inference_steps) == (None, 4)  # nothing has begun
    getattr(scheduler, method)(**given[method])


def test_noise_is_added_at_one_time_alone() -> None:
    scheduler = PlanScheduler(fs.plan("ddim", fs.grid(fs.VP.scaled_linear(), 4)))
    expected = scheduler.add_noise(X, -X, T[[1, 1]])
    point = fs.VP.scaled_linear().point(444.0)
    torch.testing.assert_close(expected, (point.alpha - point.sigma) * X)
    for times in (T[1:], T[1], 444.0, [444.0], np.float32(444.0)):
        assert torch.equal(scheduler.add_noise(X, -X, times), expected)
        assert torch.equal(scheduler.scale_noise(X, times, -X), expected)


@pytest.mark.parametrize("first", [0, 2])
def test_a_step_that_records_gradients_is_the_plain_schedulers(first: int) -> None:
    plan = fs.plan("dpmpp_2m", fs.grid(fs.VP.scaled_linear(), 4))
    results = []
    for kind in (PlanScheduler, plan_scheduler.PlanScheduler):
        scheduler: Any = kind(plan)
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(first)
        x, output = X, (0.5 * X).requires_grad_()
        for t in scheduler.timesteps[first:]:
            x = scheduler.step(output, t, x).prev_sample
        x.sum().backward()
        results.append((x.detach(), output.grad))
    assert float(results[0][1].abs().min()) > 0.1
    for twin, plain in zip(*results, strict=True):
        torch.testing.assert_close(twin, plain, rtol=0, atol=0)


def test_another_process_is_refused() -> None:
    pipe = stable_diffusion()
    before = pipe.scheduler
    for process in (fs.Flow(), fs.VP.linear(), fs.VP.scaled_linear().zero_terminal_snr()):
        spacing = "linspace" if isinstance(process, fs.Flow) else "leading"
        plan = fs.plan("ddim", fs.grid(process, 4, spacing))
        with pytest.raises(ValueError, match=r"this plan was made on .*, and DDIMScheduler has VP"):
            fs.accelerate(pipe, plan=plan)
        assert pipe.scheduler is before
    with pytest.raises(ValueError, match=r"made on VP.*FlowMatchEulerDiscreteScheduler has Flow"):
        fs.accelerate(flux(), plan=fs.plan("ddim", fs.grid(fs.VP.scaled_linear(), 4)))
    with pytest.raises(ValueError, match="is made on VP or Flow"):
        PlanScheduler(fs.plan("euler", fs.grid(fs.EDM(), 4)))


def test_plans_that_no_scheduler_can_run() -> None:
    grid = fs.grid(fs.VP.scaled_linear(), 6, "logsnr")
    with pytest.raises(ValueError, match="reads the unguided prediction"):
        PlanScheduler(fs.plan("euler_cfg_pp", grid))
    with pytest.raises(ValueError, match="starts with a draw of its own"):
        PlanScheduler(fs.plan("edm", fs.grid(grid.process, 6, "leading"), s_churn=3.0))
    with pytest.raises(ValueError, match=r"this plan starts at sigma = .* make the plan on a whole grid"):
        PlanScheduler(fs.plan("ddim", grid.tail(0.9)))
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        PlanScheduler(fs.plan("ddim", grid), prediction_type="eps")
    with pytest.raises(TypeError, match="plan must be a Plan or the path"):
        PlanScheduler(3)
    with pytest.raises(ValueError, match="needs plan="):
        PlanScheduler.from_config(diffusers.DDIMScheduler().config)
    with pytest.raises(ValueError, match="corrected=True is for diffusers' own"):
        fs.accelerate(stable_diffusion(), plan=fs.plan("ddim", grid), corrected=True)


@pytest.mark.filterwarnings("ignore:The config attributes")
def test_a_scheduler_swapped_in_keeps_the_settings() -> None:
    """Not diffusers' defaults: the betas of Stable Diffusion end at .012, the default at .02."""
    pipe = stable_diffusion()
    own = dict(pipe.scheduler.config)
    assert own["beta_end"] != diffusers.EulerDiscreteScheduler().config.beta_end
    want = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    process = from_diffusers(pipe.unet, pipe.scheduler).process
    fs.accelerate(pipe, plan=fs.plan("dpmpp_2m", fs.grid(process, 4)))
    for config in (pipe.scheduler.config, PlanScheduler.from_config(pipe.scheduler.config).config):
        swapped = diffusers.EulerDiscreteScheduler.from_config(config)
        assert torch.equal(swapped.alphas_cumprod, want.alphas_cumprod)
        assert swapped.config.prediction_type == want.config.prediction_type


def test_a_second_plan_names_the_scheduler_that_restore_puts_back() -> None:
    pipe = stable_diffusion()
    before = type(pipe.scheduler)
    for steps in (4, 6):
        plan = fs.plan("ddim", fs.grid(fs.VP.scaled_linear(), steps, "logsnr"))
        assert f"ddim in {steps} calls, in place of {before.__name__}:" in str(fs.accelerate(pipe, plan=plan))
    fs.restore(pipe)
    assert type(pipe.scheduler) is before


def test_restore_leaves_a_scheduler_that_was_swapped_in_for_a_plan() -> None:
    """Its configuration, made from the plan scheduler's, still names the scheduler that the plan replaced."""
    pipe = stable_diffusion()
    plan = fs.plan("ddim", fs.grid(fs.VP.scaled_linear(), 4, "logsnr"))
    fs.accelerate(pipe, plan=plan)
    mine = pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert "UniPCMultistepScheduler was not fused" in str(fs.restore(pipe))
    assert pipe.scheduler is mine
    for options in ({}, {"plan": plan}):
        done = fs.accelerate(pipe, **options)
        assert not options or "in place of UniPCMultistepScheduler" in str(done)
        fs.restore(pipe)
        assert type(pipe.scheduler) is diffusers.UniPCMultistepScheduler


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, arguments, _, _, _ = wrapped_sd("epsilon")
    names = {"pipe": pipe, "arguments": {**arguments, "output_type": "np"}, "fs": fs}
    run_page("docs/plans-in-pipelines.md", names, "by-hand")
    run_page("docs/plans-in-pipelines.md", names, "accelerate")
    assert capsys.readouterr().out.startswith(
        "scheduler: PlanScheduler runs unipc in 6 calls, in place of DDIMScheduler"
    )
    run_page("docs/plans-in-pipelines.md", names, "scheduler")
    assert names["pipe"].scheduler.plan == names["plan"]


def test_a_replaced_configuration_of_another_type_is_named() -> None:
    bad: Any
    for bad in ("DDIMScheduler", 3, [1]):
        with pytest.raises(TypeError, match="replaces must be the configuration of a scheduler, got "):
            PlanScheduler(fs.plan("dpmpp_2m", fs.grid(fs.VP.linear(), 4)), replaces=bad)
