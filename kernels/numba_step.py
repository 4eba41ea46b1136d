"""The fused stage on the CPU.

Bytes per element: the state's size per slot read and per row written, the model's size per raw output read and per
model input written; noise drawn here stays in L1. A guided DPM-Solver++ 2M step on a 16-bit model moves 24 bytes (reads
x 4, raws 2 + 2, history 4; writes x 4, history 4, model inputs 2 + 2).

One function serves every solver: Numba prunes an absent argument when it compiles, so each structure gets its own loop
without branches, and a table with many zeros a loop without them. 16-bit arrays are passed as their bits (bfloat16 as
uint16, float16 as int16), because Numba has no CPU arithmetic for them.

The compiled code takes its arrays as one vector of addresses: passing a dozen arrays one by one costs more than the
arithmetic of a small step, 1.3 us against 0.2 us.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
from numba import types
from numba.extending import overload
from numba.np.numpy_support import carray

from fewstep.kernels import layout
from fewstep.kernels.numba_bits import bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16, jit, pointer
from fewstep.kernels.numba_noise import fill_normals
from fewstep.kernels.philox import STEP
from fewstep.kernels.threads import threads as _workers

# Elements of a sample per pass: their noise (4 bytes each) stays in L1.
CHUNK = 2048


# --- helpers that compile to nothing where their argument is None ---
#
# A function without a body declares what its `overload` below implements for each combination of types.


def _part(a, b, lo, hi):
    """Elements lo .. hi of sample b."""


@overload(_part)
def _part_typed(a, b, lo, hi):
    if isinstance(a, types.NoneType):
        return lambda a, b, lo, hi: None
    return lambda a, b, lo, hi: a[b, lo:hi]


def _at(a, i):
    """Element i as a number; 16-bit floats are stored as their bits."""


@overload(_at)
def _at_typed(a, i):
    if isinstance(a, types.NoneType):
        return lambda a, i: None
    if a.dtype == types.uint16:
        return lambda a, i: f32_from_bf16(a[i])
    if a.dtype == types.int16:
        return lambda a, i: f32_from_f16(a[i])
    return lambda a, i: a[i]


def _put(a, i, v):
    """Store v as element i, rounded once to the storage type."""


@overload(_put)
def _put_typed(a, i, v):
    if isinstance(a, types.NoneType):
        return lambda a, i, v: None

    if a.dtype == types.uint16:

        def put(a, i, v):
            a[i] = bf16_from_f32(np.float32(v))

    elif a.dtype == types.int16:

        def put(a, i, v):
            a[i] = f16_from_f32(np.float32(v))

    else:

        def put(a, i, v):
            a[i] = v

    return put


def _add(total, c, v):
    """total + c v; a coefficient of exactly 0 drops v, even a NaN."""


@overload(_add)
def _add_typed(total, c, v):
    if isinstance(v, types.NoneType):
        return lambda total, c, v: total

    def add(total, c, v):
        term = c * v
        return total + (term if c != 0 else c)

    return add


def _term(total, c, v):
    """`_add` for a coefficient that is known not to be 0; None stands for one known to be 0."""


@overload(_term)
def _term_typed(total, c, v):
    if isinstance(c, types.NoneType) or isinstance(v, types.NoneType):
        return lambda total, c, v: total
    return lambda total, c, v: total + c * v


def _noise(streams, draw, buffer, z, b, lo, hi):
    """The normals of elements lo .. hi: drawn into `buffer` if there are streams, else read from z."""


@overload(_noise)
def _noise_typed(streams, draw, buffer, z, b, lo, hi):
    if isinstance(streams, types.NoneType):
        return lambda streams, draw, buffer, z, b, lo, hi: _part(z, b, lo, hi)

    def drawn(streams, draw, buffer, z, b, lo, hi):
        out = buffer[: hi - lo]
        fill_normals(out, lo, streams[b, 0], streams[b, 1], streams[b, 2], draw, STEP)
        return out

    return drawn


def _read(row, j, mark):
    """Number j of a row, or None where the mark is None."""


@overload(_read)
def _read_typed(row, j, mark):
    if isinstance(mark, types.NoneType):
        return lambda row, j, mark: None
    return lambda row, j, mark: row[j]


def _coefficients(table, b, k, out, reads):
    """Row k of sample b's table as a tuple, so that it stays in registers, followed by a 0 of its dtype.

    reads  a mark per column, None where the row is known to be 0; or None if nothing is known
    """


@overload(_coefficients)
def _coefficients_typed(table, b, k, out, reads):
    if isinstance(out, types.NoneType):
        return lambda table, b, k, out, reads: None

    if isinstance(reads, types.NoneType):

        def row(table, b, k, out, reads):
            r = table[b if table.shape[0] > 1 else 0, k]
            zero = r[0] - r[0]  # an integer 0 would promote float32
            return r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11], r[12], zero

    else:

        def row(table, b, k, out, reads):
            r = table[b if table.shape[0] > 1 else 0, k]
            m = reads
            return (
                _read(r, 0, m[0]), _read(r, 1, m[1]), _read(r, 2, m[2]), _read(r, 3, m[3]), _read(r, 4, m[4]),
                _read(r, 5, m[5]), _read(r, 6, m[6]), _read(r, 7, m[7]), _read(r, 8, m[8]), _read(r, 9, m[9]),
                _read(r, 10, m[10]), _read(r, 11, m[11]), _read(r, 12, m[12]), r[0] - r[0],
            )  # fmt: skip

    return row


def _prediction(p, limit, x, r1, r2, r3):
    """m = gain clip(p · [x, raws], +-bound), or None where the prediction is folded into w."""


@overload(_prediction)
def _prediction_typed(p, limit, x, r1, r2, r3):
    if isinstance(p, types.NoneType):
        return lambda p, limit, x, r1, r2, r3: None

    def linear(p, limit, x, r1, r2, r3):
        return _add(_add(_add(_add(p[0] - p[0], p[0], x), p[1], r1), p[2], r2), p[3], r3)

    if isinstance(limit, types.NoneType):
        return linear

    def clipped(p, limit, x, r1, r2, r3):
        m = _add(_add(_add(_add(p[0] - p[0], p[0], x), p[1], r1), p[2], r2), p[3], r3)
        m = limit[0] if m > limit[0] else m
        m = -limit[0] if m < -limit[0] else m
        return m * limit[1]

    return clipped


def _emit(out, i, c, s0, s1, s2, s3, s4, s5, s6, s7, r1, r2, r3, m, z, reads):
    """out[i] = c · [slots, raws, m, z]. Returns the value."""


@overload(_emit)
def _emit_typed(out, i, c, s0, s1, s2, s3, s4, s5, s6, s7, r1, r2, r3, m, z, reads):
    if isinstance(out, types.NoneType):
        return lambda out, i, c, s0, s1, s2, s3, s4, s5, s6, s7, r1, r2, r3, m, z, reads: None

    add = _add if isinstance(reads, types.NoneType) else _term

    def emit(out, i, c, s0, s1, s2, s3, s4, s5, s6, s7, r1, r2, r3, m, z, reads):
        total = add(c[13], c[0], s0)
        total = add(total, c[1], s1)
        total = add(total, c[2], s2)
        total = add(total, c[3], s3)
        total = add(total, c[4], s4)
        total = add(total, c[5], s5)
        total = add(total, c[6], s6)
        total = add(total, c[7], s7)
        total = add(total, c[8], r1)
        total = add(total, c[9], r2)
        total = add(total, c[10], r3)
        total = add(total, c[11], m)
        total = add(total, c[12], z)
        out[i] = total
        return total

    return emit


def _numbers(table, b):
    """Sample b's row of p (4 numbers) or limit (bound, gain) as a tuple, or None."""


