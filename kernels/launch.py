"""Launches of the fused stage on the CPU: the memory that one binds, and the threads that share it.

The stage itself comes from `cpu`: compiled, or interpreted until it is.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise

import numpy as np

from fewstep.kernels import layout
from fewstep.kernels.threads import threads as _workers

Stage = Callable[[int, int, int, int], None]

# The memory of a launch is one int64 vector: the addresses of slots, raws, noise, tables, outputs and model inputs, 0
# where absent; then the numbers of the launch.
RAW = layout.SLOTS
NOISE = RAW + layout.RAWS
STREAMS, P, LIMIT, W, C_IN, FREE, HELD = range(NOISE + 1, NOISE + 8)
OUTPUT = HELD + 1
INPUT = OUTPUT + layout.OUTPUTS
ADDRESSES = INPUT + layout.INPUTS
SAMPLES, ELEMENTS, CHUNK, GROUP, STREAMED, ROWS, DRAW = range(ADDRESSES, ADDRESSES + 7)
OWN_P, OWN_LIMIT, OWN_W, OWN_C_IN = range(DRAW + 1, DRAW + 5)  # lengths of the tables' first axes
STATE, MODEL, X_KIND = range(OWN_C_IN + 1, OWN_C_IN + 4)  # dtypes: of the state, of the model inputs, of x
RAW_KIND = X_KIND + 1  # and of each raw
WORDS = RAW_KIND + layout.RAWS

# The memory of a short stage, see `numba_short`: the addresses of its sources by column and of its outputs, then the
# dtypes of all of them in the same order.
SHORT_OUTPUT = layout.COLUMNS
SHORT_KIND = SHORT_OUTPUT + layout.OUTPUTS
SHORT_WORDS = 2 * SHORT_KIND
SHORT_CHUNK = 2048  # numbers of a unit, which stay in L1

# The dtypes of arrays; a position here stands for one. bfloat16 as uint16 and float16 as int16, their bits.
KINDS = (np.float32, np.float64, np.uint16, np.int16)

# Up to this many elements, one thread is faster than waking others.
SERIAL_ELEMENTS = 1 << 17

# Up to this many, the arrays of a stage stay in the last cache.
CACHED_ELEMENTS = 1 << 19

# From this many on, the arrays of a stage leave the last cache before anyone reads them again, so that its results go
# past the caches: a plain store first reads from memory what it overwrites.
STREAMED_ELEMENTS = 1 << 21


def kind_of(array: np.ndarray) -> int:
    return KINDS.index(array.dtype.type)


class Launch:
    """One stage bound to its memory, for `stage(address, 0, units, 0)`; addresses may be replaced between calls.

    Arrays are (B, elements), C-contiguous; an output must not share memory with an input.

    slots    of the state's dtype (float32 or float64), x, which may be of any dtype, first; None where the column of
             w is zero
    raws     of the model's dtype: float32, float64, uint16 (bfloat16 bits) or int16 (float16 bits)
    w        (1 or B, rows, COLUMNS) of the state's dtype, see `layout`
    outputs  one per row of w, of the state's dtype, the new x first
    inputs   of the model's dtype, each receives c_in x'
    c_in     (1 or B,) of the state's dtype
    z        noise from outside, of the state's dtype, or None
    streams  (B, 3) uint32, rows (seed low, seed high, sample): noise is drawn for them, or None
    draw     the draw number of that noise
    p        (1 or B, 4), the prediction, or None where it is folded into w
    limit    (1 or B, 4), rows (bound, gain, 0, 0), or None
    edit     (free, held), like an output: the prediction m becomes free m + held; only with p. None without
    known    by their id, arrays and their addresses: launches of one run share most arrays, and NumPy takes 0.9 us to
             name an address

    Attributes:
    memory  the vector that the stage reads; an address written to `memory[RAW + j]` binds another array of the same
            shape, which the caller keeps alive until the call returns, and of dtype KINDS[memory[RAW_KIND + j]]
    address  of `memory`: between two calls of a network that fills the caches, to take an array costs compiled code up
            to 5 us more than a number
    units   of the stage, which may run in any order and on any thread

    Raises ValueError for more arrays than `layout` has room for, or of a dtype that the stage does not read.
    """

    def __init__(
        self,
        slots: Sequence[np.ndarray | None],
        raws: Sequence[np.ndarray],
        w: np.ndarray,
        outputs: Sequence[np.ndarray],
        inputs: Sequence[np.ndarray] = (),
        *,
        c_in: np.ndarray,
        z: np.ndarray | None = None,
        streams: np.ndarray | None = None,
        draw: int = 0,
        p: np.ndarray | None = None,
        limit: np.ndarray | None = None,
        edit: tuple[np.ndarray, np.ndarray] | None = None,
        known: dict[int, tuple[np.ndarray, int]] | None = None,
    ) -> None:
        for name, arrays, room in (
            ("slots", slots, layout.SLOTS),
            ("raws", raws, layout.RAWS),
            ("outputs", outputs, layout.OUTPUTS),
            ("inputs", inputs, layout.INPUTS),
        ):
            if len(arrays) > room:
                raise ValueError(f"a fused stage takes at most {room} {name}, got {len(arrays)}")
        free, held = edit or (None, None)
        for array in (*slots[1:], *outputs, c_in, z, p, limit, free, held):
            if array is not None and array.dtype != w.dtype:
                raise ValueError(f"a fused stage on {w.dtype} got a slot, an output or a table of {array.dtype}")
        self.memory = np.zeros(WORDS, np.int64)
        self.address = self.memory.ctypes.data
        self.held: list[np.ndarray | None] = [None] * ADDRESSES
        self._known = {} if known is None else known
        tables = {P: p, LIMIT: limit, W: w, C_IN: c_in}
        given = {NOISE: z, STREAMS: streams, FREE: free, HELD: held, **tables}
        for first, arrays in ((0, slots), (RAW, raws), (OUTPUT, outputs), (INPUT, inputs)):
            given |= dict(enumerate(arrays, first))
        for j, array in given.items():
            self._hold(j, array)
        samples, elements = outputs[0].shape
        own = [0 if table is None else len(table) for table in tables.values()]
        kinds = kind_of(w), kind_of(inputs[0]) if inputs else 0
        self.memory[ROWS:X_KIND] = w.shape[1], draw, *own, *kinds
        self.units, self.size = resize(self.memory, samples, elements), samples * elements

    def _hold(self, j: int, array: np.ndarray | None) -> None:
        self.held[j] = array  # keeps the memory alive
        if array is None:
            self.memory[j] = 0
            return
        known = self._known.get(id(array))
        if known is None:
            known = self._known[id(array)] = array, array.ctypes.data
        self.memory[j] = known[1]
        if j == 0 or RAW <= j < NOISE:
            self.memory[X_KIND if j == 0 else RAW_KIND + j - RAW] = kind_of(array)

    def replaced(self, arrays: Mapping[int, np.ndarray | None]) -> Launch:
        """A launch with other arrays at these addresses, of any dtype or None; it shares the rest."""
        other = copy.copy(self)
        other.memory, other.held, other._known = self.memory.copy(), self.held.copy(), {}
        other.address = other.memory.ctypes.data
        for j, array in arrays.items():
            other._hold(j, array)
        return other

    def narrow(self, samples: int) -> None:
        """From now on only the first `samples` rows of every array and table."""
        own = self.memory[OWN_P : OWN_C_IN + 1]
        own[own > 1] = samples
        elements = int(self.memory[ELEMENTS])
        self.units, self.size = resize(self.memory, samples, elements), samples * elements

    def __call__(self, stage: Stage, keep: object = None) -> None:
        """keep: what holds the arrays alive that `memory` was pointed to."""
        launch(stage, self.address, self.units, self.size, (self.memory, self.held, keep))


def sources(x: np.ndarray | None, raws: Sequence[np.ndarray]) -> np.ndarray:
    """The memory of a launch that only names its sources, for `cpu.blend`; the caller keeps them alive.

    x, raws  (B, elements), C-contiguous: x of any dtype in KINDS, 16-bit floats as their bits
    """
    memory = np.zeros(WORDS, np.int64)
    memory[SAMPLES : ELEMENTS + 1] = raws[0].shape
    if x is not None:
        memory[0], memory[X_KIND] = x.ctypes.data, kind_of(x)
    for j, raw in enumerate(raws):
        memory[RAW + j], memory[RAW_KIND + j] = raw.ctypes.data, kind_of(raw)
    return memory


def resize(memory: np.ndarray, samples: int, elements: int) -> int:
    """Set the shape of a launch, and how it is split. Returns its units.

    A unit is a chunk of a sample, of a multiple of 4 elements, or a group of whole samples, if they share the
    coefficients. The chunks of a stage's arrays stay in L1, or in L2 where the arrays come from memory, which long runs
    suit better. A small state has a chunk of its own size: a stage's scratch is a multiple of it.
    """
    size = max(1, samples * elements)
    streamed = size >= STREAMED_ELEMENTS and (samples == 1 or elements % 32 == 0)  # samples begin cache lines
    chunk = min(2048, -(-size // 64) * 64) if size <= CACHED_ELEMENTS or streamed else 16384
    own = max(memory[OWN_P : OWN_C_IN + 1].tolist()) > 1
    group = 1 if own else max(1, chunk // elements)
    memory[SAMPLES : STREAMED + 1] = samples, elements, chunk, group, streamed
    return -(-samples // group) * -(-elements // chunk)


def workers(size: int, count: int) -> int:
    """How many threads run a stage of `count` units over `size` elements."""
    return 1 if size <= SERIAL_ELEMENTS else min(_workers(), count)


def launch(run: Stage, address: int, count: int, size: int, keep: object) -> None:
    """Run the launch at an address, a stage of `count` units over `size` elements, on all cores if it is large.

    Each element is computed from its own inputs only, so the split does not change a bit of the result. No share of the
    work is running after the return, whatever interrupts it.

    keep  what holds the launch's memory and its arrays alive; every share holds it, too
    """
    n = workers(size, count)
    if n == 1:
        run(address, 0, count, 0)
        return
    cuts = [count * i // n for i in range(n + 1)]
    # All shares exist before the first is submitted, so that an interruption at any place knows them.
    shares = [_Share(run, address, a, b, keep) for a, b in pairwise(cuts)]
    try:
        with suppress(RuntimeError):  # no thread can be started, for want of threads or as the program ends
            for share in shares[1:]:
                _pool().submit(share)
        for share in shares:  # the pool may be busy with other work: what it has not begun is done here
            share.run_here()
    finally:
        _settle(shares)
    for share in shares:
        if share.error is not None:
            raise share.error


class _Share:
    """A range of units, for the thread that claims it first."""

    def __init__(self, run: Stage, address: int, first: int, last: int, keep: object) -> None:
        self._run, self._address, self._first, self._last, self._keep = run, address, first, last, keep
        self._claims: list[str] = []
        self._done = threading.Event()
        self.error: BaseException | None = None

    def _claim(self, who: str) -> bool:
        self._claims.append(who)  # atomic: the first claim counts
        return self._claims[0] is who

    def __call__(self) -> None:
        """In the pool, whose threads no signal interrupts."""
        if self._claim("pool"):
            try:
                self._run(self._address, self._first, self._last, 0)
            except BaseException as error:
                self.error = error
            finally:
                self._done.set()

    def run_here(self) -> None:
        if self._claim("here"):
            self._run(self._address, self._first, self._last, 0)

    def settle(self) -> None:
        """Wait for the pool if it runs this share; otherwise nobody will."""
        if not self._claim("dropped") and self._claims[0] == "pool":
            self._done.wait()
        self._keep = None  # a busy pool keeps the share in its queue


def _settle(shares: Sequence[_Share]) -> None:
    """Returns when no share is running or will be. An interruption meanwhile is raised afterwards."""
    interruption: BaseException | None = None
    settled = False
    while not settled:
        try:
            for share in shares:
                share.settle()
            settled = True
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


@cache
def _pool() -> ThreadPoolExecutor:
    """Worker threads. Numba's own pool must not be entered from several Python threads at once."""
    return ThreadPoolExecutor(max(1, _workers() - 1), thread_name_prefix="fewstep")


# A forked child inherits the pool object but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
