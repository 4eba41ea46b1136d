"""Rows of any pattern of zeros give the naive result, and read only the sources that they need."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import Generator

from fewstep.kernels import cpu, layout, naive
from fewstep.kernels.launch import Launch

# Which of [x, h1, h2, h3, raw, m, z] each row reads; UniPC's is the first.
PATTERNS = {
    "unipc": ["1111100", "1000100", "1111100"],
    "no x in the first row": ["0010100", "1000100", "0111001"],
    "prediction and noise": ["0100011", "1000010", "0011001"],
    "a row of nothing": ["1111100", "0000000"],
    "nothing in the first row": ["0000000", "1100100"],
    "one term": ["0000100"],
    "twins apart": ["1100100", "1000100", "1100100", "0100000"],
    "three of a kind": ["1000100", "1000100", "1000100"],
    "seven terms": ["1111111", "1111111"],
}
COLUMNS = [0, 1, 2, 3, layout.RAW, layout.PREDICTION, layout.NOISE]


def table(rows: list[str], rng: Generator, dtype: str) -> np.ndarray:
    w = np.zeros((1, len(rows), layout.COLUMNS), dtype)
    for k, row in enumerate(rows):
        for column, mark in zip(COLUMNS, row, strict=True):
            w[0, k, column] = rng.standard_normal() if mark == "1" else 0.0
    return w


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_numbers_are_the_oracles(name: str, copies: int, dtype: str) -> None:
    """Bit for bit, with a NaN in one source at a time: it reaches only the rows that read the source."""
    rng = np.random.default_rng(3)
    w = table(PATTERNS[name], rng, dtype)
    n = 5000  # three chunks, the last one short
    sources = rng.standard_normal((6, 2, n)).astype(dtype)
    for j, source in enumerate(sources):
        source[1, 7 * j + 1] = np.nan
    *slots, raw, z = sources
    p = np.array([[0.7, -0.4, 0.0, 0.0]], dtype)
    limit = np.array([[0.8, 1.25, 0.0, 0.0]], dtype)
    predicts, noisy = bool(w[..., layout.PREDICTION].any()), bool(w[..., layout.NOISE].any())
    options = {"p": p if predicts else None, "limit": limit if predicts else None, "z": z if noisy else None}
    outputs, inputs = [np.full((2, n), np.inf, dtype) for _ in w[0]], [np.full((2, n), np.inf, dtype)] * copies
    cpu.STAGE[dtype].compile()
    launch = Launch(slots, [raw], w, outputs, inputs, c_in=np.full(1, 0.5, dtype), **options)
    launch(cpu.STAGE[dtype].run)
    for x_in in inputs:
        np.testing.assert_array_equal(x_in, 0.5 * outputs[0])
    for out, want in zip(outputs, naive.step(slots, [raw], w, **options), strict=True):
        np.testing.assert_array_equal(out, want)
        assert not np.isinf(out).any()
