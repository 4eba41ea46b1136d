"""The Triton kernels' PTX for sm_90, executed in NumPy: see `ptx_machine.py`.

`make test-ptx` runs every case of the files below, CI the first and the last of each test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ptx_machine import FaultError, Memory, execute, parse

TESTS = Path(__file__).parent
# The files that go through every kernel and structure; the others test the loops around the same kernels.
FILES = ("noise", "step", "run", "reduce", "train")


@pytest.mark.slow
def test_the_interpreted_tests_hold_of_the_ptx() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "ptx_executed", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", *(f"tests/interpreted/{name}.py" for name in FILES)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def ran(body: str, source: np.ndarray, result: np.ndarray, blocks: int = 1) -> np.ndarray:
    """`result` after a launch of 64 threads: %rd1 is the address of the thread's word in `source`, %rd2 in `result`,
    and %r1 the thread.
    """
    program = parse(f"""
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd1, %r1, 4, %rd1;
	mad.wide.u32 	%rd2, %r1, 4, %rd2;
	shl.b32 	%r2, %r1, 2;
{body}
	ret;
}}
""")
    arrays = [source, result]
    memory = Memory([(a.ctypes.data, a.nbytes) for a in arrays])
    execute(program, (blocks, 1, 1), 64, 256, memory, [a.ctypes.data for a in arrays])
    return result


LOAD, STORE = "\tld.global.b32 { %r3 }, [ %rd1 + 0 ];\n", "\n\tst.global.b32 [ %rd2 + 0 ], { %r3 };"


def words(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32).copy()


def test_threads_that_part_and_meet_again() -> None:
    """Each thread doubles its number until it exceeds 100: loops of different lengths, and a barrier after them."""
    body = (
        LOAD
        + """
$L__LOOP:
	setp.gt.u32 	%p1, %r3, 100;
	@%p1 bra 	$L__OUT;
	add.s32 	%r3, %r3, %r3;
	bra.uni 	$L__LOOP;
$L__OUT:
	bar.sync 	0;
	shfl.sync.bfly.b32 	%r3, %r3, 1, 31, -1;"""
        + STORE
    )
    x = np.arange(1, 65, dtype=np.uint32)
    want = x.copy()
    while (want <= 100).any():
        want = np.where(want <= 100, 2 * want, want)
    np.testing.assert_array_equal(ran(body, x, np.zeros(64, np.uint32)), want.reshape(-1, 2)[:, ::-1].reshape(-1))


def test_a_fused_multiply_add_rounds_once() -> None:
    """Against integers: x = m 2^-12 with 24-bit m, so that x y + z is a whole number of 2^-24."""
    rng = np.random.default_rng(0)
    m = rng.integers(2**23, 2**24, 64)
    x = (m / 4096.0).astype(np.float32)
    y, z = 0x4B7FFFFD, 0x3A800001  # 16777213, and slightly more than 2^-10
    body = LOAD + f"\tfma.rn.f32 \t%r3, %r3, 0f{y:08X}, 0f{z:08X};" + STORE
    found = ran(body, words(x), np.zeros(64, np.uint32)).view(np.float32)
    term = int(np.array([z], np.uint32).view(np.float32)[0].astype(np.float64) * 2.0**34)
    assert term == 2**24 + 2
    for i in range(64):
        exact = int(m[i]) * 16777213 * 2**22 + term  # in 2^-34
        cut = exact.bit_length() - 24
        near, left = exact >> cut, exact & (1 << cut) - 1
        near += left > 1 << cut - 1 or (left == 1 << cut - 1 and near & 1)
        assert found[i] == np.float32(near * 2.0 ** (cut - 34))


def test_a_fused_multiply_add_that_two_roundings_get_wrong() -> None:
    """2^-24 - 2^-70 added to 1 + 2^-23: below the middle of two float32 numbers, which is what float64 makes of it."""
    body = LOAD + "\tfma.rn.f32 \t%r3, %r3, 0f337FFFFE, 0f3F800001;" + STORE  # 2^-24 (1 - 2^-23) x + (1 + 2^-23)
    x = np.full(64, 1.0 + 2.0**-23, np.float32)
    assert (ran(body, words(x), np.zeros(64, np.uint32)) == 0x3F800001).all()


@pytest.mark.parametrize(
    ("value", "half"),
    [(1.0, 0x3F80), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (1.0039063692092896, 0x3F81), (-0.0, 0x8000)],
)
def test_bfloat16_is_rounded_to_nearest_even(value: float, half: int) -> None:
    body = LOAD + "\tcvt.rn.bf16x2.f32 \t%r3, 0f00000000, %r3;" + STORE
    found = ran(body, words(np.full(64, value, np.float32)), np.zeros(64, np.uint32))
    assert (found == half).all()


SHARED = "\tld.global.b32 { %r3 }, [ %rd1 + 0 ];\n\tst.shared::cta.b32 [ %r2 + 0 ], %r3;\n"
NEIGHBOUR = "\txor.b32 \t%r4, %r2, 128;\n\tld.shared.b32 \t%r3, [%r4];"


def test_an_exchange_through_shared_memory() -> None:
    x = np.arange(64, dtype=np.uint32)
    found = ran(SHARED + "\tbar.sync \t0;\n" + NEIGHBOUR + STORE, x, np.zeros(64, np.uint32))
    np.testing.assert_array_equal(found, x ^ 32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (SHARED + NEIGHBOUR + STORE, "another thread has written since the last barrier"),
        (SHARED + "\tbar.sync \t0;\n" + NEIGHBOUR + "\n\tst.shared::cta.b32 [ %r2 + 0 ], %r3;",
         "another thread has read since the last barrier"),
        (NEIGHBOUR, "no thread has written"),
        (SHARED.replace("[ %r2", "[ %r1"), "that 4 does not divide"),
        ("\tshr.u32 \t%r2, %r2, 1;\n\tand.b32 \t%r2, %r2, -4;\n" + SHARED, "different values"),
        ("\tld.shared.b32 \t%r3, [%r2+4];", "of 256 bytes of shared memory"),
        ("\tld.global.b32 { %r3 }, [ %rd1 + 4 ];", "outside of the arguments' memory"),
        ("\tld.global.v2.b32 { %r3, %r4 }, [ %rd1 + 0 ];", "that 8 does not divide"),
        (LOAD + "\tst.global.b32 [ %rd2 + 4 ], { %r3 };", "outside of the arguments' memory"),
        ("\tsetp.lt.u32 \t%p1, %r1, 40;\n\t@%p1 shfl.sync.bfly.b32 \t%r3, %r1, 1, 31, -1;", "whole warps"),
        ("\tsetp.lt.u32 \t%p1, %r1, 40;\n\t@%p1 bra \t$L__END;\n\tbar.sync \t0;\n$L__END:", "have returned"),
    ],
    ids=["read too early", "written too early", "never written", "misaligned shared", "two values", "beyond shared",
         "beyond a load", "misaligned load", "beyond a store", "half a warp", "a barrier that waits"],
)  # fmt: skip
def test_faults(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        ran(body, np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32))


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"ex2\.approx\.f32"):
        ran("\tex2.approx.f32 \t%r3, %r1;", np.zeros(64, np.uint32), np.zeros(64, np.uint32))
