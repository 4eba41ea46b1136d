"""The fused CPU kernel against its naive twin, and both against the definition written out in float64.

Error bounds, with eps the state's machine epsilon and S = sum_j |c_j v_j| of an element (with m's own terms):

    |fused - naive|      <= 4 eps S          both add the same terms, in the same precision
    |fused - definition| <= (J + 6)/2 eps S  J terms added one by one, and the few roundings of m

The structures are a fixed list, because every one is compiled on its own; their contents are random.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.kernels import cpu, interpreted, layout, naive, philox
from fewstep.kernels import launch as cpu_launch
from fewstep.kernels.launch import Launch

GUARD = 64  # elements on both sides of every output
NUMPY = {"f32": np.float32, "f64": np.float64, "f16": np.int16, "bf16": np.uint16}  # f16 and bf16 as bits
TORCH = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}


class Structure(NamedTuple):
    slots: str  # one letter a column: x where a buffer is read, - where none is
    raws: int
    outputs: int
    inputs: int
    prologue: str = ""  # "", "p" or "limit"
    noise: str = ""  # "", "z" or "streams"
    state: str = "f32"
    raw: str = "f32"
    model: str = "f32"


STRUCTURES = [
    Structure("x", 1, 1, 0),
    Structure("xx", 2, 2, 2, noise="streams", raw="bf16", model="bf16"),
    Structure("xxx", 3, 3, 3, "limit", "streams", raw="f16", model="f16"),
    Structure("xxxx", 1, 4, 1, "p", "z"),
    Structure("xxxxx", 2, 5, 2, "limit", "z", "f64", "f64", "f64"),
    Structure("xxxxxx", 0, 1, 1, "", "streams", "f64", "f64", "f32"),
    Structure("xxxxxxx", 1, 2, 3, "p", raw="bf16", model="bf16"),
    Structure("xxxxxxxx", 3, 5, 1, "limit", "streams"),
    Structure("-x-x", 1, 2, 1, raw="f16", model="f16"),
    Structure("", 2, 1, 1, raw="bf16", model="bf16"),
    Structure("x", 0, 1, 1, noise="z"),
    Structure("xx", 1, 1, 2, "p", raw="f64", model="f64"),
    Structure("x-x", 2, 2, 1, state="f64", raw="bf16", model="f16"),
]
SIZES = (1, 3, 17, 2047, 2048, 2049)


class Case(NamedTuple):
    """One call: kernel arguments by name, and the floats behind them as torch tensors."""

    structure: Structure
    kernel: dict[str, Any]
    slots: list[torch.Tensor | None]
    raws: list[torch.Tensor]
    z: torch.Tensor | None
    backing: list[np.ndarray]  # the guarded memory of outputs and inputs


def bits(a: torch.Tensor) -> np.ndarray:
    """A tensor's memory as the kernel takes it."""
    stored = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(a.dtype)
    return (a if stored is None else a.view(stored)).numpy()


def values(a: np.ndarray, kind: str) -> np.ndarray:
    """The values of the bits, in float64."""
    if kind == "bf16":
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (a.view(np.float16) if kind == "f16" else a).astype(np.float64)


