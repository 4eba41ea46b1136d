"""Twins with `noise="fewstep"`: the documented stream, its law, and where its seeds come from."""

from __future__ import annotations

import importlib
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_cases import PRESENT, SHAPE, difference, make, run, same_bits
from diffusers_pipelines import CASES, image

import fewstep as fs
from fewstep.bindings import diffusers as twins
from fewstep.bindings.diffusers.noise import Streams, take_seed
from fewstep.kernels import philox

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")

STOCHASTIC: list[tuple[str, dict[str, Any]]] = [
    ("CMStochasticIterativeScheduler", {}),
    ("DDPMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchLCMScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("SASolverScheduler", {}),
    ("TCDScheduler", {}),
]


def seed_of(generator: torch.Generator) -> int:
    """As the page of the module says it."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def stream(seed: int, draw: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    rows = [philox.normals(math.prod(shape[1:]), seed, sample, draw, philox.STEP) for sample in range(shape[0])]
    return np.stack(rows).reshape(shape)


@pytest.mark.parametrize(("name", "config"), STOCHASTIC, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_parent_with_the_documented_stream(
    name: str, config: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin's run is the parent's when the parent's draws are replaced by `philox.normals`."""
    twin = make(twins, name, noise="fewstep", **config)
    parent = make(diffusers, name, **config)
    seed, draws = seed_of(torch.Generator().manual_seed(2)), []
    found, state = run(twin, 5, dtype=dtype)

    def drawn(shape: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        draws.append(len(draws))
        return torch.from_numpy(stream(seed, draws[-1], tuple(shape))).to(dtype)

    monkeypatch.setattr(importlib.import_module(parent.__module__), "randn_tensor", drawn)
    expected, _ = run(parent, 5, dtype=dtype)
    after = torch.Generator().manual_seed(2)
    seed_of(after)
    assert torch.equal(state, after.get_state())  # the generator has given a seed and nothing else
    assert len(draws) >= 4
    if dtype == torch.float32:
        assert difference(name, expected, found, dtype) is None
    else:  # the parent rounds the noise and each operation to 16 bits
        for a, b in zip(expected[:2], found[:2], strict=True):
            for field, value in a.items():
                assert b[field].dtype == value.dtype
                scale = float(value.float().abs().max())
                torch.testing.assert_close(b[field].float(), value.float(), rtol=0.0, atol=0.05 * scale)


def test_the_operator_draws_the_same() -> None:
    same_bits("EulerAncestralDiscreteScheduler", {"noise": "fewstep"}, 5, torch.float32)


def test_on_a_device_the_streams_are_the_same() -> None:
    """The path of other devices, run on the CPU."""
    from fewstep.kernels import torch_ops

    streams = Streams(torch.Generator().manual_seed(3), torch.device("cpu"), 2)
    table = torch.from_numpy(streams.rows.astype(np.int64))
    for draw in range(2):
        assert torch.equal(streams.draw(torch.Size(SHAPE)), torch_ops.normals(table, list(SHAPE), draw, philox.STEP))


def test_the_law_of_what_a_step_adds() -> None:
    """x' of LCM is a d + b z: from two runs with equal outputs, z and z' are normal, and independent of each other."""
    shape, ends = (2, 4, 64, 64), []
    generator = torch.Generator().manual_seed(0)
    for library, options in ((twins, {"noise": "fewstep"}), (twins, {"noise": "fewstep"}), (diffusers, {})):
        scheduler = make(library, "LCMScheduler", **options)
        scheduler.set_timesteps(3)
        x, zero = torch.zeros(shape), torch.zeros(shape)
        ends.append([])
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(zero, t, torch.zeros(shape), generator=generator).prev_sample
            ends[-1].append(x.double())
    scale = [float(x.std()) for x in ends[2]]
    z = torch.stack([x.flatten(1) / s for e in ends[:2] for x, s in zip(e, scale, strict=True)]).flatten(0, 1)
    n = z.shape[1]
    assert z.shape == (8, 16384)
    torch.testing.assert_close(z.mean(1), torch.zeros(8).double(), rtol=0.0, atol=4.5 / math.sqrt(n))
    torch.testing.assert_close(z.var(1), torch.ones(8).double(), rtol=0.0, atol=4.5 * math.sqrt(2 / n) + 0.02)
    torch.testing.assert_close((z**4).mean(1), 3 * torch.ones(8).double(), rtol=0.0, atol=4.5 * math.sqrt(96 / n) + 0.1)
    between = torch.corrcoef(z) - torch.eye(8)
    assert float(between.abs().max()) < 4.5 / math.sqrt(n)
    shifted = torch.stack([(z[:, k:] * z[:, : n - k]).mean(1) for k in (1, 2, 3, 4, 64)])
    assert float(shifted.abs().max()) < 4.5 / math.sqrt(n)


def test_where_seeds_come_from() -> None:
    """The same generator's state gives the same run, its next run another; a sample's own generator is its own."""
    name = "EulerAncestralDiscreteScheduler"
    twin = make(twins, name, noise="fewstep")

    def end(generator: Any, batch: int = 2) -> torch.Tensor:
        twin.set_timesteps(4)
        x = torch.ones(batch, 3, 4, 4)
        for t in twin.timesteps:
            twin.scale_model_input(x, t)
            x = twin.step(0.1 * x, t, x, generator=generator).prev_sample
        return x

    generator = torch.Generator().manual_seed(5)
    first, second = end(generator), end(generator)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(end(generator.manual_seed(5)), first)
    torch.manual_seed(5)
    assert torch.equal(end(None), first)
    pair = end([torch.Generator().manual_seed(s) for s in (7, 8)])
    alone = [end([torch.Generator().manual_seed(s)], 1) for s in (7, 8)]
    assert torch.equal(pair, torch.cat(alone))


def test_a_generator_on_a_device_is_not_read_back() -> None:
    """Its seed and offset are host numbers; the offset advances."""

    class Fake:
        device = torch.device("cuda")
        offset = 8

        def initial_seed(self) -> int:
            return 77

        def get_offset(self) -> int:
            return self.offset

        def set_offset(self, offset: int) -> None:
            self.offset = offset

    fake: Any = Fake()
    seeds = [take_seed(fake, torch.device("cuda")) for _ in range(2)]
    words = philox.philox4x32(np.array([8, 0, 0, 0], np.uint32), np.array([77, 0], np.uint32))
    assert seeds[0] == int(words[0]) | int(words[1]) << 32
    assert seeds[1] != seeds[0]
    assert fake.offset == 16


def test_the_brownian_path_is_fewsteps() -> None:
    from fewstep.bindings.k_diffusion import brownian_noise

    name = "DPMSolverSDEScheduler"
    config = {"noise_sampler_seed": 3}
    twin, parent = make(twins, name, noise="fewstep", **config), make(diffusers, name, **config)
    parent.set_timesteps(5)
    own = brownian_noise(torch.empty(SHAPE), 3)
    expected = []
    set_timesteps = parent.set_timesteps

    def given(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        parent.noise_sampler = own

    parent.set_timesteps = given
    expected, _ = run(parent, 5)
    found, _ = run(twin, 5)
    assert difference(name, expected, found, torch.float32) is None


def test_the_wish_is_kept_and_checked(tmp_path: Any) -> None:
    for name in PRESENT:
        assert "noise" not in make(twins, name).config
    twin = make(twins, "DDPMScheduler", noise="fewstep")
    twin.save_pretrained(tmp_path)
    assert type(twin).from_pretrained(tmp_path).noise == "fewstep"
    with pytest.raises(ValueError, match="noise must be one of 'torch', 'fewstep', got 'mine'"):
        make(twins, "DDPMScheduler", noise="mine")


def test_a_pipeline() -> None:
    make_pipe, arguments = CASES["StableDiffusion SDE"]
    pipe = make_pipe()
    before = image(pipe, arguments())
    with pytest.raises(ValueError, match="noise must be one of"):
        fs.accelerate(pipe, noise="mine")
    report = fs.accelerate(pipe, noise="fewstep")
    assert str(report) == "scheduler: DPMSolverMultistepScheduler runs fused, with fewstep's noise"
    images = [image(pipe, arguments()) for _ in range(2)]
    assert torch.equal(*images)
    assert not torch.allclose(images[0], before, atol=2e-3)
    with pytest.raises(ValueError, match="with noise='fewstep', corrected=False: "):
        fs.accelerate(pipe)
    fs.restore(pipe)
    assert "noise" not in vars(pipe.scheduler.config)
    assert torch.equal(image(pipe, arguments()), before)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverSDEScheduler", {}),
        ("FlowMatchLCMScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_a_twin_that_gains_nothing_is_not_used(name: str, config: dict[str, Any]) -> None:
    pipe = CASES["StableDiffusion SDE"][0]()
    pipe.scheduler = scheduler = getattr(diffusers, name)(**config)
    with pytest.raises(ValueError, match="left as it is: drawing its noise takes nearly all of its time"):
        fs.accelerate(pipe)
    assert pipe.scheduler is scheduler
    assert str(fs.accelerate(pipe, noise="fewstep")) == f"scheduler: {name} runs fused, with fewstep's noise"
