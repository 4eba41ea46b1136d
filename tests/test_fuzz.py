"""Public callables on odd arguments, and random plans on two backends.

`make fuzz` runs the long profile; a failure prints the line that repeats it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fuzzing import LONG, TARGETS, WITHOUT, Target, attempt, examples, known, odd_values
from hypothesis import assume, given, note
from hypothesis import strategies as st

import fewstep as fs
from fewstep.bindings import maps

SLOW = ("tune", "tune_sde", "tune_range", "recommend/denoiser")
USED = [target for target in TARGETS if LONG or target.name not in SLOW]


def open_to(target: Target) -> list[str]:
    """The parameters that are not excluded with every value."""
    return [name for name in target.odd if not known(target.name, name, 0.25)]


GROUPS = sorted({target.name.partition("/")[0] for target in USED if open_to(target)})


def test_every_public_name_has_a_target_or_a_reason() -> None:
    having = {target.name.partition("/")[0] for target in TARGETS}
    reasons = {name for names in WITHOUT for name in names.split()}
    assert not having & reasons
    bindings = {"ConsistencyDenoiser", "k_diffusion", "SamplerModule", "save_loop"}
    assert having | reasons == {*fs.__all__, *maps.__all__, *bindings & having}


@pytest.mark.parametrize("target", USED, ids=lambda target: target.name)
def test_the_base_calls_are_right(target: Target) -> None:
    if target.name != "grid/ays":  # its table starts above the end of some processes
        assert attempt(target, {}) == "right"


@pytest.mark.parametrize("group", GROUPS)
@examples(40, 2000)
@given(data=st.data())
def test_odd_arguments(group: str, data: st.DataObject) -> None:
    target = data.draw(
        st.sampled_from([t for t in USED if t.name.partition("/")[0] == group and open_to(t)]), label="target"
    )
    names = data.draw(st.lists(st.sampled_from(open_to(target)), min_size=1, max_size=2, unique=True), label="names")
    odd = {name: data.draw(odd_values, label=name) for name in names}
    assume(not any(known(target.name, name, value) for name, value in odd.items()))
    note(target.name)
    attempt(target, odd)


# --- random plans ---

PROCESSES = {"epsilon": fs.VP.linear(), "v": fs.VP.cosine(), "edm": fs.EDM(), "flow": fs.Flow(3.0)}
# The short profile keeps to structures that other tests compile as well.
SOLVERS = fs.list_solvers() if LONG else ("ddim", "euler", "dpmpp_2m")


def network(x: Any, t: Any, shift: Any = 0.0) -> Any:
    """Rational, so that every backend gets the same bits from the same input, and finite on an input of inf."""
    x = np.clip(x, -64.0, 64.0)
    return 0.5 * x / (1.0 + abs(x)) + (shift if isinstance(shift, float) else shift[:, None].astype(x.dtype))


@examples(60, 10_000)
@given(
    solver=st.sampled_from(SOLVERS),
    predicts=st.sampled_from(sorted(PROCESSES)),
    spacing=st.sampled_from(["karras", "linspace", "trailing", "exponential"]),
    steps=st.integers(1, 6),
    clip=st.sampled_from([None, 0.5, 1.0, fs.DynamicThreshold(0.9)] if LONG else [None]),
    guidance=st.sampled_from([None, 0.0, 2.5, fs.CFG(3.0, 0.5), fs.CFG(2.0, 0.0, 0.2, 0.7)] if LONG else [None]),
    dtype=st.sampled_from(["float32", "float64"] if LONG else ["float32"]),
    model=st.sampled_from([None, "float16"] if LONG else [None]),
    layout=st.sampled_from(["C", "F", "strided"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    seed=st.integers(0, 2**64 - 1),
)
def test_numba_is_naive_to_the_bit(
    solver: str,
    predicts: str,
    spacing: str,
    steps: int,
    clip: Any,
    guidance: Any,
    dtype: str,
    model: str | None,
    layout: str,
    shape: tuple[int, int],
    seed: int,
) -> None:
    process = PROCESSES[predicts]
    denoiser = fs.Denoiser(network, process, predicts, guidance, clip, dtype=model)
    cond = None
    if guidance is not None:
        cond = ({"shift": np.zeros(shape[0])}, {"shift": np.full(shape[0], 0.25)})
    try:
        grid = fs.grid(process, steps, spacing)
        plan = fs.plan(solver, grid, dtype=dtype)
    except ValueError:  # a solver or a spacing that does not take this grid
        assume(False)
    x = np.random.default_rng(seed % 2**32).standard_normal((shape[0], 2 * shape[1])).astype(dtype)
    x = x[:, ::2] if layout == "strided" else np.array(x[:, : shape[1]], order=layout)
    x = x * dtype_of(dtype)(math.hypot(plan.start.alpha, plan.start.sigma))
    runs = []
    for backend in ("numba", "naive"):
        try:
            # Without checks: some plans rightly warn that their samples are far too large.
            sampler = fs.Sampler(denoiser, plan, shape, backend=backend, dtype=dtype, check=False)
            with np.errstate(over="ignore"):  # of a half-precision input
                runs.append(sampler(x, seed=seed, cond=cond))
        except ValueError as error:  # the prediction, or a half-precision input, does not allow this plan
            runs.append(str(error))
    # The oracle adds a sample up in another order and interpolates a quantile by another formula, in float64.
    reduced = getattr(guidance, "rescale", 0.0) or isinstance(clip, fs.DynamicThreshold)
    if isinstance(runs[0], str):
        assert runs[0] == runs[1]
    elif reduced and dtype == "float64":
        np.testing.assert_allclose(*runs, rtol=1e-11, atol=1e-11 * np.abs(runs[0]).max())
    else:
        assert runs[0].tobytes() == runs[1].tobytes()


def dtype_of(name: str) -> Any:
    return np.dtype(name).type
