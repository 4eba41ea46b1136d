"""The torch operators and the sampling loop as a module: the same numbers, gradients, and no graph break."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fewstep as fs
from fewstep.bindings.export.sampler_module import SamplerModule
from fewstep.kernels import layout, naive, philox, torch_ops, torch_train

VP = fs.VP.linear()


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.c = torch.nn.Conv2d(1, 4, 3, padding=1, dtype=dtype)
        self.d = torch.nn.Conv2d(4, 1, 3, padding=1, dtype=dtype)

    def forward(self, x, t, shift=None):
        h = self.d(torch.tanh(self.c(x))) * (1 + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)
        return h if shift is None else h + shift.to(x.dtype).reshape(-1, 1, 1, 1)


def streams(seed, batch):
    return torch.from_numpy(philox.streams(seed, batch).astype(np.int64))


@pytest.mark.parametrize(  # every pair of values of two axes is here; all 24 compile four times the kernels
    ("solver", "dtype", "clip", "guidance"),
    [
        ("unipc", torch.float32, None, None),
        ("unipc", torch.bfloat16, 1.0, 2.5),
        ("dpmpp_2m_sde", torch.float32, 1.0, 2.5),
        ("dpmpp_2m_sde", torch.bfloat16, None, None),
        ("edm", torch.float32, 1.0, None),
        ("edm", torch.bfloat16, None, 2.5),
    ],
)
def test_module_gives_the_samplers_bits(solver, dtype, clip, guidance):
    denoiser = fs.Denoiser(Net(dtype), VP, "v", guidance=guidance, clip=clip)
    plan = fs.plan(solver, fs.grid(VP, 5))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = None if guidance is None else ({"shift": torch.zeros(3)}, {"shift": torch.ones(3)})
    with torch.no_grad():
        ours = SamplerModule(denoiser, plan)(x, streams(3, 3), cond)
    assert torch.equal(ours, fs.Sampler(denoiser, plan, x.shape)(x, seed=3, cond=cond))


def test_compiled_without_a_graph_break():
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("dpmpp_2m_sde", fs.grid(VP, 4)))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()  # a function has eight graphs at most, those of other tests included
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, streams(3, 3)), loop(x, streams(3, 3)))


class Nested(torch.nn.Module):
    """Reads its conditions from a mapping and a list inside of a mapping."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor, added: dict) -> torch.Tensor:
        move = shift + added["pooled"] - added["layers"][0]
        return 0.5 * x + move[:, None, None, None]


@pytest.mark.parametrize("batched", [True, False])
def test_guided_with_nested_conditions_it_compiles_without_a_graph_break(batched):
    denoiser = fs.Denoiser(Nested(), VP, "v", guidance=2.5, batched=batched)
    loop = SamplerModule(denoiser, plan := fs.plan("dpmpp_2m", fs.grid(VP, 3)))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def cond(value):
        own = torch.full((3,), value)
        return {"shift": own, "added": {"pooled": 2.0 * own, "layers": [own[:1], "text"]}}

    both = cond(0.1), cond(0.4)
    torch._dynamo.reset()  # a function has eight graphs at most, those of other tests included
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(found := compiled(x, cond=both), loop(x, cond=both))
    assert torch.equal(found, fs.Sampler(denoiser, plan, x.shape)(x, cond=both))