@overload(_numbers)
def _numbers_typed(table, b):
    if isinstance(table, types.NoneType):
        return lambda table, b: None

    def row(table, b):
        r = table[b if table.shape[0] > 1 else 0]
        return r[0], r[1], r[2], r[3]

    return row


# --- the kernel ---

# The memory of a launch is one int64 vector: the addresses of slots, raws, noise, tables, outputs and model inputs, 0
# where absent, with the draw number among them; then the sizes.
RAW = layout.SLOTS
NOISE = RAW + layout.RAWS
STREAMS, DRAW, P, LIMIT, W, C_IN = range(NOISE + 1, NOISE + 7)
OUTPUT = C_IN + 1
INPUT = OUTPUT + layout.OUTPUTS
ADDRESSES = INPUT + layout.INPUTS
SAMPLES, ELEMENTS, ROWS, OWN_P, OWN_LIMIT, OWN_W, OWN_C_IN = range(ADDRESSES, ADDRESSES + 7)
WORDS = OWN_C_IN + 1


def _array(memory, j, shape, dtype):
    """The array whose address is word j, or None where the dtype is None."""


@overload(_array)
def _array_typed(memory, j, shape, dtype):
    if isinstance(dtype, types.NoneType):
        return lambda memory, j, shape, dtype: None
    return lambda memory, j, shape, dtype: carray(pointer(memory[j], dtype), shape)


