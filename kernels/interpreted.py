"""The CPU kernels as NumPy expressions on the same arguments: what runs until Numba has compiled them.

Each function takes what its compiled twin takes and gives the same bits, but for the sum of `transfer`, which has no
order; the stage is `naive.step` on the launch's memory. Bytes per element: those of `naive`. Overflow is no warning
here, because it is none in compiled code.
"""

from __future__ import annotations

import ctypes

import numpy as np

from fewstep.kernels import attempts, layout, naive, philox
from fewstep.kernels import launch as words
from fewstep.kernels.attempts import control, propose, tables  # noqa: F401  the same source, not compiled

_INT16 = words.KINDS.index(np.int16)
_UINT16 = words.KINDS.index(np.uint16)


def _at(address: int, dtype: type[np.generic], *shape: int) -> np.ndarray:
    """The array at an address."""
    count = int(np.prod(shape))
    memory = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    array: np.ndarray = np.frombuffer(memoryview(memory), np.dtype(dtype), count).reshape(shape)
    return array


def _floats(bits: np.ndarray) -> np.ndarray:
    """An array as stored for a kernel, as floats: 16-bit ones from their bits."""
    if bits.dtype == np.uint16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16) if bits.dtype == np.int16 else bits


def _stored(x: np.ndarray, kind: int) -> np.ndarray:
    """x rounded to launch.KINDS[kind]; to 16 bits from float32."""
    if kind == _INT16:
        return x.astype(np.float32).astype(np.float16).view(np.int16)
    if kind != _UINT16:
        return x.astype(words.KINDS[kind])
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # a NaN stays one
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def stage(address: int, first: int, last: int, raw: int) -> None:
    """Units first .. last - 1 of the launch at an address, see `launch.Launch`; raw is that of its first raw, or 0."""
    m = _at(address, np.int64, words.WORDS).tolist()
    m[words.RAW] = raw or m[words.RAW]
    samples, n, chunk, group = m[words.SAMPLES], m[words.ELEMENTS], m[words.CHUNK], m[words.GROUP]
    chunks = -(-n // chunk) if group == 1 else 1
    unit = first
    while unit < last:
        b = unit // chunks * group
        if unit % chunks == 0 and unit + chunks <= last:  # whole samples
            unit = unit + (last - unit) // chunks * chunks
            _part(m, b, min(unit // chunks * group, samples), 0, n)
        else:
            lo = unit % chunks * chunk
            _part(m, b, b + 1, lo, min(lo + chunk, n))
            unit += 1


def short(
    memory: int, places: int, n: int, first: int, last: int, x: int, raw: int, z: int,
    slot1: int, slot2: int, slot3: int, output0: int, output1: int, output2: int,
) -> None:  # fmt: skip
    """Units first .. last - 1 of one stage of n numbers with the tables of a launch; see `numba_short`."""
    m = _at(memory, np.int64, words.WORDS).copy()
    at, kinds = _at(places, np.int64, 2, words.SHORT_KIND).tolist()
    at[:4] = x, slot1, slot2, slot3
    at[layout.RAW], at[layout.NOISE] = raw, z
    at[words.SHORT_OUTPUT : words.SHORT_OUTPUT + 3] = output0, output1, output2
    state, lo = words.KINDS[m[words.STATE]], first * words.SHORT_CHUNK
    n = min(n, last * words.SHORT_CHUNK) - lo
    given = {
        j: _at(address + lo * np.dtype(words.KINDS[kind]).itemsize, words.KINDS[kind], n)
        for j, (address, kind) in enumerate(zip(at, kinds, strict=True))
        if address and j != layout.PREDICTION
    }
    # In the state's dtype; of an output, the memory.
    wide = {j: array if array.dtype == state else _floats(array).astype(state) for j, array in given.items()}
    own = {layout.NOISE: words.NOISE} | {words.SHORT_OUTPUT + k: words.OUTPUT + k for k in range(layout.OUTPUTS)}
    m[: words.STREAMS + 1] = m[words.OUTPUT : words.ADDRESSES] = 0
    for j, array in wide.items():
        m[own.get(j, j)] = array.ctypes.data
    m[words.X_KIND] = m[words.RAW_KIND] = m[words.STATE]
    stage(m.ctypes.data, 0, words.resize(m, 1, n), 0)
    for j in range(words.SHORT_OUTPUT, words.SHORT_KIND):
        if j in given and wide[j] is not given[j]:
            given[j][...] = _stored(wide[j], kinds[j])


def _transfer(
    dtype: type[np.generic], target: int, source: int, n: int, block: int, origin: int, rows: int, width: int
) -> float:
    if rows:
        _at(block, np.int64, rows, width)[...] = _at(origin, np.int64, rows, 1)
    if not n:
        return 0.0
    x = _at(source, dtype, n)
    if target:
        _at(target, dtype, n)[...] = x
    with np.errstate(all="ignore"):
        return float(x.dot(x))


def transfer_float32(target: int, source: int, n: int, block: int, origin: int, rows: int, width: int) -> float:
    return _transfer(np.float32, target, source, n, block, origin, rows, width)


def transfer_float64(target: int, source: int, n: int, block: int, origin: int, rows: int, width: int) -> float:
    return _transfer(np.float64, target, source, n, block, origin, rows, width)


def set_word(address: int, value: int) -> None:
    _at(address, np.int64, 1)[0] = value


def _part(m: list[int], b0: int, b1: int, lo: int, hi: int) -> None:
    """Elements lo .. hi of samples b0 .. b1."""
    samples, n, rows = m[words.SAMPLES], m[words.ELEMENTS], m[words.ROWS]
    state = words.KINDS[m[words.STATE]]

    def array(j: int, dtype: type[np.generic] = state) -> np.ndarray:
        return _at(m[j], dtype, samples, n)[b0:b1, lo:hi]

    def table(j: int, own: int, *shape: int) -> np.ndarray | None:
        if not m[j]:
            return None
        whole = _at(m[j], state, m[own], *shape)
        return whole[b0:b1] if m[own] > 1 else whole

    slots = [array(j) if m[j] else None for j in range(layout.SLOTS)]
    if m[0]:
        slots[0] = _floats(array(0, words.KINDS[m[words.X_KIND]])).astype(state, copy=False)
    raws = [
        _floats(array(words.RAW + j, words.KINDS[m[words.RAW_KIND + j]])) if m[words.RAW + j] else None
        for j in range(layout.RAWS)
    ]
    z = array(words.NOISE) if m[words.NOISE] else None
    if m[words.STREAMS]:
        streams = _at(m[words.STREAMS], np.uint32, samples, 3)[b0:b1]
        z = philox.normal_rows(hi - lo, streams, m[words.DRAW], philox.STEP, lo)
    w, c_in = table(words.W, words.OWN_W, rows, layout.COLUMNS), table(words.C_IN, words.OWN_C_IN)
    p, limit = table(words.P, words.OWN_P, 4), table(words.LIMIT, words.OWN_LIMIT, 4)
    edit = (array(words.FREE), array(words.HELD)) if m[words.FREE] else None
    assert w is not None
    assert c_in is not None
    present = [raw for raw in raws if raw is not None]  # the first ones: a launch has no gaps
    with np.errstate(all="ignore"):
        outputs = naive.step(slots, present, w, z=z, p=p, limit=limit, edit=edit)
        for k, output in enumerate(outputs):
            array(words.OUTPUT + k)[...] = output
        scaled = outputs[0] * naive.column(c_in, outputs[0])
        for j in range(words.INPUT, words.INPUT + layout.INPUTS):
            if m[j]:
                array(j, words.KINDS[m[words.MODEL]])[...] = _stored(scaled, m[words.MODEL])


def normal_batch(out: np.ndarray, streams: np.ndarray, draw: int, domain: int) -> None:
    out[...] = philox.normal_rows(out.shape[1], streams, draw, domain)


def bridge_batch(
    out: np.ndarray,
    streams: np.ndarray,
    domain: int,
    draws: np.ndarray,
    weights: np.ndarray,
    stds: np.ndarray,
    right: np.ndarray,
) -> None:
    def z(k: int) -> np.ndarray:
        return philox.normal_rows(out.shape[1], streams, int(draws[k]), domain).astype(np.float64)

    a = stds[0] * z(0)
    b = a + stds[1] * z(1)
    for k in range(2, len(draws)):
        w = a + weights[k] * (b - a) + stds[k] * z(k)
        if k == len(draws) - 1:
            out[...] = w
        elif right[k]:
            a = w
        else:
            b = w


def _outputs(raws: np.ndarray, kinds: np.ndarray, samples: int, n: int) -> list[np.ndarray]:
    return [
        _floats(_at(int(address), words.KINDS[kind], samples, n)) for address, kind in zip(raws, kinds, strict=True)
    ]


LANES = 512  # in which sums over a sample are split, a power of two; its blocks of that size stay in L1


def blend(memory: np.ndarray, blends: np.ndarray, p: np.ndarray) -> None:
    m = memory.tolist()
    samples, n = m[words.SAMPLES], m[words.ELEMENTS]
    places = [(0, words.X_KIND), *((words.RAW + j, words.RAW_KIND + j) for j in range(layout.RAWS))]
    with np.errstate(all="ignore"):
        values = [
            _floats(_at(m[place], words.KINDS[m[kind]], samples, n)).astype(np.float64) if m[place] else None
            for place, kind in places
        ]
        for b in range(samples):
            row = blends[b if len(blends) > 1 else 0]
            mixes = np.zeros((2, n))
            for j, value in enumerate(values):
                for mix, c in zip(mixes, (row[layout.MIX_A + j], row[layout.MIX_B + j]), strict=True):
                    if c != 0.0 and value is not None:
                        mix += c * value[b]
            u, v = mixes - mixes[:, :1]
            first_a, first_c = mixes[:, 0]
            s = np.array([lane_sum(part) for part in (u, v, u * u, u * v, v * v)])
            spread_a, spread_c = s[2] - s[0] * s[0] / n, s[4] - s[1] * s[1] / n
            norm = np.sqrt(s[2] + 2.0 * first_a * s[0] + n * first_a * first_a)
            product = s[3] + first_a * s[1] + first_c * s[0] + n * first_a * first_c
            square = s[4] + 2.0 * first_c * s[1] + n * first_c * first_c
            f, q, phi = 1.0, 0.0, row[layout.PHI]
            if spread_a > 0.0:
                f = phi * np.sqrt(max(spread_c, 0.0) / spread_a) + (1.0 - phi)
            if norm > row[layout.RADIUS]:
                f *= row[layout.RADIUS] / norm
            if square > 0.0:
                q = product / square
            fixed, scaled, projected = (row[j : j + 4] for j in (layout.FIXED, layout.SCALED, layout.PROJECTED))
            p[b] = fixed + f * (scaled + q * projected)


def lane_sum(values: np.ndarray) -> np.float64:
    """The sum of a row in the compiled order: element i into lane i mod LANES, then halves of the lanes."""
    rows = np.zeros((-(-len(values) // LANES) + 1, LANES))  # the first row is the sums' start
    rows[1:].reshape(-1)[: len(values)] = values
    lanes = np.cumsum(rows, axis=0)[-1]
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    total: np.float64 = lanes[0]
    return total


def square_sums(streams: np.ndarray, draws: np.ndarray, n: int, domain: int, out: np.ndarray) -> None:
    for k, draw in enumerate(draws.tolist()):
        for b in range(len(streams)):
            (z,) = philox.normal_rows(n, streams[b : b + 1], draw, domain)
            out[b, k] = lane_sum(z.astype(np.float64) ** 2)


def magnitudes(
    x: int, raws: np.ndarray, kinds: np.ndarray, sizes: np.ndarray, n: int, p: np.ndarray, out: np.ndarray
) -> None:
    with np.errstate(all="ignore"):
        values = [raw.astype(p.dtype) for raw in _outputs(raws, kinds, len(out), n)]
        out[...] = np.abs(naive.combine([_at(x, p.dtype.type, len(out), n) if x else None, *values], p, out))


def error_norm(
    error: np.ndarray, low: np.ndarray, before: np.ndarray, rtol: float, atol: float, out: np.ndarray
) -> None:
    with np.errstate(all="ignore"):
        e, a, b = (v.astype(np.float64) for v in (error, low, before))
        delta = np.maximum(atol, rtol * np.maximum(np.abs(a), np.abs(b)))
        share = np.where(e != 0.0, np.where(delta != 0.0, (e / delta) ** 2, np.inf), 0.0)
        out[...] = np.sqrt(np.cumsum(share, axis=1)[:, -1] / e.shape[1])


def finish32(memory: np.ndarray, state: np.ndarray, numbers: np.ndarray, norms: np.ndarray, report: np.ndarray) -> None:
    _finish(np.float32, memory.tolist(), state, numbers, norms, report)


def finish64(memory: np.ndarray, state: np.ndarray, numbers: np.ndarray, norms: np.ndarray, report: np.ndarray) -> None:
    _finish(np.float64, memory.tolist(), state, numbers, norms, report)


def _finish(
    dtype: type[np.generic],
    m: list[int],
    state: np.ndarray,
    numbers: np.ndarray,
    norms: np.ndarray,
    report: np.ndarray,
) -> None:
    shape = m[attempts.SAMPLES], m[attempts.ELEMENTS]
    error, high, low, x, before, first = (_at(address, dtype, *shape) for address in m[: attempts.LAST_F])
    moves = [(x, high), (before, low)]
    if m[attempts.LAST_F]:
        moves.append((first, _at(m[attempts.LAST_F], dtype, *shape)))
    with np.errstate(all="ignore"):
        np.add(high, error, out=low)
    error_norm(error, low, before, numbers[attempts.RTOL], numbers[attempts.ATOL], norms)
    control(state, norms, numbers, report)
    if report[attempts.PROBLEM]:
        return
    taken = state[attempts.TAKEN, : len(x)] > 0.0
    for to, source in moves:
        to[taken] = source[taken]