def guarded(shape: tuple[int, int], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(the whole memory, its middle): NaN inside, a recognisable pattern around it."""
    size = shape[0] * shape[1]
    whole = np.frombuffer(bytearray(b"\xa5" * (size + 2 * GUARD) * np.dtype(NUMPY[kind]).itemsize), NUMPY[kind])
    middle = whole[GUARD : GUARD + size]
    middle[...] = bits(torch.full((size,), float("nan"), dtype=TORCH[kind]))
    return whole, middle.reshape(shape)


def make(s: Structure, seed: int, batch: int, n: int, own: dict[str, bool], density: float) -> Case:
    """Random contents for a structure; sources that no coefficient of a sample reads hold NaN there."""
    rng = np.random.default_rng(seed)
    state = NUMPY[s.state]

    def rows(name: str) -> int:
        return batch if own[name] else 1

    def table(*shape: int) -> np.ndarray:
        c = rng.standard_normal(shape) * 2.0 ** rng.integers(-4, 5, shape)
        return np.ascontiguousarray(np.where(rng.random(shape) < density, c, 0.0).astype(state))

    columns = np.zeros(layout.COLUMNS, bool)
    columns[: len(s.slots)] = [c == "x" for c in s.slots]
    if s.prologue:
        columns[layout.PREDICTION] = True
    else:
        columns[layout.RAW : layout.RAW + s.raws] = True
    columns[layout.NOISE] = bool(s.noise)
    w = table(rows("w"), s.outputs, layout.COLUMNS)
    w[:, :, ~columns] = 0.0
    p = table(rows("p"), 4) if s.prologue else None
    limit = None
    if p is not None:
        p[:, 1 + s.raws :] = 0.0
    if s.prologue == "limit":
        limit = np.zeros((rows("limit"), 4), state)
        limit[:, 0] = rng.uniform(0.3, 3.0, len(limit))
        limit[:, 1] = rng.uniform(0.3, 3.0, len(limit))

    used = np.broadcast_to((w != 0).any(axis=1), (batch, layout.COLUMNS)).copy()
    if p is not None:
        read = np.broadcast_to(p != 0, (batch, 4)) & used[:, layout.PREDICTION, None]
        used[:, 0] |= read[:, 0]
        used[:, layout.RAW : layout.RAW + layout.RAWS] = read[:, 1:]

    def source(column: int, kind: str) -> torch.Tensor:
        a = torch.from_numpy(rng.standard_normal((batch, n)) * 3.0).to(TORCH[kind])
        a[torch.from_numpy(~used[:, column])] = float("nan")
        return a

    slots = [source(j, s.state) if c == "x" else None for j, c in enumerate(s.slots)]
    raws = [source(layout.RAW + j, s.raw) for j in range(s.raws)]
    z, streams, draw = None, None, 0
    if s.noise == "z":
        z = source(layout.NOISE, s.state)
    elif s.noise == "streams":
        streams = rng.integers(0, 2**32, (batch, 3), dtype=np.uint64).astype(np.uint32)
        draw = int(rng.integers(0, 2**31))
        drawn = [philox.normals(n, int(a) | int(b) << 32, int(c), draw, philox.STEP) for a, b, c in streams]
        z = torch.from_numpy(np.stack(drawn)).to(TORCH[s.state])
    edit = None
    if s.prologue and seed % 2:
        edit = [rng.uniform(-1.0, 1.0, (batch, n)).astype(state), rng.standard_normal((batch, n)).astype(state)]
    out = [guarded((batch, n), s.state) for _ in range(s.outputs)]
    inp = [guarded((batch, n), s.model) for _ in range(s.inputs)]
    kernel = {
        "slots": [None if a is None else a.numpy() for a in slots],
        "raws": [bits(a) for a in raws],
        "w": w,
        "outputs": [middle for _, middle in out],
        "inputs": [middle for _, middle in inp],
        "c_in": rng.uniform(0.2, 2.0, rows("c_in")).astype(state),
        "z": z.numpy() if s.noise == "z" and z is not None else None,
        "streams": streams,
        "draw": draw,
        "p": p,
        "limit": limit,
        "edit": edit,
    }
    return Case(s, kernel, slots, raws, z, [whole for whole, _ in [*out, *inp]])


def launch(kernel: dict[str, Any]) -> None:
    stage = cpu.STAGE[kernel["w"].dtype.name]
    stage.compile()
    Launch(**kernel)(stage.run)


def definition(case: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every output in float64, element by element as the equation says, and its S."""
    w, p, limit = (None if case.kernel[k] is None else case.kernel[k].astype(np.float64) for k in ("w", "p", "limit"))
    batch, n = case.kernel["outputs"][0].shape
    slots = [None if a is None else a.double().numpy() for a in case.slots]
    raws = [a.double().numpy() for a in case.raws]
    z = None if case.z is None else case.z.double().numpy()
    outputs = [np.empty((batch, n)) for _ in range(w.shape[1])]
    sums = [np.empty((batch, n)) for _ in range(w.shape[1])]
    for b in range(batch):
        sources = {j: a[b] for j, a in enumerate(slots) if a is not None}
        sources |= {layout.RAW + j: a[b] for j, a in enumerate(raws)}
        sizes = {j: np.abs(a) for j, a in sources.items()}
        if z is not None:
            sources[layout.NOISE], sizes[layout.NOISE] = z[b], np.abs(z[b])
        if p is not None:
            q = p[b % len(p)]
            terms = [(q[0], 0), *((q[1 + j], layout.RAW + j) for j in range(len(raws)))]
            m = sum((c * sources[j] for c, j in terms if c), np.zeros(n))
            size = sum((abs(c) * sizes[j] for c, j in terms if c), np.zeros(n))
            if limit is not None:
                bound, gain = limit[b % len(limit), :2]
                m, size = np.minimum(np.maximum(m, -bound), bound) * gain, size * gain
            if case.kernel["edit"] is not None:
                free, held = (a[b].astype(np.float64) for a in case.kernel["edit"])
                m, size = free * m + held, abs(free) * size + abs(held)
            sources[layout.PREDICTION], sizes[layout.PREDICTION] = m, size
        for k in range(w.shape[1]):
            row = w[b % len(w), k]
            outputs[k][b] = sum((row[j] * sources[j] for j in np.flatnonzero(row)), np.zeros(n))
            sums[k][b] = sum((abs(row[j]) * sizes[j] for j in np.flatnonzero(row)), np.zeros(n))
    return outputs, sums


def inside(a: np.ndarray, b: np.ndarray, bound: np.ndarray) -> None:
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    assert (np.abs(a.astype(np.float64) - b.astype(np.float64)) <= bound).all()


def meets_its_definition(case: Case) -> None:
    """The outputs are those of the equation and of the naive stage, the model inputs those of the first output.

    Nothing beside them was written.
    """
    structure, kernel = case.structure, case.kernel
    exact, sums = definition(case)
    eps = float(np.finfo(NUMPY[structure.state]).eps)
    limit = None if kernel["limit"] is None else kernel["limit"][:, :2]
    edit = None if kernel["edit"] is None else [*map(torch.from_numpy, kernel["edit"])]
    twin = naive.step(case.slots, case.raws, kernel["w"], z=case.z, p=kernel["p"], limit=limit, edit=edit)
    for out, other, true, size in zip(kernel["outputs"], twin, exact, sums, strict=True):
        assert other.dtype == TORCH[structure.state]
        inside(out, other.numpy(), 4.0 * eps * size)
        inside(out, true, (layout.COLUMNS + 6) / 2.0 * eps * size)

    x = kernel["outputs"][0]
    scaled = torch.from_numpy(x * np.broadcast_to(kernel["c_in"], len(x))[:, None])
    rounded = bits(scaled.to(TORCH[structure.model]))
    for copy in kernel["inputs"]:
        assert copy.tobytes() == rounded.tobytes()
    for whole in case.backing:
        edge = np.concatenate([whole[:GUARD], whole[-GUARD:]])
        assert edge.tobytes() == b"\xa5" * edge.nbytes


def contents() -> Any:
    flags = st.fixed_dictionaries({k: st.booleans() for k in ("w", "p", "limit", "c_in")})
    return given(
        seed=st.integers(0, 2**32),
        batch=st.integers(1, 5),
        n=st.sampled_from(SIZES),
        own=flags,
        density=st.sampled_from([1.0, 0.7, 0.3]),
    )


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: "-".join(str(f) for f in s if f != ""))
@settings(max_examples=12, deadline=None)
@contents()
def test_a_stage(structure: Structure, seed: int, batch: int, n: int, own: dict[str, bool], density: float) -> None:
    case = make(structure, seed, batch, n, own, density)
    kernel = case.kernel
    read = [a for a in itertools.chain.from_iterable(
        v if isinstance(v, list) else [v] for k, v in kernel.items() if k not in ("outputs", "inputs", "draw")
    ) if a is not None]  # fmt: skip
    before = [a.tobytes() for a in read]
    launch(kernel)
    assert [a.tobytes() for a in read] == before
    meets_its_definition(case)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s.raw != "bf16" and s.slots], ids=str)
