"""The compiled kernels for several GPUs, which need not be present: triton cross-compiles.

For every structure that a plan can have, on sm_80, sm_90, sm_100 and gfx942: float32 and 16-bit tensors move by 128
bits, each live tensor is loaded and stored once, nothing spills, no register lands in local memory. The counts come
from the plan: slots + outputs at 4 bytes, raws + copies at the model's size, and 16 bytes an access.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fewstep as fs
from fewstep.kernels import triton_noise, triton_reduce, triton_step, triton_train
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.tables import stage_tables

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


def width(target: str, warps: int = triton_noise.WARPS) -> int:
    """Elements of a program: what the kernels launch on the target."""
    return triton_noise.elements(warps, TARGETS[target].warp_size)


class Variant(NamedTuple):
    structure: triton_step.Structure
    raws: int
    copies: int
    model: str


def plan_variant(solver: str, model: str, guidance: float | None = None, clip: float | None = None,
                 **options: Any) -> Variant:  # fmt: skip
    """The structure that the run layer gives a real plan."""
    process = fs.VP.linear()
    denoiser = fs.Denoiser(lambda x, t: x, process, "v", guidance=guidance, clip=clip)
    tables = stage_tables(compile_plan(fs.plan(solver, fs.grid(process, 8), **options), in_place=True), denoiser,
                          "float32")  # fmt: skip
    structure = triton_step.Structure(
        slots=max(len(t.slots) for t in tables),
        outputs=max(len(t.writes) for t in tables),
        predict=clip is not None,
        clip=clip is not None,
        noise=any(t.draw is not None for t in tables),
    )
    branches = len(tables[0].branches)
    return Variant(structure, branches, branches, model)


VARIANTS = {
    "DPM-Solver++ 2M": plan_variant("dpmpp_2m", "fp32"),
    "DPM-Solver++ 2M, guided, fp16": plan_variant("dpmpp_2m", "fp16", 2.0),
    "DPM-Solver++ 2M, guided, clipped, bf16": plan_variant("dpmpp_2m", "bf16", 2.0, 1.0),
    "UniPC 2": plan_variant("unipc", "fp32"),
    "UniPC 3, guided, bf16": plan_variant("unipc", "bf16", 2.0, order=3),
    "EDM churn": plan_variant("edm", "fp32", s_churn=40.0),
    "EDM churn, guided, fp16": plan_variant("edm", "fp16", 2.0, s_churn=40.0),
    "the widest": Variant(triton_step.Structure(8, 5, True, True, False), 3, 3, "bf16"),
}


SIXTEENS = frozenset({"n", "size", "copy", "span"})  # arguments that 16 divides


def compiled(
    kernel: Any, signature: dict[str, Any], target: str, warps: int | None = None, *, fusion: bool = True,
    even: frozenset[str] = SIXTEENS,
) -> Any:  # fmt: skip
    """A kernel with pointers and sizes divisible by 16, as torch's allocator and real images make them."""
    kinds = {a: v if isinstance(v, str) else "constexpr" for a, v in signature.items()}
    constants = {a: v for a, v in signature.items() if not isinstance(v, str)}
    aligned = [i for i, a in enumerate(kernel.arg_names) if kinds[a][0] == "*" or a in even - constants.keys()]
    source = ASTSource(kernel, kinds, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    warps = warps or triton_noise.WARPS
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "enable_fp_fusion": fusion})


