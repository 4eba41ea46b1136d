"""PTX executed in NumPy, all threads of a block at once: what Triton compiles for NVIDIA's GPUs, without one.

It knows the instructions that this project's kernels compile to; another one raises NotImplementedError with its name.
A FaultError is raised for what a device would do in silence, or report at some later call:

- an access outside of the arguments' memory or of shared memory, or at an address that its size does not divide;
- shared memory that is read before it is written, or written and touched by two threads with no barrier in between;
- two values for one address in one instruction;
- a shuffle, or a barrier at its end, without all the threads that it waits for.

Floating point is IEEE's to the bit: NumPy's operations round once, `fma` of float32 rounds once as well, 16-bit
conversions round to nearest even. Of float64, `fma` rounds twice; `div.full` is the rounded quotient.
Source: NVIDIA's PTX ISA 8.8, the sections named after the instructions.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

WARP = 32
UNSIGNED: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
REGISTERS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}  # bits, by the name's letters
TYPES: dict[str, Any] = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
PARAMETERS = {"u32": "I", "u64": "Q", "f32": "f", "f64": "d"}
ATOMIC = -2  # in place of the thread that wrote last

Registers = dict[str, Any]  # unsigned integers or bools: a scalar, or one for each thread
Step = Callable[["Block", Any], None]  # of a block, for the threads of a mask; None: for all


class FaultError(Exception):
    """What a device must not be asked for."""


def bits(kind: Any) -> int:
    return 1 if kind is np.bool_ else 8 * np.dtype(kind).itemsize


# --- arithmetic ---


def _fma32(a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once: the product is exact in float64, and the sum is rounded to odd there before it is rounded
    to float32 (Boldo and Melquiond 2008).
    """
    product, term = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + term
    other = total - product
    left = (product - (total - other)) + (term - other)
    even = total.view(np.int64) % 2 == 0
    odd = np.where(np.isfinite(left) & (left != 0.0) & even, np.nextafter(total, np.copysign(np.inf, left)), total)
    return odd.astype(np.float32)


def _bf16(value: Any) -> Any:
    """The upper 16 bits, rounded to nearest even."""
    word = value.view(np.uint32).astype(np.uint64)
    near = (word + 0x7FFF + (word >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, near).astype(np.uint16)


def _halves(convert: Callable[[Any], Any], high: Any, low: Any) -> Any:
    return convert(high).astype(np.uint32) << 16 | convert(low).astype(np.uint32)


def _divide(a: Any, b: Any) -> Any:
    """Integers, rounded towards 0."""
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def _shift(left: bool, a: Any, by: Any) -> Any:
    width = bits(a.dtype.type)
    if not left and a.dtype.kind == "i":
        return a >> np.minimum(by, width - 1).astype(a.dtype)
    some = (by & np.uint32(width - 1)).astype(a.dtype)
    return np.where(by < width, a << some if left else a >> some, 0).astype(a.dtype)


def _field(kind: Any, a: Any, start: Any, length: Any) -> Any:
    assert int(length) > 0
    top = 32 - int(start) - int(length)
    return a << kind(top) >> kind(32 - int(length))


def _permute(a: Any, b: Any, selector: Any) -> Any:
    """The bytes of a and b, 0 .. 7, that the selector's four nibbles name."""
    if (selector & np.uint32(0x8888)).any():
        raise NotImplementedError("PTX instruction prmt.b32 with copies of a sign")
    both = b.astype(np.uint64) << 32 | a.astype(np.uint64)
    picked = [both >> 8 * (selector >> 4 * i & 7).astype(np.uint64) & 255 for i in range(4)]
    return (picked[3] << 24 | picked[2] << 16 | picked[1] << 8 | picked[0]).astype(np.uint32)


def _convert(to: str, of: str, modifiers: list[str], value: Any) -> Any:
    if of == "bf16":
        return (value.astype(np.uint32) << 16).view(np.float32).astype(TYPES[to])
    if to == "bf16":
        return _bf16(value)
    if "rzi" in modifiers:
        least, most = (float(f(TYPES[to])) for f in (lambda t: np.iinfo(t).min, lambda t: np.iinfo(t).max))
        return np.clip(np.nan_to_num(np.trunc(value)), least, most).astype(TYPES[to])
    return value.astype(TYPES[to])


COMPARISONS: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _compare(how: str, a: Any, b: Any) -> Any:
    """`neu` and the like hold where a side is NaN, the others do not."""
    if a.dtype.kind != "f":
        return COMPARISONS[how](a, b)
    undefined = np.isnan(a) | np.isnan(b)
    found = COMPARISONS[how.removesuffix("u")](a, b)
    return found | undefined if how.endswith("u") else found & ~undefined


PLAIN: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "mov": lambda a: a,
}  # fmt: skip


