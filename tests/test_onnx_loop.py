"""A sampling loop as one ONNX file: equal to `Sampler` over the same network, on ONNX Runtime alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs

onnx = pytest.importorskip("onnx", reason="needs the extra fewstep[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra fewstep[onnx]")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fewstep.bindings import onnx_graph  # noqa: E402
from fewstep.bindings.flow_map import FlowMapDenoiser  # noqa: E402
from fewstep.bindings.onnx import OnnxModel  # noqa: E402
from fewstep.bindings.onnx_loop import save_loop  # noqa: E402
from fewstep.kernels import philox  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VP, EDM, FLOW = fs.VP.linear(), fs.EDM(), fs.Flow()
FLOAT, HALF, DOUBLE, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64
SHAPE = (2, 3)  # 6 elements: two blocks of noise, the second one not full


def onnx_model(**options):
    return OnnxModel(network(**options), threads=1)


def network(kind=FLOAT, t_kind=FLOAT, t_shape=("batch",), batch="batch", opset=18, seed=0, cond=("shift",)):
    """raw = tanh(W x + shift) (1 + t / 500), as the bytes of a file; W mixes the elements of a sample."""
    g = np.random.default_rng(seed)
    w = numpy_helper.from_array((g.standard_normal((6, 6)) / 3.0).astype(helper.tensor_dtype_to_np_dtype(kind)), "W")
    scalar = numpy_helper.from_array(np.array([0.002, 1.0], helper.tensor_dtype_to_np_dtype(kind)), "numbers")
    shapes = [
        numpy_helper.from_array(np.array(v, np.int64), n)
        for n, v in (("flat", [-1, 6]), ("column", [-1, 1]), ("full", [-1, 2, 3]), ("zero", [0]), ("one", [1]))
    ]
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "W"], ["mixed"]),
        *[helper.make_node("Add", ["mixed", name], ["mixed_" + name]) for name in cond],
        helper.make_node("Tanh", ["mixed_" + cond[0] if cond else "mixed"], ["h"]),
        helper.make_node("Cast", ["t"], ["time"], to=kind),
        helper.make_node("Reshape", ["time", "column"], ["times"]),
        helper.make_node("Gather", ["numbers", "zero"], ["slope"]),
        helper.make_node("Gather", ["numbers", "one"], ["offset"]),
        helper.make_node("Mul", ["times", "slope"], ["part"]),
        helper.make_node("Add", ["part", "offset"], ["factor"]),
        helper.make_node("Mul", ["h", "factor"], ["out"]),
        helper.make_node("Reshape", ["out", "full"], ["raw"]),
    ]
    ports = [("x", kind, [batch, 2, 3]), ("t", t_kind, [batch] if t_shape else [])]
    ports += [(name, kind, [batch, 1]) for name in cond]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(*port) for port in ports],
        [helper.make_tensor_value_info("raw", kind, [batch, 2, 3])],
        [w, scalar, *shapes],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def shift(batch, scale=1.0):
    return scale * np.linspace(-0.5, 0.5, batch, dtype=np.float32)[:, None]


def session(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # its threads would spin beside the other tests
    graph = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def streams(seed, batch):
    return philox.streams(seed, batch).astype(np.int64)


def agree(got, want, share=1e-5):
    """To a share of the samples' scale."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert np.abs(want).std() > 0.05
    assert np.abs(got - want).max() <= share * want.std(), np.abs(got - want).max() / want.std()


def tuned(denoiser):
    """Fitted to the digits network, which any network may run."""
    return fs.load_plan(ROOT / "docs/tuning/digits-6.json", denoiser, force=True)


