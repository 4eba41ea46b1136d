"""Memory that a caller, a model or a callback may touch: changes are refused, or end with the call."""

from __future__ import annotations

import re
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from classifier import guided_and_exact
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fewstep as fs

VP = fs.VP.linear()
SHAPE = (2, 3, 4)
BACKENDS = ("numba", "naive")
PLAN = fs.plan("dpmpp_2m", fs.grid(VP, 4))


def latent(library: str) -> Any:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    return x if library == "numpy" else torch.from_numpy(x)


def sampler(model: Any, backend: str, library: str, plan: fs.Plan = PLAN) -> fs.Sampler:
    return fs.Sampler(
        fs.Denoiser(model, VP), plan, SHAPE, backend=backend, device="cpu" if library == "torch" else None
    )


def array(values: Any) -> np.ndarray:
    return np.asarray(values.detach() if isinstance(values, torch.Tensor) else values)


# --- the model's arguments ---


def accumulates(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Leaves a gradient, an attribute, another shape and other memory on what it was given."""
    with torch.enable_grad():
        assert x.grad is None
        assert not x.requires_grad
        assert not hasattr(x, "seen")
        assert x.shape == SHAPE
        x.requires_grad_()
        x.square().sum().backward()
        raw = 0.05 * x.grad
    x.seen = True
    x.requires_grad_(False)
    x.unsqueeze_(0)
    x.set_(torch.zeros(1))
    t.set_(torch.full((1,), -1.0))
    return raw


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_model_does_to_its_arguments_ends_with_the_call(backend: str) -> None:
    ours, want = sampler(accumulates, backend, "torch"), sampler(lambda x, t: 0.1 * x, backend, "torch")
    for _ in range(2):
        torch.testing.assert_close(ours(latent("torch")), want(latent("torch")), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reshaping_an_argument_ends_with_the_call(backend: str) -> None:
    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        assert x.shape == SHAPE
        raw = 0.1 * x
        x.shape = (24,)
        return raw

    want = sampler(lambda x, t: 0.1 * x, backend, "numpy")(latent("numpy"))
    np.testing.assert_array_equal(sampler(model, backend, "numpy")(latent("numpy")), want)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("moved", ["x", "t", "x and t"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_may_move_the_memory_of_its_arguments(backend: str, moved: str, dtype: str | None) -> None:
    """As a torch queue to another process does: the storage is then in shared memory, and torch frees the old one."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raw = 0.1 * x + 1e-4 * t[:, None, None]
        for name, given in {"x": x, "t": t}.items():
            if name in moved:
                given.share_memory_().fill_(7.0)
        return raw.to(x.dtype)

    def plain(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (0.1 * x + 1e-4 * t[:, None, None]).to(x.dtype)

    ours, want = (
        fs.Sampler(fs.Denoiser(each, VP, dtype=dtype), PLAN, SHAPE, backend=backend, device="cpu")
        for each in (model, plain)
    )
    for _ in range(3):
        torch.testing.assert_close(ours(latent("torch")), want(latent("torch")), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_taken_inside_the_model_ends_with_the_call(backend: str) -> None:
    """`x.grad` is there in every call, and the result has no graph; the parameters' graph is kept."""
    weight = torch.tensor(0.05, requires_grad=True)

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x.requires_grad_()
            x.square().sum().backward()
        return 0.05 * x + 0.025 * x.grad

    def trained(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(x.requires_grad_().square().sum(), x)
        return 0.05 * x + 0.5 * weight * slope

    want = sampler(lambda x, t: 0.1 * x, backend, "torch")(latent("torch"))
    found = sampler(model, backend, "torch")(latent("torch"))
    assert not found.requires_grad
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    if backend == "naive":
        found = sampler(trained, backend, "torch")(latent("torch"))
        torch.testing.assert_close(found.detach(), want, rtol=1e-6, atol=1e-6)
        (slope,) = torch.autograd.grad(found.sum(), weight)
        assert slope.abs() > 0.1


# --- noise from outside ---


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_cannot_reach_the_networks_output(backend: str, library: str) -> None:
    """The output is one buffer of the model's, which `noise` fills with rubbish; `noise` returns one buffer, too."""
    plan = fs.plan("ddpm", fs.grid(VP, 4))
    buffer, z = (np.zeros(SHAPE, np.float32) for _ in range(2))
    output = buffer if library == "numpy" else torch.from_numpy(buffer)

    def model(x: Any, t: Any) -> Any:
        buffer[...] = 0.1
        z[...] = np.nan  # what was drawn for this stage is a copy by now
        return output

    def noise(draw: int, *_: Any) -> np.ndarray:
        buffer[...] = 1e30
        z[...] = draw
        return z

    found = sampler(model, backend, library, plan)(latent(library), noise=noise)
    plain = sampler(lambda x, t: 0.0 * x + 0.1, backend, library, plan)
    want = plain(latent(library), noise=lambda draw, *_: np.full(SHAPE, float(draw)))
    np.testing.assert_allclose(array(found), array(want), rtol=1e-6)


# --- out and x ---


def strided(strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.zeros(60, np.float32), SHAPE, strides)


def read_only() -> np.ndarray:
    out = np.zeros(SHAPE, np.float32)
    out.flags.writeable = False
    return out


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(SHAPE)


REFUSED: dict[str, tuple[Any, str]] = {
    "read-only": (read_only, "out is read-only"),
    "broadcast": (lambda: np.broadcast_to(np.zeros(4, np.float32), SHAPE), "out is read-only"),
    "zero strides": (lambda: strided((0, 0, 4)), "its elements share memory"),
    "overlapping": (lambda: strided((4, 8, 4)), "its elements share memory"),
    "masked": (lambda: np.ma.zeros(SHAPE, np.float32), "out is a masked array"),
    "expanded": (lambda: torch.zeros(1, 1, 4).expand(SHAPE), "its elements share memory"),
    "overlapping tensor": (lambda: torch.as_strided(torch.zeros(40), SHAPE, (1, 2, 1)), "its elements share memory"),
    "leaf": (lambda: torch.zeros(SHAPE, requires_grad=True), "out requires grad"),
    "view of a leaf": (lambda: torch.zeros(SHAPE, requires_grad=True)[:], "out requires grad"),
    "part of a split": (lambda: torch.zeros(4, 3, 4, requires_grad=True).split(2)[0], "out requires grad"),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.zeros(SHAPE)), "out is a FakeTensor"),
    "nested": (lambda: torch.nested.as_nested_tensor([torch.zeros(SHAPE[1:])] * 2), "out is a nested tensor"),
    "sparse": (lambda: torch.zeros(SHAPE).to_sparse(), "out is a tensor of layout torch.sparse_coo"),
    "inference": (inference, "out is an inference tensor"),
}


def no_call(x: Any, t: Any) -> Any:
    raise AssertionError("the model was called")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_memory_that_holds_no_result_is_refused_before_any_call(case: str, backend: str) -> None:
    make, message = REFUSED[case]
    out = make()
    library = "torch" if isinstance(out, torch.Tensor) else "numpy"
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        sampler(no_call, backend, library)(latent(library), out=out)
    works = eval(re.search(r"; out=(.*) would do$", str(refused.value))[1], {"np": np, "torch": torch})
    assert sampler(lambda x, t: 0.1 * x, backend, library)(latent(library), out=works) is works


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "out",
    [
        np.zeros(SHAPE, np.float32)[::-1, ::-1],
        np.zeros(SHAPE, np.float32, order="F"),
        np.zeros(97, np.uint8)[1:].view(np.float32).reshape(SHAPE),
        torch.zeros(SHAPE[::-1]).permute(2, 1, 0),
    ],
    ids=["reversed", "fortran", "unaligned", "permuted"],
)
def test_memory_of_any_other_layout_is_written(out: Any, backend: str) -> None:
    library = "torch" if isinstance(out, torch.Tensor) else "numpy"
    made = sampler(lambda x, t: 0.1 * x, backend, library)
    assert made(latent(library), out=out) is out
    np.testing.assert_array_equal(array(out), array(made(latent(library))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_is_not_dropped(backend: str) -> None:
    with pytest.raises(TypeError, match=r"x is a masked array, and a run has no masks: pass x.filled"):
        sampler(no_call, backend, "numpy")(np.ma.array(latent("numpy"), mask=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own rules for tangents
def test_a_tangent_is_kept_or_refused() -> None:
    x, slope = latent("torch"), torch.ones(SHAPE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, slope)
        with pytest.raises(ValueError, match=r"x requires grad or has a tangent, and backend='numba'"):
            sampler(no_call, "numba", "torch")(dual)
        _, found = forward_ad.unpack_dual(sampler(lambda x, t: 0.1 * x, "naive", "torch")(dual))
    run = sampler(lambda x, t: 0.1 * x, "naive", "torch")  # linear: the tangent is the sample from the slope
    torch.testing.assert_close(found, run(slope), rtol=1e-5, atol=1e-4)


# --- callbacks ---


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callback_has_copies(backend: str, library: str) -> None:
    made, kept = sampler(lambda x, t: 0.1 * x, backend, library), []

    def spoils(info: fs.StepInfo) -> None:
        kept.append((info.x, info.x0, array(info.x).copy(), array(info.x0).copy()))
        info.x[...] = 7.0

    x = latent(library)
    found = made(x, callback=spoils)
    np.testing.assert_array_equal(array(found), array(made(latent(library))))
    np.testing.assert_array_equal(array(x), array(latent(library)))
    assert len(kept) == 4
    for _, x0, _, then in kept:
        np.testing.assert_array_equal(array(x0), then)
    assert len({array(x).ctypes.data for x, *_ in kept}) == 4


# --- interrupted launches ---


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    from fewstep.kernels import launch

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(launch, "_workers", lambda: 2)
        monkeypatch.setattr(launch, "_pool", lambda: pool)
        yield launch, pool


def test_an_interrupted_launch_waits_for_its_other_share(two_workers: Any) -> None:
    launch, _ = two_workers
    begun, written = threading.Event(), []

    def run(address: int, first: int, last: int, raw: int) -> None:
        if first == 0:
            begun.wait()
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.05)
        written.append(first)

    with pytest.raises(KeyboardInterrupt):
        launch.launch(run, 0, 4, launch.SERIAL_ELEMENTS + 1, None)
    assert written == [2]


def test_a_share_that_has_not_begun_never_does(two_workers: Any) -> None:
    """The pool is busy with another sampler's work: without an interruption its share is done here."""
    launch, pool = two_workers
    free, ran = threading.Event(), []
    busy = pool.submit(free.wait)

    def run(address: int, first: int, last: int, raw: int) -> None:
        ran.append((first, last))
        if address:
            raise KeyboardInterrupt

    kept = np.ones(4)
    freed = weakref.ref(kept)
    launch.launch(run, 0, 4, launch.SERIAL_ELEMENTS + 1, [kept])
    assert ran == [(0, 2), (2, 4)]
    del kept
    assert freed() is None  # the pool's queue does not hold what the launch has used
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        launch.launch(run, 1, 4, launch.SERIAL_ELEMENTS + 1, None)
    free.set()
    busy.result()
    pool.submit(lambda: None).result()  # everything submitted before has had its turn
    assert ran == [(0, 2)]


def test_an_error_in_the_pool_is_raised_here(two_workers: Any) -> None:
    launch, _ = two_workers
    begun = threading.Event()

    def run(address: int, first: int, last: int, raw: int) -> None:
        if first:
            begun.set()
            raise MemoryError("in the pool")
        begun.wait()

    with pytest.raises(MemoryError, match="in the pool"):
        launch.launch(run, 0, 4, launch.SERIAL_ELEMENTS + 1, None)


def test_where_no_thread_can_be_started_all_shares_run_here(two_workers: Any) -> None:
    """As when the program ends, or where a container allows no more threads."""
    launch, pool = two_workers
    pool.shutdown()
    ran = []

    def run(address: int, first: int, last: int, raw: int) -> None:
        ran.append((first, last))

    launch.launch(run, 0, 4, launch.SERIAL_ELEMENTS + 1, None)
    assert ran == [(0, 2), (2, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_classifier_guidance_is_the_sampler_of_the_posterior(backend: str) -> None:
    found, exact = guided_and_exact(backend)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
