"""Children forked while another thread holds a lock, which nobody in the child will ever release."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import fewstep as fs
from fewstep.solvers.locks import lock
from fewstep.solvers.run.one_call import PLANS, SAMPLERS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SECONDS = 20


def child_of(locks: list[Any], work: Callable[[], bool]) -> int:
    """The exit code of a child forked while another thread holds these locks: 0 where `work` returns True there."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for each in locks:
                stack.enter_context(each)
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of a fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(SECONDS)  # ends a child that waits
            code = 0 if work() else 2
        finally:
            os._exit(code)
    over.set()
    thread.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def denoiser() -> fs.Denoiser:
    return fs.Denoiser(lambda x, t: 0.5 * x, fs.VP.linear())


def test_a_child_samples() -> None:
    made = denoiser()

    def draw() -> Any:
        return fs.sample(made, shape=(2, 3), steps=3, seed=0)

    want = draw()
    assert child_of([PLANS.lock, SAMPLERS.lock], lambda: np.array_equal(draw(), want)) == 0


def test_a_child_updates_a_sampler() -> None:
    grid = fs.grid(fs.VP.linear(), 4)
    sampler = fs.Sampler(denoiser(), fs.plan("ddim", grid), (2, 3))
    want = fs.Sampler(denoiser(), fs.plan("heun", grid), (2, 3))(seed=0)

    def work() -> bool:
        sampler.update(fs.plan("heun", grid))
        return np.array_equal(sampler(seed=0), want)

    assert child_of([sampler._changing], work) == 0


def test_a_child_closes_an_engine() -> None:
    plan = fs.plan("ddim", fs.grid(fs.VP.linear(), 2))
    with fs.Engine(denoiser(), (2, 3), [plan]) as engine:

        def work() -> bool:
            engine.close()
            return engine.closed

        assert child_of([engine._loop.changed], work) == 0


def test_a_child_runs_a_scheduler() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from fewstep.bindings.diffusers import DDIMScheduler

    scheduler = DDIMScheduler()

    def run() -> Any:
        scheduler.set_timesteps(3)
        x = torch.ones(1, 2)
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x).prev_sample
        return x

    want = run()
    assert child_of([scheduler._shared.lock], lambda: torch.equal(run(), want)) == 0


def test_a_lock_of_the_thread_that_forks_stays_its_own() -> None:
    mine = lock()

    def work() -> bool:
        assert not free()
        mine.release()
        return free()

    def free() -> bool:
        """For another thread."""
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(mine.acquire(blocking=False)))
        thread.start()
        thread.join()
        return taken[0]

    with mine:
        assert child_of([], work) == 0