Compiled = Callable[[np.ndarray, int, int], None]
Kind = type[np.generic] | None  # of an array; None where it is absent
Marks = tuple[int | None, ...]  # per column of a row: None for a number known to be 0


@lru_cache(maxsize=1024)  # one for each pattern of zeros, which schedules bring along
def kernel(kinds: tuple[Kind, ...], zeros: tuple[Marks | None, ...] = (None,) * layout.OUTPUTS) -> Compiled:
    """The fused stage for arrays of these kinds, one per address.

    zeros  per row, what is known of its zeros: see `_coefficients`
    """
    d0, d1, d2, d3, d4, d5, d6, d7, e1, e2, e3, dz, ds, _, dp, dl, dw, dc, f0, f1, f2, f3, f4, h1, h2, h3 = kinds
    m0, m1, m2, m3, m4 = zeros

    @jit()
    def fused(memory, first, last):
        """Units first .. last - 1 of one stage; a unit is a chunk of one sample."""
        n = memory[ELEMENTS]
        rows = (memory[SAMPLES], n)
        s0, s1, s2, s3 = (_array(memory, 0, rows, d0), _array(memory, 1, rows, d1), _array(memory, 2, rows, d2),
                          _array(memory, 3, rows, d3))  # fmt: skip
        s4, s5, s6, s7 = (_array(memory, 4, rows, d4), _array(memory, 5, rows, d5), _array(memory, 6, rows, d6),
                          _array(memory, 7, rows, d7))  # fmt: skip
        r1, r2, r3 = (_array(memory, RAW, rows, e1), _array(memory, RAW + 1, rows, e2),
                      _array(memory, RAW + 2, rows, e3))  # fmt: skip
        z = _array(memory, NOISE, rows, dz)
        streams, draw = _array(memory, STREAMS, (memory[SAMPLES], 3), ds), np.uint32(memory[DRAW])
        p = _array(memory, P, (memory[OWN_P], 4), dp)
        limit = _array(memory, LIMIT, (memory[OWN_LIMIT], 4), dl)
        w = _array(memory, W, (memory[OWN_W], memory[ROWS], layout.COLUMNS), dw)
        c_in = _array(memory, C_IN, (memory[OWN_C_IN],), dc)
        o0, o1, o2, o3, o4 = (_array(memory, OUTPUT, rows, f0), _array(memory, OUTPUT + 1, rows, f1),
                              _array(memory, OUTPUT + 2, rows, f2), _array(memory, OUTPUT + 3, rows, f3),
                              _array(memory, OUTPUT + 4, rows, f4))  # fmt: skip
        i1, i2, i3 = (_array(memory, INPUT, rows, h1), _array(memory, INPUT + 1, rows, h2),
                      _array(memory, INPUT + 2, rows, h3))  # fmt: skip
        chunks = (n + CHUNK - 1) // CHUNK
        buffer = np.empty(CHUNK, np.float32)
        for unit in range(first, last):
            b = unit // chunks
            lo = unit % chunks * CHUNK
            hi = min(n, lo + CHUNK)
            x0, x1, x2, x3 = _part(s0, b, lo, hi), _part(s1, b, lo, hi), _part(s2, b, lo, hi), _part(s3, b, lo, hi)
            x4, x5, x6, x7 = _part(s4, b, lo, hi), _part(s5, b, lo, hi), _part(s6, b, lo, hi), _part(s7, b, lo, hi)
            y1, y2, y3 = _part(r1, b, lo, hi), _part(r2, b, lo, hi), _part(r3, b, lo, hi)
            q0, q1, q2, q3 = _part(o0, b, lo, hi), _part(o1, b, lo, hi), _part(o2, b, lo, hi), _part(o3, b, lo, hi)
            q4 = _part(o4, b, lo, hi)
            v1, v2, v3 = _part(i1, b, lo, hi), _part(i2, b, lo, hi), _part(i3, b, lo, hi)
            zz = _noise(streams, draw, buffer, z, b, lo, hi)
            c0, c1, c2 = _coefficients(w, b, 0, o0, m0), _coefficients(w, b, 1, o1, m1), _coefficients(w, b, 2, o2, m2)
            c3, c4 = _coefficients(w, b, 3, o3, m3), _coefficients(w, b, 4, o4, m4)
            pb, bounds = _numbers(p, b), _numbers(limit, b)
            scale = c_in[b if c_in.shape[0] > 1 else 0]
            for i in range(hi - lo):
                a0, a1, a2, a3 = _at(x0, i), _at(x1, i), _at(x2, i), _at(x3, i)
                a4, a5, a6, a7 = _at(x4, i), _at(x5, i), _at(x6, i), _at(x7, i)
                g1, g2, g3, e = _at(y1, i), _at(y2, i), _at(y3, i), _at(zz, i)
                m = _prediction(pb, bounds, a0, g1, g2, g3)
                x = _emit(q0, i, c0, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, m0)
                _emit(q1, i, c1, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, m1)
                _emit(q2, i, c2, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, m2)
                _emit(q3, i, c3, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, m3)
                _emit(q4, i, c4, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, m4)
                _put(v1, i, scale * x)
                _put(v2, i, scale * x)
                _put(v3, i, scale * x)

    return fused


