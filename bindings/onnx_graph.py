"""An ONNX graph as it is written: nodes and constants, the normals of `kernels.philox`, networks copied into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.bindings.onnx import OnnxModel
from fewstep.kernels import philox
from fewstep.solvers.options import needs

needs("fewstep.bindings.onnx_loop", "onnx", extra="onnx")

import onnx  # noqa: E402
from onnx import helper, inliner, numpy_helper, version_converter  # noqa: E402


class Graph:
    """Nodes in order, and the constants that they read. A body of a `Loop` shares the constants of its parent."""

    def __init__(self, parent: Graph | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = [] if parent is None else parent.initializers
        self.known: dict[tuple[str, tuple[int, ...], bytes], str] = {} if parent is None else parent.known
        self.counter: list[int] = [0] if parent is None else parent.counter

    def name(self, kind: str) -> str:
        self.counter[0] += 1
        return f"fewstep/{kind.lower()}_{self.counter[0]}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output; returns the output's name."""
        out = self.name(kind)
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def const(self, values: ArrayLike, dtype: str) -> str:
        array = np.ascontiguousarray(np.asarray(values, dtype))
        array = array.reshape(np.shape(values))  # ascontiguousarray gives a number an axis
        key = (dtype, array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = self.name("const")
            self.initializers.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def ints(self, *values: int) -> str:
        return self.const(values, "int64")

    def cast(self, value: str, dtype: str, known: str = "") -> str:
        """The value in another dtype; as it is if it is `known` to have it."""
        return value if dtype == known else self.op("Cast", value, to=tensor_type(dtype))

    def joined(self, *parts: str, axis: int = 0) -> str:
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def combine(self, sources: Mapping[int, str], w: NDArray[Any], shape: str) -> str:
        """sum_j w[j] sources[j], left to right, over the coefficients that are not 0."""
        total = ""
        for j, source in sources.items():
            if w[j] == 0.0:
                continue
            term = source if w[j] == 1.0 else self.op("Mul", source, self.const(w[j], w.dtype.name))
            total = self.op("Add", total, term) if total else term
        return total or self.op("Expand", self.const(0.0, w.dtype.name), shape)


def tensor_type(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def normals(g: Graph, streams: str, draws: str, domain: int, shape: str) -> str:
    """Standard normals (draws, *shape) at the addresses of `kernels.philox`: its words to the bit, in uint64.

    streams  (B, 3) int64, rows (seed low, seed high, sample); draws (D,) uint64; shape of x, int64

    The transform differs from the kernels' in the rounding of Log, Sin and Cos.
    """

    def u64(values: ArrayLike) -> str:
        return g.const(values, "uint64")

    mask, half = u64(philox.MASK), u64(32)
    elements = g.op("ReduceProd", g.op("Slice", shape, g.ints(1), g.ints(2**31)), keepdims=0)
    count = g.op("Div", g.op("Add", elements, g.const(3, "int64")), g.const(4, "int64"))
    blocks = g.cast(g.op("Range", g.const(0, "int64"), count, g.const(1, "int64")), "uint64")
    stream = g.op("Transpose", g.cast(streams, "uint64"), perm=[1, 0])  # (3, B)
    batch = g.op("Slice", shape, g.ints(0), g.ints(1))
    sizes = g.joined(g.op("Shape", draws), batch, g.op("Reshape", count, g.ints(1)))
    low_high = g.op("Slice", stream, g.ints(0), g.ints(2), g.ints(0))
    key = g.op("Reshape", low_high, g.ints(2, 1, -1, 1))
    sample = g.op("Reshape", g.op("Gather", stream, g.const(2, "int64"), axis=0), g.ints(-1, 1))
    # The counter's words 0 and 2, and 1 and 3, as pairs on the first axis.
    even = g.joined(*(g.op("Unsqueeze", g.op("Expand", c, sizes), g.ints(0)) for c in (blocks, sample)))
    draw = g.op("Reshape", draws, g.ints(1, -1, 1, 1))
    odd = g.joined(draw, g.op("Expand", u64(domain), g.op("Shape", draw)))
    for k in range(philox.ROUNDS):
        step = [[[[k * philox.W0]]], [[[k * philox.W1]]]]
        own = g.op("BitwiseAnd", g.op("Add", key, u64(step)), mask) if k else key
        product = g.op("Mul", g.op("Gather", even, g.ints(1, 0), axis=0), u64([[[[philox.M1]]], [[[philox.M0]]]]))
        high = g.op("BitShift", product, half, direction="RIGHT")
        even = g.op("BitwiseXor", g.op("BitwiseXor", high, odd), own)
        odd = g.op("BitwiseAnd", product, mask)

    def f32(value: float) -> str:
        return g.const(value, "float32")

    u = g.op("Add", g.op("Mul", g.cast(even, "float32"), f32(philox.U_SCALE)), f32(philox.U_HALF))
    radius = g.op("Sqrt", g.op("Mul", g.op("Log", u), f32(-2.0)))
    nearest = g.op("BitwiseAnd", g.op("Add", odd, u64(1 << 29)), mask)
    quarter = g.cast(g.op("BitShift", nearest, u64(30), direction="RIGHT"), "int64")
    rest = g.op("Sub", g.cast(g.op("BitwiseAnd", nearest, u64(0x3FFFFFFF)), "int64"), g.const(1 << 29, "int64"))
    angle = g.op("Mul", g.cast(rest, "float32"), f32(philox.TURN))
    s, c = g.op("Sin", angle), g.op("Cos", angle)
    turned_c, turned_s = (g.op("Gather", g.const(t, "float32"), quarter) for t in ([1, 0, -1, 0], [0, 1, 0, -1]))
    cos = g.op("Sub", g.op("Mul", turned_c, c), g.op("Mul", turned_s, s))
    sin = g.op("Add", g.op("Mul", turned_s, c), g.op("Mul", turned_c, s))
    pairs = g.joined(*(g.op("Unsqueeze", g.op("Mul", radius, v), g.ints(4)) for v in (cos, sin)), axis=4)
    rows = g.op("Transpose", pairs, perm=[1, 2, 3, 0, 4])  # (D, B, blocks, 2 pairs, 2)
    flat = g.op("Reshape", rows, g.joined(g.op("Shape", draws), batch, g.ints(-1)))
    own = g.op("Slice", flat, g.ints(0), g.op("Reshape", elements, g.ints(1)), g.ints(2))
    return g.op("Reshape", own, g.joined(g.op("Shape", draws), shape))


class Network:
    """An ONNX network whose nodes are copied for each call; the weights are there once."""

    def __init__(self, model: OnnxModel, proto: onnx.ModelProto, number: int, opset: int, g: Graph) -> None:
        self.model, self.prefix, self.calls = model, f"network{number}", 0
        own = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
        if own != opset:
            try:
                proto = version_converter.convert_version(proto, opset)
            except Exception as error:  # of C++, without a narrower class
                raise ValueError(
                    f"the network's file has opset {own}, the loop needs {opset}, and onnx cannot convert it "
                    f"({str(error).splitlines()[0]:.200}): export the network with opset={opset}"
                ) from error
        self.proto = proto
        self.shared: dict[str, str] = {}
        for tensor in (*proto.graph.initializer, *proto.graph.sparse_initializer):
            name = tensor.name if isinstance(tensor, onnx.TensorProto) else tensor.values.name
            self.shared[name] = f"{self.prefix}/{name}"
        for tensor in proto.graph.initializer:
            kept = onnx.TensorProto()
            kept.CopyFrom(tensor)
            kept.name = self.shared[tensor.name]
            g.initializers.append(kept)
        if proto.graph.sparse_initializer:
            raise ValueError("the network's file holds sparse weights: save them as dense ones")

    def __call__(self, g: Graph, x: str, t: str, cond: Mapping[str, str]) -> str:
        """The raw output's name, of one more call."""
        self.calls += 1
        here = f"{self.prefix}/{self.calls}"
        names = {**self.shared, self.model.x.name: x, self.model.t.name: t, **cond, "": ""}

        def renamed(name: str) -> str:
            return names.get(name) or (f"{here}/{name}" if name else "")

        def copied(node: onnx.NodeProto) -> onnx.NodeProto:
            new = onnx.NodeProto()
            new.CopyFrom(node)
            new.name = f"{here}/{node.name}" if node.name else ""
            new.ClearField("doc_string")  # exporters keep a stack trace in each node
            del new.metadata_props[:]
            new.input[:] = map(renamed, node.input)
            new.output[:] = map(renamed, node.output)
            for attribute in new.attribute:
                for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                    inner(graph)
            return new

        def inner(graph: onnx.GraphProto) -> None:
            nodes = [copied(node) for node in graph.node]
            del graph.node[:], graph.value_info[:]
            graph.node.extend(nodes)
            for port in (*graph.input, *graph.output, *graph.initializer):
                port.name = renamed(port.name)

        g.nodes += [copied(node) for node in self.proto.graph.node]
        return renamed(self.model.output.name)


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A network without functions of its own.

    Two exports of one architecture name theirs alike, and the version converter drops them.
    """
    return inliner.inline_local_functions(proto, convert_version=True) if proto.functions else proto
