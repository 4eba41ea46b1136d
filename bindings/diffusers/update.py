"""The update of one scheduler call, applied to tensors in one fused pass.

Every live tensor is read once, and every new one written once. On the CPU the Numba kernel reads the tensors by their
addresses. On a GPU with Triton it is the operator `fewstep::stage`, with its tables on the device. Other devices, and
float64 on a GPU, use the oracle's expressions. None of these synchronises with the GPU.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable, Sequence
from sys import getrefcount
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo import guards

from fewstep.bindings.diffusers.noise import Streams
from fewstep.bindings.diffusers.probe import CLIPPED, MEMORY, NOISE, RAW, Call, Clip, NotAffineError, X
from fewstep.kernels import cpu, layout, naive
from fewstep.kernels import launch as words
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.checks import pick_backend
from fewstep.solvers.run.functional import stage

_bits, _address = TorchFrame().bits, TorchFrame().address
_RAW = words.RAW
_KINDS = {
    dtype: words.kind_of(_bits(torch.zeros((1, 1), dtype=dtype, device="cpu")))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
_empty_like = torch.empty_like
# Parts of torch's compiler, which a later torch may not have: without them a step takes longer.
_holders: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_guards: Any = getattr(guards, "TensorGuards", None)
# As compiled code allocates: in half the time of `empty_like`.
empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    guards, "_empty_strided_cpu", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
)

# Without Triton the operator has no GPU kernel, and its definition copies the tables to the host.
_TRITON = importlib.util.find_spec("triton") is not None


class Tables(NamedTuple):
    """The coefficients on one device, in the state's dtype: one `w` per launch, the rest as for `stage`."""

    w: list[Tensor]
    c_in: Tensor
    p: Tensor | None
    limit: Tensor | None


