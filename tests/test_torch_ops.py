"""The torch operators and the sampling loop as a module: the same numbers, gradients, and no graph break."""

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.bindings.sampler_module import SamplerModule
from fewstep.kernels import layout, naive, philox, torch_ops

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


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2m_sde", "edm"])
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
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, streams(3, 3)), loop(x, streams(3, 3)))


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
    loop = SamplerModule(denoiser, fs.plan(solver, fs.grid(VP, 3)), dtype="float64")
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


def test_normals_are_the_addressed_ones():
    got = torch_ops.normals(streams(9, 2), [2, 5], 4, philox.STEP)
    want = np.stack([philox.normals(5, 9, i, 4, philox.STEP) for i in range(2)])
    np.testing.assert_array_equal(got.numpy(), want)


def test_what_the_module_cannot_do_is_said_at_once():
    plan = fs.plan("ddim", fs.grid(VP, 2))
    with pytest.raises(ValueError, match=r"no guidance rescale and no DynamicThreshold: use fewstep\.Sampler"):
        SamplerModule(fs.Denoiser(Net(), VP, "v", clip=fs.DynamicThreshold()), plan)
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("ddpm", fs.grid(VP, 2)))
    with pytest.raises(ValueError, match="ddpm draws noise: pass streams"):
        loop(torch.randn(1, 1, 4, 4))