def ordered(kernel: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the order of the kernel's."""
    assert given.keys() >= set(kernel.arg_names)
    return {name: given[name] for name in kernel.arg_names}


@cache
def run_kernel(v: Variant, target: str, *, fusion: bool = True, even: int = 1) -> Any:
    """The kernel of a run, for sizes that 16 divides, or else for those that `even` does."""
    s = v.structure
    raws = {f"r{j}": f"*{v.model}" if j <= v.raws else None for j in (1, 2, 3)}
    given = {
        "state": "*fp32", "numbers": "*fp32", "indices": "*i32", "counter": None,
        "clock": "*fp32", "stage": "i32", "moved": None, "arrivals": None,
        "streams": "*i64" if s.noise else None, **raws, "z": None, "own_p": None, "own_limit": None,
        "x_in": f"*{v.model}", "t": "*fp32", "n": "i32", "size": "i32", "samples": "i32", "counter_step": "i32",
        "rows": 1, "last": "i32", "SLOTS": s.slots, "OUTPUTS": s.outputs, "COPIES": v.copies, "PREDICT": s.predict,
        "CLIP": s.clip, "SHARED": True, "PACK": 1, "EVEN": even, "BLOCK": width(target),
    }  # fmt: skip
    sizes = SIXTEENS if even == 1 else frozenset()
    return compiled(triton_step.run_kernel, ordered(triton_step.run_kernel, given), target, fusion=fusion, even=sizes)


def traffic(v: Variant, per_thread: int = 8) -> tuple[int, int]:
    """128-bit loads and stores of a thread that handles 8 elements."""
    s = v.structure
    state, model = 4 * per_thread // 16, SIZES[v.model] * per_thread // 16
    return s.slots * state + v.raws * model, s.outputs * state + v.copies * model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_live_tensor_moves_once_by_128_bits(name: str, target: str) -> None:
    v = VARIANTS[name]
    block, warps = width(target), triton_noise.WARPS
    assert block // (warps * TARGETS[target].warp_size) == 8  # elements a thread, as `traffic` has it
    found = run_kernel(v, target)
    if target == "gfx942":
        asm = found.asm["amdgcn"]
        # Tensors move by buffer instructions, the tables' numbers by global ones.
        loads, stores = (len(re.findall(rf"\bbuffer_{kind}_dwordx4\b", asm)) for kind in ("load", "store"))
        spills = [int(n) for n in re.findall(r"gpr_spill_count:\s*(\d+)", asm)]
        assert spills
        assert not any(spills)
        assert not re.search(r"\bscratch_(load|store)", asm)
        # No store of a tensor is narrower; each copy of the model's time is one store.
        assert len(re.findall(r"\b(?:buffer|global|flat)_store", asm)) == stores + v.copies
        assert len(re.findall(r"\bbuffer_load", asm)) == loads
    else:
        asm = found.asm["ptx"]
        loads, stores = (len(re.findall(rf"\b{kind}\.global\S*\.v4\.b32", asm)) for kind in ("ld", "st"))
        assert not re.search(r"\b(ld|st)\.local", asm)
        # No store of a tensor is narrower; each copy of the model's time is one store.
        assert len(re.findall(r"\bst\.global", asm)) == stores + v.copies
        assert no_contraction(asm)  # the CPU's roundings
        if v.model == "bf16":
            assert "cvt.rn.bf16" in asm  # to nearest even, where Triton's interpreter truncates
    assert (loads, stores) == traffic(v)


def no_contraction(ptx: str) -> bool:
    """Whether every fused multiply-add rounds as two operations would.

    It adds 0 and so is a product (see `triton_noise.times`), or its product with a power of two is exact.
    """
    # Two at once, on sm_100, add a register; `test_every_compiler_gives_the_same_bits` sees those.
    found = re.findall(r"\bfma\.rn\.f32 (.*);", ptx)
    return all(
        line.endswith(", 0f00000000") or any(int(c, 16) & 0x7FFFFF == 0 for c in re.findall(r"0f(\w{8}),", line))
        for line in found
    )


def dumped(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL ... of the one kernel in a cubin."""
    return {n: int(value) for n, value in re.findall(r"\b([A-Z]+):(\d+)", dumped(cubin, "--dump-resource-usage"))}


def instructions(found: Any) -> list[str]:
    if "amdgcn" in found.asm:
        return re.findall(r"^\t([a-z]+_.*)$", found.asm["amdgcn"], re.MULTILINE)
    return re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(.*?);", dumped(found.asm["cubin"], "--dump-sass"), re.MULTILINE)


# Instructions per element of a stage on sm_90, sm_100 and gfx942, about 5 % above the counts of Triton 3.6 and
# 3.8. In the time that an H200 takes for a stage of 24 bytes per element it issues 160: 132 SMs issue 4 x 32 of them a
# cycle at 1.7 GHz, beside 4.3 TB/s.
BUDGETS = {
    "DPM-Solver++ 2M": (42, 42, 45),
    "DPM-Solver++ 2M, guided, fp16": (58, 56, 60),
    "DPM-Solver++ 2M, guided, clipped, bf16": (77, 74, 79),
    "UniPC 2": (71, 69, 72),
    "UniPC 3, guided, bf16": (98, 94, 101),
    "EDM churn": (108, 105, 109),
    "EDM churn, guided, fp16": (126, 118, 120),
    "the widest": (218, 214, 202),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_instructions_per_element(name: str) -> None:
    targets = ("sm_90", "sm_100", "gfx942")
    found = [len(instructions(run_kernel(VARIANTS[name], target))) / 8 for target in targets]
    assert all(10 < count <= budget for count, budget in zip(found, BUDGETS[name], strict=True)), found


@pytest.mark.parametrize("even", [4, 8])
@pytest.mark.parametrize("name", ["DPM-Solver++ 2M, guided, fp16", "EDM churn"])
def test_sizes_that_16_does_not_divide(name: str, even: int) -> None:
    """They move float32 by 128 bits and keep the budget where 4 divides them, and 16-bit tensors where 8 does."""
    v = VARIANTS[name]
    found = run_kernel(v, "sm_90", even=even)
    assert len(instructions(found)) / 8 <= BUDGETS[name][0] + 2 * (SIZES[v.model] == 2 and even == 4)
    ptx = found.asm["ptx"]
    loads, stores = (len(re.findall(rf"\b{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st"))
    narrow = SIZES[v.model] * even < 16
    assert (loads, stores) == traffic(v._replace(raws=0, copies=0) if narrow else v)
    pairs = [len(re.findall(rf"\b{kind}\.global\S*\.v2\.b32", ptx)) for kind in ("ld", "st")]
    assert pairs == ([2 * v.raws, 2 * v.copies] if narrow else [0, 0])  # 64 bits
    assert len(re.findall(r"\bst\.global", ptx)) == stores + pairs[1] + v.copies


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
@pytest.mark.parametrize("name", VARIANTS)
def test_registers_hold_it_all(name: str, target: str) -> None:
    """8 registers a live input (8 elements a thread), a few for each row's numbers, the rest for addresses."""
    v = VARIANTS[name]
    found = resources(run_kernel(v, target).asm["cubin"])
    assert found["LOCAL"] == 0
    assert found["STACK"] == 0
    inputs = v.structure.slots + v.raws + v.structure.noise
    assert 0 < found["REG"] <= 8 * inputs + 4 * v.structure.outputs + 52


NOISE = {"out": "*fp32", "streams": "*i64", "scale": None, "draw": "i32", "n": "i32", "domain": 0, "BLOCK": 1024}


def noise_kernel(target: str, *, fusion: bool = True) -> Any:
    block = width(target)
    return compiled(triton_noise.normals_kernel, NOISE | {"BLOCK": block}, target, fusion=fusion)


@pytest.mark.parametrize("target", TARGETS)
def test_the_noise_kernel_rounds_as_the_cpu_does(target: str) -> None:
    found = noise_kernel(target)
    if target == "gfx942":
        assert re.search(r"\bv_(sqrt|rsq)_f32", found.asm["amdgcn"])  # refined by either, after the compiler's age
        return
    ptx = found.asm["ptx"]
    assert "sqrt.rn.f32" in ptx
    assert no_contraction(ptx)
    assert not re.search(r"sqrt\.approx|\.ftz", ptx)
    assert len(re.findall(r"\bst\.global\S*\.v4\.b32", ptx)) == 2
    assert resources(found.asm["cubin"])["LOCAL"] == 0


TABLES = {"numbers": "*fp32", "stage": "i32", "counter": "*i32"}
STEPS = {"counter_step": "i32", "rows": 1, "row_step": "i32"}
RAWS = {"r1": "*bf16", "r2": "*bf16", "r3": None}
PARTIAL = {"partial": "*fp64", "arrivals": "*i32"}
SPLIT = TABLES | RAWS | STEPS | {
    "indices": "*i32", "state": "*fp32", "size": "i32", "out": "*fp32", "settings": "*fp64", "digits": "*i32",
    "arrivals": "*i32", "n": "i32", "span": "i32", "shift": "i32", "INDICES": triton_step.INDICES, "BLENDED": True,
    "LAST": False,
}  # fmt: skip
REDUCTIONS = {
    "blend of a guidance": (triton_reduce.blend_kernel, RAWS | {"out": "*fp32"} | PARTIAL | STEPS | {
        "blends": "*fp32", "indices": "*i32", "stage": "i32", "counter": "*i32", "state": "*fp32", "size": "i32",
        "n": "i32", "span": "i32", "INDICES": triton_step.INDICES, "LANES": 32}, 2 * 2),
    "dynamic threshold": (triton_reduce.threshold_kernel, TABLES | RAWS | STEPS | {
        "indices": "*i32", "state": "*fp32", "size": "i32", "out": "*fp32", "settings": "*fp64", "n": "i32",
        "INDICES": triton_step.INDICES, "BLENDED": True}, 5 * 4),
    "dynamic threshold, split": (triton_reduce.digit_kernel, SPLIT, 4),
    "dynamic threshold, split, last pass": (triton_reduce.digit_kernel, SPLIT | {"LAST": True}, 4),
    "error norm": (triton_reduce.error_kernel, {
        "error": "*fp32", "low": "*fp32", "before": "*fp32", "out": "*fp64", "n": "i32", "span": "i32", "rtol": "*fp64",
        "atol": "*fp64", "LANES": 32} | PARTIAL, 3 * 2),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_read_by_128_bits_and_spill_nothing(name: str, target: str) -> None:
    """The last number of a row: 128-bit loads of a thread's 8 elements, over all passes."""
    kernel, signature, loads = REDUCTIONS[name]
    block = width(target, triton_reduce.WARPS)
    found = compiled(kernel, ordered(kernel, signature | {"BLOCK": block}), target, warps=triton_reduce.WARPS)
    if target == "gfx942":
        spills = [int(n) for n in re.findall(r"gpr_spill_count:\s*(\d+)", found.asm["amdgcn"])]
        assert spills
        assert not any(spills)
        return
    ptx = found.asm["ptx"]
    assert len(re.findall(r"\bld\.global\S*\.v4\.b32", ptx)) == loads
    assert not re.search(r"\b(ld|st)\.local", ptx)
    usage = resources(found.asm["cubin"])
    assert usage["LOCAL"] == usage["STACK"] == 0


def test_counts_are_complete_before_a_program_arrives() -> None:
    """A barrier of gfx942 waits for no write to memory: each wave waits for its own before it."""
    kernel, signature, _ = REDUCTIONS["dynamic threshold, split"]
    block = width("gfx942", triton_reduce.WARPS)
    found = compiled(kernel, ordered(kernel, signature | {"BLOCK": block}), "gfx942", warps=triton_reduce.WARPS)
    added = re.search(r"\n\t(?:buffer|global)_atomic_add\b.*?\n\ts_barrier\b", found.asm["amdgcn"], re.DOTALL)
    assert added
    assert re.search(r"s_waitcnt.*\bvmcnt\(0\)", added[0])


TRAINING = {
    "pseudo-Huber, elementwise": (triton_train.huber_kernel, {
        "x": "*bf16", "y": "*bf16", "loss": "*fp32", "grad": "*bf16", "c": "fp32", "n": "i32", "PER_SAMPLE": False},
        2, 1),
    "pseudo-Huber, of the norm": (triton_train.huber_kernel, {
        "x": "*bf16", "y": "*bf16", "loss": "*fp32", "grad": "*bf16", "c": "fp32", "n": "i32", "PER_SAMPLE": True},
        4, 1),
    "distribution matching of bf16 samples": (triton_train.difference_kernel, {
        "x": "*bf16", "real": "*fp32", "own": "*fp32", "loss": "*fp32", "gradient": "*fp32", "floor": "fp32",
        "n": "i32"}, 1 + 2 * 3, 2),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TRAINING)
def test_training_kernels_move_by_128_bits_and_spill_nothing(name: str, target: str) -> None:
    """The last numbers of a row: 128-bit loads and stores of a thread's 8 elements, over all passes."""
    kernel, signature, loads, stores = TRAINING[name]
    block = width(target, triton_train.WARPS)
    found = compiled(kernel, ordered(kernel, signature | {"BLOCK": block}), target, warps=triton_train.WARPS)
    if target == "gfx942":
        spills = [int(n) for n in re.findall(r"gpr_spill_count:\s*(\d+)", found.asm["amdgcn"])]
        assert spills
        assert not any(spills)
        return
    ptx = found.asm["ptx"]
    for kind, count in (("ld", loads), ("st", stores)):
        assert len(re.findall(rf"\b{kind}\.global\S*\.v4\.b32", ptx)) == count
    usage = resources(found.asm["cubin"])
    assert usage["LOCAL"] == usage["STACK"] == 0


def stage_kernel(target: str, *, fusion: bool = True) -> Any:
    given = dict.fromkeys(triton_step.stage_kernel.arg_names)
    given |= dict.fromkeys(["s0", "s1", "s2", "o0", "o1", "o2", "w", "p", "limit", "c_in", "z"], "*fp32")
    given |= dict.fromkeys(["r1", "r2", "x_in"], "*bf16")
    given |= dict.fromkeys(["n", "copy", "w_step", "p_step", "limit_step", "c_step"], "i32")
    given |= {"COPIES": 2, "BLOCK": width(target)}
    return compiled(triton_step.stage_kernel, given, target, fusion=fusion)


@pytest.mark.parametrize("target", TARGETS)
def test_the_operators_kernel(target: str) -> None:
    found = stage_kernel(target)
    if target != "gfx942":
        ptx = found.asm["ptx"]
        assert len(re.findall(r"\bld\.global\S*\.v4\.b32", ptx)) == (3 + 1) * 2 + 2
        assert len(re.findall(r"\bst\.global\S*\.v4\.b32", ptx)) == 3 * 2 + 2
        assert no_contraction(ptx)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_compiler_gives_the_same_bits(target: str) -> None:
    """The machine code is the same whether or not the compiler may contract to fused multiply-adds.

    Inductor ignores the caller's setting when it compiles a kernel into its own code.
    """
    for name in ("UniPC 3, guided, bf16", "EDM churn, guided, fp16", "the widest"):
        with_fusion, without = (run_kernel(VARIANTS[name], target, fusion=fusion) for fusion in (True, False))
        assert len(instructions(without)) > 100
        assert instructions(with_fusion) == instructions(without), name
    for kernel in (stage_kernel, noise_kernel):
        with_fusion, without = (instructions(kernel(target, fusion=fusion)) for fusion in (True, False))
        assert len(without) > 100
        assert with_fusion == without, kernel


RUN = {
    "state": "*fp32", "numbers": "*fp32", "indices": "*i32", "clock": "*fp32", "stage": "i32", "counter": "*i32",
    "moved": "*i32", "arrivals": "*i32", "streams": "*i64", "r1": "*fp16", "r2": None, "r3": None, "z": None,
    "own_p": None, "own_limit": None, "x_in": "*fp16", "t": "*fp32", "n": "i32", "size": "i32", "samples": "i32",
    "counter_step": "i32", "rows": 1, "last": "i32", "SLOTS": 2, "OUTPUTS": 2, "COPIES": 1, "PREDICT": False,
    "CLIP": False, "SHARED": True, "PACK": 1, "EVEN": 1, "BLOCK": 1024,
}  # fmt: skip
BATCH_OF_PLANS = {"counter_step": 1, "rows": "i32", "SHARED": False}
STAGE = dict.fromkeys(triton_step.stage_kernel.arg_names) | {
    "s0": "*fp32", "r1": "*fp16", "w": "*fp32", "c_in": "*fp32", "o0": "*fp32", "x_in": "*fp16", "n": "i32",
    "copy": "i32", "w_step": "i32", "p_step": "i32", "limit_step": "i32", "c_step": "i32", "COPIES": 1, "BLOCK": 1024,
}  # fmt: skip
CORNERS = {
    **{f"draw {draw} as a constant": (triton_noise.normals_kernel, NOISE, {"draw": draw}) for draw in (0, 1, 2, 16)},
    "a draw beyond 2^31": (triton_noise.normals_kernel, NOISE, {"draw": "i64"}),
    "a latent": (triton_noise.normals_kernel, NOISE, {"scale": "*fp32"}),
    "one element": (triton_step.run_kernel, RUN, {"n": 1, "size": 1, "samples": 1}),
    "the init row": (triton_step.run_kernel, RUN, {
        "r1": None, "counter": None, "arrivals": None, "SLOTS": 1, "OUTPUTS": 1}),
    "a batch of plans": (triton_step.run_kernel, RUN, BATCH_OF_PLANS),
    "a batch of plans, one of which starts": (
        triton_step.run_kernel, RUN, BATCH_OF_PLANS | {"moved": None, "arrivals": None}),
    "whole times": (triton_step.run_kernel, RUN, {"clock": "*i64", "t": "*i64", "COPIES": 2}),
    "whole times of a batch of plans": (triton_step.run_kernel, RUN, BATCH_OF_PLANS | {"clock": "*i64", "t": "*i64"}),
    "noise alone": (triton_step.run_kernel, RUN, BATCH_OF_PLANS | {
        "r1": None, "SLOTS": 0, "OUTPUTS": 1, "COPIES": 0, "x_in": "*fp32", "clock": None, "t": None, "moved": None,
        "arrivals": None}),
    "outside noise": (triton_step.run_kernel, RUN, {"z": "*fp32", "streams": None}),
    "points of two numbers": (triton_step.run_kernel, RUN, {"n": "i32", "PACK": 256}),
    "points of two numbers and whole times": (
        triton_step.run_kernel, RUN, {"PACK": 256, "counter": None, "clock": "*i64", "t": "*i64", "arrivals": None}),
    "more than 2^31 elements": (triton_step.run_kernel, RUN, {"n": "i64", "size": "i64"}),
    "more than 2^31 elements, in fours": (triton_step.run_kernel, RUN, {"n": "i64", "size": "i64", "EVEN": 4}),
    "rescaled and thresholded": (triton_step.run_kernel, RUN, {
        "PREDICT": True, "CLIP": True, "own_p": "*fp32", "own_limit": "*fp32"}),
    "own p, a static clip": (
        triton_step.run_kernel, RUN, {"PREDICT": True, "CLIP": True, "own_p": "*fp32"}),
    "a stage of one element": (triton_step.stage_kernel, STAGE, {"n": 1, "copy": 1, "c_step": 1}),
    "a stage with no model input": (triton_step.stage_kernel, STAGE, {"x_in": None, "COPIES": 0}),
    "a stage of noise alone": (triton_step.stage_kernel, STAGE, {"s0": None, "r1": None, "z": "*fp32"}),
    "a stage of more than 2^31 elements": (triton_step.stage_kernel, STAGE, {"n": "i64", "copy": "i64"}),
    "threshold of one raw": (triton_reduce.threshold_kernel, REDUCTIONS["dynamic threshold"][1], {
        "r2": None, "BLENDED": False, "n": 1, "BLOCK": 2048}),
    "threshold of more than 2^31 elements": (triton_reduce.digit_kernel, SPLIT, {
        "state": None, "size": "i64", "counter_step": 1, "rows": "i32", "row_step": 1, "BLOCK": 2048}),
    "blend of three raws": (triton_reduce.blend_kernel, REDUCTIONS["blend of a guidance"][1], {
        "r3": "*bf16", "state": None, "n": 1, "BLOCK": 2048}),
    "blend with a running average": (triton_reduce.blend_kernel, REDUCTIONS["blend of a guidance"][1], {
        "r3": "*fp32", "rows": "i32", "row_step": 1, "BLOCK": 2048}),
    "a loss of one element": (triton_train.huber_kernel, TRAINING["pseudo-Huber, of the norm"][1], {
        "n": 1, "BLOCK": 1024}),
    "a score difference of one element": (
        triton_train.difference_kernel, TRAINING["distribution matching of bf16 samples"][1], {"n": 1, "BLOCK": 1024}),
    "a loss whose number Inductor hands on": (triton_train.huber_kernel, TRAINING["pseudo-Huber, of the norm"][1], {
        "c": "fp64", "BLOCK": 1024}),
    "a score difference whose number Inductor hands on": (
        triton_train.difference_kernel, TRAINING["distribution matching of bf16 samples"][1], {
            "floor": "fp64", "BLOCK": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("name", CORNERS)
def test_corners_compile(name: str) -> None:
    """Cases that the interpreter does not type-check: integers of 1 as constants, absent pointers, wide integers."""
    kernel, signature, values = CORNERS[name]
    found = compiled(kernel, ordered(kernel, signature | values), "sm_90")
    assert not re.search(r"\b(ld|st)\.local", found.asm["ptx"])
    if kernel in (triton_train.huber_kernel, triton_train.difference_kernel):
        assert not re.search(r"\b(add|mul|fma|div|sqrt)\S*\.f64", found.asm["ptx"])  # an element's are float32