def operation(name: str) -> tuple[Callable[..., Any], list[Any], Any]:
    """What an instruction computes, the types of its sources, and that of its result."""
    word, *modifiers = name.split(".")
    kinds = [m for m in modifiers if m in TYPES]
    kind = TYPES[kinds[0]] if kinds else None
    floating = kind in (np.float32, np.float64)
    wide = {np.int32: np.int64, np.uint32: np.uint64}.get(kind)
    match word, modifiers:
        case "mul" | "mad", ["wide", _]:
            product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
            if word == "mul":
                return product, [kind] * 2, wide
            return lambda a, b, c: product(a, b) + c, [kind] * 2 + [wide], wide
        case "mul", _ if floating or modifiers[0] == "lo":
            return np.multiply, [kind] * 2, kind
        case "mad", ["lo", _]:
            return lambda a, b, c: a * b + c, [kind] * 3, kind
        case "fma", ["rn", _]:
            return _fma32 if kind is np.float32 else lambda a, b, c: a * b + c, [kind] * 3, kind
        case "div", _:
            return np.divide if floating else _divide, [kind] * 2, kind
        case "min" | "max", [_]:
            return getattr(np, ("f" if floating else "") + word + ("" if floating else "imum")), [kind] * 2, kind
        case "shl" | "shr", [_]:
            return partial(_shift, word == "shl"), [kind, np.uint32], kind
        case "bfe", [_]:
            return partial(_field, kind), [kind, np.uint32, np.uint32], kind
        case "prmt", ["b32"]:
            return _permute, [kind] * 3, kind
        case "setp", [how, _]:
            return partial(_compare, how), [kind] * 2, np.bool_
        case "selp", [_]:
            return lambda a, b, p: np.where(p, a, b).astype(kind), [kind] * 2 + [np.bool_], kind
        case "cvt", _ if kinds[0] in ("f16x2", "bf16x2"):
            half = _bf16 if kinds[0] == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)
            return partial(_halves, half), [np.float32] * 2, np.uint32
        case "cvt", _ if not {"sat", "ftz", "rz", "rm", "rp", "rni", "rmi", "rpi"} & {*modifiers}:
            return partial(_convert, *kinds, modifiers), [TYPES[kinds[1]]], kind
        case _ if word in PLAIN and not {*modifiers} - {"rn", *kinds}:
            return PLAIN[word], [kind] * (2 if word in ("add", "sub", "and", "or", "xor") else 1), kind
    raise NotImplementedError(f"PTX instruction {name}")


# --- memory ---


class Memory:
    """Pieces of this process's memory, by address."""

    def __init__(self, pieces: list[tuple[int, int]]) -> None:
        """Start and bytes of each piece; pieces may repeat."""
        found = sorted({p for p in pieces if p[1]})
        self.starts, self.sizes = (np.array([p[i] for p in found], np.int64) for i in (0, 1))
        self.bytes = [np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(at)) for at, n in found]

    def _places(self, addresses: Any, size: int) -> Iterator[tuple[Any, Any, Any]]:
        addresses = addresses.astype(np.int64)
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        for i in np.unique(which):
            chosen = which == i
            at = addresses[chosen] - self.starts[i]
            if i < 0 or at.max() + size > self.sizes[i]:
                raise FaultError(f"{size} bytes at {addresses[chosen].max()} are outside of the arguments' memory")
            whole = self.sizes[i] // size * size
            yield chosen, self.bytes[i][:whole].view(UNSIGNED[8 * size]), at // size

    def load(self, addresses: Any, size: int) -> Any:
        found = np.empty(addresses.shape, UNSIGNED[8 * size])
        for chosen, memory, at in self._places(addresses, size):
            found[chosen] = memory[at]
        return found

    def store(self, addresses: Any, values: Any, size: int) -> None:
        for chosen, memory, at in self._places(addresses, size):
            memory[at] = values[chosen]
            if (memory[at] != values[chosen]).any():
                raise FaultError("threads store different values at one address")