# Specialise from this many zeros: such a kernel has fewer terms and no tests for 0, but must be compiled.
ZEROS = 3


def zeros_of(w: np.ndarray) -> tuple[Marks | None, ...]:
    """The `zeros` of `kernel` for a constant table (1, rows, COLUMNS): its zeros, if they are at least ZEROS."""
    zero = w[0] == 0.0
    live = ~zero.all(axis=0)
    known: list[Marks | None] = [None] * layout.OUTPUTS
    if len(w) == 1 and np.count_nonzero(zero[:, live]) >= ZEROS:
        known[: len(zero)] = [tuple(None if none else 1 for none in row) for row in zero.tolist()]
    return tuple(known)


# Up to this many elements, one thread is faster than waking others.
SERIAL_ELEMENTS = 1 << 17


class Launch:
    """One stage bound to its memory: a call runs it, and addresses may be replaced between calls.

    Arrays are (B, elements), C-contiguous; an output must not share memory with an input.

    slots    of the state's dtype (float32 or float64), x first; None where the column of w is zero
    raws     of the model's dtype: float32, float64, uint16 (bfloat16 bits) or int16 (float16 bits)
    w        (1 or B, rows, COLUMNS) of the state's dtype, see `layout`
    outputs  one per row of w, of the state's dtype, the new x first
    inputs   of the model's dtype, each receives c_in x'
    c_in     (1 or B,) of the state's dtype
    z        noise from outside, or None
    streams  (B, 3) uint32, rows (seed low, seed high, sample): noise is drawn for them, or None
    draw     the draw number of that noise
    p        (1 or B, 4), the prediction, or None where it is folded into w
    limit    (1 or B, 4), rows (bound, gain, 0, 0), or None
    fixed    whether w stays constant, so that its zeros may be compiled away

    Attributes:
    memory  the vector that the compiled code takes; an address written to `memory[RAW + j]` binds another array of the
            same shape and dtype, which the caller keeps alive until the call returns
    run     the compiled code, `run(memory, 0, units)`

    Raises ValueError for more arrays than `layout` has room for.
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
        fixed: bool = False,
    ) -> None:
        for name, arrays, room in (
            ("slots", slots, layout.SLOTS),
            ("raws", raws, layout.RAWS),
            ("outputs", outputs, layout.OUTPUTS),
            ("inputs", inputs, layout.INPUTS),
        ):
            if len(arrays) > room:
                raise ValueError(f"a fused stage takes at most {room} {name}, got {len(arrays)}")
        self.memory = np.zeros(WORDS, np.int64)
        self.kinds: list[Kind] = [None] * ADDRESSES
        self.held: list[np.ndarray | None] = [None] * ADDRESSES
        self.zeros = zeros_of(w) if fixed else (None,) * layout.OUTPUTS
        tables = {P: p, LIMIT: limit, W: w, C_IN: c_in}
        given = {NOISE: z, STREAMS: streams, **tables}
        for first, arrays in ((0, slots), (RAW, raws), (OUTPUT, outputs), (INPUT, inputs)):
            given |= dict(enumerate(arrays, first))
        for j, array in given.items():
            self._hold(j, array)
        samples, elements = outputs[0].shape
        self.memory[[DRAW, SAMPLES, ELEMENTS, ROWS]] = draw, samples, elements, w.shape[1]
        self.memory[OWN_P:] = [0 if table is None else len(table) for table in tables.values()]
        self.units, self.size = units(samples, elements), samples * elements
        self._compile()

    def _hold(self, j: int, array: np.ndarray | None) -> None:
        self.held[j] = array  # keeps the memory alive
        self.memory[j] = 0 if array is None else array.ctypes.data
        self.kinds[j] = None if array is None else array.dtype.type

    def _compile(self) -> None:
        self.run = kernel(tuple(self.kinds), self.zeros)

    def replaced(self, arrays: Mapping[int, np.ndarray | None]) -> Launch:
        """A launch with other arrays at these addresses, of any dtype or None; it shares the rest."""
        other = copy.copy(self)
        other.memory, other.kinds, other.held = self.memory.copy(), self.kinds.copy(), self.held.copy()
        for j, array in arrays.items():
            other._hold(j, array)
        other._compile()
        return other

    def __call__(self, keep: object = None) -> None:
        """keep: what holds the arrays alive that `memory` was pointed to."""
        launch(self.run, self.memory, self.units, self.size, (self.held, keep))


def units(samples: int, elements: int) -> int:
    """The number of units of a stage over (samples, elements)."""
    return samples * -(-elements // CHUNK)


def launch(run: Compiled, memory: np.ndarray, count: int, size: int, keep: object = None) -> None:
    """Run a stage of `count` units over `size` elements, on all cores if it is large.

    Each element is computed from its own inputs only, so the split does not change a bit of the result. No share of the
    work is running after the return, whatever interrupts it.

    keep  what holds the arrays alive; every share holds it, too
    """
    if size <= SERIAL_ELEMENTS:
        run(memory, 0, count)
        return
    workers = min(_workers(), count)
    cuts = [count * i // workers for i in range(workers + 1)]
    # All shares exist before the first is submitted, so that an interruption at any place knows them.
    shares = [_Share(run, memory, a, b, keep) for a, b in pairwise(cuts)]
    try:
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

    def __init__(self, run: Compiled, memory: np.ndarray, first: int, last: int, keep: object) -> None:
        self._run, self._memory, self._first, self._last, self._keep = run, memory, first, last, keep
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
                self._run(self._memory, self._first, self._last)
            except BaseException as error:
                self.error = error
            finally:
                self._done.set()

    def run_here(self) -> None:
        if self._claim("here"):
            self._run(self._memory, self._first, self._last)

    def settle(self) -> None:
        """Wait for the pool if it runs this share; otherwise nobody will."""
        if not self._claim("dropped") and self._claims[0] == "pool":
            self._done.wait()


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
