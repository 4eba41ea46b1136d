"""`tune_pipeline`: what is read off a pipeline's runs, against the network wrapped by hand, and the way to a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_pipelines import CASES, _embeddings, _image, _scheduler, _stable_diffusion
from pages import run_page
from plan_pipelines import flux, flux_arguments
from test_plan_scheduler import WRAPPED, normals, wrapped_sd

import fewstep as fs
from fewstep.bindings.diffusers import tune_pipeline as module
from fewstep.bindings.diffusers.collect import _explain, collect

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity_warning()


def other(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of another prompt."""
    return {k: v.flip(-1) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_pipelines_network_and_conditions(name: str) -> None:
    """On two prompts the denoiser predicts what the network wrapped by hand does, on both in one batch."""
    pipe, arguments, shape, denoiser, cond = WRAPPED[name]()
    before = pipe.scheduler
    made = collect(pipe, [arguments, other(arguments)])
    assert pipe.scheduler is before
    assert made.shape == shape[1:]
    assert made.scale == denoiser.guidance.scale
    assert made.denoiser.time_scale == denoiser.time_scale
    assert made.denoiser.predicts == denoiser.predicts
    plan = fs.plan("dpmpp_2m", fs.grid(denoiser.process, 3, "logsnr"))
    x = normals(2, *shape[1:])
    found = fs.Sampler(made.denoiser, plan, tuple(x.shape))(x, cond=made.cond)
    expected = fs.Sampler(denoiser, plan, shape)(x[:1], cond=cond)
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    fs.accelerate(pipe, plan=plan)
    out = pipe(**other(arguments), num_inference_steps=3, latents=x[1:].clone(), output_type="latent")
    second = out.frames if hasattr(out, "frames") else out.images
    torch.testing.assert_close(found[1:], second, rtol=1e-4, atol=1e-4 * float(second.abs().max()))


@pytest.mark.parametrize(("name", "scale"), [("SD epsilon", 4.1), ("SD epsilon", 7.25), ("Wan", 5.0)])
def test_the_scale_of_guidance_in_16_bits(name: str, scale: float) -> None:
    """The rounding of the predictions, here up to 0.003 of the scale, is no part of it."""
    pipe, arguments, *_ = WRAPPED[name]()
    pipe.to(torch.bfloat16)
    given = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    made = collect(pipe, [{**given, "guidance_scale": scale}])
    assert made.scale == scale
    assert made.denoiser.guidance.scale == scale


def test_no_guidance_and_distilled_guidance() -> None:
    """One branch; Flux's guidance scale is a condition of its network."""
    given = flux_arguments()
    made = collect(flux(), [{**given, "guidance_scale": scale} for scale in (2.0, 5.0)])
    assert made.scale is None
    assert made.denoiser.guidance is None
    assert made.cond[0]["guidance"].tolist() == [2.0, 5.0]


def test_pipelines_that_cannot_be_tuned() -> None:
    pipe, arguments, *_ = wrapped_sd("epsilon")
    with pytest.raises(ValueError, match=r"not a fixed combination of its network's outputs .* guidance rescale"):
        collect(pipe, [{**arguments, "guidance_rescale": 0.7}])
    with pytest.raises(ValueError, match="a prompt must make one latent, it made 2"):
        collect(pipe, [{**arguments, "num_images_per_prompt": 2}])
    same = {**arguments, "negative_prompt_embeds": arguments["prompt_embeds"]}
    with pytest.raises(ValueError, match="its two branches of guidance agree"):
        collect(pipe, [same])
    long = {k: torch.cat([v, v], 1) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match="condition encoder_hidden_states has other shapes for other prompts"):
        collect(pipe, [arguments, long])
    pipe.unet.train()
    with pytest.raises(ValueError, match=r"pipe.unet is in training mode, .* call pipe.unet.eval\(\)"):
        collect(pipe, [arguments])
    pipe = _stable_diffusion("StableDiffusionInpaintPipeline", _scheduler("DDIMScheduler"))
    pipe.register_modules(unet=_inpainting_unet())
    given = {**_embeddings(), "image": _image(), "mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}
    with pytest.raises(ValueError, match=r"no argument of its network is the latents .* \(extra channels"):
        collect(pipe, [given])


def _inpainting_unet() -> Any:
    from diffusers_pipelines import _unet

    return _unet(in_channels=9).eval()


# --- the way to a plan ---


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of the fit a hand-made plan with a record, as `tune` returns it; keeps the fit's arguments."""
    seen: list[dict[str, Any]] = []

    def fit(denoiser: Any, nfe: int, **given: Any) -> fs.Plan:
        seen.append({"denoiser": denoiser, "nfe": nfe, **given})
        plan = fs.plan("unipc", fs.grid(denoiser.process, nfe, "logsnr"))
        errors = {name: {"test": {"rmse": value, "median": value}} for name, value in (("tuned", 0.1), ("hand", 0.2))}
        record = {
            "guidance": None,
            "cond": None,
            "shape": list(given["shape"]),
            "errors": errors,
            "calls": 1234,
            "complete": True,
        }
        return replace(plan, options={**plan.options, "tuning": {**record, "fingerprint": [0.5] * 128}})

    monkeypatch.setattr(module, "tune", fit)
    return seen


def test_the_plan_is_saved_and_runs(fits: list[dict[str, Any]], tmp_path: Path) -> None:
    pipe, arguments, shape, *_ = wrapped_sd("epsilon")
    lines: list[str] = []
    given = {k: v for k, v in arguments.items() if k != "guidance_scale"}
    again = fs.tune_pipeline(
        pipe, [given, other(given)], 4, guidance=4.0, out=tmp_path / "plan.json", quick=True, progress=lines.append
    )
    assert again is pipe
    dry, fit = fits
    assert dry["shape"] == (2,)
    assert dry["cache"] is None
    assert (fit["nfe"], fit["seeds"], fit["reference"].nfe, fit["shape"]) == (4, 12, 32, shape[1:])
    assert [len(one["encoder_hidden_states"]) for one in fit["cond"]] == [2, 2]
    assert lines[0] == "StableDiffusionPipeline: unet on 2 prompts, latents (4, 8, 8), guidance 4"
    assert lines[1].startswith("about 1234 predictions of one sample, 2468 evaluations of the network, ")
    assert "best hand-made plan 0.2" in lines[2]
    assert lines[3].endswith("num_inference_steps=4; fitted for guidance 4 and latents of (4, 8, 8)")
    plan = pipe.scheduler.plan
    own = plan.options["tuning"]["pipeline"]
    assert (own["component"], own["guidance"], own["prompts"]) == ("unet", 4.0, 2)
    assert fs.load_plan(tmp_path / "plan.json", force=True) == plan
    x = normals(*shape)
    expected = pipe(**arguments, num_inference_steps=4, latents=x.clone(), output_type="latent").images
    fs.restore(pipe)
    assert "fitted for guidance 4" in str(fs.accelerate(pipe, plan=tmp_path / "plan.json"))
    found = pipe(**arguments, num_inference_steps=4, latents=x.clone(), output_type="latent").images
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_an_interrupted_fit_goes_on(
    fits: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, arguments, *_ = wrapped_sd("epsilon")
    fit, lines, path = module.tune, list[str](), tmp_path / "plan.json"

    def interrupted(*args: Any, **given: Any) -> fs.Plan:
        plan = fit(*args, **given)
        record = {**plan.options["tuning"], "complete": given["cache"] is None}
        return replace(plan, options={**plan.options, "tuning": record})

    with monkeypatch.context() as patch:
        patch.setattr(module, "tune", interrupted)
        fs.tune_pipeline(pipe, [arguments], 4, quick=True, out=path, progress=lines.append)
    assert lines[2] == f"interrupted: this is the best plan so far; go on with resume={str(path)!r}"
    monkeypatch.setattr(module, "check_arguments", lambda base, *rest: None)  # the stand-in's plan is not tuned
    fs.tune_pipeline(pipe, [arguments], 4, quick=True, resume=path, progress=False)
    assert fits[-1]["base"] == fs.load_plan(path, force=True)


def of_texts() -> tuple[Any, dict[str, Any]]:
    """A pipeline whose stand-in for a text encoder knows the texts "a" and "b", and the arguments of its calls."""
    pipe, arguments, *_ = wrapped_sd("epsilon")
    known = {"a": arguments, "b": other(arguments)}

    def encode_prompt(prompt: str, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return known[prompt]["prompt_embeds"], known[prompt]["negative_prompt_embeds"]

    pipe.encode_prompt = encode_prompt
    return pipe, known


def test_prompts_are_texts(fits: list[dict[str, Any]]) -> None:
    pipe, known = of_texts()
    fs.tune_pipeline(pipe, ["a", "b"], 4, guidance=3.0, height=16, width=16, progress=False)
    null, cond = fits[1]["cond"]
    expected = torch.cat([known[name]["prompt_embeds"] for name in "ab"])
    torch.testing.assert_close(cond["encoder_hidden_states"], expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(null["encoder_hidden_states"][:1], known["a"]["negative_prompt_embeds"])
    assert fits[1]["seeds"] == 64


def test_the_command(
    fits: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fewstep.cli import main

    pipe, _ = of_texts()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda name, **given: pipe)
    (tmp_path / "prompts.txt").write_text("b\n\n")
    words = ["tune-pipeline", "mine", "--prompt", "a", "--prompts", str(tmp_path / "prompts.txt"), "--nfe", "4"]
    words += ["--guidance", "3", "--height", "16", "--width", "16", "--quick", "--out", str(tmp_path / "plan.json")]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--json"])
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out)["pipeline"]["prompts"] == 2
    assert fs.load_plan(tmp_path / "plan.json", force=True) == pipe.scheduler.plan
    for missing, message in (([], "give prompts by --prompt"), (["--dtype", "int8"], "--dtype must be one of")):
        with pytest.raises(SystemExit) as stopped:
            main(["tune-pipeline", "mine", "--out", str(tmp_path / "other.json"), *missing])
        assert stopped.value.code
        assert message in capsys.readouterr().err


def test_another_network_is_refused(fits: list[dict[str, Any]]) -> None:
    pipe, arguments, *_ = wrapped_sd("epsilon")
    fs.tune_pipeline(pipe, [arguments], 4, quick=True, progress=False)
    plan = pipe.scheduler.plan
    make, _ = CASES["DDPM"]
    with pytest.raises(ValueError, match="fitted for StableDiffusionPipeline with the component 'unet' of"):
        fs.accelerate(make(), plan=plan)
    fs.restore(pipe)
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.mul_(1.05)
    with pytest.raises(ValueError, match=r"with other weights \(.*\), and StableDiffusionPipeline has another network"):
        fs.accelerate(pipe, plan=plan)
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.div_(1.05)
    pipe.unet.bfloat16()
    fs.accelerate(pipe, plan=plan)  # of the same network in another dtype


def test_bad_arguments_are_refused_before_the_network_runs() -> None:
    pipe, arguments, *_ = wrapped_sd("epsilon")

    def fail(*args: Any) -> None:
        raise AssertionError("the network was called")

    pipe.unet.register_forward_pre_hook(fail)

    def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            fs.tune_pipeline(*args, **options)

    refused(TypeError, "prompts must be a sequence of texts", pipe, "a cat", 4)
    refused(ValueError, r"prompts is empty, got \[\]: give texts", pipe, [], 4)
    refused(TypeError, r"prompts\[0\] must be a text or a mapping", pipe, [3], 4)
    refused(ValueError, "nfe must be an int >= 2", pipe, [arguments], 1)
    refused(ValueError, "seeds must be an int >= 12", pipe, [arguments], 4, seeds=3)
    refused(ValueError, "guidance must be a finite number", pipe, [arguments], 4, guidance="7")
    refused(ValueError, "options may not hold 'latents'", pipe, [arguments], 4, latents=None)
    refused(ValueError, r"out plan.txt: the file must end in \.json", pipe, [arguments], 4, out="plan.txt")
    refused(TypeError, "out must be a path such as 'plan.json', got 3", pipe, [arguments], 4, out=3)
    refused(TypeError, "pipe must be a diffusers pipeline", object(), [arguments], 4)
    refused(ValueError, "quick must be True or False", pipe, [arguments], 4, quick=1)
    refused(ValueError, "unknown argument 'heigth': did you mean 'height'", pipe, [arguments], 4, heigth=16)


def test_a_pipeline_that_lacks_what_its_prompts_need() -> None:
    """Each is one error that names what is missing, before the network runs; other errors stay as they are."""
    pipe, arguments, *_ = wrapped_sd("epsilon")
    called: list[object] = []
    hook = pipe.unet.register_forward_pre_hook(lambda *args: called.append(args))
    with pytest.raises(ValueError, match=r"it has no text_encoder, tokenizer; load it .*mappings .* prompt_embeds"):
        fs.tune_pipeline(pipe, ["a cat"], 4, quick=True, progress=False)
    rest = {**pipe.components, **{n: object() for n in ("text_encoder", "tokenizer", "safety_checker")}}
    with pytest.raises(ValueError, match=r"it has no feature_extractor, image_encoder"):
        _explain(pipe, rest, TypeError("'NoneType' object is not callable"))
    with pytest.raises(AttributeError, match="has no attribute 'shape'"):
        collect(pipe, [{**arguments, "prompt_embeds": 3, "negative_prompt_embeds": 4}])
    for prompts in ([arguments, "a cat"], [arguments, {**arguments, "prompt": "a cat"}]):
        with pytest.raises(ValueError, match=r"no text_encoder, tokenizer|Cannot forward both `prompt`"):
            fs.tune_pipeline(pipe, prompts, 4, quick=True, progress=False)
    assert not called
    hook.remove()
    assert collect(pipe, [arguments]).scale == 4.0


def test_a_pipeline_whose_call_takes_fewer_arguments() -> None:
    pipe, arguments, *_ = wrapped_sd("epsilon")
    kind = type(pipe)

    class Latents(kind):  # type: ignore[misc, valid-type]
        def __call__(self, prompt_embeds: Any, num_inference_steps: int = 50, generator: Any = None) -> Any:
            given = {**arguments, "prompt_embeds": prompt_embeds, "num_inference_steps": num_inference_steps}
            return kind.__call__(self, **given, generator=generator, output_type="latent")

    class OneStep(kind):  # type: ignore[misc, valid-type]
        def __call__(self, prompt_embeds: Any) -> Any:
            raise AssertionError("it was called")

    given = {"prompt_embeds": arguments["prompt_embeds"]}
    expected = collect(pipe, [arguments])
    pipe.__class__ = Latents
    made = collect(pipe, [given])
    assert (made.scale, made.shape) == (expected.scale, expected.shape)
    for null_or_not in range(2):
        torch.testing.assert_close(made.cond[null_or_not], expected.cond[null_or_not], rtol=0.0, atol=0.0)
    pipe.__class__ = OneStep
    with pytest.raises(ValueError, match="cannot be tuned: a call of OneStep takes no num_inference_steps and no g"):
        collect(pipe, [given])


@pytest.mark.parametrize("resumed", [False, True])
def test_the_digits_pipeline(tmp_path: Path, resumed: bool) -> None:
    """A real fit, through the pipeline: 2 calls with less error than the best hand-made plan on held-out latents."""
    from reports.digits_pipeline import digits_pipeline

    if resumed and not os.environ.get("FEWSTEP_LONG"):
        pytest.skip("a second fit; set FEWSTEP_LONG=1")
    pipe = digits_pipeline()
    options: dict[str, Any] = {"quick": True, "cache": None, "batch": 512, "progress": False}
    fs.tune_pipeline(pipe, [{"label": i} for i in range(10)], 2, **options)
    record = pipe.scheduler.plan.options["tuning"]
    rmse = {name: record["errors"][name]["test"]["rmse"] for name in ("tuned", "hand")}
    assert rmse["tuned"] < 0.9 * rmse["hand"]
    if resumed:
        fs.save_plan(pipe.scheduler.plan, tmp_path / "plan.json")
        pipe = fs.tune_pipeline(pipe, [{"label": i} for i in range(10)], 2, resume=tmp_path / "plan.json", **options)
        again = pipe.scheduler.plan.options["tuning"]["errors"]["tuned"]["validation"]["rmse"]
        assert again <= 1.001 * record["errors"]["tuned"]["validation"]["rmse"]


@pytest.mark.skipif(not os.environ.get("FEWSTEP_LONG"), reason="minutes of CPU; set FEWSTEP_LONG=1")
@pytest.mark.parametrize("name", WRAPPED)
def test_real_fits_of_tiny_pipelines(name: str, tmp_path: Path) -> None:
    """End to end: the fitted plan is at least as good as the best hand-made one, and is what the pipeline runs."""
    pipe, arguments, shape, denoiser, cond = WRAPPED[name]()
    options: dict[str, Any] = {"quick": True, "cache": None, "batch": 64, "progress": print}
    fs.tune_pipeline(pipe, [arguments, other(arguments)], 2, out=tmp_path / "plan.json", **options)
    plan = pipe.scheduler.plan
    errors = plan.options["tuning"]["errors"]
    assert errors["tuned"]["validation"]["rmse"] <= errors["hand"]["validation"]["rmse"]
    x = normals(*shape)
    out = pipe(**arguments, num_inference_steps=plan.nfe, latents=x.clone(), output_type="latent")
    found = out.frames if hasattr(out, "frames") else out.images
    expected = fs.Sampler(denoiser, plan, shape)(x, cond=cond)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_prompts_of_several_kinds_are_seen_as_those_of_one() -> None:
    pipe, arguments, *_ = wrapped_sd("epsilon")
    prompts = [arguments, other(arguments)]
    alike, mixed = (collect(pipe, [prompts[0], {**prompts[1], **more}]) for more in ({}, {"eta": 0.0}))
    assert alike.scale == mixed.scale == 4.0
    for a, b in zip(alike.cond, mixed.cond, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not pipe.unet._forward_pre_hooks
    assert len(pipe.unet._forward_hooks) == 0


def test_the_page(fits: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, arguments, *_ = wrapped_sd("epsilon")
    given = {k: v for k, v in arguments.items() if k != "guidance_scale"}
    names = {"fs": fs, "pipe": pipe, "prompts": [given, other(given)], "options": {}, "arguments": given}
    run_page("docs/plans-in-pipelines.md", names, "tune")
    assert names["pipe"].scheduler.plan == fs.load_plan("plan.json", force=True)
    assert fits[1]["nfe"] == 6


def test_the_tables_are_those_of_the_committed_results() -> None:
    from reports import pipeline_report, resolution_report

    text = pipeline_report.PAGE.read_text(encoding="utf-8")
    for report in (pipeline_report, resolution_report):
        tables = report.table(json.loads(report.RESULTS.read_text(encoding="utf-8")))
        assert pipeline_report.page(text, tables, report.MARKS) == text
