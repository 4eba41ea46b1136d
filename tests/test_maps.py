"""Denoisers made from other libraries' models, against the loops of these libraries and against formulas."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fewstep as fs  # noqa: E402
from fewstep.bindings.maps import InLibrary, from_diffusers, from_edm, from_k_diffusion  # noqa: E402


class Raw(torch.nn.Module):
    """F of EDM's preconditioning."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(5, 5)

    def forward(self, x, t, shift=0.0):
        return torch.tanh(self.linear(x)) * (1.0 + 0.1 * t[:, None].to(x.dtype)) + shift


class Preconditioned(torch.nn.Module):
    """Karras et al. 2022, eq. 7 and Table 1, around F; in the form of EDM's released networks."""

    def __init__(self, raw, sigma_data=0.6):
        super().__init__()
        self.raw, self.sigma_data = raw, sigma_data

    def forward(self, x, sigma, shift=0.0):
        sigma = sigma.reshape(-1, 1)
        data = self.sigma_data
        norm = (sigma**2 + data**2).sqrt()
        out = self.raw(x / norm, sigma.flatten().log() / 4, shift)
        return data**2 / norm**2 * x + sigma * data / norm * out


def latent(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batched", [True, False])
def test_edm_network_and_its_raw_network_agree(batched):
    raw = Raw()
    shift = torch.linspace(-1.0, 1.0, 4)[:, None]
    cond = ({"shift": 0 * shift}, {"shift": shift})
    options = {"guidance": 1.5, "batched": batched}
    ours = from_edm(Preconditioned(raw), **options)
    assert ours.process == fs.EDM(sigma_data=0.6)
    assert ours.frame.name == "torch"
    theirs = fs.Denoiser(raw, ours.process, "edm", **options)
    with torch.no_grad():
        a, b = (fs.sample(d, shape=(4, 5), solver="heun", steps=6, seed=1, cond=cond) for d in (ours, theirs))
    assert isinstance(a, torch.Tensor)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_network_dtype_is_its_parameters():
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16), requires_grad=False)

        def forward(self, x, sigma):
            seen.append(x.dtype)
            return x * self.scale

    fs.sample(from_edm(Net()), shape=(2, 3), steps=2, seed=0)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("flow", [False, True])
def test_k_diffusion_wrapper(flow):
    told = []

    def model(x, sigma, a=1.0):
        told.append(float(sigma[0]))
        return torch.tanh(a * x)

    sigmas = [0.9, 0.5, 0.2, 0.0]
    denoiser = from_k_diffusion(model, flow=flow)
    make = fs.Grid.from_times if flow else fs.Grid.from_sigmas
    x = latent(2, 3).double()
    got = fs.sample(denoiser, x, solver="euler", grid=make(denoiser.process, sigmas), cond={"a": 0.7})
    want = x
    for s, t in pairwise(sigmas):
        want = want + (want - torch.tanh(0.7 * want)) / s * (t - s)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert told == sigmas[:-1]


def test_a_wrapper_that_says_it_is_a_flow():
    class CONST:
        pass

    model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=CONST()))

    class Callable(SimpleNamespace):
        def __call__(self, x, sigma):
            return x

    assert from_k_diffusion(Callable(inner_model=model.inner_model)).process == fs.Flow()


# --- diffusers ---


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_unet_in_diffusers_own_loop(diffusers, prediction):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    denoiser = from_diffusers(unet, scheduler)
    x = latent(2, 2, 8, 8)
    with torch.no_grad():
        want = x
        for t in scheduler.timesteps:
            want = scheduler.step(unet(want, t).sample, t, want).prev_sample
        grid = fs.Grid.from_times(denoiser.process, [*scheduler.timesteps.tolist(), -1.0])
        got = fs.sample(denoiser, x, solver="ddim", grid=grid)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_flow_transformer_in_diffusers_own_loop(diffusers):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=2, out_channels=2, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    denoiser = from_diffusers(transformer, scheduler)
    assert denoiser.process == fs.Flow(shift=3.0)
    cond = {"encoder_hidden_states": latent(2, 3, 8), "pooled_projections": latent(2, 8)}
    x = latent(2, 2, 8, 8)
    with torch.no_grad():
        want = x
        for t in scheduler.timesteps:
            out = transformer(want, timestep=t.expand(2), **cond, return_dict=False)[0]
            want = scheduler.step(out, t, want, return_dict=False)[0]
        grid = fs.Grid.from_times(denoiser.process, scheduler.sigmas.double().numpy())
        got = fs.sample(denoiser, x, solver="euler", grid=grid, cond=cond)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "FlowMatchLCMScheduler"])
@pytest.mark.parametrize("trained", [1000, 1])
def test_the_shift_and_the_times_of_any_flow_scheduler(diffusers, name, trained):
    """Their own sigmas are those of the process's grid, and their timesteps what the network is given."""
    from fewstep.bindings import diffusers as twins

    own = {"shift": 3.0, "flow_shift": 7.0}
    if name == "FlowMatchLCMScheduler":
        parts, shift = {}, 3.0
    else:
        parts, shift = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, 7.0
    for library in (diffusers, twins):
        # Entries of a configuration that a class does not take are kept, and do nothing.
        scheduler = getattr(library, name).from_config({**own, **parts, "num_train_timesteps": trained})
        assert {**scheduler.config}.items() >= own.items()
        seen = []

        def network(x, timestep, seen=seen):
            seen.append(float(timestep[0]))
            return 0.0 * x

        denoiser = from_diffusers(network, scheduler)
        assert denoiser.process == fs.Flow(shift)
        if name == "UniPCMultistepScheduler" and trained > 1:  # whose grid is uniform before the shift
            scheduler.set_timesteps(4)
            given = scheduler.sigmas[:-1].tolist()
            assert given == pytest.approx(
                [shift * u / (1.0 + (shift - 1.0) * u) for u in (1.0, 0.75, 0.5, 0.25)], rel=2e-3
            )
        fs.sample(denoiser, latent(1, 4), solver="euler", grid=fs.Grid.from_times(denoiser.process, [0.75, 0.25, 0.0]))
        assert seen == pytest.approx([0.75 * trained, 0.25 * trained], rel=1e-6)


def test_a_flow_whose_time_rises_is_refused(diffusers):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="has invert_sigmas=True, for a network whose time rises"):
        from_diffusers(lambda x, timestep: x, scheduler)


def test_a_scheduler_that_tells_no_process():
    scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon"))
    with pytest.raises(ValueError, match="SimpleNamespace has no alphas_cumprod"):
        from_diffusers(lambda x, timestep: x, scheduler)


def test_a_flow_scheduler_without_a_configuration():
    class FlowMatchOfMine:
        pass

    denoiser = from_diffusers(lambda x, timestep: x, FlowMatchOfMine())
    assert (denoiser.process.shift, denoiser.time_scale) == (1.0, 1000.0)


def test_tuples_and_plain_outputs():
    bars = torch.linspace(0.99, 0.01, 10)
    scheduler = SimpleNamespace(alphas_cumprod=bars, config=SimpleNamespace(prediction_type="sample"))
    for model in (lambda x, t: (0.5 * x, None), lambda x, timestep: 0.5 * x):
        x = latent(1, 4)
        got = fs.sample(from_diffusers(model, scheduler), x, solver="ddim", steps=1)
        # One step to the clean end is the prediction itself, 0.5 x.
        torch.testing.assert_close(got, 0.5 * x)
    assert math.isclose(float(bars[0]), from_diffusers(model, scheduler).process.alphas_cumprod[0], rel_tol=1e-7)
    assert isinstance(InLibrary(lambda x, t: x, np), InLibrary)