def test_the_naive_twin_is_the_same_in_numpy_and_torch(structure: Structure) -> None:
    own = {"w": True, "p": True, "limit": False, "c_in": False}
    case = make(structure, 5, 3, 33, own, 0.7)
    kernel = case.kernel
    limit = None if kernel["limit"] is None else kernel["limit"][:, :2]
    options = {"p": kernel["p"], "limit": limit}
    theirs = naive.step(case.slots, case.raws, kernel["w"], z=case.z, **options)
    slots = [None if a is None else a.numpy() for a in case.slots]
    z = None if case.z is None else case.z.numpy()
    with np.errstate(invalid="ignore"):  # NaN in the sources that nothing reads
        ours = naive.step(slots, [a.numpy() for a in case.raws], kernel["w"], z=z, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.numpy().dtype
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize("structure", [STRUCTURES[i] for i in (1, 2, 4, 7)], ids=str)
@pytest.mark.parametrize("workers", [2, 3, 7])
def test_the_split_over_threads_changes_no_bit(
    structure: Structure, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"w": True, "p": True, "limit": True, "c_in": True}
    results = []
    for serial in (True, False):
        monkeypatch.setattr(cpu_launch, "SERIAL_ELEMENTS", 1 << 40 if serial else 0)
        monkeypatch.setattr(cpu_launch, "_workers", lambda: workers)
        case = make(structure, 11, 5, 4099, own, 0.8)
        launch(case.kernel)
        results.append([a.tobytes() for a in [*case.kernel["outputs"], *case.kernel["inputs"]]])
    assert results[0] == results[1]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize(("batch", "n"), [(1, 4099), (5, 2080), (40, 96)])
@pytest.mark.parametrize("offset", [0, 16])
def test_results_past_the_caches_have_the_same_bits(
    structure: Structure, batch: int, n: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """offset: of the outputs from the start of a cache line; only from 0 on they go past the caches."""
    own = {"w": batch == 5, "p": batch == 5, "limit": True, "c_in": batch == 5}
    results = []
    for streamed in (False, True):
        monkeypatch.setattr(cpu_launch, "STREAMED_ELEMENTS", 1 if streamed else 1 << 40)
        case = make(structure, 5, batch, n, own, 0.8)
        for name in ("outputs", "inputs"):
            placed = [at_offset(a, offset) for a in case.kernel[name]]
            case.kernel[name] = [middle for _, middle in placed]
            case.backing.extend(whole for whole, _ in placed)
        assert Launch(**case.kernel).memory[cpu_launch.STREAMED] == streamed
        launch(case.kernel)
        meets_its_definition(case)
        results.append([a.tobytes() for a in [*case.kernel["outputs"], *case.kernel["inputs"]]])
    assert results[0] == results[1]


def at_offset(like: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """A guarded array like another one, `offset` bytes behind the start of a cache line, within its whole memory."""
    guard = GUARD * like.itemsize
    memory = np.full(like.nbytes + 2 * guard + 128, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    whole = memory[start : start + like.nbytes + 2 * guard].view(like.dtype)
    return whole, whole[GUARD:-GUARD].reshape(like.shape)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_sample_is_the_same_alone_and_in_its_batch(structure: Structure) -> None:
    own = {"w": True, "p": True, "limit": True, "c_in": True}
    case = make(structure, 3, 4, 2049, own, 0.8)
    launch(case.kernel)
    shared = ("slots", "raws", "w", "c_in", "z", "streams", "p", "limit", "edit")
    for b in (0, 3):

        def one(v: Any, b: int = b) -> Any:
            if isinstance(v, list):
                return [one(a) for a in v]
            return None if v is None else np.ascontiguousarray(v[b : b + 1])

        alone = {k: one(v) if k in shared else v for k, v in case.kernel.items()}
        for k in ("outputs", "inputs"):
            alone[k] = [np.empty_like(a[b : b + 1]) for a in case.kernel[k]]
        launch(alone)
        for k in ("outputs", "inputs"):
            for whole, part in zip(case.kernel[k], alone[k], strict=True):
                assert whole[b].tobytes() == part[0].tobytes()


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: "-".join(str(f) for f in s if f != ""))
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 33), (2, 2049), (9, 700)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_interpreted_stage_gives_the_compiled_ones_bits(
    structure: Structure, batch: int, n: int, shared: bool
) -> None:
    """In one piece, and unit by unit in another order."""
    own = dict.fromkeys(("w", "p", "limit", "c_in"), not shared)
    case = make(structure, 7 * n + batch, batch, n, own, 0.7)
    arrays = [*case.kernel["outputs"], *case.kernel["inputs"]]
    launch(case.kernel)
    want = [a.tobytes() for a in arrays]
    bound = Launch(**case.kernel)
    for parts in ([(0, bound.units)], [(unit, unit + 1) for unit in reversed(range(bound.units))]):
        for a in arrays:
            a[...] = 0
        for first, last in parts:
            interpreted.stage(bound.address, first, last, 0)
        assert [a.tobytes() for a in arrays] == want


@pytest.mark.parametrize("name", ["compiled", "interpreted"])
def test_a_stage_takes_the_first_raw_as_an_address(name: str) -> None:
    own = dict.fromkeys(("w", "p", "limit", "c_in"), False)
    case = make(Structure("xx", 2, 2, 1), 3, 2, 40, own, 0.7)
    launch(case.kernel)
    arrays = [*case.kernel["outputs"], *case.kernel["inputs"]]
    want = [a.tobytes() for a in arrays]
    bound = Launch(**case.kernel)
    raw = int(bound.memory[cpu_launch.RAW])
    bound.memory[cpu_launch.RAW] = 1  # of the call before
    for a in arrays:
        a[...] = 0
    stage = cpu.STAGE[case.kernel["w"].dtype.name].run if name == "compiled" else interpreted.stage
    stage(bound.address, 0, bound.units, raw)
    assert [a.tobytes() for a in arrays] == want


def test_a_clip_keeps_its_bounds_and_gain_exactly() -> None:
    """p = (0, 1), w reads m alone: the output is gain clip(raw, +-bound), exact for powers of 2."""
    raw = np.array([[-5.0, -2.0, -1.5, -0.0, 0.25, 2.0, 2.0000002, np.inf, -np.inf]], np.float32)
    w = np.zeros((1, 1, layout.COLUMNS), np.float32)
    w[0, 0, layout.PREDICTION] = 1.0
    out = np.full_like(raw, np.nan)
    launch(
        {
            "slots": [np.full_like(raw, np.nan)],
            "raws": [raw],
            "w": w,
            "outputs": [out],
            "c_in": np.ones(1, np.float32),
            "p": np.array([[0.0, 1.0, 0.0, 0.0]], np.float32),
            "limit": np.array([[2.0, 0.5, 0.0, 0.0]], np.float32),
        }
    )
    np.testing.assert_array_equal(out, [[-1.0, -1.0, -0.75, 0.0, 0.125, 1.0, 1.0, 1.0, -1.0]])


def test_a_nan_that_is_read_reaches_the_output() -> None:
    """Only zero coefficients mask a source: a network's NaN must not be hidden, not even by the clip."""
    raw = np.array([[1.0, np.nan, 3.0]], np.float32)
    x = np.ones_like(raw)
    w = np.zeros((1, 1, layout.COLUMNS), np.float32)
    w[0, 0, [0, layout.PREDICTION]] = 0.5, 2.0
    kernel = {
        "slots": [x],
        "raws": [raw],
        "w": w,
        "outputs": [np.zeros_like(raw)],
        "c_in": np.ones(1, np.float32),
        "p": np.array([[0.0, 1.0, 0.0, 0.0]], np.float32),
        "limit": np.array([[2.0, 1.0, 0.0, 0.0]], np.float32),
    }
    launch(kernel)
    np.testing.assert_array_equal(kernel["outputs"][0], [[2.5, np.nan, 4.5]])
    (twin,) = naive.step([x], [raw], w, p=kernel["p"], limit=kernel["limit"][:, :2])
    np.testing.assert_array_equal(twin, [[2.5, np.nan, 4.5]])


@pytest.mark.parametrize(
    ("name", "count", "room"), [("slots", 9, 8), ("raws", 4, 3), ("outputs", 6, 5), ("inputs", 4, 3)]
)
def test_too_many_arrays(name: str, count: int, room: int) -> None:
    a = np.zeros((1, 4), np.float32)
    given_ = {"slots": [a], "raws": [a], "outputs": [a], "inputs": [a]} | {name: [a] * count}
    w = np.zeros((1, 1, layout.COLUMNS), np.float32)
    with pytest.raises(ValueError, match=f"at most {room} {name}, got {count}"):
        Launch(**given_, w=w, c_in=np.ones(1, np.float32))


@pytest.mark.parametrize("name", ["slots", "outputs", "c_in", "z"])
def test_an_array_of_another_dtype(name: str) -> None:
    a, other = np.zeros((1, 4), np.float32), np.zeros((1, 4))
    given_: dict[str, Any] = {"slots": [a, a], "outputs": [a], "c_in": np.ones(1, np.float32), "z": a}
    given_[name] = [a, other][-len(given_[name]) :] if isinstance(given_[name], list) else given_[name].astype(float)
    with pytest.raises(ValueError, match="stage on float32 got a slot, an output or a table of float64"):
        Launch(raws=[a], w=np.zeros((1, 1, layout.COLUMNS), np.float32), **given_)


def test_a_float64_state_makes_the_same_half_inputs_everywhere() -> None:
    """Near a tie of float16, rounding by way of float32 and at once differ; every backend does the first."""
    x = (1.0 + np.arange(64) * 2.0**-10 + 2.0**-11 + 1e-12).reshape(1, 64)
    want = torch.from_numpy(x).half().numpy()
    assert (x.astype(np.float16) != want).any()
    np.testing.assert_array_equal(naive.model_input(x, np.ones(1), np.empty(0, np.float16)), want)
    w = np.zeros((1, 1, layout.COLUMNS))
    w[0, 0, 0] = 1.0
    model = np.empty((1, 64), np.int16)
    cpu.STAGE["float64"].compile()
    Launch([x], [], w, [np.empty_like(x)], [model], c_in=np.ones(1))(cpu.STAGE["float64"].run)
    np.testing.assert_array_equal(model.view(np.float16), want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 1000])
@pytest.mark.parametrize("to", [True, False])
def test_a_transfer_copies_bits_and_sums_squares(dtype: str, compiled: bool, n: int, to: bool) -> None:
    """Payloads of NaNs among the words and the numbers stay as they are; nothing else is written.

    Of three rows of two words the first is as it should be, and the others are wrong in one word and in both.
    """
    kernel = cpu.TRANSFER[dtype]
    run = kernel.run if compiled else getattr(interpreted, kernel.twin)
    x = np.random.default_rng(n).standard_normal(n + 2).astype(dtype)
    target, words = np.full(n + 2, 7.0, dtype), np.array([-1, 5, -(1 << 62), 9])
    block = np.array([-1, -1, 5, 4, 0, 0, 0])
    source, place = (array.ctypes.data + array.itemsize for array in (x, target))
    total = run(place if to else 0, source, n, block.ctypes.data, words.ctypes.data, 3, 2)
    assert total == pytest.approx(float((x[1 : n + 1].astype(np.float64) ** 2).sum()), rel=1e-5)
    want = np.full(n + 2, 7.0, dtype)
    want[1 : n + 1] = x[1 : n + 1] if to else 7.0
    assert target.tobytes() == want.tobytes()
    assert block.tolist() == [-1, -1, 5, 5, -(1 << 62), -(1 << 62), 0]
    if n:
        x[n] = np.nan
        assert np.isnan(run(place, source, n, 0, 0, 0, 0))
        x[n] = np.inf
        assert run(place, source, n, 0, 0, 0, 0) == np.inf


@pytest.mark.parametrize("kernel", [kernel for kernel in cpu.KERNELS if kernel._direct], ids=repr)
def test_kernels_that_trust_their_callers_have_one_signature(kernel: cpu.Kernel) -> None:
    """And none of their arguments is an array, whose layout would be trusted.

    Of adaptive attempts `test_adaptive` checks the arrays.
    """
    (signature,) = kernel._signatures
    if kernel in cpu.ATTEMPTS:
        return
    arrays = [part for part in signature.replace(" ", "").partition("(")[2].split(",") if "[" in part]
    assert not arrays


def test_a_word_is_set() -> None:
    for run in (cpu.WORD.run, interpreted.set_word):
        memory = np.zeros(4, np.int64)
        run(memory[2:].ctypes.data, 1 << 40)
        assert memory.tolist() == [0, 0, 1 << 40, 0]


SHORT_COLUMNS = [([0, 8], [0, 8]), ([0], [8, 11, 12]), ([], [0, 1, 2, 3, 8]), ([0, 1, 2, 3, 4, 8, 11, 12], [11])]


@pytest.mark.parametrize("state", ["f32", "f64"])
@pytest.mark.parametrize("other", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("columns", SHORT_COLUMNS, ids=str)
@pytest.mark.parametrize("bound", [None, 0.0, 0.8])
@pytest.mark.parametrize(("shape", "rows"), [((1, 1), 5), ((3, 7), 1), ((1, 2049), 2), ((2, 2500), 4)])
def test_the_short_stage_gives_the_bits_of_the_stage(
    state: str, other: str, columns: tuple[list[int], ...], bound: float | None, shape: tuple[int, int], rows: int
) -> None:
    """The stage is given all arrays in the state's dtype, and torch rounds what it returns.

    other  the dtype of the short stage's raw, noise, last slot, and even rows
    bound  of the prediction; it does not act at 0, and at None there is no prediction
    """
    rng, dtype = np.random.default_rng(rows), NUMPY[state]
    kinds = {j: other if j in (4, layout.RAW, layout.NOISE) else state for j in (0, 1, 2, 3, 4, 8, 12)}
    kinds |= {cpu_launch.SHORT_OUTPUT + k: state if k % 2 else other for k in range(rows)}
    sources = {}
    for j in (0, 1, 2, 3, 4, layout.RAW, layout.NOISE):
        made = torch.from_numpy(rng.standard_normal(shape))
        made.view(-1)[:2] = torch.tensor([torch.inf, -0.0])[: made.numel()]
        sources[j] = made.to(TORCH[state]).to(TORCH[kinds[j]])
    *slots, raw, z = (source.to(TORCH[state]).numpy() for source in sources.values())
    w = np.zeros((1, rows, layout.COLUMNS), dtype)
    for k in range(rows):
        used = [j for j in columns[k % 2] if j != layout.PREDICTION or bound is not None]
        w[0, k, used] = rng.standard_normal(len(used))
    p = None if bound is None else np.array([[1.3, -0.7, 0.0, 0.0]], dtype)
    limit = np.array([[bound, 1.5, 0.0, 0.0]], dtype) if bound else None
    whole = np.empty((rows, *shape), dtype)
    launch = Launch(slots, [raw], w, list(whole), c_in=np.ones(1, dtype), z=z, p=p, limit=limit)
    stage, short = cpu.STAGE[np.dtype(dtype).name], cpu.SHORT[np.dtype(dtype).name]
    stage.compile()
    short.compile()
    launch(stage.run)
    for run in (short.run, interpreted.short):
        outputs = [torch.full(shape, 7.0, dtype=TORCH[kinds[cpu_launch.SHORT_OUTPUT + k]]) for k in range(rows)]
        table = np.zeros((2, cpu_launch.SHORT_KIND), np.int64)
        for j, array in (*sources.items(), *enumerate(outputs, cpu_launch.SHORT_OUTPUT)):
            table[:, j] = array.data_ptr(), cpu_launch.kind_of(bits(array))
        table[1, layout.PREDICTION] = cpu_launch.KINDS.index(dtype)
        given_ = table[0, [0, 8, 12, 1, 2, 3, 13, 14, 15]].tolist()
        table[0, [0, 8, 12, 1, 2, 3, 13, 14, 15]] = -1  # the arguments stand for these
        before, begin = (launch.memory.copy(), table.copy()), (launch.memory.ctypes.data, table.ctypes.data, raw.size)
        with np.errstate(all="ignore"):
            run(*begin, 0, 1, *given_)
            if raw.size > cpu_launch.SHORT_CHUNK:  # the rest, as another thread may do
                run(*begin, 1, 3, *given_)
        for output, row in zip(outputs, whole, strict=True):
            want = torch.from_numpy(row).to(output.dtype)
            torch.testing.assert_close(output, want, rtol=0.0, atol=0.0, equal_nan=True)
            number = ~want.isnan()  # torch gives a NaN of 16 bits no sign
            assert torch.equal(output.signbit()[number], want.signbit()[number])
        assert launch.memory.tolist() == before[0].tolist()
        assert table.tolist() == before[1].tolist()