TABLE = [
    ("euler", EDM, "edm", {}),
    ("heun", EDM, "edm", {}),
    ("dpmpp_2m", FLOW, "flow", {}),
    ("unipc", VP, "v", {"order": 3}),
    ("edm", EDM, "edm", {"s_churn": 4.0}),
    ("dpmpp_2m_sde", VP, "v", {}),
    ("lcm", VP, "epsilon", {}),
    ("deis", FLOW, "flow", {"order": 3}),
    ("rk4", EDM, "edm", {}),
    ("tuned", VP, "v", {}),
]


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "rolled"])
@pytest.mark.parametrize("clip", [None, 0.6], ids=["open", "clipped"])
@pytest.mark.parametrize(("solver", "process", "predicts", "options"), TABLE, ids=[row[0] for row in TABLE])
def test_the_file_is_the_sampler(solver, process, predicts, options, clip, unroll, tmp_path):
    """With seeds per sample, and with the same normals from outside."""
    denoiser = fs.Denoiser(onnx_model(), process, predicts, clip=clip)
    plan = tuned(denoiser) if solver == "tuned" else fs.plan(solver, grid(process, solver), **options)
    seeds = [3, 2**40 + 5, 2**64 - 1]
    want = fs.Sampler(denoiser, plan, (3, *SHAPE))(seed=seeds, cond={"shift": shift(3)})
    x = plan.start.sigma * np.stack([philox.normals(6, s, 0, 0, philox.LATENT).reshape(SHAPE) for s in seeds])
    feeds = {"x": x.astype(np.float32), "shift": shift(3)}
    drawn = session(save_loop(denoiser, plan, tmp_path / "a.onnx", unroll=unroll))
    takes = {port.name for port in drawn.get_inputs()}
    noisy = "streams" in takes
    (got,) = drawn.run(["sample"], feeds | ({"streams": streams(seeds, 3)} if noisy else {}))
    agree(got, want)
    if noisy:
        given = session(save_loop(denoiser, plan, tmp_path / "b.onnx", unroll=unroll, noise="input"))
        (shape,) = (port.shape for port in given.get_inputs() if port.name == "noise")
        draws = [k + 1 for k, stage in enumerate(plan.stages) if stage.rows["x"].get("z")]
        draws = [0, *draws] if plan.init is not None else draws
        assert shape[0] == len(draws)
        noise = np.stack([np.stack([philox.normals(6, s, 0, d, 0).reshape(SHAPE) for s in seeds]) for d in draws])
        (got,) = given.run(["sample"], feeds | {"noise": noise})
        agree(got, want)


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "rolled"])
@pytest.mark.parametrize(("solver", "options"), [("euler", {}), ("tcd", {"gamma": 0.4}), ("lcm", {})])
def test_the_ends_of_the_steps_are_in_the_file(solver, options, unroll, tmp_path):
    """A network of two times: x + shift + 0.2 t - 0.3 s, with s where the plan's step ends."""
    column = helper.make_tensor("column", TensorProto.INT64, [2], [-1, 1])
    nodes = [helper.make_node("Constant", [], ["column"], value=column)]
    total = "x"
    for name, factor in (("t", 0.2), ("s", -0.3), ("shift", 1.0)):
        value = helper.make_tensor(f"f{name}", TensorProto.FLOAT, [], [factor])
        nodes += [
            helper.make_node("Constant", [], [f"factor_{name}"], value=value),
            helper.make_node("Reshape", [name, "column"], [f"{name}_column"]),
            helper.make_node("Mul", [f"{name}_column", f"factor_{name}"], [f"{name}_part"]),
            helper.make_node("Add", [total, f"{name}_part"], ["raw" if name == "shift" else f"with_{name}"]),
        ]
        total = f"with_{name}"
    ports = [("x", ["batch", 3]), ("t", ["batch"]), ("s", ["batch"]), ("shift", ["batch"])]
    made = helper.make_graph(
        nodes,
        "two times",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports],
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    denoiser = FlowMapDenoiser(OnnxModel(model.SerializeToString()), FLOW, "flow")
    plan = fs.plan(solver, fs.grid(FLOW, 4), **options)
    moved = np.array([0.1, -0.2], np.float32)
    want = fs.Sampler(denoiser, plan, (2, 3))(seed=[3, 4], cond={"shift": moved})
    x = np.stack([philox.normals(3, s, 0, 0, philox.LATENT) for s in (3, 4)])
    drawn = session(save_loop(denoiser, plan, tmp_path / "a.onnx", unroll=unroll))
    assert "s" not in {port.name for port in drawn.get_inputs()}
    noisy = {"streams": streams([3, 4], 2)} if plan.stochastic else {}
    agree(drawn.run(["sample"], {"x": x, "shift": moved, **noisy})[0], want)
    plain = FlowMapDenoiser(onnx_model(), FLOW, "flow")
    with pytest.raises(ValueError, match=r"the graph has no input 's' for the end of a step: \['shift'\]"):
        save_loop(plain, plan, tmp_path / "b.onnx")