def test_exported_program_runs_without_the_solvers_python():
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("unipc", fs.grid(VP, 4)))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        program = torch.export.export(loop, (x,))
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert called.count("fewstep.stage.default") == 1 + 4  # the first model input, then one a call
        assert torch.equal(program.module()(x), loop(x))


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("solver", ["unipc", "heun"])
def test_gradients_against_finite_differences(solver, clip):
    denoiser = fs.Denoiser(Net(torch.float64), VP, "v", clip=clip)
    loop = SamplerModule(denoiser, fs.plan(solver, fs.grid(VP, 3, "karras")), dtype="float64")
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(loop, (x,))
    again = SamplerModule(denoiser, loop.program.plan, dtype="float64", checkpoint=True)
    parameters = [x, *denoiser.model.parameters()]
    for a, b in zip(
        torch.autograd.grad(loop(x).square().sum(), parameters),
        torch.autograd.grad(again(x).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert a.abs().max() > 0


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("batched", [False, True])
def test_stage_has_the_adjoint_of_its_table(batched, clip):
    """gradcheck of the operator alone, over slots, raws and noise, with gaps in the columns."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    w = draw(2 if batched else 1, 3, layout.COLUMNS)
    p = draw(1, 4) if clip else None
    limit = torch.tensor([[clip, 1.3, 0.0, 0.0]], dtype=torch.float64) if clip else None
    tensors = [draw(2, 3, 2).requires_grad_() for _ in range(5)]

    def run(x, h, raw0, raw1, z):
        return tuple(
            torch_ops.stage([x, h], [0, 2], [raw0, raw1], w, w.new_full((1,), 0.7), 2, torch.float64, p, limit, z)
        )

    assert torch.autograd.gradcheck(run, tensors)
    x, h, raw0, raw1, z = (t.detach() for t in tensors)
    want = naive.step([x, None, h], [raw0, raw1], w.numpy(), z=z, p=None if p is None else p.numpy(),
                      limit=None if limit is None else limit.numpy())  # fmt: skip
    got = run(x, h, raw0, raw1, z)
    for a, b in zip(got, [*want, torch.cat([0.7 * want[0]] * 2)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_operators_pass_opcheck():
    x = torch.randn(3, 1, 4, 4)
    w = torch.randn(1, 2, layout.COLUMNS)
    torch.library.opcheck(
        torch_ops.stage, ([x, x + 1], [0, 1], [x.clone()], w, torch.ones(1), 2, torch.float16, None, None, None)
    )
    torch.library.opcheck(torch_ops.normals, (streams(1, 3), [3, 1, 4, 4], 1, philox.STEP))


@pytest.fixture
def compiler_for_a_gpu(monkeypatch):
    """The queries of torch to the device while it traces for a GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from fewstep.kernels import triton_noise, triton_reduce, triton_step, triton_train

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    # torch 2.15 looks at a kernel with Triton's default options, of which Triton 3.9 warns.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    for module in (triton_noise, triton_reduce, triton_step, triton_train):
        monkeypatch.setattr(module, "guard", lambda tensor: contextlib.nullcontext())


class Update(torch.nn.Module):
    """Two rows with noise, from x and two guided outputs, and the model's next input for both halves."""

    def __init__(self, draw=3):
        super().__init__()
        self.draw = draw

    def forward(self, x, raw, w, c_in, streams):
        z = torch_ops.normals(streams, list(x.shape), self.draw, philox.STEP)
        return tuple(torch_ops.stage([x], [0], [raw, raw + 1], w, c_in, 2, torch.float16, None, None, z))


def fake_update():
    """Arguments of `Update`, on a GPU; to be made in a `FakeTensorMode`."""
    x, raw = torch.empty(2, 3, 40, 40, device="cuda"), torch.empty(2, 3, 40, 40, dtype=torch.float16, device="cuda")
    w, c_in = torch.empty(1, 2, layout.COLUMNS, device="cuda"), torch.empty(1, device="cuda")
    return [x, raw, w, c_in, torch.empty(2, 3, dtype=torch.int64, device="cuda")]


@pytest.mark.usefixtures("compiler_for_a_gpu")
@pytest.mark.parametrize("draw", [0, 1, 16])  # the analysis of what a kernel writes makes a constant of 1
def test_a_compiler_sees_the_kernels_of_a_gpu(draw):
    """The graph that AOTAutograd passes on for CUDA tensors: the kernels, which write only to new memory."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from fewstep.kernels import triton_noise, triton_step

    with FakeTensorMode():
        graph, _ = aot_export_module(Update(draw), fake_update(), trace_joint=False)
    assert not [node for node in graph.graph.nodes if "fewstep" in str(node.target)]
    noise, stage = (node.kwargs for node in graph.graph.nodes if "triton_kernel" in str(node.target))
    elements, warps = triton_step.block()
    drawn = kernel_side_table.get_kernel(noise["kernel_idx"])
    assert drawn.fn is triton_noise.normals_kernel
    assert [(config.kwargs, config.num_warps) for config in drawn.configs] == [({}, triton_noise.WARPS)]
    assert noise["grid"] == [(2 * -(-4800 // 1024), 1, 1)]
    assert noise["tensors_to_clone"] == ["out"]
    assert {k: noise["kwargs"][k] for k in ("draw", "n", "domain")} == {"draw": draw, "n": 4800, "domain": philox.STEP}

    launched = kernel_side_table.get_kernel(stage["kernel_idx"])
    assert launched.fn is triton_step.stage_kernel
    assert [(config.kwargs, config.num_warps) for config in launched.configs] == [({}, warps)]
    assert stage["grid"] == [(-(-9600 // elements), 1, 1)]  # the samples share a table: one of 9600 elements
    assert stage["tensors_to_clone"] == ["o0", "o1", "x_in"]
    given = {**stage["kwargs"], **kernel_side_table.get_constant_args(stage["constant_args_idx"])}
    assert given.pop("enable_fp_fusion") is True  # of those that compile it, torch before 2.15 drops it
    assert given.keys() == set(triton_step.stage_kernel.arg_names)
    tensors = {k: v.meta["val"] for k, v in given.items() if isinstance(v, torch.fx.Node)}
    assert tensors.keys() == {"s0", "r1", "r2", "z", "w", "c_in", "o0", "o1", "x_in"}
    assert (tensors["x_in"].shape, tensors["x_in"].dtype) == ((4, 3, 40, 40), torch.float16)
    numbers = {k: v for k, v in given.items() if isinstance(v, int)}
    steps = dict.fromkeys(["w_step", "p_step", "limit_step", "c_step"], 0)
    assert numbers == {"n": 9600, "copy": 9600, "COPIES": 2, "BLOCK": elements, **steps}


@pytest.mark.usefixtures("compiler_for_a_gpu")
def test_one_trace_serves_every_size():
    """A symbolic batch and image size stay symbolic: nothing reads their values."""
    shapes = ShapeEnv()

    def size(name, hint):
        source = ConstantSource(name)
        return shapes.create_symintnode(shapes.create_symbol(hint, source=source), hint=hint, source=source)

    with FakeTensorMode(shape_env=shapes):
        batch, edge = size("batch", 2), size("edge", 40)
        x = torch.empty(batch, 3, edge, edge, device="cuda")
        w, c_in = torch.empty(batch, 2, layout.COLUMNS, device="cuda"), torch.empty(batch, device="cuda")
        streams = torch.empty(batch, 3, dtype=torch.int64, device="cuda")
        graph, _ = aot_export_module(Update(), [x, x.half(), w, c_in, streams], trace_joint=False)
        losses, _ = aot_export_module(Losses(), [x.half(), x.half()], trace_joint=False)
    assert len([node for made in (graph, losses) for node in made.graph.nodes if "triton_k" in str(node.target)]) == 4
    assert shapes.guards == []


class Losses(torch.nn.Module):
    def forward(self, x, y):
        return (
            torch_train.pseudo_huber(x, y, 0.25, per_sample=False),
            torch_train.score_difference(x, y.float(), y.float() + 1.0, 0.5)[0],
        )


@pytest.mark.usefixtures("compiler_for_a_gpu")
def test_a_compiler_sees_the_losses_of_a_gpu():
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from fewstep.kernels import triton_train

    with FakeTensorMode():
        pair = [torch.empty(3, 5, 7, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        graph, _ = aot_export_module(Losses(), pair, trace_joint=False)
    assert not [node for node in graph.graph.nodes if "fewstep" in str(node.target)]
    huber, difference = (node.kwargs for node in graph.graph.nodes if "triton_kernel" in str(node.target))
    for launch, kernel, writes, numbers in (
        (huber, triton_train.huber_kernel, ["loss", "grad"], {"c": 0.25, "n": 35, "PER_SAMPLE": False}),
        (difference, triton_train.difference_kernel, ["loss", "gradient"], {"floor": 0.5, "n": 35}),
    ):
        launched = kernel_side_table.get_kernel(launch["kernel_idx"])
        assert launched.fn is kernel
        assert [(config.kwargs, config.num_warps) for config in launched.configs] == [({}, triton_train.WARPS)]
        assert launch["grid"] == [(3, 1, 1)]
        assert launch["tensors_to_clone"] == writes
        given = {k: v for k, v in launch["kwargs"].items() if not isinstance(v, torch.fx.Node)}
        assert given == numbers | {"BLOCK": triton_train.BLOCK, "enable_fp_fusion": True}


def test_kernels_belong_to_their_operators():
    """The key by which torch's caches of compiled code distinguish versions of an operator's kernels."""
    pytest.importorskip("triton")
    from torch._library.triton import get_triton_kernels_for_op

    from fewstep.kernels import triton_noise, triton_step, triton_train

    for name, *kernels in (
        ("stage", triton_step.stage_kernel),
        ("normals", triton_noise.normals_kernel),
        ("pseudo_huber", triton_train.huber_kernel),
        ("score_difference", triton_train.difference_kernel),
    ):
        assert get_triton_kernels_for_op(f"fewstep::{name}") == kernels


@pytest.mark.slow
def test_a_gpu_needs_no_numba():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from fewstep.kernels import torch_ops, torch_train\n"
        "from fewstep.bindings import sampler_module\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("batched", [False, True])
def test_the_definition_reads_no_table_on_the_host(batched):
    """The float64 path of a GPU: bit-identical to the oracle, without reading from the device (meta has no values)."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    w, p, c_in = draw(2 if batched else 1, 2, layout.COLUMNS), draw(1, 4), draw(2 if batched else 1)
    w[:, 0, 2] = 0.0
    limit = torch.tensor([[0.8, 1.3, 0.0, 0.0]], dtype=torch.float64)
    x, h, raw, z = (draw(2, 3, 4) for _ in range(4))
    h[0, 0, 0] = float("nan")
    args = ([x, h], [0, 2], [raw], w, c_in, 2, torch.float32, p, limit, z)
    *rows, x_in = torch_ops._by_definition(*args)
    want = naive.step([x, None, h], [raw], w.numpy(), z=z, p=p.numpy(), limit=limit.numpy())
    for a, b in zip(rows, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not rows[0].isnan().any()
    copies = torch.cat([(want[0] * c_in.reshape(-1, 1, 1)).float()] * 2)
    assert torch.equal(x_in, copies)
    nowhere = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
    assert [t.shape for t in torch_ops._by_definition(*nowhere)] == [t.shape for t in (*want, copies)]


def test_normals_are_the_addressed_ones():
    got = torch_ops.normals(streams(9, 2), [2, 5], 4, philox.STEP)
    want = np.stack([philox.normals(5, 9, i, 4, philox.STEP) for i in range(2)])
    np.testing.assert_array_equal(got.numpy(), want)


def test_what_the_module_cannot_do_is_said_at_once():
    plan = fs.plan("ddim", fs.grid(VP, 2))
    with pytest.raises(
        ValueError, match=r"CFGZero or DynamicThreshold, which reduce whole samples: use fewstep\.Sampler"
    ):
        SamplerModule(fs.Denoiser(Net(), VP, "v", clip=fs.DynamicThreshold()), plan)
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("ddpm", fs.grid(VP, 2)))
    with pytest.raises(ValueError, match="ddpm draws noise: pass streams"):
        loop(torch.randn(1, 1, 4, 4))
