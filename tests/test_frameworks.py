"""Other libraries' arrays through DLPack: the same memory, the same numbers, the same type back.

`toy` is a fake library: an array class over NumPy that supports DLPack and nothing else, to test the exchange on the
CPU. JAX is tested where it is installed, CuPy on a machine with a GPU.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from pages import run_page

import fewstep as fs
from fewstep.solvers.run import dlpack
from fewstep.solvers.run.dlpack import InLibrary

VP = fs.VP.linear()
SHAPE = (4, 6)


class Toy:
    """An array of the stand-in library: immutable, without NumPy's or torch's methods."""

    exported = 0

    def __init__(self, values):
        self.values = values
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __len__(self):
        return len(self.values)

    def __dlpack__(self, **options):
        Toy.exported += 1
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()

    def __array__(self, *args, **kwargs):
        raise AssertionError("converted instead of exchanged")

    def __array_namespace__(self):
        return toy


toy = SimpleNamespace(from_dlpack=lambda other: Toy(np.from_dlpack(other)))


def numpy_model(x, t, shift=None):
    out = np.tanh(x) * (1.0 + t[:, None] / 1000.0).astype(x.dtype)
    return out if shift is None else out + shift


class ToyModel:
    """The same network on the fake library's arrays; records the addresses of its inputs."""

    def __init__(self):
        self.memory, self.branches = [], []

    def __call__(self, x, t, shift=None):
        assert type(x) is type(t) is Toy
        assert shift is None or type(shift) is Toy
        self.memory.append(x.values.ctypes.data)
        self.branches.append(len(x))
        return Toy(numpy_model(x.values, t.values, None if shift is None else shift.values))


def latent(dtype=np.float32):
    return np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_samples_are_numpys_to_the_bit(backend, dtype):
    options = {"solver": "dpmpp_2m_sde", "steps": 5, "seed": 3, "backend": backend}
    x = latent(dtype)
    got = fs.sample(fs.Denoiser(ToyModel(), VP), Toy(x), **options)
    assert type(got) is Toy
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.values, fs.sample(fs.Denoiser(numpy_model, VP), x, **options))
    np.testing.assert_array_equal(x, latent(dtype))  # the caller's memory is only read


def test_the_model_sees_the_runs_own_memory():
    """Zero-copy: the model gets the two alternating model inputs of the run, call after call."""
    model = ToyModel()
    sampler = fs.Sampler(fs.Denoiser(InLibrary(model, toy), VP), fs.plan("unipc", fs.grid(VP, 6)), SHAPE)
    for _ in range(3):
        sampler(seed=0)
    assert len(model.memory) == 18
    assert len(set(model.memory)) == 2
    assert all(address % 64 == 0 for address in model.memory)  # XLA needs this alignment to avoid a copy


def test_what_the_model_returns_is_read_in_place():
    """A read-only array is viewed, not copied, and uses the same compiled kernel as NumPy arrays."""
    values = np.arange(6.0)
    values.flags.writeable = False
    taken = dlpack.Library(toy).take(Toy(values))
    assert taken.ctypes.data == values.ctypes.data
    assert taken.flags.writeable
    np.testing.assert_array_equal(taken, np.arange(6.0))


def test_samples_from_a_seed_are_the_models_arrays():
    sampler = fs.Sampler(fs.Denoiser(InLibrary(ToyModel(), toy), VP), fs.plan("ddim", fs.grid(VP, 4)), SHAPE)
    own = fs.Sampler(fs.Denoiser(numpy_model, VP), sampler.plan, SHAPE)
    got = sampler(seed=2)
    assert type(got) is Toy
    np.testing.assert_array_equal(got.values, own(seed=2))
    # The result is like x: NumPy for a NumPy latent.
    assert type(sampler(latent())) is np.ndarray
    drawn = fs.sample(fs.Denoiser(InLibrary(ToyModel(), toy), VP), shape=SHAPE, solver="ddim", steps=4, seed=2)
    assert type(drawn) is Toy


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_on_the_librarys_conditions(batched):
    model = ToyModel()
    shift = np.linspace(-1.0, 1.0, 4, dtype=np.float32)[:, None]
    null = np.zeros_like(shift)
    got = fs.sample(
        fs.Denoiser(model, VP, guidance=2.0, null={"shift": Toy(null)}, batched=batched),
        Toy(latent()), cond={"shift": Toy(shift)}, steps=3,
    )  # fmt: skip
    want = fs.sample(
        fs.Denoiser(numpy_model, VP, guidance=2.0), latent(), cond=({"shift": null}, {"shift": shift}), steps=3
    )
    np.testing.assert_allclose(got.values, want, rtol=1e-6, atol=1e-6)
    assert model.branches == ([8] * 3 if batched else [4] * 6)