class Update:
    """Rows over [x, raw, z, m, *memory], with their tables for the kernels.

    rows    float64, those of the returned tensors first
    dtypes  of the returned tensors
    call    the dtypes of x and raw
    clip    of the x0 prediction, or None

    Attributes: `dtypes`, of all rows; `memory`, the remembered tensors that the rows read, in the order of the slots
    after x; `noisy`, whether a row reads z; `anywhere`, whether it runs on any device (a per-sample quantile is reduced
    on the CPU); `compiled`, whether the CPU kernels can run.
    """

    def __init__(
        self, rows: Sequence[np.ndarray], dtypes: Sequence[torch.dtype], call: Call, clip: Clip | None
    ) -> None:
        matrix = np.array(rows)
        wide = torch.float64 in (call.x_dtype, call.raw_dtype, *dtypes)
        self.dtype = torch.float64 if wide else torch.float32
        self.state = state = np.dtype("float64" if wide else "float32")
        self.memory = [int(j) for j in np.nonzero(matrix[:, MEMORY:].any(axis=0))[0]]
        if len(self.memory) >= layout.SLOTS:
            raise NotAffineError(f"it reads {len(self.memory)} remembered tensors")
        self.noisy = bool(matrix[:, NOISE].any())
        w = np.zeros((1, len(rows), layout.COLUMNS))
        w[0, :, 0] = matrix[:, X]
        w[0, :, 1 : 1 + len(self.memory)] = matrix[:, [MEMORY + j for j in self.memory]]
        w[0, :, layout.RAW] = matrix[:, RAW]
        w[0, :, layout.PREDICTION] = matrix[:, CLIPPED]
        w[0, :, layout.NOISE] = matrix[:, NOISE]
        self.w = w
        self.p = self.limit = None
        if clip is not None:
            self.p = np.array([[*clip.p, 0.0, 0.0]], state)
            if clip.bound is not None:
                self.limit = np.array([[clip.bound, 1.0, 0.0, 0.0]], state)
        self.quantile = (0.0, 0.0) if clip is None or clip.quantile is None else clip.quantile
        self.anywhere = clip is None or clip.quantile is None
        self.compiled = pick_backend("auto", TorchFrame("cpu")) == "numba"
        self.narrow = dtypes[0] if dtypes[0].itemsize == 2 else None
        self.casts = [(i, dtype) for i, dtype in enumerate(dtypes) if dtype != self.dtype]
        self.dtypes = [*dtypes, *[self.dtype] * (len(rows) - len(dtypes))]
        # The kernel writes a few rows at a time: one launch suffices for all but the longest memories.
        self.launches = [
            _Launch(self, call, np.ascontiguousarray(w[:, i : i + layout.OUTPUTS], state), i)
            for i in range(0, len(matrix), layout.OUTPUTS)
        ]
        self.stage, self.short = cpu.STAGE[state.name], cpu.SHORT[state.name]
        if self.compiled:
            self.stage.request()
            self.short.request()
        self.tables: dict[torch.device, Tables] = {}
        self.plain = call.x_dtype is self.dtype
        self.factor = self._factor(matrix, call)

    def run(self, x: Tensor, raw: Tensor, z: Tensor | None, memory: Sequence[Tensor]) -> list[Tensor]:
        """The rows as new tensors: returned tensors in `dtypes`, remembered ones in the state's dtype."""
        if self.factor is not None and not self.binds(x, raw, memory):
            return [torch.add(x, raw, alpha=self.factor)]
        if x.is_cpu and self.compiled:
            run = self._fused
        else:
            run = self._operator if _TRITON and x.is_cuda and self.dtype is torch.float32 else self._naive
        results = run(x, raw, z, memory)
        for i, dtype in self.casts:
            results[i] = results[i].to(dtype)
        return results

    def _factor(self, rows: np.ndarray, call: Call) -> float | None:
        """The c of an update that is x + c raw, one pass of torch's own where the kernel cannot run; otherwise None."""
        plain = call.x_dtype is call.raw_dtype is self.dtype and not self.casts
        if len(rows) > 1 or not plain or rows[0, X] != 1.0 or np.delete(rows[0], [X, RAW]).any():
            return None
        return float(rows[0, RAW])

    def _fused(self, x: Tensor, raw: Tensor, z: Tensor | None, memory: Sequence[Tensor]) -> list[Tensor]:
        samples, size = len(x), x.numel()
        sources = [x, raw]
        if self.noisy:
            assert z is not None
            sources.append(z)
        for j in self.memory:
            sources.append(memory[j])
        for i, tensor in enumerate(sources):
            if i > 1 and tensor.dtype is not self.dtype:
                tensor = sources[i] = tensor.to(self.dtype)
            if not tensor.is_contiguous() or tensor.is_neg():
                sources[i] = _address(tensor)[1]
        x = sources[0]
        limit = None
        if not self.anywhere:
            limit = np.zeros((samples, 4), self.state)
            m = [_bits(source).reshape(samples, -1) for source in sources[:2]]
            assert self.p is not None
            wide_x = m[0] if m[0].dtype == self.state else x.to(self.dtype).reshape(samples, -1).numpy()
            cpu.threshold(wide_x, m[1:], self.p, *self.quantile, limit)
        results: list[Tensor] = []
        for launch in self.launches:
            vector = launch.words.copy()  # one copy per call: calls may run in several threads
            for j, tensor in zip(launch.sources, sources, strict=True):
                vector[j] = tensor.data_ptr()
            if limit is not None:
                vector[words.LIMIT], vector[words.OWN_LIMIT] = limit.ctypes.data, samples
            units = words.resize(vector, samples, size // samples)
            for j in launch.outputs:
                out = _empty_like(x) if self.plain else _empty_like(x, dtype=self.dtype)
                vector[j] = out.data_ptr()
                results.append(out)
            wide = None
            if launch.narrow is not None:
                wide, results[0] = results[0], _empty_like(x, dtype=launch.narrow)  # the kernel writes both
                vector[words.INPUT] = results[0].data_ptr()
            words.launch(self.stage.run, vector.ctypes.data, units, size, (vector, sources, results, wide))
        return results

    def binds(self, x: Tensor, raw: Tensor, memory: Sequence[Tensor]) -> bool:
        """Whether one launch makes it of tensors like these without copying one."""
        if not self.compiled or not self.anywhere or len(self.launches) > 1:
            return False
        if any(memory[j].dtype not in _KINDS for j in self.memory):
            return False
        return all(t.is_cpu and t.is_contiguous() and not t.is_neg() for t in (x, raw, *memory))

    def _operator(self, x: Tensor, raw: Tensor, z: Tensor | None, memory: Sequence[Tensor]) -> list[Tensor]:
        """`_fused` on a GPU, one operator per launch. Requires `anywhere`."""
        tables = self.tables.get(x.device)
        if tables is None:
            tables = self.tables[x.device] = self._upload(x.device)
        slots = [x, *(memory[j] for j in self.memory)]
        noise = z if self.noisy else None
        results: list[Tensor] = []
        for launch, w in zip(self.launches, tables.w, strict=True):
            narrow = launch.narrow is not None
            live = [slot if j in launch.live else None for j, slot in enumerate(slots)]
            rows = stage(
                live, [raw], w, z=noise, p=tables.p, limit=tables.limit, c_in=tables.c_in, copies=int(narrow),
                model_dtype=self.narrow or self.dtype,
            )  # fmt: skip
            if narrow:  # the copy for the model is the first result in its own dtype
                rows[0] = rows.pop()
            results += rows
        return results

    def _upload(self, device: torch.device) -> Tables:
        """Copy the tables to the device, synchronously: any stream may read them afterwards."""
        parts = [np.ones(1, self.state), self.p, self.limit, *(launch.table for launch in self.launches)]
        # Every table begins at a multiple of 16 bytes: Triton specialises kernels for aligned pointers.
        filled = [np.zeros(0, self.state) if part is None else part.ravel() for part in parts]
        gaps = [-part.size % 4 for part in filled]
        flat = np.concatenate([np.pad(part, (0, gap)) for part, gap in zip(filled, gaps, strict=True)])
        sizes = [size for part, gap in zip(filled, gaps, strict=True) for size in (part.size, gap)]
        pieces = torch.split(torch.from_numpy(flat).to(device), sizes)[::2]
        c_in, p, limit, *w = (
            None if part is None else piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)
        )
        return Tables(w, c_in, p, limit)  # type: ignore[arg-type]

    def _naive(self, x: Tensor, raw: Tensor, z: Tensor | None, memory: Sequence[Tensor]) -> list[Tensor]:
        """`_fused` on any device, by the oracle."""
        slots = [t.to(self.dtype) for t in (x, *(memory[j] for j in self.memory))]
        limit = self.limit
        if not self.anywhere:
            assert self.p is not None
            m = naive.combine([slots[0], raw.to(self.dtype)], self.p, slots[0])
            limit = naive.threshold(m, *self.quantile)
        return stage(slots, [raw], self.w, z=z, p=self.p, limit=limit, backend="naive")


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Tells in one call whether other tensors are like these: torch.compile's own check.

    It compares types, dtypes, devices, shapes, strides, lazy negation, whether a gradient is needed, the modes of torch
    that act on operators, and which of the tensors are the same.
    """
    if _guards is None:
        return _plain_guard(tensors)
    first = [next(j for j, other in enumerate(tensors) if other is tensor) for tensor in tensors]
    single = [i for i, j in enumerate(first) if i == j]
    # One list per tensor; the stub says that there is one in all.
    shapes: list[Any] = [list(tensors[i].shape) for i in single]
    strides: list[Any] = [list(tensors[i].stride()) for i in single]
    check: Callable[..., bool] = _guards(
        *(tensors[i] for i in single), dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
    ).check
    if len(single) == len(tensors):
        return check
    # torch's takes no tensor twice.
    return lambda *others: (
        all(map(operator.is_, others, [others[j] for j in first])) and check(*[others[i] for i in single])
    )


def _plain_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """`guard` without torch's compiler."""

    def traits(those: Sequence[Tensor]) -> list[object]:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._len_torch_dispatch_stack()
        own = [
            (type(t), t.dtype, t.device, t.shape, t.stride(), t.is_neg(), t.requires_grad, t.is_inference())
            for t in those
        ]
        same = [[a is b for b in those] for a in those]
        return [modes, own, same]

    known = traits(tensors)
    return lambda *others: len(others) == len(tensors) and traits(others) == known


