"""A pytest plugin, `-p emulated`: Triton kernels compiled for gfx942, executed in tinygrad's emulator of AMD's GPUs.

So the files of `interpreted/` test the machine code: the compiler, the exchange through shared memory, the roundings.
The emulator is part of tinygrad's repository (`test/mockgpu/amd`) and of no package; PYTHONPATH names a checkout, and
clang must be found (or CC name it), because the emulator compiles each kind of instruction once.
"""

from __future__ import annotations

import ctypes
import os
import struct
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import triton
from stub_driver import StubDriver
from test.mockgpu.amd import emu  # type: ignore[import-not-found]
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as drivers

from fewstep.kernels import triton_noise
from fewstep.solvers.run import checks

WAVE = 64  # threads of a wave of gfx942
LDS_UNIT = 512  # bytes in which the descriptor counts shared memory
PRELOADED_ENTRY = 256  # bytes of code that load what the hardware has preloaded already

# ELF64: where the header counts segments and sections, and their entries.
SEGMENTS_AT, SECTIONS_AT, COUNTS_AT = 0x20, 0x28, 0x38
SEGMENT, SECTION, SYMBOL = struct.Struct("<IIQQQQQQ"), struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
LOADED, SYMBOLS = 1, 11

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


REGISTERS = 256  # vector registers of a wave, WAVE words each
ROW = 16  # lanes of a row
BROADCASTS = {0x142: 15, 0x143: 31}  # controls of lane swizzles, `row_bcast:15` and `row_bcast:31`

_source_lane = emu._dpp16_ctrl


def _broadcast(lane: Any, control: int, rows: int, banks: int, wave: int) -> Any:
    """`emu._dpp16_ctrl`, which takes a broadcast's lane from the row itself.

    `row_bcast:15` hands the last lane of each row to the next row, `row_bcast:31` lane 31 to all rows after it (AMD's
    instruction set of CDNA 3, DPP). So a sum over more than one row of lanes needs them.
    """
    if control not in BROADCASTS:
        return _source_lane(lane, control, rows, banks, wave)
    integer = emu.dtypes.int
    _, enabled, _ = _source_lane(lane, control, rows, banks, wave)
    lane, last = lane.cast(integer), emu._c(BROADCASTS[control], integer)
    source = (lane & emu._c(-ROW, integer)) - emu._c(1, integer) if BROADCASTS[control] < ROW else last
    return source, enabled, last < lane


def _swizzled(context: Any, instruction: Any, lane: Any, fallback: Any) -> Any:
    """An operand that comes from other lanes: `emu._load_dpp16_src0`, but from the copy that `_decoded` makes.

    The emulator reads and writes lane by lane, so that an instruction with one register as source and target would
    read lanes that it has written.
    """
    source, enabled, valid = emu._dpp16_ctrl(
        lane, instruction.dpp, instruction.row_mask, instruction.bank_mask, context.wave_size
    )
    first = emu._c(0, emu.dtypes.int)
    value = context.raccvgpr_dyn(context.inst_field(type(instruction).vsrc0), (enabled & valid).where(source, first))
    outside = emu.UOp.const(0, fallback.dtype) if emu._iattr(instruction, "bc") else fallback
    return enabled.where(valid.where(value, outside), fallback)


_decode = emu._decode_at


def _decoded(at: int, arch: str) -> Any:
    """`emu._decode_at`, with a copy of the source before an instruction that reads other lanes.

    It goes to the matrix units' registers, which no kernel here uses.
    """
    (program, runtime), instruction = _decode(at, arch)
    if not hasattr(type(instruction), "dpp"):
        return (program, runtime), instruction
    used, offset = list(program.arg.globals), 4 * WAVE * (instruction.vsrc0.offset - REGISTERS)

    def copied(*buffers: ctypes.c_uint64) -> None:
        registers, copy = (buffers[i].value for i in (1, 5))
        ctypes.memmove(copy + offset, registers + offset, 4 * WAVE)
        runtime.fxn(*[buffers[i] for i in used])

    return (SimpleNamespace(arg=SimpleNamespace(globals=range(6))), SimpleNamespace(fxn=copied)), instruction


def _buffer(instruction: Any, context: Any) -> Any:
    """`emu._compile_mubuf`, which takes the instructions of the caches for loads; here memory has no caches."""
    if emu._op_name(instruction).split("_")[1] in ("WBL2", "INV"):
        return emu.UOp.sink(*context.inc_pc())
    return emu._compile_mubuf(instruction, context)


def _field(instruction: Any, name: str, default: int = 0) -> int:
    """A field of an instruction, 0 if it has none. gfx942 has sc0 for glc: whether an atomic returns what was there."""
    value = getattr(instruction, "sc0" if name == "glc" and hasattr(instruction, "sc0") else name, None)
    return default if value is None else int(value)


class Code(NamedTuple):
    """A kernel in memory: what its descriptor of 64 bytes says (LLVM's user guide of AMDGPU)."""

    memory: ctypes.Array[ctypes.c_char]  # holds the code
    entry: int
    shared: int  # bytes
    scratch: int  # bytes of a thread
    arguments: int  # bytes
    settings: int  # COMPUTE_PGM_RSRC2
    preloaded: int  # words of arguments that the hardware puts into registers