def test_callbacks_and_noise_are_the_librarys():
    seen, z = [], np.random.default_rng(1).standard_normal((8, *SHAPE)).astype(np.float32)

    def watch(info):
        assert type(info.x) is type(info.x0) is Toy
        seen.append((info.step, info.x.values.copy()))

    def noise(draw, at, to, shape):
        return Toy(z[draw])

    got = fs.sample(fs.Denoiser(ToyModel(), VP), Toy(latent()), solver="ddpm", steps=3, noise=noise, callback=watch)
    want = fs.sample(fs.Denoiser(numpy_model, VP), latent(), solver="ddpm", steps=3, noise=lambda d, *_: z[d])
    assert [step for step, _ in seen] == [0, 1, 2]
    np.testing.assert_array_equal(seen[-1][1], got.values)
    np.testing.assert_allclose(got.values, want, rtol=1e-6, atol=1e-6)


def test_adaptive_sampling_too():
    got = fs.sample_adaptive(fs.Denoiser(ToyModel(), VP), Toy(latent()), rtol=0.1)
    want = fs.sample_adaptive(fs.Denoiser(numpy_model, VP), latent(), rtol=0.1)
    assert type(got.x) is Toy
    np.testing.assert_array_equal(got.x.values, want.x)
    np.testing.assert_array_equal(got.nfe, want.nfe)


def test_a_torch_network_with_a_latent_of_another_library():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)

        def forward(self, x, t):
            return self.linear(x)

    denoiser = fs.Denoiser(Net(), VP)
    got = fs.sample(denoiser, Toy(latent()), steps=3)
    assert type(got) is Toy
    np.testing.assert_array_equal(got.values, fs.sample(denoiser, torch.from_numpy(latent()), steps=3).numpy())


class Far:
    """A fake of an array on a GPU: it reports device type 2 and cannot be exported."""

    def __init__(self, kind):
        self.kind, self.shape, self.ndim, self.dtype = kind, SHAPE, 2, np.dtype(np.float32)

    def __dlpack_device__(self):
        return (self.kind, 0)

    def __dlpack__(self, **options):
        raise BufferError("there is no such device")

    def __array_namespace__(self):
        return toy


def test_gpu_arrays_go_to_torch_on_the_current_stream(monkeypatch):
    """The order of DLPack calls, recorded with a fake of torch, so that no GPU is needed."""
    asked = []
    torch = SimpleNamespace(from_dlpack=lambda array: asked.append(array) or "tensor")
    monkeypatch.setattr(dlpack, "TorchFrame", lambda device: SimpleNamespace(torch=torch, device=device))
    for kind in dlpack.GPUS:
        far = Far(kind)
        assert dlpack.Library(toy).take(far) == "tensor"
        assert asked[-1] is far  # torch passes its current stream to far.__dlpack__


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: dlpack.Library(toy).take(Far(7)),
            ValueError,
            "on DLPack device type 7: the loop runs on CPUs and GPUs",
        ),
        (lambda: dlpack.Library(toy).take(Far(1)), ValueError, "Far of dtype float32 cannot be viewed through DLPack"),
        (lambda: InLibrary(lambda x, t: x, np.random), TypeError, "namespace must have from_dlpack"),
        (lambda: InLibrary(3, toy), TypeError, r"model must be callable as model\(x, t, \*\*cond\), got int"),
    ],
)
def test_what_cannot_be_exchanged_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_log_probabilities_come_with_an_array_of_the_library():
    sampler = fs.Sampler(fs.Denoiser(InLibrary(ToyModel(), toy), VP), fs.plan("ddpm", fs.grid(VP, 3)), SHAPE)
    found, back = sampler(seed=1, log_prob=True), Toy(np.zeros(SHAPE, np.float32))
    assert type(found.x) is Toy
    np.testing.assert_array_equal(found.x.values, sampler(seed=1).values)
    assert sampler(seed=1, log_prob=True, out=back).x is back
    np.testing.assert_array_equal(back.values, found.x.values)