def grid(process, solver="", steps=6):
    if process == VP:
        return fs.grid(VP, steps, "logsnr").tail(1 / 3 if solver == "lcm" else 0.0)
    return fs.grid(process, steps)


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "rolled"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "apart"])
@pytest.mark.parametrize("null", [True, False], ids=["null", "two"])
def test_guidance_at_any_batch(null, batched, unroll, tmp_path):
    model = onnx_model()
    held = {"shift": np.array([[0.25]], np.float32)}
    denoiser = fs.Denoiser(model, EDM, "edm", guidance=2.5, batched=batched, null=held if null else None)
    plan = fs.plan("dpmpp_2m_sde", fs.grid(EDM, 4))
    run = session(save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE, unroll=unroll))
    assert [port.name for port in run.get_inputs()] == ["streams", *["null.shift"] * (not null), "shift"]
    for batch in (1, 2, 5):
        given = {"shift": shift(batch)} | ({} if null else {"null.shift": held["shift"]})
        if not null and not batched:  # separate calls: the null condition serves all samples as it is
            given["null.shift"] = np.repeat(held["shift"], batch, 0)
        cond = {"shift": shift(batch)} if null else (held, {"shift": shift(batch)})
        (got,) = run.run(["sample"], given | {"streams": streams(7, batch)})
        agree(got, fs.Sampler(denoiser, plan, (batch, *SHAPE))(seed=7, cond=cond))


def test_guidance_of_a_second_network_and_of_three_branches(tmp_path):
    one, other = onnx_model(), onnx_model(seed=1)
    plan = fs.plan("heun", fs.grid(EDM, 3))
    auto = fs.Denoiser(one, EDM, "edm", guidance=fs.AutoGuidance(other, 1.7))
    run = session(save_loop(auto, plan, tmp_path / "auto.onnx", shape=SHAPE))
    (got,) = run.run(["sample"], {"shift": shift(2), "streams": streams(1, 2)})
    agree(got, fs.Sampler(auto, plan, (2, *SHAPE))(seed=1, cond={"shift": shift(2)}))
    three = fs.Denoiser(one, EDM, "edm", guidance=fs.Branches((-0.5, 0.7, 0.8)))
    run = session(save_loop(three, plan, tmp_path / "three.onnx", shape=SHAPE))
    conds = [shift(2, k) for k in (0.0, -1.0, 2.0)]
    feeds = dict(zip(("branch0.shift", "branch1.shift", "shift"), conds, strict=True))
    (got,) = run.run(["sample"], feeds | {"streams": streams(1, 2)})
    agree(got, fs.Sampler(three, plan, (2, *SHAPE))(seed=1, cond=[{"shift": c} for c in conds]))


@pytest.mark.parametrize(
    "guidance",
    [
        fs.CFG(3.0, rescale=0.7),
        fs.CFG(3.0, rescale=0.7, sigma_hi=5.0),
        fs.APG(4.0, eta=0.3, norm_threshold=1.5),
        fs.APG(4.0, norm_threshold=2.0, momentum=-0.5),
        fs.CFGZero(3.0, zero_steps=1),
    ],
    ids=["rescale", "in-an-interval", "apg", "momentum", "zero"],
)
@pytest.mark.parametrize("clip", [None, 2.0], ids=["open", "clipped"])
def test_guidance_that_reduces_whole_samples(guidance, clip, tmp_path):
    denoiser = fs.Denoiser(onnx_model(), FLOW, "flow", guidance=guidance, clip=clip)
    plan = fs.plan("dpmpp_2m", fs.grid(FLOW, 5))
    path = save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE)
    cond = ({"shift": shift(3, -2.0)}, {"shift": shift(3)})
    feeds = {"null.shift": cond[0]["shift"], "shift": cond[1]["shift"], "streams": streams(4, 3)}
    (got,) = session(path).run(["sample"], feeds)
    agree(got, fs.Sampler(denoiser, plan, (3, *SHAPE))(seed=4, cond=cond))


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "rolled"])
@pytest.mark.parametrize("quantile", [0.0, 0.37, 0.995, 1.0])
def test_dynamic_thresholding(quantile, unroll, tmp_path):
    clip = fs.DynamicThreshold(quantile, maximum=1.6)
    denoiser = fs.Denoiser(onnx_model(), EDM, "edm", guidance=6.0, clip=clip)
    plan = fs.plan("heun", fs.grid(EDM, 4))
    path = save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE, unroll=unroll)
    cond = ({"shift": shift(3, -2.0)}, {"shift": shift(3)})
    feeds = {"null.shift": cond[0]["shift"], "shift": cond[1]["shift"], "streams": streams(4, 3)}
    (got,) = session(path).run(["sample"], feeds)
    agree(got, fs.Sampler(denoiser, plan, (3, *SHAPE))(seed=4, cond=cond))