def load(elf: bytes, kernel: str) -> Code:
    """Place a code object's segments in memory and read the kernel's descriptor."""
    (segments,), (sections,) = (struct.unpack_from("<Q", elf, at) for at in (SEGMENTS_AT, SECTIONS_AT))
    segment_count, _, section_count = struct.unpack_from("<HHH", elf, COUNTS_AT)
    headers = [SEGMENT.unpack_from(elf, segments + SEGMENT.size * i) for i in range(segment_count)]
    loaded = [(at, address, size, room) for kind, _, at, address, _, size, room, _ in headers if kind == LOADED]
    memory = ctypes.create_string_buffer(max(address + room for _, address, _, room in loaded) + 2 * 4096)
    base = -(-ctypes.addressof(memory) // 4096) * 4096
    for at, address, size, _ in loaded:
        ctypes.memmove(base + address, elf[at : at + size], size)
    tables = [SECTION.unpack_from(elf, sections + SECTION.size * i) for i in range(section_count)]
    symbols = next(table for table in tables if table[1] == SYMBOLS)
    names = tables[symbols[6]][4]
    for i in range(symbols[5] // SYMBOL.size):
        name, _, _, _, value, _ = SYMBOL.unpack_from(elf, symbols[4] + SYMBOL.size * i)
        if elf[names + name :].startswith(f"{kernel}.kd\0".encode()):
            break
    else:
        raise LookupError(f"no descriptor of {kernel} in the code object")
    descriptor = ctypes.string_at(base + value, 64)
    shared, scratch, arguments = struct.unpack_from("<III", descriptor, 0)
    (entry,) = struct.unpack_from("<q", descriptor, 16)
    settings, _, preload = struct.unpack_from("<IHH", descriptor, 52)
    return Code(memory, base + value + entry, shared, scratch, arguments, settings, preload & 127)


def execute(
    code: Code, grid: tuple[int, int, int], threads: int, shared: int, arguments: list[tuple[str, Any]]
) -> None:
    """Run all programs of a launch, one after the other."""
    packed = b""
    for form, value in arguments:
        packed += b"\0" * (-len(packed) % struct.calcsize(form)) + struct.pack(f"<{form}", value)
    packed += b"\0" * (-len(packed) % 8)
    assert len(packed) <= code.arguments
    packed += struct.pack("<IIIHHH", *grid, threads, 1, 1)  # hidden arguments, where a kernel asks for its grid
    memory = ctypes.create_string_buffer(packed, len(packed) + code.arguments)
    words = [*struct.unpack("<II", struct.pack("<Q", ctypes.addressof(memory)))]
    words += struct.unpack_from(f"<{code.preloaded}I", memory)
    settings = code.settings & ~(0x1FF << 15) | -(-max(shared, code.shared) // LDS_UNIT) << 15
    user = settings >> 1 & 31
    entry = code.entry + (PRELOADED_ENTRY if code.preloaded else 0)
    emu.run_asm(entry, 0, *grid, threads, 1, 1, ctypes.addressof(memory), settings, code.scratch, "cdna",
                (words + [0] * user)[:user])  # fmt: skip


class Emulated(StubDriver):
    """A driver for gfx942 whose launches are executed on tensors of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        launched = self.launched

        class Utils:
            def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
                return None, load(kernel, name), 32, 0, 1024

            def get_device_properties(self, device: int) -> dict[str, int]:
                return {"max_shared_mem": 65536, "warpSize": WAVE, "multiprocessor_count": 304}

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name, self.metadata = source.fn.__name__, metadata
                self.kinds = list(source.signature.values())

            def __call__(self, x: int, y: int, z: int, stream: int, code: Code, *rest: Any) -> None:
                launched[self.name] += 1
                values = rest[-len(self.kinds) :]
                arguments = [_argument(kind, v) for kind, v in zip(self.kinds, values, strict=True)]
                given = [a for a in arguments if a is not None] + [("Q", 0), ("Q", 0)]  # no scratch of Triton's
                if min(x, y, z) > 0:
                    execute(code, (x, y, z), WAVE * self.metadata.num_warps, self.metadata.shared, given)

        self.utils, self.launcher_cls = Utils(), Launcher  # type: ignore[assignment]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", WAVE)


def _argument(kind: str, value: Any) -> tuple[str, Any] | None:
    """A struct format and a value, or None for what is compiled in."""
    if kind == "constexpr":
        return None
    if kind.startswith("*"):
        return "Q", 0 if value is None else value.data_ptr()
    return FORMATS[kind], value


def pytest_configure(config: pytest.Config) -> None:
    assert not triton_noise.INTERPRETED
    drivers._active = Emulated()
    # The emulator moves whole words by buffer instructions: `test_triton_emulated.py` has those of real sizes.
    triton.knobs.amd.use_buffer_ops = bool(os.environ.get("BUFFER_OPS"))
    emu._iattr = _field
    emu._INST_HANDLERS[emu.irc.MUBUF] = _buffer
    emu._dpp16_ctrl, emu._load_dpp16_src0, emu._decode_at = _broadcast, _swizzled, _decoded
    checks.why_unavailable = lambda frame: None
