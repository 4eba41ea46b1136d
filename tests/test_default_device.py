"""A step follows its tensors' device, whatever torch.set_default_device says."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fewstep as fs  # noqa: E402
from fewstep.bindings import comfyui  # noqa: E402
from fewstep.bindings import k_diffusion as kd  # noqa: E402
from fewstep.bindings.export.sampler_module import SamplerModule  # noqa: E402
from fewstep.kernels import philox  # noqa: E402

VP = fs.VP.linear()
SIGMAS = [14.6, 4.2, 0.9, 0.1, 0.0]
X = torch.linspace(-2.0, 2.0, 30).reshape(3, 2, 5)


@pytest.fixture
def elsewhere() -> Iterator[Callable[[str | None], None]]:
    """Sets the default device."""
    yield torch.set_default_device
    torch.set_default_device(None)


def net(x: Any, t: Any, c: Any = 0.1) -> Any:
    return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1) / 2000.0) + c


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("guidance", [None, fs.CFG(2.0, rescale=0.5)])
@pytest.mark.parametrize("clip", [None, 0.9, fs.DynamicThreshold(0.9)])
def test_samples(backend: str, guidance: Any, clip: Any, elsewhere: Callable[[str | None], None]) -> None:
    def ends() -> list[Any]:
        denoiser = fs.Denoiser(net, VP, "v", guidance=guidance, clip=clip)
        own = {"cond": None if guidance is None else ({"c": 0 * X[:, :1, :1]}, {"c": X[:, :1, :1]})}
        sampled = fs.sample(denoiser, X, solver="dpmpp_2m_sde", steps=3, seed=1, backend=backend, **own)
        drawn = fs.sample(denoiser, shape=X.shape, steps=3, seed=1, backend=backend, device="cpu", **own)
        return [sampled, drawn, fs.sample_adaptive(denoiser, X, backend=backend, **own).x]

    want = ends()
    elsewhere("meta")
    for a, b in zip(ends(), want, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


def test_modules(elsewhere: Callable[[str | None], None]) -> None:
    streams = torch.as_tensor(philox.streams(7, 3).astype("int64"))

    def end() -> Any:
        x = X.clone().requires_grad_()
        loop = SamplerModule(fs.Denoiser(net, VP, "v", clip=0.9), fs.plan("dpmpp_2m_sde", fs.grid(VP, 3)))
        found = loop(x, streams)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        return torch.stack([found.detach(), gradient])

    want = end()
    elsewhere("meta")
    assert torch.equal(end(), want)


class Model:
    def __call__(self, x: Any, sigma: Any, model_options: Any = None, **own: Any) -> Any:
        found = torch.tanh(x / (1.0 + sigma.reshape(-1, 1, 1)))
        for hook in (model_options or {}).get("sampler_post_cfg_function", []):
            found = hook({"denoised": found, "uncond_denoised": 0.9 * found})
        return found


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
@pytest.mark.parametrize("name", sorted(comfyui.nodes.SAMPLERS))
def test_samplers_of_k_diffusion_and_comfyui(name: str, elsewhere: Callable[[str | None], None]) -> None:
    function = comfyui.nodes.SAMPLERS[name]
    own = (
        {"noise_sampler": kd.brownian_noise(X, 3)} if "noise_sampler" in inspect.signature(function).parameters else {}
    )

    def end() -> Any:
        found = function(Model(), X.clone(), torch.tensor(SIGMAS, device="cpu"), disable=True, **own)
        return found[0] if isinstance(found, tuple) else found

    want = end()
    elsewhere("meta")
    with warnings.catch_warnings():
        found = end()
    assert found.device.type == "cpu"
    assert torch.equal(found, want)


def test_noise_sources(elsewhere: Callable[[str | None], None]) -> None:
    pytest.importorskip("torchsde")

    def draws() -> list[Any]:
        sources = (
            kd.gaussian_noise(X, 3),
            kd.brownian_noise(X, 3),
            kd.torchsde_noise(X, 0.1, 14.6, 3),
            kd.torchsde_noise(X, 0.1, 14.6, [1, 2, 3]),
        )
        return [source(torch.tensor(4.0, device="cpu"), torch.tensor(2.0, device="cpu")) for source in sources]

    want = draws()
    elsewhere("meta")
    for a, b in zip(draws(), want, strict=True):
        assert torch.equal(a, b)
