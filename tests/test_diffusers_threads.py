"""A twin's settings are the object's, its runs the threads': as diffusers' own between requests, apart within them."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from diffusers_cases import GENERAL, make, only_fused, run

import fewstep.bindings.diffusers as twins

SHAPE = (1, 4, 9, 9)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:__array_:DeprecationWarning", "ignore:The `scale_model_input`:UserWarning"
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        diffusers.logging.set_verbosity_error()
        yield
        diffusers.logging.set_verbosity_warning()


def steps(scheduler: Any, times: Any = None) -> torch.Tensor:
    x = torch.linspace(-1.0, 1.0, 324).reshape(SHAPE)
    for t in scheduler.timesteps if times is None else times:
        x = scheduler.step(torch.tanh(2.0 * x), t, x, return_dict=False)[0]
    return x


def request(scheduler: Any) -> torch.Tensor:
    scheduler.set_timesteps(5)
    return steps(scheduler)


def scheduled(scheduler: Any) -> torch.Tensor:
    """A request on the schedule that is there."""
    return steps(scheduler)


def edited(scheduler: Any) -> None:
    scheduler.config.use_karras_sigmas = True  # in place


def sigmas(scheduler: Any) -> None:
    scheduler.set_timesteps(4)
    scheduler.sigmas = scheduler.sigmas * 0.9


def in_place(scheduler: Any) -> None:
    scheduler.set_timesteps(4)
    scheduler.sigmas[1] *= 0.9


def later(scheduler: Any) -> None:
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)


FLOW, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
CHANGES: list[tuple[str, Callable[[Any], object], Callable[[Any], torch.Tensor]]] = [
    (FLOW, lambda s: s.set_shift(3.0), request),
    (FLOW, lambda s: s.register_to_config(use_karras_sigmas=True), request),
    (FLOW, edited, request),
    (UNIPC, edited, request),
    (UNIPC, lambda s: s.register_to_config(final_sigmas_type="sigma_min"), request),
    (UNIPC, lambda s: setattr(s, "disable_corrector", [0, 1]), request),
    (UNIPC, lambda s: s.set_timesteps(7), scheduled),
    (UNIPC, sigmas, scheduled),
    (UNIPC, in_place, scheduled),
    (UNIPC, later, scheduled),
    ("DDIMScheduler", lambda s: s.set_timesteps(3), scheduled),
    ("DDIMScheduler", lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.99995)), request),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("name", "change", "ask"), CHANGES)
def test_a_change_acts_on_the_next_request_in_any_thread(
    name: str, change: Callable[[Any], object], ask: Callable[[Any], torch.Tensor], finished: bool
) -> None:
    ends = []
    for scheduler in (make(diffusers, name), make(twins, name)):
        with ThreadPoolExecutor(1) as there, ThreadPoolExecutor(1) as elsewhere:
            plain = there.submit(request, scheduler).result()
            elsewhere.submit(request, scheduler).result()
            if not finished and ask is request:  # interrupted

                def part(scheduler: Any = scheduler) -> None:
                    scheduler.set_timesteps(8)
                    steps(scheduler, scheduler.timesteps[:3])

                there.submit(part).result()
            change(scheduler)
            ends.append(there.submit(ask, scheduler).result())
            again = ask(copy.deepcopy(scheduler)) if ask is request else ends[-1]
            torch.testing.assert_close(again, ends[-1], rtol=0.0, atol=0.0)
    assert not torch.equal(plain, ends[0])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [FLOW, UNIPC, "DDIMScheduler", "LMSDiscreteScheduler"])
def test_a_run_under_way_is_not_disturbed(name: str) -> None:
    """While one thread is in the middle of a run, another sets another schedule, runs it and changes settings."""
    scheduler, alone = make(twins, name), request(make(twins, name))
    scheduler.set_timesteps(5)
    x = torch.linspace(-1.0, 1.0, 324).reshape(SHAPE)
    with ThreadPoolExecutor(1) as there:
        for t in scheduler.timesteps:
            there.submit(lambda: (scheduler.set_timesteps(9), steps(scheduler))).result()
            there.submit(setattr, scheduler, "num_inference_steps", 9).result()
            x = scheduler.step(torch.tanh(2.0 * x), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, alone, rtol=0.0, atol=0.0)
    assert len(scheduler.timesteps) >= 9  # between two runs, the object's


# Who sets the schedule, scales and steps: threads by number, for each step. -1 is a new thread each time.
THREADS = [(1, 0, 0), (0, -1, -1), (-1, -1, -1), (1, 2, 1), (2, 1, 1), (1, "alternate", "alternate"), (0, 1, 0)]


@pytest.mark.parametrize("times", ["elements", "numbers"])
@pytest.mark.parametrize(("sets", "scales", "makes"), THREADS)
@pytest.mark.parametrize("name", [UNIPC, "EulerAncestralDiscreteScheduler", "PNDMScheduler", "HeunDiscreteScheduler"])
def test_one_run_in_several_threads(name: str, sets: Any, scales: Any, makes: Any, times: str) -> None:
    """A run is continued by whichever thread makes its next step, also where a thread has broken off one of its own."""
    ends = []
    for scheduler in (make(diffusers, name), make(twins, name)):
        pools = [ThreadPoolExecutor(1) for _ in range(3)]

        def call(who: Any, method: Any, *args: Any, pools: Any = pools, **kwargs: Any) -> Any:
            if who == -1:
                with ThreadPoolExecutor(1) as new:
                    return new.submit(method, *args, **kwargs).result()
            return pools[who].submit(method, *args, **kwargs).result()

        pools[2].submit(request, scheduler).result()
        if times == "elements":
            pools[2].submit(scheduler.set_timesteps, 9).result()
            pools[2].submit(steps, scheduler, scheduler.timesteps[:2]).result()
        call(sets, scheduler.set_timesteps, 5)
        x, noise = torch.linspace(-1.0, 1.0, 324).reshape(SHAPE), torch.Generator().manual_seed(0)
        drawn = {"generator": noise} if name.startswith("EulerA") else {}
        schedule = call(sets if sets != -1 else makes, lambda s=scheduler: s.timesteps)
        for k, t in enumerate(schedule):
            at = t if times == "elements" else float(t) if name[0] in "EH" else int(t)
            at = t.clone() if name.startswith("EulerA") and times == "numbers" else at
            x_in = call(k % 2 if scales == "alternate" else scales, scheduler.scale_model_input, x, at)
            raw = torch.tanh(2.0 * x_in)
            x = call(k % 2 if makes == "alternate" else makes, scheduler.step, raw, at, x, **drawn).prev_sample
        ends.append(x)
        for pool in pools:
            pool.shutdown()
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def test_a_run_that_could_be_either_threads_is_refused() -> None:
    """Two threads have taken up one schedule, and a third comes with the next step of both."""
    scheduler = make(twins, UNIPC)
    scheduler.set_timesteps(5)
    times = scheduler.timesteps
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other, ThreadPoolExecutor(1) as third:
        for pool in (one, other):
            pool.submit(steps, scheduler, times[:2]).result()
        x = torch.zeros(SHAPE)
        with pytest.raises(RuntimeError, match="comes next in the runs of 2 threads on one schedule: call"):
            third.submit(scheduler.step, x, times[2], x).result()


@pytest.mark.parametrize("name", [UNIPC, "LMSDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_idle_threads_keep_no_latents(name: str) -> None:
    held = {}
    for module in (diffusers, twins):
        scheduler, gate, lock = make(module, name), threading.Barrier(6), threading.Lock()

        def job(scheduler: Any = scheduler, gate: Any = gate, lock: Any = lock) -> None:
            gate.wait()
            with lock:
                request(scheduler)

        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(job) for _ in range(6)]:
                future.result()
            gc.collect()
            held[module.__name__] = sum(type(o) is torch.Tensor and tuple(o.shape) == SHAPE for o in gc.get_objects())
        del scheduler
    assert held["fewstep.bindings.diffusers"] <= held["diffusers"]


def test_a_thread_that_ends_leaves_nothing() -> None:
    scheduler = make(twins, UNIPC)
    for _ in range(20):
        thread = threading.Thread(target=request, args=(scheduler,))
        thread.start()
        thread.join()
    assert len(scheduler._shared.threads) <= 2  # this one, and the last


# --- the default device ---


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", GENERAL)
def test_the_default_device_is_not_the_steps(name: str) -> None:
    config = {"noise_sampler_seed": 0} if name == "DPMSolverSDEScheduler" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, _ = run(make(twins, name, **config), 4)
        randn = torch.randn
        with default_device("meta"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *a, **k: randn(*a, **{"device": "cpu", **k}))
            found, _ = run(make(twins, name, **config), 4)
    for a, b in zip(expected, found, strict=True):
        for field, value in a.items():
            torch.testing.assert_close(b[field], value, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ["DDIMScheduler", FLOW, UNIPC, "HeunDiscreteScheduler"])
def test_a_first_request_in_another_thread_is_fused_too(name: str) -> None:
    """A server makes its pipeline in one thread and runs it in others."""
    want = request(make(twins, name))
    scheduler = make(twins, name)

    def copied() -> torch.Tensor:
        return request(copy.deepcopy(scheduler))

    with ThreadPoolExecutor(1) as pool, only_fused(name):
        for found in (pool.submit(request, scheduler).result(), pool.submit(copied).result(), request(scheduler)):
            torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_a_schedule_that_ends_twice_at_one_time_is_not_over_at_the_first() -> None:
    """PNDM's 4 steps: a run in another thread that has just ended must not take the memory of the last step."""
    scheduler = make(twins, "PNDMScheduler")

    def run(stop: int, begin: int, x: torch.Tensor) -> torch.Tensor:
        if begin == 0:
            scheduler.set_timesteps(4)
        for t in scheduler.timesteps[begin:stop]:
            x = scheduler.step(torch.tanh(2.0 * x), t, x, return_dict=False)[0]
        return x

    x = torch.linspace(-1.0, 1.0, 324).reshape(SHAPE)
    want = run(13, 0, x)
    with ThreadPoolExecutor(1) as pool:
        middle = run(12, 0, x)
        torch.testing.assert_close(pool.submit(run, 13, 0, x).result(), want, rtol=0, atol=0)
        torch.testing.assert_close(run(13, 12, middle), want, rtol=0, atol=0)
