"""ONNX networks: equal to torch, sampled without it, without allocation, and with checked dtypes and shapes."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs

onnx = pytest.importorskip("onnx", reason="needs the extra fewstep[onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra fewstep[onnx]")

from onnx import TensorProto, helper  # noqa: E402
from pages import run_page  # noqa: E402

from fewstep.bindings.onnx import OnnxModel  # noqa: E402

VP = fs.VP.linear()
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def graph(nodes, inputs, outputs=(("raw", FLOAT, ["batch", 3]),)):
    """The bytes of a small graph; ports are (name, type, shape)."""
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def shifted(dtype=FLOAT, t_type=FLOAT, t_shape=("batch",)):
    """raw = tanh(x) + shift, after a use of t that leaves it out: tanh(x) + shift + 0 t."""
    nodes = [
        helper.make_node("Cast", ["t"], ["tf"], to=dtype),
        helper.make_node("Reshape", ["tf", "column"], ["tc"]),
        helper.make_node("Constant", [], ["column"], value=helper.make_tensor("c", INT, [2], [-1, 1])),
        helper.make_node("Tanh", ["x"], ["h"]),
        helper.make_node("Add", ["h", "shift"], ["hs"]),
        helper.make_node("Constant", [], ["scale"], value=helper.make_tensor("s", dtype, [1], [0.001])),
        helper.make_node("Mul", ["tc", "scale"], ["ts"]),
        helper.make_node("Add", ["hs", "ts"], ["raw"]),
    ]
    nodes = [nodes[0], nodes[2], nodes[1], *nodes[3:]]
    ports = [("x", dtype, ["batch", 3]), ("t", t_type, list(t_shape)), ("shift", dtype, ["batch", 1])]
    return graph(nodes, ports, [("raw", dtype, ["batch", 3])])


def numpy_shifted(x, t, shift):
    return np.tanh(x) + shift + (0.001 * t).astype(x.dtype)[:, None]


def latent(dtype=np.float32):
    return np.random.default_rng(0).standard_normal((4, 3)).astype(dtype)


SHIFT = np.linspace(-0.5, 0.5, 4, dtype=np.float32)[:, None]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_graph_samples_like_its_expression(guidance, batched):
    cond = {"shift": SHIFT} if guidance is None else ({"shift": 0.0 * SHIFT}, {"shift": SHIFT})
    options = {"steps": 5, "solver": "dpmpp_2m_sde", "seed": 1, "cond": cond}
    got = fs.sample(fs.Denoiser(OnnxModel(shifted()), VP, guidance=guidance, batched=batched), latent(), **options)
    want = fs.sample(fs.Denoiser(numpy_shifted, VP, guidance=guidance, batched=batched), latent(), **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-3)  # raws of 1e-7 are multiplied by 1 / alpha = 160


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)])
def test_arrays_are_cast_to_the_graphs_dtype(kind, dtype):
    model = OnnxModel(shifted(kind))
    assert repr(model).startswith("OnnxModel(x='x', t='t', output='")
    raw = model(latent(), np.full(4, 100.0, np.float32), shift=SHIFT)
    assert raw.dtype == dtype
    want = numpy_shifted(latent(), np.full(4, 100.0), SHIFT)
    np.testing.assert_allclose(raw, want, atol=4 * np.finfo(np.float16 if dtype == np.float16 else np.float32).eps)
    fs.sample(fs.Denoiser(model, VP, dtype=dtype), latent(), steps=2, cond={"shift": SHIFT})


def test_whole_times():
    model = OnnxModel(shifted(t_type=INT))
    raw = model(latent(), np.full(4, 100.0, np.float32), shift=SHIFT)
    np.testing.assert_allclose(raw, numpy_shifted(latent(), np.full(4, 100.0), SHIFT), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"'t' of the graph takes whole times, got 99.5.*round_times=True"):
        model(latent(), np.full(4, 99.5, np.float32), shift=SHIFT)


def test_one_time_for_all():
    model = OnnxModel(shifted(t_shape=()))
    raw = model(latent(), np.full(4, 250.0, np.float32), shift=SHIFT)
    np.testing.assert_allclose(raw, numpy_shifted(latent(), np.full(4, 250.0), SHIFT), rtol=1e-6, atol=1e-6)
    # The samples of a mixed batch stand at times of their own, of which such a graph would take the first for all.
    with pytest.raises(ValueError, match=r"input 't' of the graph is one time for the whole batch, got 250 to 251"):
        model(latent(), np.array([250.0, 250.0, 251.0, 250.0], np.float32), shift=SHIFT)


def test_whole_numbers():
    looked_up = [
        helper.make_node("Gather", ["table", "label"], ["row"]),
        helper.make_node("Constant", [], ["table"], value=helper.make_tensor("v", FLOAT, [4, 3], [*range(12)])),
        helper.make_node("Mul", ["x", "t"], ["xt"]),
        helper.make_node("Add", ["xt", "row"], ["raw"]),
    ]
    ports = [("x", FLOAT, ["batch", 3]), ("t", FLOAT, []), ("label", INT, ["batch"])]
    model = OnnxModel(graph([looked_up[1], looked_up[0], *looked_up[2:]], ports))
    raw = model(latent(), np.ones(4), label=np.array([0.0, 3.0, 1.0, 2.0]))
    np.testing.assert_array_equal(raw, latent() + np.arange(12.0, dtype=np.float32).reshape(4, 3)[[0, 3, 1, 2]])
    with pytest.raises(ValueError, match=r"input 'label' of the graph takes whole numbers, got 1.5$"):
        model(latent(), np.ones(4), label=np.array([0.0, 3.0, 1.5, 2.0]))


def test_inputs_and_output_by_name():
    nodes = [
        helper.make_node("Identity", ["noisy"], ["raw"]),
        helper.make_node("Add", ["noisy", "other"], ["second"]),
        helper.make_node("Identity", ["sigma"], ["unused"]),
    ]
    ports = [("sigma", FLOAT, ["batch"]), ("other", FLOAT, ["batch", 3]), ("noisy", FLOAT, ["batch", 3])]
    outs = [("raw", FLOAT, ["batch", 3]), ("second", FLOAT, ["batch", 3]), ("unused", FLOAT, ["batch"])]
    model = OnnxModel(graph(nodes, ports, outs), x="noisy", t="sigma", output="second")
    raw = model(latent(), np.zeros(4, np.float32), other=latent() * 2.0)
    np.testing.assert_allclose(raw, 3.0 * latent(), rtol=1e-6)


def test_a_wider_output_is_the_graphs():
    """A network that also predicts its variance returns twice the channels."""
    nodes = [helper.make_node("Concat", ["x", "x"], ["raw"], axis=1), helper.make_node("Identity", ["t"], ["u"])]
    ports = [("x", FLOAT, ["batch", 3]), ("t", FLOAT, ["batch"])]
    model = OnnxModel(graph(nodes, ports, [("raw", FLOAT, ["batch", 6]), ("u", FLOAT, ["batch"])]))
    raw = model(latent(), np.zeros(4, np.float32))
    np.testing.assert_array_equal(raw, np.concatenate([latent(), latent()], axis=1))


def test_memory_is_bound_and_kept():
    """Outputs alternate between four buffers; after the first calls nothing of their size is allocated."""
    model = OnnxModel(shifted())
    x, t = np.zeros((4096, 3), np.float32), np.zeros(4096, np.float32)
    shift = np.zeros((4096, 1), np.float32)
    seen = [model(x, t, shift=shift).ctypes.data for _ in range(8)]
    assert len(set(seen)) == 4
    assert seen[:4] == seen[4:]
    tracemalloc.start()
    for _ in range(20):
        model(x, t, shift=shift)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes // 2, peak


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_copies_load_the_graph_anew(kind, duplicate, tmp_path):
    """With the names that were asked for, and in a sampler too."""
    nodes = [
        helper.make_node("Mul", ["noisy", "noisy"], ["first"]),
        helper.make_node("Add", ["noisy", "noisy"], ["second"]),
    ]
    ports = [("sigma", FLOAT, ["batch"]), ("noisy", FLOAT, ["batch", 3])]
    source = graph(nodes, ports, [(name, FLOAT, ["batch", 3]) for name in ("first", "second")])
    if kind == "file":
        (tmp_path / "a.onnx").write_bytes(source)
        source = tmp_path / "a.onnx"
    model = OnnxModel(source, x="noisy", t="sigma", output="second")
    again = duplicate(model)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(again(x, np.zeros(2, np.float32)), 2.0 * x)
    sampler = fs.Sampler(fs.Denoiser(model, VP), fs.plan("ddim", fs.grid(VP, 2)), (2, 3))
    np.testing.assert_array_equal(duplicate(sampler)(seed=0), sampler(seed=0))


def test_a_session_goes_with_its_model():
    """At once, not at the next garbage collection: it holds the network's weights."""
    model = OnnxModel(shifted())
    fs.sample(fs.Denoiser(model, VP), shape=(4, 3), steps=2, seed=0, cond={"shift": SHIFT})
    freed = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_threads_have_their_own_memory():
    model = OnnxModel(shifted())
    sampler = fs.Sampler(fs.Denoiser(model, VP), fs.plan("ddpm", fs.grid(VP, 6)), (4, 3))
    want = [sampler(seed=i, cond={"shift": SHIFT}) for i in range(4)]
    got = [None] * 4

    def work(i):
        for _ in range(5):
            got[i] = sampler(seed=i, cond={"shift": SHIFT})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