@pytest.mark.parametrize("solver", [name for name in fs.list_solvers() if name != "ddim_inverse"])
def test_every_solver_in_float64(solver, tmp_path):
    """Where rounding cannot hide a wrong coefficient; the normals are float32, and agree to its rounding."""
    denoiser = fs.Denoiser(onnx_model(kind=DOUBLE), EDM, "edm")
    plan = fs.plan(solver, fs.grid(EDM, 4), dtype="float64")
    path = save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE, dtype="float64")
    (got,) = session(path).run(["sample"], {"shift": shift(2).astype(np.float64), "streams": streams(6, 2)})
    want = fs.Sampler(denoiser, plan, (2, *SHAPE), dtype="float64")(seed=6, cond={"shift": shift(2)})
    agree(got, want, 1e-5)
    fixed = session(save_loop(denoiser, plan, tmp_path / "fixed.onnx", noise="input", dtype="float64"))
    if "noise" not in {port.name for port in fixed.get_inputs()}:
        latent = np.stack([philox.normals(6, 6, i, 0, philox.LATENT).reshape(SHAPE) for i in range(2)])
        x = plan.start.sigma * latent.astype(np.float64)
        (got,) = fixed.run(["sample"], {"x": x, "shift": shift(2).astype(np.float64)})
        agree(got, want, 1e-11)


def test_guidance_in_an_interval(tmp_path):
    """Unrolled, it calls only the branches that the sampler calls; rolled, it is refused."""
    denoiser = fs.Denoiser(onnx_model(), EDM, "edm", guidance=fs.CFG(3.0, sigma_lo=0.3, sigma_hi=5.0))
    plan = fs.plan("dpmpp_2m", fs.grid(EDM, 6))
    path = save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE)
    cond = ({"shift": shift(3, 0.0)}, {"shift": shift(3)})
    feeds = {"null.shift": cond[0]["shift"], "shift": cond[1]["shift"], "streams": streams(2, 3)}
    (got,) = session(path).run(["sample"], feeds)
    agree(got, fs.Sampler(denoiser, plan, (3, *SHAPE))(seed=2, cond=cond))
    with pytest.raises(ValueError, match="the guidance is off in some: use unroll=True"):
        save_loop(denoiser, plan, tmp_path / "loop.onnx", unroll=False)


@pytest.mark.parametrize(
    ("options", "dtype", "share"),
    [
        ({"kind": HALF}, "float32", 2e-2),  # the network's own rounding, at another order of its sums
        ({"kind": DOUBLE}, "float64", 1e-10),
        ({"t_kind": INT}, "float32", 1e-5),
        ({"t_shape": ()}, "float32", 1e-5),
        ({"opset": 13}, "float32", 1e-5),
        ({"batch": 2}, "float32", 1e-5),
        ({"cond": ()}, "float32", 1e-5),
    ],
    ids=["half", "double", "whole-times", "one-time", "old-opset", "fixed-batch", "unconditional"],
)
def test_networks_of_other_kinds(options, dtype, share, tmp_path):
    denoiser = fs.Denoiser(onnx_model(**options), VP, "v")
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 5, "linspace", round_times=True))
    cond = {} if options.get("cond") == () else {"shift": shift(2)}
    x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(dtype)
    want = fs.Sampler(denoiser, plan, x.shape, dtype=dtype)(x, cond=cond)
    kind = np.float16 if options.get("kind") == HALF else np.float64 if options.get("kind") == DOUBLE else np.float32
    for unroll in (True, False):
        path = save_loop(denoiser, plan, tmp_path / "loop.onnx", unroll=unroll, dtype=dtype)
        (got,) = session(path).run(["sample"], {"x": x} | {name: v.astype(kind) for name, v in cond.items()})
        agree(got, want, share)