class Shared:
    """A block's shared memory, and who touched each byte since the last barrier."""

    def __init__(self, size: int) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.written, self.seen = np.full((2, size), -1)  # the last epoch, which a barrier ends
        self.writer, self.reader = np.full((2, size), -1)
        self.epoch = 0

    def _at(self, addresses: Any, size: int) -> Any:
        at = addresses.astype(np.int64)[:, None] + np.arange(size)
        if at.max(initial=0) >= len(self.bytes) or at.min(initial=0) < 0:
            raise FaultError(f"{size} bytes at {addresses.max()} of {len(self.bytes)} bytes of shared memory")
        return at

    def load(self, addresses: Any, threads: Any, size: int) -> Any:
        at = self._at(addresses, size)
        if (self.written[at] < 0).any():
            raise FaultError("shared memory is read that no thread has written")
        if ((self.written[at] == self.epoch) & (self.writer[at] != threads[:, None])).any():
            raise FaultError("shared memory is read that another thread has written since the last barrier")
        alone = (self.seen[at] != self.epoch) | (self.reader[at] == threads[:, None])
        owner = np.broadcast_to(threads[:, None], at.shape)
        # Two threads that read a byte in one instruction are seen as well: only one of them is its reader after it.
        self.reader[at] = np.where(alone, owner, -1)
        self.reader[at] = np.where(self.reader[at] == owner, owner, -1)
        self.seen[at] = self.epoch
        return self.bytes[at].view(UNSIGNED[8 * size])[:, 0]

    def store(self, addresses: Any, threads: Any, values: Any, size: int, *, atomic: bool = False) -> None:
        at = self._at(addresses, size)
        owner = np.broadcast_to(ATOMIC if atomic else threads[:, None], at.shape)
        if ((self.written[at] == self.epoch) & (self.writer[at] != owner)).any():
            raise FaultError("two threads write to shared memory without a barrier in between")
        if ((self.seen[at] == self.epoch) & (self.reader[at] != threads[:, None])).any():
            raise FaultError("shared memory is written that another thread has read since the last barrier")
        split = np.ascontiguousarray(values)[:, None].view(np.uint8)
        self.bytes[at], self.writer[at], self.written[at] = split, owner, self.epoch
        if (self.bytes[at] != split).any():  # equal values are copies that a layout keeps of a tensor
            raise FaultError("two threads write different values to shared memory at once")


# --- programs ---


class Part(NamedTuple):
    """Instructions without a branch, and how they end: 'next', 'bar', 'ret' or the label of a branch."""

    steps: list[Step]
    end: str
    guard: Callable[[Registers], Any] | None


class Program(NamedTuple):
    name: str
    parameters: list[tuple[str, str]]  # name, type
    parts: list[Part]
    labels: dict[str, int]


class Block:
    """The threads of one block, while they run."""

    def __init__(self, program: Program, threads: int, memory: Memory, shared: int, given: Registers) -> None:
        self.program, self.memory, self.shared = program, memory, Shared(shared)
        self.threads = np.arange(threads)
        self.registers: Registers = {**given, "%tid.x": self.threads.astype(np.uint32)}

    def run(self) -> None:
        """The threads that lag behind go first, so that those that part meet again."""
        at = np.zeros(len(self.threads), np.int64)
        alive, waiting = np.ones(len(at), np.bool_), np.zeros(len(at), np.bool_)
        while alive.any():
            ready = alive & ~waiting
            if not ready.any():
                if not alive.all():
                    raise FaultError("a barrier waits for threads that have returned")
                waiting[:] = False
                self.shared.epoch += 1
                continue
            now = int(at[ready].min())
            active = ready & (at == now)
            part = self.program.parts[now]
            for step in part.steps:
                step(self, None if active.all() else active)
            ends = active if part.guard is None else active & np.broadcast_to(part.guard(self.registers), active.shape)
            at[active] = now + 1
            if part.end == "ret":
                alive &= ~ends
            elif part.end == "bar":
                waiting |= ends
            elif part.end != "next":
                at[ends] = self.program.labels[part.end]

    def chosen(self, mask: Any) -> Any:
        return self.threads if mask is None else np.flatnonzero(mask)

    def warps(self, mask: Any) -> Any:
        """The threads of an instruction that whole warps take part in."""
        chosen = self.chosen(mask)
        if len(chosen) % WARP or (chosen.reshape(-1, WARP)[:, 0] % WARP).any():
            raise FaultError("an instruction of whole warps without all their threads")
        return chosen

    def put(self, name: str, value: Any, mask: Any) -> None:
        if name == "_":
            return
        width = REGISTERS[name.rstrip("0123456789")]
        if bits(value.dtype.type) < width:  # loads extend
            value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64).astype(UNSIGNED[width])
        value = value.view(UNSIGNED[width])
        self.registers[name] = value if mask is None else np.where(mask, value, self.registers.get(name, value))


