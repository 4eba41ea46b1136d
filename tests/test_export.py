"""Loops exported and compiled ahead of time: plain operators, the same results, without this package at run time."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_torch_ops import Net  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.bindings.export.sampler_module import SamplerModule  # noqa: E402
from fewstep.bindings.export.torch_export import compile_loop, export_loop, plain_stage  # noqa: E402
from fewstep.kernels import layout, philox, torch_ops  # noqa: E402

VP = fs.VP.linear()


def latent(batch=3):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_plain_stage_is_the_operator(clip, per_sample):
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    w = draw(2 if per_sample else 1, 3, layout.COLUMNS)
    w[:, 1, 2] = 0.0
    p = draw(1, 4) if clip else None
    limit = torch.tensor([[clip, 1.3, 0.0, 0.0]], dtype=torch.float64) if clip else None
    tensors = [draw(2, 3, 2) for _ in range(5)]
    args = (tensors[:2], [0, 2], tensors[2:4], w, w.new_full((1,), 0.7), 2, torch.float64, p, limit, tensors[4])
    for got, want in zip(plain_stage(*args), torch_ops.stage(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # A source with coefficient 0 may hold anything.
    tensors[1].fill_(float("nan"))
    assert torch.isfinite(plain_stage(*args)[1]).all()


CASES = [
    ("unipc", {}, None, None),
    ("heun", {}, None, 0.7),
    ("dpmpp_2m", {}, 2.0, None),
    ("lms", {"order": 3}, 2.0, 0.7),
]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, from its own pytree
@pytest.mark.parametrize(("solver", "options", "guidance", "clip"), CASES)
def test_exported_program_has_torchs_operators_alone(solver, options, guidance, clip):
    loop = SamplerModule(
        fs.Denoiser(Net(), VP, "v", guidance=guidance, clip=clip), fs.plan(solver, fs.grid(VP, 4), **options)
    )
    shift = torch.linspace(-0.5, 0.5, 3)
    cond = ({"shift": 0 * shift}, {"shift": shift}) if guidance else {"shift": shift}
    program = export_loop(loop, latent(), cond)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert not any("fewstep" in name for name in called)
    with torch.no_grad():
        got = program.module()(latent(), cond=cond)
        torch.testing.assert_close(got, loop(latent(), cond=cond), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("clip", [None, 0.2])
def test_a_stage_that_reads_the_output_alone(clip):
    """The last step to data under a network of x0: no row and no prediction reads x."""
    loop = SamplerModule(fs.Denoiser(Net(), VP, "sample", clip=clip), fs.plan("ddim", fs.grid(VP, 1)))
    x = latent()
    m = Net()(x, torch.full((3,), loop.tables[0].t)).detach()
    found = export_loop(loop, x).module()(x)
    torch.testing.assert_close(found, m if clip is None else m.clamp(-clip, clip), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    ("solver", "process", "options"),
    [("ddpm", VP, {}), ("dpmpp_sde", VP, {}), ("dpmpp_2m_sde", VP, {}), ("edm", fs.EDM(), {"s_churn": 4.0})],
)
def test_noise_is_an_input_of_the_program(solver, process, options):
    """A stochastic loop takes its draws as one tensor; with those of a seed it equals the sampler of that seed."""
    denoiser = fs.Denoiser(Net(), process, "sample")
    plan = fs.plan(solver, fs.grid(process, 4), **options)
    loop, x = SamplerModule(denoiser, plan), plan.start.sigma * latent()
    streams = torch.as_tensor(philox.streams(7, 3).astype(np.int64))
    noise = loop.noise(streams, x.shape)
    assert noise.shape == (len(loop.draws), *x.shape)
    program = export_loop(loop, x)
    assert not any("fewstep" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    with torch.no_grad():
        want = fs.Sampler(denoiser, plan, (3, 1, 8, 8), backend="numba")(x, seed=7)
        assert torch.equal(loop(x, noise=noise), loop(x, streams))
        got = program.module()(x, noise=noise)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        other = program.module()(x, noise=noise.flip(0))
    assert (other - want).abs().max() > 0.01  # each draw has its place


def test_outputs_that_are_no_prediction_are_refused():
    """A network that also predicts its variance, with and without saying so."""

    def wide(x, t):
        return torch.cat([x, x], 1)

    plan = fs.plan("ddim", fs.grid(VP, 2))
    with pytest.raises(ValueError, match="SamplerModule does not support variance='learned_range'"):
        SamplerModule(fs.Denoiser(wide, VP, "epsilon", variance="learned_range"), plan)
    with pytest.raises(ValueError, match=r"the model returned shape \(3, 2, 8, 8\) for x of shape \(3, 1, 8, 8\)"):
        SamplerModule(fs.Denoiser(wide, VP, "epsilon"), plan)(latent())
    with pytest.raises(ValueError, match="the model returned tuple, not an array of torch"):
        SamplerModule(fs.Denoiser(lambda x, t: (x,), VP, "epsilon"), plan)(latent())
    half = fs.Denoiser(lambda x, t: {"sample": x}, VP, "epsilon", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"\*\*cond\)\['sample'\], and pass device='cpu' and dtype='bfloat16'"):
        SamplerModule(half, plan)(latent())


def test_noise_that_does_not_fit_is_named():
    loop, x = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("ddpm", fs.grid(VP, 3))), latent()
    with pytest.raises(
        ValueError, match=r"noise must have shape \(2, 3, 1, 8, 8\), .* per draw of ddpm; got \(3, 1, 8, 8\)"
    ):
        loop(x, noise=x)
    with pytest.raises(TypeError, match=r"streams must be .*, got dict: the model's conditions go to cond="):
        loop(x, {"label": torch.zeros(3)})
    with pytest.raises(ValueError, match="pass streams or noise, not both"):
        loop(x, torch.zeros(3, 3, dtype=torch.int64), noise=torch.zeros(2, 3, 1, 8, 8))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"plan": "euler"}, TypeError, "plan must come from fewstep.plan"),
        ({"plan": fs.plan("euler", fs.grid(fs.EDM(), 3))}, ValueError, "plan was made on EDM.*trained on VP"),
        ({"denoiser": Net()}, TypeError, "denoiser must be a fewstep.Denoiser, got Net"),
        ({"dtype": "float16"}, ValueError, "dtype is the state's, float32 or float64"),
        ({"checkpoint": 1}, ValueError, "checkpoint must be True or False"),
    ],
)
def test_bad_arguments_of_the_module(change, error, text):
    arguments = {"denoiser": fs.Denoiser(Net(), VP, "v"), "plan": fs.plan("ddim", fs.grid(VP, 2))} | change
    with pytest.raises(error, match=text):
        SamplerModule(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", latent().numpy()),
        ("x", latent().long()),
        ("x", latent().to_sparse()),
        ("x", torch.tensor(1.0)),
        ("streams", torch.zeros(3, 3)),
        ("streams", torch.zeros(2, 3, dtype=torch.int64)),
        ("streams", np.zeros((3, 3), np.int64)),
        ("noise", np.zeros((2, 3, 1, 8, 8))),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_inputs_are_named_before_any_call(name, value):
    def model(x, t):
        raise AssertionError("the model was called")

    loop = SamplerModule(fs.Denoiser(model, VP, "v"), fs.plan("ddpm", fs.grid(VP, 3)))
    with pytest.raises(TypeError, match=f"{name} must be"):
        loop(**{"x": latent(), name: value})


def test_path_is_checked_before_the_work(tmp_path):
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("ddim", fs.grid(VP, 2)))
    with pytest.raises(ValueError, match=r"path .*: the file must end in \.pt2"):
        compile_loop(loop, latent(), tmp_path / "loop.so")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(("solver", "guidance"), [("dpmpp_2m", None), ("dpmpp_2m_sde", 2.0)])
def test_the_batch_is_free_between_the_bounds(solver, guidance):
    """With nested conditions, for each sample or for all of them."""

    class Nested(Net):
        def forward(self, x, t, added):
            return super().forward(x, t, added["shift"]) + added["more"][0]

    def inputs(n):
        g = torch.Generator().manual_seed(n)
        x, shift, noise = (torch.randn(*s, generator=g) for s in ((n, 1, 8, 8), (n,), (len(loop.draws), n, 1, 8, 8)))
        conds = [{"added": {"shift": k * shift, "more": [torch.full((1, 1, 1, 1), 0.1 * k)]}} for k in (0.0, 1.0)]
        return x, {"cond": conds if guidance else conds[1]} | ({"noise": noise} if loop.draws else {})

    loop = SamplerModule(fs.Denoiser(Nested(), VP, "v", guidance=guidance), fs.plan(solver, fs.grid(VP, 2)))
    x, own = inputs(3)
    run = export_loop(loop, x, own["cond"], batch=(1, 8)).module()
    with torch.no_grad():
        for n in (1, 2, 7, 8):
            x, own = inputs(n)
            torch.testing.assert_close(run(x, **own), loop(x, **own), rtol=1e-5, atol=1e-5)
        for bad in (inputs(9)[0], x[:, :, :4], x[:, :, :, :4].contiguous(), x.double()):
            with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|dtype mismatch"):
                run(bad, **inputs(9 if len(bad) == 9 else 8)[1])


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_fixed_batch_is_held_to():
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("ddim", fs.grid(VP, 2)))
    run = export_loop(loop, latent(4)).module()
    for n in (2, 7):
        with pytest.raises(AssertionError, match=r"Guard failed: x.size\(\)\[0\] == 4"):
            run(latent(n))
    with pytest.raises(ValueError, match=r"batch must be ints \(smallest, largest\).*got \(0, 3\)"):
        export_loop(loop, latent(), batch=(0, 3))
    with pytest.raises(ValueError, match=r"batch = \(5, 9\) does not hold the 4 samples"):
        export_loop(loop, latent(4), batch=(5, 9))
    with pytest.raises(ValueError, match="batch= needs an example x of two samples or more"):
        export_loop(loop, latent(1), batch=(1, 8))
    fixed = fs.Denoiser(lambda x, t: x.reshape(len(x), 1, 8, 8), VP, "v")
    with pytest.raises(ValueError, match=r"for a batch of 1 to 8.*the network's code fixes the batch, by len\(x\)"):
        export_loop(SamplerModule(fixed, fs.plan("ddim", fs.grid(VP, 2))), latent(), batch=(1, 8))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler (g++)")
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
@pytest.mark.parametrize("batch", [None, (1, 8)])
def test_a_compiled_loop_checks_its_inputs(batch, tmp_path, monkeypatch):
    """A smaller batch would be read past its end, a larger one cut."""
    monkeypatch.delenv("AOTI_RUNTIME_CHECK_INPUTS", raising=False)
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("dpmpp_2m", fs.grid(VP, 2)))
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    run = torch._inductor.aoti_load_package(
        str(compile_loop(loop, latent(4), tmp_path / "loop.pt2", batch=batch, options=quick))
    )
    with torch.no_grad():
        for n in (1, 2, 4, 7, 8) if batch else (4,):
            torch.testing.assert_close(run(latent(n)), loop(latent(n)), rtol=1e-5, atol=1e-5)
        wide = torch.zeros(4, 1, 8, 16)
        wrong = (latent(9), latent(4).double(), wide, wide[..., ::2], torch.zeros(4, 2, 8, 8), torch.zeros(4, 1, 4, 4))
        for bad in wrong if batch else (latent(1), latent(2), latent(7), *wrong):
            with pytest.raises(RuntimeError, match=r"unmatched|too large"):
                run(bad)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler (g++)")
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
def test_compiled_loop_runs_where_fewstep_cannot_be_imported(tmp_path):
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("dpmpp_2m", fs.grid(VP, 2)))
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = compile_loop(loop, latent(), tmp_path / "loop.pt2", options=quick)
    assert [p.name for p in tmp_path.iterdir()] == ["loop.pt2"]
    torch.save(latent(), tmp_path / "x.pt")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['fewstep', 'numba', 'diffusers']))\n"
        "import torch, torch._inductor\n"
        f"run = torch._inductor.aoti_load_package({str(path)!r})\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        "with torch.no_grad(): print(run(x).flatten().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        want = loop(latent()).flatten().numpy()
    got = np.fromstring(done.stdout.strip().strip("[]"), sep=",")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_batch_that_torch_narrows_is_an_error(tmp_path, monkeypatch):
    """With a compiler that reports a narrower range, as torch's does where an operator looks at the batch."""
    from fewstep.bindings.export import torch_export

    def compiled(program, *, package_path, inductor_configs):
        Path(package_path).write_bytes(b"package")
        return package_path

    loop = SamplerModule(fs.Denoiser(Net(), VP, "v"), fs.plan("ddim", fs.grid(VP, 2)))
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compiled)
    for found, error in (((2.0, 7.0), "2 to 7"), ((4.0, 8.0), "4 to 8"), ((2.0, 8.0), None)):
        monkeypatch.setattr(torch_export, "_checked_inputs", lambda found=found: contextlib.nullcontext([found]))
        if error is None:
            assert compile_loop(loop, latent(4), tmp_path / "loop.pt2", batch=(1, 8)).read_bytes() == b"package"
            continue
        with pytest.raises(ValueError, match=f"torch compiled the loop for a batch of {error} and not for 1 to 8"):
            compile_loop(loop, latent(4), tmp_path / "loop.pt2", batch=(1, 8))
        assert not [*tmp_path.iterdir()]