def test_a_network_with_inner_graphs_and_functions(tmp_path):
    """Names of an If's branches are renamed with the rest, and read weights from outside."""
    value = helper.make_tensor_value_info
    branch = [
        helper.make_graph([helper.make_node("Mul", ["x", w], ["y"])], "b", [], [value("y", FLOAT, ["batch", 2, 3])])
        for w in ("small", "large")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["t"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "limit"], ["high"]),
        helper.make_node("If", ["high"], ["scaled"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Twice", ["scaled"], ["raw"], domain="own"),
    ]
    twice = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    numbers = {"small": 0.1, "large": 0.3, "limit": 400.0}
    graph = helper.make_graph(
        nodes,
        "network",
        [value("x", FLOAT, ["batch", 2, 3]), value("t", FLOAT, ["batch"])],
        [value("raw", FLOAT, ["batch", 2, 3])],
        [numpy_helper.from_array(np.float32(v), name) for name, v in numbers.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model = OnnxModel(
        helper.make_model(graph, opset_imports=imports, functions=[twice], ir_version=8).SerializeToString()
    )
    denoiser, plan = fs.Denoiser(model, VP, "v"), fs.plan("unipc", fs.grid(VP, 4, "linspace"))
    x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    want = fs.Sampler(denoiser, plan, x.shape)(x)
    for unroll in (True, False):
        (got,) = session(save_loop(denoiser, plan, tmp_path / "loop.onnx", unroll=unroll)).run(["sample"], {"x": x})
        agree(got, want)


@pytest.mark.parametrize("opset", [17, 18])
def test_two_networks_whose_functions_have_one_name(opset, tmp_path):
    """As two exports of one architecture have; a function calls another one, also from within an If."""
    value = helper.make_tensor_value_info

    def exported(scale):
        number = helper.make_tensor("scale", FLOAT, [], [scale])
        scaled = [helper.make_node("Constant", [], ["c"], value=number), helper.make_node("Mul", ["a", "c"], ["b"])]
        branches = [
            helper.make_graph(
                [helper.make_node(kind, ["a"], ["y"], domain=domain)], "branch", [], [value("y", FLOAT, None)]
            )
            for kind, domain in (("Scaled", "own"), ("Neg", ""))
        ]
        chosen = [
            helper.make_node("Constant", [], ["zero"], value=helper.make_tensor("zero", FLOAT, [], [0.0])),
            helper.make_node("ReduceMax", ["t"], ["top"], keepdims=0),
            helper.make_node("Greater", ["top", "zero"], ["above"]),
            helper.make_node("If", ["above"], ["b"], then_branch=branches[0], else_branch=branches[1]),
        ]
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
        functions = [
            helper.make_function("own", "Scaled", ["a"], ["b"], scaled, imports[:1]),
            helper.make_function("own", "Chosen", ["a", "t"], ["b"], chosen, imports),
        ]
        graph = helper.make_graph(
            [helper.make_node("Chosen", ["x", "t"], ["raw"], domain="own")],
            "network",
            [value("x", FLOAT, ["batch", 2, 3]), value("t", FLOAT, ["batch"])],
            [value("raw", FLOAT, ["batch", 2, 3])],
        )
        made = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)
        return OnnxModel(made.SerializeToString(), threads=1)

    denoiser = fs.Denoiser(exported(0.1), FLOW, "flow", guidance=fs.AutoGuidance(exported(0.4), 1.7))
    plan = fs.plan("heun", fs.grid(FLOW, 3))
    run = session(save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE))
    (got,) = run.run(["sample"], {"streams": streams(1, 2)})
    agree(got, fs.Sampler(denoiser, plan, (2, *SHAPE))(seed=1))


def test_normals_have_the_packages_addresses():
    """The words to the bit (any other would be another normal), the transform to a few roundings."""
    g = onnx_graph.Graph()
    draws, domain = [0, 1, 7, 2**31], philox.STEP
    out = onnx_graph.normals(g, "streams", g.const(draws, "uint64"), domain, g.const([4, 5, 1001], "int64"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        g.nodes, "normals", [value("streams", INT, ["batch", 3])], [value(out, FLOAT, None)], g.initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    own = np.array([[0, 0, 0], [2**32 - 1, 2**32 - 1, 2**32 - 1], [7, 0, 3], [2**31, 5, 2**31]], np.int64)
    (got,) = session(model.SerializeToString()).run(None, {"streams": own})
    assert got.shape == (4, 4, 5, 1001)
    for i, draw in enumerate(draws):
        want = philox.normal_rows(5005, own.astype(np.uint32), draw, domain).reshape(4, 5, 1001)
        np.testing.assert_allclose(got[i], want, rtol=2e-6, atol=2e-6)


def test_the_latent_and_the_noise_are_the_samplers(tmp_path):
    """A seed alone gives the sampler's sample; batches of one job join, whatever their sizes."""
    denoiser = fs.Denoiser(onnx_model(), EDM, "edm")
    plan = fs.plan("euler_ancestral", fs.grid(EDM, 14))  # more draws than one group of them
    run = session(save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE))
    want = fs.Sampler(denoiser, plan, (5, *SHAPE))(seed=11, cond={"shift": shift(5)})
    parts = [
        run.run(["sample"], {"streams": streams(11, 5)[own], "shift": shift(5)[own]})[0]
        for own in (slice(0, 2), slice(2, 5))
    ]
    agree(np.concatenate(parts), want)


def test_the_file_needs_onnx_runtime_alone(tmp_path):
    denoiser = fs.Denoiser(onnx_model(), VP, "v", guidance=2.0)
    plan = fs.plan("dpmpp_2m_sde", grid(VP))
    path = save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE)
    assert [p.name for p in tmp_path.iterdir()] == ["loop.onnx"]
    onnx.checker.check_model(str(path), full_check=True)
    code = (
        "import sys, json; sys.modules.update(dict.fromkeys(['fewstep', 'numba', 'torch', 'onnx']))\n"
        "import numpy as np, onnxruntime\n"
        f"run = onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        "shift = np.linspace(-0.5, 0.5, 2, dtype=np.float32)[:, None]\n"
        "streams = np.array([[9, 0, 0], [9, 0, 1]])  # of seed 9\n"
        "(x,) = run.run(['sample'], {'streams': streams, 'null.shift': 0 * shift, 'shift': shift})\n"
        "print(json.dumps([x.tolist(), dict(run.get_modelmeta().custom_metadata_map)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values, facts = json.loads(done.stdout)
    cond = ({"shift": shift(2, 0.0)}, {"shift": shift(2)})
    agree(np.array(values, np.float32), fs.Sampler(denoiser, plan, (2, *SHAPE))(seed=9, cond=cond))
    assert facts == {
        "solver": "dpmpp_2m_sde",
        "calls": "6",
        "alpha": str(plan.start.alpha),
        "sigma": str(plan.start.sigma),
    }


def test_weights_are_there_once_and_steps_are_free_in_a_loop(tmp_path):
    denoiser = fs.Denoiser(onnx_model(), EDM, "edm")
    sizes = {}
    for unroll in (True, False):
        for steps in (5, 50):
            plan = fs.plan("euler", fs.grid(EDM, steps))
            path = save_loop(denoiser, plan, tmp_path / "loop.onnx", unroll=unroll)
            sizes[unroll, steps] = path.stat().st_size
            graph = onnx.load(str(path)).graph
            place = graph if unroll else next(node for node in graph.node if node.op_type == "Loop").attribute[0].g
            assert [list(t.dims) for t in place.initializer].count([6, 6]) == 1
            assert len(graph.initializer) < 12 or unroll
    assert sizes[False, 50] - sizes[False, 5] < 45 * 40  # four numbers a step, and room for their names
    assert sizes[True, 50] > 4 * sizes[False, 50]


HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE", "")


@pytest.mark.slow
@pytest.mark.skipif(not HEADERS, reason="ONNXRUNTIME_INCLUDE names no folder with ONNX Runtime's C++ headers")
@pytest.mark.skipif(not all(map(shutil.which, ("g++", "cmake", "make"))), reason="needs g++, cmake and make")
def test_the_cpp_example_needs_a_seed_alone(tmp_path):
    """examples/cpp/onnx_loop.cpp against the library in the Python wheel, under the names that a release gives it."""

    def run(*arguments):
        return subprocess.run([*map(str, arguments)], capture_output=True, check=False)

    (shipped,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(shipped)
    build, libraries = tmp_path / "build", f"-DONNXRUNTIME_LIBRARY={tmp_path / 'libonnxruntime.so'}"
    include = f"-DONNXRUNTIME_INCLUDE={HEADERS}"
    found = run("cmake", "-S", ROOT / "examples/cpp", "-B", build, libraries, include)
    assert found.returncode == 0, found.stderr.decode()
    made = run("cmake", "--build", build, "--target", "onnx_loop")
    assert made.returncode == 0, made.stdout.decode() + made.stderr.decode()
    denoiser = fs.Denoiser(onnx_model(cond=()), EDM, "edm")
    plan = fs.plan("edm", fs.grid(EDM, 5), s_churn=4.0)
    path = save_loop(denoiser, plan, tmp_path / "loop.onnx", shape=SHAPE)
    for batch, seed in ((1, 0), (5, 2**63 + 11)):
        done = run(build / "onnx_loop", path, batch, seed)
        assert done.returncode == 0, done.stderr.decode()
        want = fs.Sampler(denoiser, plan, (batch, *SHAPE))(seed=seed)
        agree(np.frombuffer(done.stdout, np.float32).reshape(want.shape), want)
    assert run(build / "onnx_loop", tmp_path / "none.onnx", 1, 0).returncode == 1


DENOISER, PLAN = fs.Denoiser(onnx_model(), VP, "v"), fs.plan("ddim", fs.grid(VP, 2, "linspace"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"denoiser": lambda x, t: x}, TypeError, "denoiser must be a fewstep.Denoiser, got function"),
        ({"denoiser": fs.Denoiser(lambda x, t: x, VP)}, TypeError, "save_loop needs an ONNX network, got function"),
        ({"plan": "euler"}, TypeError, "plan must come from fewstep.plan"),
        ({"plan": fs.plan("euler", fs.grid(EDM, 3))}, ValueError, "plan was made on EDM.*trained on VP"),
        ({"path": "loop.pt2"}, ValueError, r"path loop.pt2: the file must end in \.onnx"),
        ({"path": 3}, TypeError, "path must be a path, got 3"),
        ({"noise": "seed"}, ValueError, "noise must be one of 'streams', 'input', got 'seed'"),
        ({"unroll": 1}, ValueError, "unroll must be True or False, got 1"),
        ({"dtype": "float16"}, ValueError, "dtype is the state's, float32 or float64, got float16"),
        ({"shape": 6}, TypeError, "shape must be the sizes of one sample"),
        ({"shape": (2, 0)}, ValueError, r"shape must be the sizes of one sample, ints of 1 or more, got \(2, 0\)"),
        ({"shape": (3, 2)}, ValueError, r"shape = \(3, 2\) is not a sample of the network, whose axes are \[2, 3\]"),
        (
            {"denoiser": DENOISER.with_guidance(fs.APG(2.0)), "unroll": False},
            ValueError,
            "unroll=False has no guidance rescale, APG or CFGZero",
        ),
        (
            {"denoiser": fs.Denoiser(onnx_model(), VP, "epsilon", variance="learned")},
            ValueError,
            "save_loop does not support variance='learned'",
        ),
        (
            {"denoiser": DENOISER.with_guidance(fs.CFG(np.array([1.0, 2.0])))},
            ValueError,
            "the guidance scale holds 2 samples",
        ),
        (
            {"denoiser": fs.Denoiser(onnx_model(batch=2), VP, "v", guidance=2.0)},
            ValueError,
            r"the network's batch is 2, and the branches of guidance are one batch of 2.*batched=False",
        ),
        (
            {"denoiser": fs.Denoiser(onnx_model(), VP, "v", guidance=2.0, null={"label": 3})},
            ValueError,
            r"the graph takes the conditions \['shift'\], null has \['label'\]",
        ),
        (
            {"denoiser": fs.Denoiser(onnx_model(cond=("streams",)), VP, "v"), "shape": SHAPE},
            ValueError,
            "the network's condition 'streams' has the name of an input or output of the loop",
        ),
        (
            {
                "denoiser": fs.Denoiser(onnx_model(t_kind=INT), VP, "v"),
                "plan": fs.plan("ddim", fs.grid(VP, 3, "logsnr")),
            },
            ValueError,
            "input 't' of the graph takes whole times, got .*round_times=True",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_no_file_can_hold_is_refused(change, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"denoiser": DENOISER, "plan": PLAN, "path": "loop.onnx"} | change
    with pytest.raises(error, match=message):
        save_loop(**arguments)
    assert not [*tmp_path.iterdir()]