class Lone:
    """A tensor, and how many hold it: that tells whether anyone else has come to hold it, a view of it or its memory.

    `settle` takes those that hold it at that moment for the usual ones.
    """

    __slots__ = ("_address", "_holders", "_place", "_references", "_shape", "_storage", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._storage, self._shape = tensor, tensor.untyped_storage(), tensor.shape
        self._place, self._address = self._storage._cdata, tensor.data_ptr()

    @staticmethod
    def counts() -> bool:
        """Whether torch tells who holds memory."""
        return _holders is not None

    def settle(self) -> None:
        assert _holders is not None
        self._holders = _holders(self._place)
        self._references = getrefcount(self._storage) + getrefcount(self.tensor)

    def is_alone(self) -> bool:
        """Whether only the usual ones hold it, and its memory was not resized, moved or shared with a process."""
        # Holders of the memory are tensors, views, NumPy's arrays, graphs; references to Python's objects count apart.
        return (
            _holders is not None
            and _holders(self._place) == self._holders
            and getrefcount(self._storage) + getrefcount(self.tensor) == self._references
            and self.tensor.data_ptr() == self._address
        )

    def is_as_made(self) -> bool:
        """Whether the tensor itself, which others have held, was not edited, resized or asked for a gradient."""
        tensor = self.tensor
        return not tensor._version and tensor.shape == self._shape and not tensor.requires_grad


class Pool:
    """Memory of a run's large tensors, used again once nobody holds a tensor in it.

    What is freed at this size goes back to the system, so that a new tensor would wait for each of its pages: up to as
    long as the step that fills it.
    """

    LEAST, MOST, ROOM = 1 << 17, 1 << 23, 8  # bytes of a tensor, and how many are kept

    def __init__(self) -> None:
        self.kind: object = None
        self.kept: list[Lone] = []

    def empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor."""
        kind = shape, strides, torch.is_inference_mode_enabled()
        if self.kind != kind:
            self.kind, self.kept = kind, []
        for kept in self.kept:
            if kept.tensor.dtype is dtype and kept.is_alone():
                unused: Tensor = kept.tensor.data
                return unused
        tensor = empty_strided(shape, strides, dtype)
        if not Lone.counts():
            return tensor
        new = Lone(tensor)
        del tensor
        new.settle()
        del self.kept[: 1 - self.ROOM]
        self.kept.append(new)
        made: Tensor = new.tensor.data
        return made


class Bound:
    """An update bound to a shape, for tensors like those that it `binds`: the caller checks that with a `guard`.

    draws   whether the whole stage can make it, which draws noise itself but keeps to the state's dtype
    idle    launches' words for that, with their addresses, which no call is using; several calls may run at once, in
            several threads
    ready   the same for the short stage
    """

    __slots__ = (
        "draws", "idle", "kinds", "memory", "more", "noise", "noisy", "outputs", "ready", "serial", "shape", "short",
        "size", "slots", "stage", "strides", "targets", "units", "update", "words",
    )  # fmt: skip

    def __init__(
        self, update: Update, x: Tensor, raw: Tensor, memory: Sequence[Tensor], noise: torch.dtype = torch.float32
    ) -> None:
        """noise: the dtype of the noise that calls are given."""
        (launch,) = update.launches
        self.update, self.stage, self.short, self.noisy = update, update.stage, update.short, update.noisy
        self.noise, self.shape, self.strides, self.size = noise, tuple(x.shape), x.stride(), x.numel()
        self.words = launch.words.copy()
        self.units = words.resize(self.words, len(x), x.shape[1:].numel())
        self.serial = words.workers(self.size, self.units) == 1
        self.memory = tuple(enumerate(update.memory, 1))
        # Of each row: the word of its address, its dtype, and whether its memory is kept.
        self.outputs = tuple(
            (j, dtype, Pool.LEAST <= self.size * dtype.itemsize <= Pool.MOST)
            for j, dtype in zip(launch.outputs, update.dtypes, strict=True)
        )
        self.draws = not update.casts and all(memory[j].dtype is update.dtype for j in update.memory)
        self.kinds = np.full(words.SHORT_KIND, _KINDS[update.dtype])
        self.kinds[[0, layout.RAW, layout.NOISE]] = _KINDS[x.dtype], _KINDS[raw.dtype], _KINDS[noise]
        for slot, j in self.memory:
            self.kinds[slot] = _KINDS[memory[j].dtype]
        for k, (_, dtype, _) in enumerate(self.outputs, words.SHORT_OUTPUT):
            self.kinds[k] = _KINDS[dtype]
        self.idle: list[tuple[np.ndarray, int]] = []
        self.ready: list[_Short] = []
        # The addresses of three of each are arguments of the short stage, from places 8 and 11 on.
        self.slots = tuple((7 + slot, j) for slot, j in self.memory[:3])
        self.targets = tuple((place, dtype, kept) for place, (_, dtype, kept) in enumerate(self.outputs[:3], 11))
        self.more = len(self.memory) > 3 or len(self.outputs) > 3

    def run(
        self, x: Tensor, raw: Tensor, z: Tensor | Streams | None, memory: Sequence[Tensor], pool: Pool
    ) -> list[Tensor]:
        """The rows as new tensors. z: the noise, or, if it `draws`, what it draws it from."""
        if type(z) is Streams:
            return self._launch(x, raw, z, memory, pool)
        noise = 0
        if self.noisy:
            assert isinstance(z, Tensor)
            if z.dtype is not self.noise or not z.is_contiguous():
                return self.update.run(x, raw, z, memory)
            noise = z.data_ptr()
        try:
            ready = self.ready.pop()
        except IndexError:  # another thread may have taken the last one just now
            ready = _Short(self.words, self.kinds, self.size)
        given = ready.given
        given[5], given[6], given[7] = x.data_ptr(), raw.data_ptr(), noise
        for place, j in self.slots:
            given[place] = memory[j].data_ptr()
        rows = []
        for place, dtype, kept in self.targets:
            row = (pool.empty if kept else empty_strided)(self.shape, self.strides, dtype)
            given[place] = row.data_ptr()
            rows.append(row)
        if self.more:
            for slot, j in self.memory[3:]:
                ready.table[slot] = memory[j].data_ptr()
            for k, (_, dtype, _) in enumerate(self.outputs[3:], words.SHORT_OUTPUT + 3):
                row = empty_strided(self.shape, self.strides, dtype)
                ready.table[k] = row.data_ptr()
                rows.append(row)
        if self.serial:
            self.short.run(*given)
        else:
            words.launch(ready.share(self.short.run), given[0], given[4], self.size, (ready, x, raw, z, memory, rows))
        self.ready.append(ready)
        return rows

    def _launch(self, x: Tensor, raw: Tensor, z: Streams, memory: Sequence[Tensor], pool: Pool) -> list[Tensor]:
        """The rows by the whole stage."""
        try:
            vector, address = self.idle.pop()
        except IndexError:
            vector = self.words.copy()
            address = vector.ctypes.data
        vector[0], vector[_RAW] = x.data_ptr(), raw.data_ptr()
        for slot, j in self.memory:
            vector[slot] = memory[j].data_ptr()
        vector[words.DRAW] = z.count()
        vector[words.STREAMS] = z.address if self.noisy else 0
        rows = []
        for output, dtype, kept in self.outputs:
            row = (pool.empty if kept else empty_strided)(self.shape, self.strides, dtype)
            vector[output] = row.data_ptr()
            rows.append(row)
        if self.serial:
            self.stage.run(address, 0, self.units, 0)
        else:
            words.launch(self.stage.run, address, self.units, self.size, (vector, x, raw, z, memory, rows))
        self.idle.append((vector, address))
        return rows


class _Short:
    """The memory of one call of the short stage for `size` numbers.

    given  the stage's arguments, of which each call sets its addresses
    table  the words of its other addresses, and of all dtypes
    """

    __slots__ = ("given", "held", "table")

    def __init__(self, vector: np.ndarray, kinds: np.ndarray, size: int) -> None:
        self.table = np.concatenate([np.zeros(words.SHORT_KIND, np.int64), kinds])
        units = -(-size // words.SHORT_CHUNK)
        self.given = [vector.ctypes.data, self.table.ctypes.data, size, 0, units, *[0] * 9]
        self.held = vector  # its address is in use

    def share(self, run: Callable[..., None]) -> words.Stage:
        """The short stage as `launch` runs one."""
        begin, rest = self.given[:3], self.given[5:]
        return lambda _, first, last, __: run(*begin, first, last, *rest)


class _Launch:
    """One launch of the kernel, and the words of its memory that each call sets.

    table  its rows, (1, rows, COLUMNS)
    live   indices of the tensors of [x, *memory] that the rows read
    """

    def __init__(self, update: Update, call: Call, table: np.ndarray, first: int) -> None:
        self.table = table
        self.live = [
            j
            for j in range(1 + len(update.memory))
            if table[:, :, j].any() or (j == 0 and update.p is not None and update.p[0, 0])
        ]
        # Placeholders of one element for the tensors of each call.
        one = np.zeros((1, 1), update.state)
        x, raw = (_bits(torch.zeros((1, 1), dtype=dtype)) for dtype in (call.x_dtype, call.raw_dtype))
        self.narrow = update.narrow if first == 0 else None
        launch = words.Launch(
            [x, *[one] * len(update.memory)],
            [raw],
            table,
            [one] * table.shape[1],
            [] if self.narrow is None else [_bits(torch.zeros((1, 1), dtype=self.narrow))],
            c_in=np.ones(1, update.state),
            z=one if update.noisy else None,
            p=update.p,
            limit=update.limit if update.anywhere else np.zeros((1, 4), update.state),
        )
        self.words = launch.memory
        self._held = launch  # keeps the tables alive whose addresses are in `words`
        slots = range(1, 1 + len(update.memory))
        self.sources = [0, words.RAW, *([words.NOISE] if update.noisy else []), *slots]
        self.outputs = range(words.OUTPUT, words.OUTPUT + table.shape[1])