CPP = Path(__file__).resolve().parent.parent / "examples" / "cpp"
PROGRAMS = ("g++", "cmake", "make")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason=f"needs {', '.join(PROGRAMS)}")
@pytest.mark.skipif(torch.version.cuda is not None and not shutil.which("nvcc"), reason="torch's CUDA build needs nvcc")
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
def test_the_cpp_example_samples_at_any_batch(tmp_path):
    """examples/cpp/torch_loop.cpp: built with this torch, run on a guided stochastic loop whose batch is free."""

    def run(*arguments, given=b""):
        return subprocess.run([*map(str, arguments)], capture_output=True, input=given, check=False)

    build = tmp_path / "build"
    found = run("cmake", "-S", CPP, "-B", build, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    assert found.returncode == 0, found.stderr.decode()
    made = run("cmake", "--build", build, "--target", "torch_loop")
    assert made.returncode == 0, made.stdout.decode() + made.stderr.decode()
    denoiser = fs.Denoiser(Net(), VP, "v", guidance=2.0)
    loop = SamplerModule(denoiser, fs.plan("dpmpp_2m_sde", fs.grid(VP, 2)))

    def inputs(n):
        g = torch.Generator().manual_seed(n)
        x, noise = (torch.randn(*shape, generator=g) for shape in ((n, 1, 8, 8), (len(loop.draws), n, 1, 8, 8)))
        return [x, torch.zeros(n, dtype=torch.int64), torch.arange(n), noise]

    x, null, shift, _ = inputs(4)
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    package = tmp_path / "loop.pt2"
    compile_loop(loop, x, package, ({"shift": null}, {"shift": shift}), batch=(1, 8), options=quick)
    for n in (1, 8):
        x, null, shift, noise = own = inputs(n)
        shapes = ["x".join(map(str, v.shape)) + ":int64" * (not v.is_floating_point()) for v in own]
        done = run(build / "torch_loop", package, *shapes, given=b"".join(v.numpy().tobytes() for v in own))
        assert done.returncode == 0, done.stderr.decode()
        with torch.no_grad():
            want = loop(x, cond=({"shift": null}, {"shift": shift}), noise=noise).numpy()
        np.testing.assert_allclose(
            np.frombuffer(done.stdout, np.float32).reshape(want.shape), want, rtol=1e-4, atol=1e-5
        )
    # The package checks every size, and that all inputs are of one batch: nothing is read past an input's end.
    right = ["3x1x8x8", "3:int64", "3:int64", "1x3x1x8x8"]
    for place, wrong in enumerate([["9x1x8x8", "2x1x8x8"], ["2:int64"], ["3", "3:float"], ["1x2x1x8x8"]]):
        for bad in wrong:
            shapes = [*right[:place], bad, *right[place + 1 :]]
            done = run(build / "torch_loop", package, *shapes, given=bytes(1 << 14))
            assert (done.returncode, done.stdout) == (1, b""), shapes
            assert re.search("unmatched|too large|expected size|an input is float32", done.stderr.decode()), (
                done.stderr.decode()
            )
    done = run(build / "torch_loop", package, "2x1x8x8", given=bytes(4))
    assert (done.returncode, done.stderr.decode()) == (1, "standard input ends before input 0 is full\n")


# --- gradients and devices, beyond tests/test_torch_ops.py ---


def test_gradient_through_the_naive_loop_against_finite_differences():
    """fewstep.sample on an x that requires grad runs the oracle, with autograd through it and the network."""
    net = Net(torch.float64)
    denoiser = fs.Denoiser(net, VP, "v", guidance=2.0)
    shift = torch.linspace(-0.5, 0.5, 2, dtype=torch.float64)
    cond = ({"shift": 0 * shift}, {"shift": shift})
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def run(x):
        return fs.sample(denoiser, x, solver="dpmpp_2m", steps=3, cond=cond)

    assert torch.autograd.gradcheck(run, (x,))
    (weight,) = torch.autograd.grad(run(x).square().sum(), [net.c.weight])
    h, (i, j) = 1e-6, (1, 4)
    ends = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            net.c.weight[i, 0, j // 3, j % 3] += sign * h
            ends.append(float(run(x.detach()).square().sum()))
            net.c.weight[i, 0, j // 3, j % 3] -= sign * h
    assert float(weight[i, 0, j // 3, j % 3]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_the_naive_backend_asks_nothing_of_the_device():
    """MPS and XPU can run it: between the model's calls it uses only torch's own operators."""
    seen = []

    class Where(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    denoiser = fs.Denoiser(Net(), VP, "v")
    with Where():
        fs.sample(denoiser, latent(), solver="unipc", steps=3, backend="naive")
    assert seen
    assert set(seen) <= {"aten", "prim", "prims"}


@pytest.mark.parametrize("guided", [False, True])
def test_a_trace_of_the_loop_does_not_meet_the_imported_modules(guided, monkeypatch):
    """torch.compile would go through all of `sys.modules`, which an import in another thread, of Numba say, changes:
    "dictionary changed size during iteration"."""
    given = {"guidance": 3.0, "null": {"shift": torch.zeros(1)}} if guided else {}
    cond = {"shift": torch.ones(3)} if guided else None
    loop = SamplerModule(fs.Denoiser(Net(), VP, "v", **given), fs.plan("ddim", fs.grid(VP, 2)))
    for name, module in [*sys.modules.items()]:
        if name.startswith("fewstep.") and hasattr(module, "sys"):
            monkeypatch.setattr(module, "sys", None)
    for grad in (False, True):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            found = torch.compile(loop, backend="eager", fullgraph=True)(latent(), cond=cond)
            torch.testing.assert_close(found, loop(latent(), cond=cond), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_a_module_made_in_inference_mode_records_gradients_later():
    net, plan = Net(), fs.plan("ddim", fs.grid(fs.VP.linear(), 2))
    x = torch.linspace(-1.0, 1.0, 12).reshape(3, 1, 2, 2)

    def make():
        return SamplerModule(fs.Denoiser(net, fs.VP.linear()), plan)

    def slope(loop):
        at = x.clone().requires_grad_()
        return torch.autograd.grad(loop(at).sum(), at)[0]

    with torch.inference_mode():
        made = make()
    torch.testing.assert_close(slope(made), slope(make()), rtol=0.0, atol=0.0)