TWO = [("x", FLOAT, ["batch", 3]), ("t", FLOAT, ["batch"])]
ONE = graph([helper.make_node("Identity", ["x"], ["raw"])], TWO[:1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: OnnxModel("nowhere.onnx"), FileNotFoundError, "no ONNX file at nowhere.onnx"),
        (lambda: OnnxModel(b"not a graph"), ValueError, "ONNX Runtime cannot load the graph"),
        (lambda: OnnxModel(ONE), ValueError, r"the graph has the inputs \['x'\]: a denoiser needs at least x and t"),
        (lambda: OnnxModel(shifted(), x="z"), ValueError, "x = 'z' is not in the graph, which has x, t, shift"),
        (lambda: OnnxModel(shifted(), output="z"), ValueError, "output = 'z' is not in the graph, which has raw"),
        (
            lambda: OnnxModel(shifted())(latent(), np.zeros(4)),
            ValueError,
            r"takes the conditions \['shift'\], got \[\]",
        ),
    ],
)
def test_what_does_not_fit_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- the shipped network ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    import warnings

    path = tmp_path_factory.mktemp("onnx") / "digits.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning about its other exporter, which needs another package
        run_page("docs/onnx.md", {"path": path}, "export")
    assert torch is not None
    return path


def test_a_nested_condition_is_inputs_of_its_leaves(tmp_path):
    torch = pytest.importorskip("torch")
    from fewstep.bindings.onnx import export_onnx

    class Net(torch.nn.Module):
        def forward(self, x, t, added):
            return expression(x, t, added)

    def expression(x, t, added):
        return 0.1 * x + added["pooled"] + 2.0 * added["ids"][0] + t[:, None] / 1024.0

    def cond(seed):
        g = np.random.default_rng(seed)
        pooled, ids = (g.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
        return {"added": {"pooled": pooled, "ids": [ids]}}

    example = {"added": {"pooled": torch.zeros(2, 3), "ids": [torch.ones(2, 3)]}}
    export_onnx(Net(), tmp_path / "net.onnx", torch.zeros(2, 3), example)
    model = OnnxModel(tmp_path / "net.onnx")
    assert sorted(model.cond) == ["added.ids.0", "added.pooled"]
    options = {"steps": 4, "cond": (cond(1), cond(2))}
    got = fs.sample(fs.Denoiser(model, VP, guidance=2.0), latent(), **options)
    want = fs.sample(fs.Denoiser(expression, VP, guidance=2.0), latent(), **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-3)
    with pytest.raises(ValueError, match=r"the conditions \['added.ids.0', 'added.pooled'\], got \['added.pooled'\]"):
        model(latent(), np.zeros(4), added={"pooled": latent()})


def test_what_cannot_be_exported_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    from fewstep.bindings.onnx import export_onnx

    class Wrapped(torch.nn.Module):
        """Returns its prediction in a dict, as diffusers' models do in an object."""

        def forward(self, x, t):
            return {"sample": x}

    path, x = tmp_path / "net.onnx", torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function: call it in a module's forward"):
        export_onnx(lambda x, t: x, path, x)
    with pytest.raises(TypeError, match=r"the module returned dict: .* returns the raw prediction alone"):
        export_onnx(Wrapped(), path, x)
    with pytest.raises(ValueError, match=r"no bfloat16 network: export copy.deepcopy\(module\).float\(\)"):
        export_onnx(torch.nn.Linear(3, 3).bfloat16(), path, x)
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=r"path .*missing.net.onnx: there is no folder .*missing"):
        export_onnx(Wrapped(), tmp_path / "missing" / "net.onnx", x)
    with pytest.raises(ValueError, match=r"net.pt: the file must end in .onnx"):
        export_onnx(Wrapped(), tmp_path / "net.pt", x)