def test_an_immutable_output_is_refused():
    model = ToyModel()
    sampler = fs.Sampler(fs.Denoiser(InLibrary(model, toy), VP), fs.plan("ddim", fs.grid(VP, 2)), SHAPE)
    room = np.zeros(SHAPE, np.float32)
    back = sampler(seed=1, out=Toy(room))
    np.testing.assert_array_equal(room, sampler(seed=1).values)
    assert back.values is room
    calls = len(model.memory)
    room.flags.writeable = False
    with pytest.raises(ValueError, match="out is an immutable Toy: use the returned array"):
        sampler(seed=1, out=Toy(room))
    assert len(model.memory) == calls


def test_library_without_from_dlpack_is_named():
    class Odd:
        __module__ = "oddlib.core"

        def __dlpack__(self):
            raise AssertionError

    with pytest.raises(TypeError, match="x is an array of 'oddlib', which has no from_dlpack"):
        fs.sample(fs.Denoiser(numpy_model, VP), Odd(), steps=2)


# --- the libraries themselves ---


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed (pip install jax)")
class TestJax:
    def model(self):
        import jax
        import jax.numpy as jnp

        return jax.jit(lambda x, t, shift=0.0: jnp.tanh(x) * (1.0 + t[:, None] / 1000.0) + shift)

    def test_latent_in_and_out(self):
        import jax
        import jax.numpy as jnp

        got = fs.sample(fs.Denoiser(self.model(), VP), jnp.asarray(latent()), solver="ddpm", steps=5, seed=1)
        assert isinstance(got, jax.Array)
        want = fs.sample(fs.Denoiser(numpy_model, VP), latent(), solver="ddpm", steps=5, seed=1)
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=2e-3)

    def test_the_input_is_not_copied(self):
        import jax.numpy as jnp

        seen = []

        def model(x, t):
            seen.append(x.unsafe_buffer_pointer())
            return x * 0.5

        sampler = fs.Sampler(fs.Denoiser(InLibrary(model, jnp), VP), fs.plan("euler", fs.grid(VP, 6)), SHAPE)
        sampler(seed=0)
        sampler(seed=0)
        assert len(set(seen)) == 2

    def test_guidance_and_seeds(self):
        import jax
        import jax.numpy as jnp

        shift = np.linspace(-1.0, 1.0, 4, dtype=np.float32)[:, None]
        cond = ({"shift": jnp.zeros((4, 1))}, {"shift": jnp.asarray(shift)})
        got = fs.sample(
            fs.Denoiser(InLibrary(self.model(), jnp), VP, guidance=2.0), shape=SHAPE, seed=4, steps=4, cond=cond
        )
        assert isinstance(got, jax.Array)
        want = fs.sample(
            fs.Denoiser(numpy_model, VP, guidance=2.0), shape=SHAPE, seed=4, steps=4,
            cond=({"shift": 0.0 * shift}, {"shift": shift}),
        )  # fmt: skip
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=2e-3)

    def test_an_immutable_output_is_refused(self):
        import jax.numpy as jnp

        sampler = fs.Sampler(fs.Denoiser(InLibrary(self.model(), jnp), VP), fs.plan("ddim", fs.grid(VP, 2)), SHAPE)
        with pytest.raises(ValueError, match="out is an immutable"):
            sampler(seed=0, out=jnp.zeros(SHAPE))

    def test_the_page(self):
        """docs/frameworks.md"""
        import jax

        names = run_page("docs/frameworks.md", {}, "needs-jax")
        assert isinstance(names["sample"], jax.Array)
        np.testing.assert_allclose(np.asarray(names["sample"]), np.asarray(names["by_hand"]), rtol=1e-3, atol=1e-3)
        assert isinstance(names["drawn"], jax.Array)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, from its own pytree
def test_the_page_on_torch():
    torch = pytest.importorskip("torch")
    names = run_page("docs/frameworks.md", {}, "torch")
    with torch.no_grad():
        torch.testing.assert_close(names["program"].module()(names["x"]), names["images"], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed, or there is no GPU")
def test_cupy_in_and_out_on_its_own_stream():
    """Needs CuPy and a GPU."""
    import cupy

    def model(x, t):
        return cupy.tanh(x) * (1.0 + t[:, None] / 1000.0)

    with cupy.cuda.Stream(non_blocking=True):
        x = cupy.asarray(latent())
        got = fs.sample(fs.Denoiser(model, VP), x, solver="dpmpp_2m", steps=5)
        assert isinstance(got, cupy.ndarray)
        host = cupy.asnumpy(got)
    np.testing.assert_allclose(host, fs.sample(fs.Denoiser(numpy_model, VP), latent(), steps=5), rtol=1e-4, atol=2e-3)
