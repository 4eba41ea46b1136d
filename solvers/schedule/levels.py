"""When each token of a sample takes its steps: schedules of Diffusion Forcing (Chen et al. 2024, arXiv 2407.01392).

A schedule is an int array (R, T): entry (r, j) is the number of steps of the plan that token j has finished after r
rows, from 0 (pure noise) to `steps` (done). A row costs one call of the network for a solver of one call per step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fewstep.solvers.options import between, named, whole

Levels = NDArray[np.int64]

_MOST = 1 << 24  # entries of a schedule


def uniform(steps: int, tokens: int) -> Levels:
    """All tokens together, as in plain sampling: steps + 1 rows."""
    steps, tokens = _counts(steps, tokens)
    _check_size(steps, tokens, 0, "steps, tokens")
    return _lagged(steps, np.zeros(tokens), 0)


def staircase(steps: int, tokens: int, offset: int | None = None, width: int = 1) -> Levels:
    """Blocks of `width` tokens, each block `offset` rows behind the one before it.

    offset  None is `steps`: a block starts when the block before it is finished, as autoregressive models sample
    width   tokens side by side in a block
    """
    steps, tokens = _counts(steps, tokens)
    width = whole("width", width, 1, _MOST)
    offset = steps if offset is None else whole("offset", offset, 0, _MOST)
    lag = offset * ((tokens - 1) // width)
    _check_size(steps, tokens, lag, "steps, tokens, offset, width")
    return _lagged(steps, offset * (np.arange(tokens) // width), lag)


def pyramid(steps: int, tokens: int, scale: float = 1.0) -> Levels:
    """Token j is floor(scale j) rows behind the first one, so that the future is noisier than the past.

    scale  the paper's uncertainty scale: 0 is `uniform`, `steps` is `staircase`
    """
    steps, tokens = _counts(steps, tokens)
    between("scale", scale, 0.0, _MOST)
    lag = int(float(scale) * (tokens - 1))
    _check_size(steps, tokens, lag, "steps, tokens, scale")
    return _lagged(steps, np.floor(float(scale) * np.arange(tokens)), lag)


SCHEDULES: dict[str, Callable[[int, int], Levels]] = {"uniform": uniform, "staircase": staircase, "pyramid": pyramid}


def matrix(levels: object, steps: int, tokens: int) -> Levels:
    """A schedule by name, or a checked copy of one given as an array. Raises ValueError or TypeError that names it."""
    if isinstance(levels, str):
        named("levels", levels, tuple(SCHEDULES))
        return SCHEDULES[levels](steps, tokens)
    wanted = f"levels must be one of {', '.join(SCHEDULES)}, or ints (R, {tokens}) from 0 to {steps}"
    if not isinstance(levels, (np.ndarray, list, tuple)):
        raise TypeError(f"{wanted}, got {levels!r:.80}")
    try:
        found = np.asarray(levels)
    except ValueError:  # rows of several lengths
        raise ValueError(f"{wanted}, got {levels!r:.80}") from None
    if found.dtype.kind not in "iu" or found.ndim != 2 or found.shape[1] != tokens or len(found) < 2:
        raise ValueError(f"{wanted}, two rows or more; got {found.dtype} of shape {found.shape}")
    if found.min() < 0 or found.max() > steps:
        raise ValueError(f"{wanted}, got entries from {found.min()} to {found.max()}")
    made: Levels = found.astype(np.int64)
    if not np.isin(made[0], (0, steps)).all():
        raise ValueError(f"levels must start at 0, or at {steps} for tokens that are known; its first row is {made[0]}")
    if (np.diff(made, axis=0) < 0).any():
        raise ValueError("levels must not fall from row to row: a finished step is not undone")
    if (made[-1] != steps).any():
        raise ValueError(f"levels must end at {steps}, the plan's number of steps, in every column; got {made[-1]}")
    return made


def _lagged(steps: int, lags: NDArray[np.number], longest: int) -> Levels:
    rows = np.arange(steps + longest + 1)
    return np.clip(rows[:, None] - lags.astype(np.int64), 0, steps)


def _counts(steps: object, tokens: object) -> tuple[int, int]:
    return whole("steps", steps, 1, _MOST), whole("tokens", tokens, 1, _MOST)


def _check_size(steps: int, tokens: int, lag: int, names: str) -> None:
    """Raises ValueError for a schedule that is too large to be meant."""
    if (steps + lag + 1) * tokens > _MOST:
        raise ValueError(f"{names} make a schedule of more than {_MOST} entries")