def test_export_leaves_one_whole_file(digits):
    assert [p.name for p in digits.parent.iterdir()] == ["digits.onnx"]
    onnx.checker.check_model(str(digits))


def test_digits_equal_torch(digits):
    import torch

    from fewstep.bindings.unet import NO_CLASS, digits_model

    labels = np.arange(6) % 10
    plan = fs.plan("unipc", fs.grid(VP, 8, "logsnr"))
    ours = fs.Denoiser(OnnxModel(digits), VP, "v", guidance=2.0, null={"label": np.array([NO_CLASS])})
    theirs = fs.Denoiser(digits_model(), VP, "v", guidance=2.0, null={"label": torch.tensor([NO_CLASS])})
    got = fs.Sampler(ours, plan, (6, 1, 8, 8))(seed=0, cond={"label": labels})
    want = fs.Sampler(theirs, plan, (6, 1, 8, 8))(seed=0, cond={"label": torch.from_numpy(labels)}).numpy()
    assert np.abs(want).max() > 0.9  # digits, not noise around zero
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_digits_without_torch(digits):
    """In a process that cannot import torch."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['triton'] = None\n"
        "import numpy as np, fewstep as fs\n"
        "from fewstep.bindings.onnx import OnnxModel\n"
        f"d = fs.Denoiser(OnnxModel({str(digits)!r}, threads=1), fs.VP.linear(), 'v')\n"
        "x = fs.sample(d, shape=(4, 1, 8, 8), solver='dpmpp_2m', spacing='logsnr', steps=8, seed=0,\n"
        "              cond={'label': np.array([0, 1, 2, 3])})\n"
        "print(type(x).__module__, x.dtype, x.ravel().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    module, dtype, values = done.stdout.split(" ", 2)
    assert (module, dtype) == ("numpy", "float32")
    network = OnnxModel(digits)
    cond = {"label": np.array([0, 1, 2, 3])}
    options = {"solver": "dpmpp_2m", "spacing": "logsnr", "steps": 8, "seed": 0}
    want = fs.sample(fs.Denoiser(network, VP, "v"), shape=(4, 1, 8, 8), cond=cond, **options)
    np.testing.assert_allclose(np.fromstring(values.strip("[]\n"), sep=","), want.ravel(), atol=1e-4)


def test_the_file_of_the_page_draws_the_samplers_images(digits, tmp_path, monkeypatch):
    """docs/embedding.md"""
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/embedding.md", {"path": str(digits)}, "onnx")
    sampler = fs.Sampler(names["denoiser"], names["plan"], (3, 1, 8, 8))
    want = sampler(seed=7, cond={"label": names["labels"]})
    assert np.abs(want).max() > 0.9
    np.testing.assert_allclose(names["images"], want, atol=1e-5)


def test_the_short_plan_of_the_page_is_four_euler_steps():
    """docs/embedding.md"""
    names = run_page("docs/embedding.md", {}, "deadline")
    policy = names["policy"].requires_grad_(False)
    x = fs.sample(fs.Denoiser(lambda x, t: 0.0 * x, fs.Flow(), "flow"), shape=(1, 16, 7), steps=1, seed=1)
    x = policy.weight.new_tensor(x)
    for _ in range(4):
        x = x - 0.25 * policy(x)
    np.testing.assert_allclose(names["actions"], x, atol=1e-5)


def test_the_page_gives_the_same_image(digits, tmp_path, monkeypatch):
    """docs/onnx.md"""
    monkeypatch.chdir(tmp_path)
    grid = fs.grid(VP, 6, "logsnr")
    noise = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
    names = {"path": str(digits), "grid": grid, "noise": noise, "labels": np.array([0, 1, 2, 3])}
    run_page("docs/onnx.md", names, "before", "after", "loop")
    np.testing.assert_allclose(names["images"], names["by_hand"], atol=1e-4)
    np.testing.assert_allclose(names["same"], names["better"], atol=1e-5)
    assert np.abs(names["images"]).max() > 0.9