def _read(text: str, kind: Any) -> Callable[[Registers], Any]:
    """An operand as a value of its instruction's type."""
    if text.startswith("!"):
        inner = _read(text[1:], kind)
        return lambda registers: ~inner(registers)
    if text.startswith("%"):
        return lambda registers: registers[text].view(kind)
    if text == "global_smem":
        number = 0
    else:
        number = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
    # As wide as the type: a float's bits, or an integer in two's complement.
    constant = np.array([number & (1 << bits(kind)) - 1], np.uint64).astype(UNSIGNED[bits(kind)]).view(kind)[0]
    return lambda registers: constant


def _operands(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*", text)]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


def _address(text: str, kind: Any) -> Callable[[Block, Any], Any]:
    """The addresses of the threads that are chosen."""
    found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    assert found, text
    base, offset = _read(found[1], kind), int(found[2] or 0)

    def addresses(block: Block, chosen: Any) -> Any:
        return np.broadcast_to(base(block.registers), block.threads.shape)[chosen].astype(np.int64) + offset

    return addresses


def _spread(block: Block, values: Any, chosen: Any) -> Any:
    found = np.zeros(block.threads.shape, values.dtype)
    found[chosen] = values
    return found


def _access(name: str, texts: list[str]) -> Step:
    """A load or a store."""
    word, *modifiers = name.split(".")
    modifiers = [m.partition("::")[0] for m in modifiers]
    if {*modifiers} - {"global", "shared", "volatile", "v2", "v4", *TYPES}:
        raise NotImplementedError(f"PTX instruction {name}")
    kind = TYPES[modifiers[-1]]
    size, shared, loads = np.dtype(kind).itemsize, "shared" in modifiers, word == "ld"
    where, values = (texts[1], texts[0]) if loads else texts
    names = _names(values)
    address = _address(where, np.uint32 if shared else np.uint64)
    sources = [] if loads else [_read(n, kind) for n in names]

    def step(block: Block, mask: Any) -> None:
        chosen = block.chosen(mask)
        if not len(chosen):
            return
        at = address(block, chosen)
        if (at % (size * len(names))).any():
            raise FaultError(f"{name} at an address that {size * len(names)} does not divide")
        for i, register in enumerate(names):
            here = at + size * i
            if loads:
                found = block.shared.load(here, chosen, size) if shared else block.memory.load(here, size)
                block.put(register, _spread(block, found.view(kind), chosen), mask)
                continue
            value = np.broadcast_to(sources[i](block.registers), block.threads.shape)[chosen].view(UNSIGNED[8 * size])
            if shared:
                block.shared.store(here, chosen, value, size)
            else:
                block.memory.store(here, value, size)

    return step


def _atomic(name: str, texts: list[str]) -> Step:
    """`atom`, and `red`, which does not return what it found."""
    word, *modifiers = name.split(".")
    how, kind = modifiers[-2], TYPES[modifiers[-1]]
    shared, size = "shared" in modifiers, np.dtype(kind).itemsize
    change = {"add": np.add, "max": np.maximum, "min": np.minimum, "exch": lambda old, new: new}[how]
    where, operand = texts[-2:]
    address, source = _address(where, np.uint32 if shared else np.uint64), _read(operand, kind)

    def step(block: Block, mask: Any) -> None:
        chosen = block.chosen(mask)
        values = np.broadcast_to(source(block.registers), block.threads.shape)[chosen]
        found = np.zeros(len(chosen), kind)
        for i, at in enumerate(address(block, chosen)):
            here, thread = np.array([at]), chosen[i : i + 1]
            if at % size:
                raise FaultError(f"{name} at an address that {size} does not divide")
            if shared:  # its own reads and writes are in order
                old = block.shared.bytes[block.shared._at(here, size)].view(kind)[0]
                if (block.shared.written[at : at + size] < 0).any():
                    raise FaultError("shared memory is read that no thread has written")
            else:
                old = block.memory.load(here, size).view(kind)
            found[i] = old[0]
            new = change(old, values[i : i + 1]).view(UNSIGNED[8 * size])
            if shared:
                block.shared.store(here, thread, new, size, atomic=True)
            else:
                block.memory.store(here, new, size)
        if len(chosen) and word == "atom":
            block.put(texts[0], _spread(block, found, chosen), mask)

    return step


def _shuffle(name: str, texts: list[str]) -> Step:
    _, _, how, _ = name.split(".")
    value, by, clamp = _read(texts[1], np.uint32), _read(texts[2], np.uint32), int(texts[3], 0)
    if clamp != (0 if how == "up" else WARP - 1):
        raise NotImplementedError(f"PTX instruction {name} within less than a warp")

    def step(block: Block, mask: Any) -> None:
        chosen = block.warps(mask)
        lane = chosen % WARP
        distance = np.broadcast_to(by(block.registers), block.threads.shape)[chosen].astype(np.int64)
        source = {"up": lane - distance, "down": lane + distance, "bfly": lane ^ distance, "idx": distance}[how]
        source = np.where((source >= 0) & (source < WARP), source, lane)
        found = np.broadcast_to(value(block.registers), block.threads.shape)[chosen - lane + source]
        block.put(texts[0], _spread(block, found, chosen), mask)

    return step


def _redux(name: str, texts: list[str]) -> Step:
    _, _, how, kind = name.split(".")
    value, reduce = _read(texts[1], TYPES[kind]), {"add": np.add, "min": np.minimum, "max": np.maximum}[how].reduce

    def step(block: Block, mask: Any) -> None:
        chosen = block.warps(mask)
        own = np.broadcast_to(value(block.registers), block.threads.shape)[chosen].reshape(-1, WARP)
        block.put(texts[0], _spread(block, np.repeat(reduce(own, axis=1, dtype=own.dtype), WARP), chosen), mask)

    return step


def _vote(name: str, texts: list[str]) -> Step:
    """Bit i of the result is the predicate of a warp's thread i."""
    if name != "vote.sync.ballot.b32" or texts[2] != "-1":
        raise NotImplementedError(f"PTX instruction {name} by {texts[2]}")
    value, places = _read(texts[1], np.bool_), np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def step(block: Block, mask: Any) -> None:
        chosen = block.warps(mask)
        own = np.broadcast_to(value(block.registers), block.threads.shape)[chosen].reshape(-1, WARP)
        ballots = (own * places).sum(axis=1, dtype=np.uint32)
        block.put(texts[0], _spread(block, np.repeat(ballots, WARP), chosen), mask)

    return step


def _stmatrix(name: str, texts: list[str]) -> Step:
    """Four matrices of 8 x 8 halves: the threads 8 i .. 8 i + 7 of a warp have the addresses of matrix i's rows, and
    its register i holds two neighbours of row lane / 4.
    """
    if name != "stmatrix.sync.aligned.m8n8.x4.shared.b16":
        raise NotImplementedError(f"PTX instruction {name}")
    address, values = _address(texts[0], np.uint32), [_read(n, np.uint32) for n in _names(texts[1])]

    def step(block: Block, mask: Any) -> None:
        chosen = block.warps(mask)
        rows, lane = address(block, chosen).reshape(-1, WARP), np.arange(WARP)
        if (rows % 16).any():
            raise FaultError(f"{name} at an address that 16 does not divide")
        for i, value in enumerate(values):
            at = rows[:, 8 * i + lane // 4] + 4 * (lane % 4)
            word = np.broadcast_to(value(block.registers), block.threads.shape)[chosen]
            block.shared.store(at.reshape(-1), chosen, word, 4)

    return step


def _parameter(name: str, texts: list[str]) -> Step:
    read, kind = texts[1].strip("[] "), TYPES[name.split(".")[-1]]
    return lambda block, mask: block.put(texts[0], block.registers[read].view(kind), mask)


def _pack(name: str, texts: list[str]) -> Step:
    """mov between a register and its halves."""
    width = bits(TYPES[name.split(".")[-1]])
    half, whole = UNSIGNED[width // 2], UNSIGNED[width]
    if texts[0].startswith("{"):
        names, source = _names(texts[0]), _read(texts[1], whole)

        def split(block: Block, mask: Any) -> None:
            value = source(block.registers)
            for i, register in enumerate(names):
                block.put(register, (value >> whole(width // 2 * i)).astype(half), mask)

        return split
    low, high = (_read(n, half) for n in _names(texts[1]))

    def join(block: Block, mask: Any) -> None:
        value = high(block.registers).astype(whole) << whole(width // 2) | low(block.registers).astype(whole)
        block.put(texts[0], value, mask)

    return join


OTHERS: dict[str, Callable[[str, list[str]], Step]] = {
    "ld": _access, "st": _access, "atom": _atomic, "red": _atomic, "shfl": _shuffle, "redux": _redux,
    "vote": _vote, "stmatrix": _stmatrix,
}  # fmt: skip


def _step(name: str, texts: list[str]) -> Step:
    if name.startswith("ld.param."):
        return _parameter(name, texts)
    if name.startswith("mov.") and any(text.startswith("{") for text in texts):
        return _pack(name, texts)
    word = name.partition(".")[0]
    if word in OTHERS:
        return OTHERS[word](name, texts)
    compute, kinds, result = operation(name)
    target, *given = texts
    sources = [_read(text, kind) for text, kind in zip(given, kinds, strict=True)]

    def step(block: Block, mask: Any) -> None:
        value = compute(*(source(block.registers) for source in sources))
        block.put(target, np.asarray(value)[()].astype(result, copy=False), mask)

    return step


def _guarded(step: Step, guard: Callable[[Registers], Any] | None) -> Step:
    if guard is None:
        return step

    def run(block: Block, mask: Any) -> None:
        own = np.broadcast_to(guard(block.registers), block.threads.shape)
        step(block, own if mask is None else own & mask)

    return run


@cache
def parse(text: str) -> Program:
    text = re.sub(r"//.*", "", text)
    entry = re.search(r"\.entry (\w+)\((.*?)\)(.*?)\{(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    assert entry
    kinds = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+),?\s*$", entry[2], re.MULTILINE)
    parts: list[Part] = []
    labels: dict[str, int] = {}
    steps: list[Step] = []

    def close(end: str, guard: Any = None) -> None:
        parts.append(Part(steps[:], end, guard))
        steps.clear()

    for line in re.split(r"[;\n]", entry[4]):
        line = line.strip(" \t{}") if line.strip() in "{}" else line.strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            if steps:
                close("next")
            labels[label[1]] = len(parts)
            continue
        if not line or line.startswith("."):
            continue
        found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line)
        assert found, line
        guard = _read(found[1], np.bool_) if found[1] else None
        name, texts = found[2], _operands(found[3])
        if name in ("bra", "bra.uni"):
            close(texts[0], guard)
        elif name == "ret":
            close("ret", guard)
        elif name == "bar.sync" and texts == ["0"] and guard is None:
            close("bar")
        else:
            steps.append(_guarded(_step(name, texts), guard))
    close("ret")
    return Program(entry[1], [(name, kind) for kind, name in kinds], parts, labels)


def execute(
    program: Program, grid: tuple[int, int, int], threads: int, shared: int, memory: Memory, values: list[Any],
    *, backwards: bool = False,
) -> None:  # fmt: skip
    """Run the blocks of a launch, one after the other.

    values     of the parameters, in order
    backwards  the last block first
    """
    given: Registers = {f"%nctaid.{a}": np.uint32(n) for a, n in zip("xyz", grid, strict=True)}
    given["%ntid.x"] = np.uint32(threads)
    for (name, kind), value in zip(program.parameters, values, strict=True):
        typed = np.array([value], TYPES[kind]) if kind[0] == "f" else np.array([value & (1 << 64) - 1], np.uint64)
        given[name] = typed.astype(TYPES[kind]).view(UNSIGNED[bits(TYPES[kind])])[0]
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    with np.errstate(all="ignore"):
        for place in reversed(places) if backwards else places:
            here = {f"%ctaid.{a}": np.uint32(i) for a, i in zip("xyz", place, strict=True)}
            Block(program, threads, memory, shared, given | here).run()
