"""Whole pipelines of diffusers, with and without `accelerate`: the same image."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers_cases import only_fused
from diffusers_pipelines import CASES, FIELDS, image

import fewstep as fs
from fewstep.bindings import diffusers as twins

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")

# Images lie in 0 .. 1; a tiny network magnifies what the schedulers round differently.
TOLERANCE = 2e-3


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        diffusers.logging.set_verbosity_error()
        yield
        diffusers.logging.set_verbosity_warning()


@pytest.mark.parametrize("name", CASES)
def test_the_same_image(name: str) -> None:
    make, arguments = CASES[name]
    pipe = make()
    expected = image(pipe, arguments())
    scheduler = type(pipe.scheduler).__name__
    assert str(fs.accelerate(pipe)) == f"scheduler: {scheduler} runs fused"
    with only_fused(scheduler):
        found = image(pipe, arguments())
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)
    fs.restore(pipe)
    assert type(pipe.scheduler) is getattr(diffusers, scheduler)
    torch.testing.assert_close(image(pipe, arguments()), expected, rtol=0.0, atol=0.0)


def latents(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = pipe(**arguments, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")  # torchsde's, of what it has rounded itself
@pytest.mark.parametrize("name", FIELDS)
def test_the_same_latents(name: str) -> None:
    """Audio, video and newer image models."""
    make, arguments = FIELDS[name]
    pipe = make()
    expected = latents(pipe, arguments())
    scheduler = type(pipe.scheduler).__name__
    if scheduler.startswith("Cosine"):  # left alone by accelerate, whose noise would be another
        pipe.scheduler = getattr(twins, scheduler).from_config(pipe.scheduler.config)
    else:
        assert str(fs.accelerate(pipe)) == f"scheduler: {scheduler} runs fused"
    with contextlib.nullcontext() if "learned" in name else only_fused(scheduler):
        found = latents(pipe, arguments())
    scale = float(expected.abs().max())
    assert 0.0 < float(expected.std()) < torch.inf
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE * max(1.0, scale))


def test_one_scheduler_in_two_threads() -> None:
    """Each concurrent call gives the image that it gives alone: a run belongs to the thread, not to the object."""
    make, arguments = CASES["StableDiffusion UniPC"]
    first, second = make(), make()
    fs.accelerate(first)
    second.scheduler = first.scheduler
    runs = {0: (first, {**arguments(), "num_inference_steps": 9}), 1: (second, {**arguments(), "guidance_scale": 2.0})}
    alone = {seed: image(pipe, given, seed) for seed, (pipe, given) in runs.items()}
    together: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def call(seed: int) -> None:
        pipe, given = runs[seed]
        for _ in range(3):
            barrier.wait()

            def lockstep(*args: Any) -> dict[str, Any]:
                barrier.wait() if args[1] < 6 else None  # both are in the middle of a run at once
                return args[3]  # type: ignore[no-any-return]

            together[seed].append(image(pipe, given, seed, callback_on_step_end=lockstep))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, images in together.items():
        assert len(images) == 3
        for found in images:
            torch.testing.assert_close(found, alone[seed], rtol=0.0, atol=0.0)


def test_networks_that_move() -> None:
    """As offloading moves weights to a device and back around each call, and a pipeline to another dtype and back."""
    make, arguments = CASES["StableDiffusion UniPC"]

    def moved(module: torch.nn.Module, *args: Any) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()

    images = []
    for accelerated in (False, True):
        pipe = make()
        for network in (pipe.unet, pipe.vae):
            network.register_forward_pre_hook(moved)
            network.register_forward_hook(moved)
        if accelerated:
            fs.accelerate(pipe)
        with only_fused("UniPCMultistepScheduler") if accelerated else contextlib.nullcontext():
            for dtype in (torch.float32, torch.float64, torch.float32):
                pipe.to(dtype)
                given = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
                images.append(image(pipe, given))
    for expected, found in zip(images[:3], images[3:], strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("whole", [False, True], ids=["network", "whole call"])
def test_compiled(whole: bool) -> None:
    """COMPILER=inductor compiles as torch.compile does by default, and the whole call too, which takes minutes."""
    compiler = os.environ.get("COMPILER")
    if whole and compiler is None:
        pytest.skip("takes a minute: COMPILER=eager or COMPILER=inductor runs it")
    make, arguments = CASES["StableDiffusion UniPC"]
    pipe, backend = make(), compiler or "eager"
    expected = image(pipe, arguments())
    fs.accelerate(pipe)
    torch._dynamo.reset()
    if whole:
        found = torch.compile(image, backend=backend)(pipe, arguments())
    else:
        pipe.unet = torch.compile(pipe.unet, backend=backend)
        found = image(pipe, arguments())
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)


def test_callbacks_see_and_change_the_latents() -> None:
    make, arguments = CASES["StableDiffusion UniPC"]
    seen: list[list[torch.Tensor]] = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[-1].append(tensors["latents"].clone())
        return {"latents": tensors["latents"] * 0.9} if step == 2 else tensors

    images = []
    pipe = make()
    for swap in (False, True):
        if swap:
            fs.accelerate(pipe)
        seen.append([])
        images.append(image(pipe, arguments(), callback_on_step_end=watch))
    assert len(seen[0]) == len(seen[1]) == 6
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(images[1], images[0], rtol=0.0, atol=TOLERANCE)


def test_interrupt_and_begin_again() -> None:
    """An interrupted or failed run leaves no state behind."""
    make, arguments = CASES["StableDiffusion"]
    pipe = make()
    fs.accelerate(pipe)
    expected = image(pipe, arguments())

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return tensors

    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    image(pipe, arguments(), callback_on_step_end=stop)
    with pytest.raises(KeyboardInterrupt):
        image(pipe, arguments(), callback_on_step_end=fail)
    torch.testing.assert_close(image(pipe, arguments()), expected, rtol=0.0, atol=0.0)


def test_sixteen_bits() -> None:
    make, arguments = CASES["StableDiffusion UniPC"]
    pipe = make().to(torch.bfloat16)
    given = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    expected = image(pipe, given)
    fs.accelerate(pipe)
    torch.testing.assert_close(image(pipe, given), expected, rtol=0.0, atol=0.1)


def test_saved_pipelines_come_back(tmp_path: Any) -> None:
    """A saved pipeline gives the same images; one that was restored before saving does not mention fewstep."""
    make, arguments = CASES["DDIM"]
    pipe = make()
    expected = image(pipe, arguments())
    fs.accelerate(pipe)
    pipe.save_pretrained(tmp_path / "fused")
    fs.restore(pipe)
    pipe.save_pretrained(tmp_path / "restored")
    assert "fewstep" not in (tmp_path / "restored" / "model_index.json").read_text()
    for folder in ("fused", "restored"):
        again = diffusers.DDIMPipeline.from_pretrained(tmp_path / folder)
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(image(again, arguments()), expected, rtol=0.0, atol=0.0)


def test_a_scheduler_keeps_what_it_holds() -> None:
    pipe = CASES["SD3"][0]()
    pipe.scheduler.set_shift(5.0)
    fs.accelerate(pipe)
    assert pipe.scheduler.shift == 5.0
    pipe.scheduler.set_shift(2.0)
    fs.restore(pipe)
    assert pipe.scheduler.shift == 2.0
    assert pipe.scheduler.config.shift == 3.0
    assert not hasattr(pipe.scheduler, "corrected")


def test_what_is_refused() -> None:
    class Mine(diffusers.DDIMScheduler):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, got DDIMScheduler"):
        fs.accelerate(diffusers.DDIMScheduler())
    pipe = CASES["DDIM"][0]()
    pipe.scheduler = mine = Mine()
    with pytest.raises(
        ValueError, match=r"nothing to accelerate in DDIMPipeline.*there is no fused Mine: its step may differ"
    ) as told:
        fs.accelerate(pipe)
    assert "set DDIMScheduler.from_config(scheduler.config) in its place" in str(told.value)
    assert pipe.scheduler is mine
    pipe.scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=4)
    with pytest.raises(ValueError, match="no fused VQDiffusionScheduler"):
        fs.accelerate(pipe)
    pipe.scheduler = diffusers.DDIMScheduler()
    assert "DDIMScheduler was not fused" in str(fs.restore(pipe))
    assert "runs fused, corrected" in str(fs.accelerate(pipe, corrected=True))
    assert "was fused already" in str(fs.accelerate(pipe, corrected=True))
    with pytest.raises(ValueError, match=r"corrected=True: fewstep.restore\(pipe\) first"):
        fs.accelerate(pipe)
    assert "DDIMScheduler is diffusers' own again" in str(fs.restore(pipe))
    assert "DDIMScheduler was not fused" in str(fs.restore(pipe))  # as a second `accelerate` says "fused already"
    assert "corrected" not in pipe.scheduler.config


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_graph_needs_cuda() -> None:
    pipe = CASES["DDIM"][0]()
    before = pipe.scheduler
    with pytest.raises(ValueError, match="graph=True captures the denoiser in a CUDA graph, and there is no CUDA"):
        fs.accelerate(pipe, graph=True)
    assert pipe.scheduler is before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_changes_no_image() -> None:
    make, arguments = CASES["StableDiffusion"]
    pipe = make().to("cuda")
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    expected = image(pipe, given)
    fs.accelerate(pipe, graph=True)
    for _ in range(2):
        torch.testing.assert_close(image(pipe, given), expected, rtol=0.0, atol=TOLERANCE)
    wide = {**given, "width": 24}
    found = image(pipe, wide)
    fs.restore(pipe)
    assert "forward" not in pipe.unet.__dict__
    torch.testing.assert_close(found, image(pipe, wide), rtol=0.0, atol=TOLERANCE)
