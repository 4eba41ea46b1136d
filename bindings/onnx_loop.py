"""A whole sampling loop as one ONNX file: network, solver and noise, which ONNX Runtime runs alone.

    denoiser = fewstep.Denoiser(OnnxModel("unet.onnx"), fewstep.VP.linear(), predicts="v")
    save_loop(denoiser, fewstep.plan("unipc", grid), "loop.onnx")
    onnxruntime.InferenceSession("loop.onnx").run(["sample"], {"x": latent, "label": labels})

A stage is its row of the tables over the slots, the network's outputs and the noise, as products and sums; the file
holds the network's weights once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.bindings.onnx import OnnxModel, Port, by_name
from fewstep.bindings.onnx_graph import Graph, Network, inlined, normals, tensor_type
from fewstep.kernels import layout, philox
from fewstep.solvers.files import check_target, write_whole
from fewstep.solvers.options import flag, instance, one_of
from fewstep.solvers.plans.ends import step_ends
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.tables import StageTable, init_table, stage_tables
from fewstep.solvers.run.arrays import DType, state_dtype
from fewstep.solvers.run.checks import check_plan
from fewstep.solvers.run.denoising import Threshold, check_denoiser, time_dtype

# After `onnx_graph`, which says how to install it.
import onnx  # isort: skip
from onnx import helper  # isort: skip

# Draws of noise that are made at once: fewer nodes than one by one, and less memory than all of them.
_DRAWS = 8
# Noise needs BitwiseXor, and reductions ReduceMean over given axes; everything else here is older.
_OPSET, _NEWER = 13, 18


class _Loop:
    """What both forms of the loop need: the denoiser's networks, conditions, tables and noise, as names of a graph."""

    def __init__(self, denoiser: Denoiser, plan: Plan, dtype: str, noise: str, shape: Sequence[int] | None) -> None:
        self.denoiser, self.plan, self.dtype = denoiser, plan, dtype
        self.model_dtype = denoiser.model_dtype(dtype)
        if self.model_dtype == "bfloat16":
            raise ValueError("the denoiser's dtype is bfloat16, which OnnxModel does not take: use float16 or float32")
        self.program = compile_plan(plan)
        self.tables = stage_tables(self.program, denoiser, dtype)
        if any(len(table.w) > 1 for table in self.tables):
            raise ValueError("the guidance has a scale for each sample, and the file's batch is free: use one number")
        self.draws = [0] * self.program.init.noisy + [table.draw for table in self.tables if table.draw is not None]
        self.drawn = shape is not None or (bool(self.draws) and noise == "streams")
        self.main = g = Graph()
        self.models: list[OnnxModel] = []  # of each branch
        for network in denoiser.networks:
            if not isinstance(network, OnnxModel):
                raise TypeError(
                    f"save_loop needs an ONNX network, got {type(network).__name__}: write a torch module with "
                    "export_onnx, then Denoiser(OnnxModel(path), ...)"
                )
            self.models.append(network)
        models = {id(model): model for model in self.models}
        protos = [inlined(model.proto()) for model in models.values()]
        imports = [{o.domain: o.version for o in proto.opset_import} for proto in protos]
        self.opset = max(
            _NEWER if self.drawn or denoiser.reduces else _OPSET,
            *(own.get("", own.get("ai.onnx", 1)) for own in imports),
        )
        self.domains = {domain: v for own in imports for domain, v in own.items() if domain not in ("", "ai.onnx")}
        if any(own.get(domain, v) != v for domain, v in self.domains.items() for own in imports):
            raise ValueError(
                "the networks of the guidance use different versions of an operator set: export them alike"
            )
        self.ir_version = max(8, *(proto.ir_version for proto in protos))
        self.networks = {
            key: Network(models[key], proto, i, self.opset, g)
            for i, (key, proto) in enumerate(zip(models, protos, strict=True))
        }
        self.inputs: list[onnx.ValueInfoProto] = []
        self.model = self.models[-1]
        # Of a network of two times: the name of the second one, and its number in each call.
        self.end, self.ends = "", list[float]()
        if isinstance(denoiser, FlowMapDenoiser):
            self.end, self.ends = denoiser.end, [denoiser.end_time(to) for to in step_ends(plan)]
            if self.end not in self.model.cond:
                raise ValueError(
                    f"the graph has no input {self.end!r} for the end of a step: {sorted(self.model.cond)}"
                )
        self._open(noise, shape)
        self.conds = self._conditions()

    def _input(self, name: str, dtype: str, shape: Sequence[int | str | None]) -> str:
        if name == "sample" or any(port.name == name for port in self.inputs):
            raise ValueError(
                f"the network's condition {name!r} has the name of an input or output of the loop: rename it"
            )
        self.inputs.append(helper.make_tensor_value_info(name, tensor_type(dtype), list(shape)))
        return name

    def _open(self, noise: str, shape: Sequence[int] | None) -> None:
        """The inputs of the loop itself: x or streams, and noise."""
        g, start = self.main, self.plan.start
        axes = [*self.model.x.shape]
        self.batch = axes[0] if isinstance(axes[0], int) else "batch"
        self.free = [self.batch, *axes[1:]]
        self.noise = ""
        self.streams = self._input("streams", "int64", [self.batch, 3]) if self.drawn else ""
        if shape is None:
            self.x = self._input("x", self.dtype, self.free)
            self.shape = g.op("Shape", self.x)
        else:
            wanted = axes[1:]
            if len(shape) != len(wanted) or any(
                isinstance(a, int) and a != b for a, b in zip(wanted, shape, strict=False)
            ):
                raise ValueError(f"shape = {tuple(shape)} is not a sample of the network, whose axes are {wanted}")
            batch = g.op("Slice", g.op("Shape", self.streams), g.ints(0), g.ints(1))
            self.shape = g.joined(batch, g.ints(*shape))
            latent = normals(g, self.streams, g.const([0], "uint64"), philox.LATENT, self.shape)
            latent = g.cast(g.op("Reshape", latent, self.shape), self.dtype, "float32")
            self.x = g.op("Mul", latent, g.const(start.sigma, self.dtype))
        if self.draws and noise == "input":
            self.noise = self._input("noise", self.dtype, [len(self.draws), *self.free])

    def _conditions(self) -> list[dict[str, str]]:
        """For each branch the names that hold its conditions."""
        denoiser, found = self.denoiser, list[dict[str, str]]()
        for j, network in enumerate(self.models):
            last = j == denoiser.branches - 1
            ports = {name: port for name, port in network.cond.items() if name != self.end}
            if not last and denoiser.null is not None and denoiser.branches == 2:
                given = by_name(denoiser.null)
                if given.keys() != ports.keys():
                    raise ValueError(f"the graph takes the conditions {sorted(ports)}, null has {sorted(given)}")
                values = {name: np.asarray(value) for name, value in given.items()}
                found.append({n: self.main.const(v, ports[n].dtype.name) for n, v in values.items()})
                continue
            shared = denoiser.guidance is not None and denoiser.guidance.one_condition
            if shared and network.cond.keys() != self.model.cond.keys():
                raise ValueError(
                    f"the networks of the guidance take different conditions, {sorted(network.cond)} and "
                    f"{sorted(self.model.cond)}: give them the same inputs"
                )
            prefix = "" if last or shared else "null." if denoiser.branches == 2 else f"branch{j}."
            own = {name: prefix + name for name in ports}
            for name, port in ports.items() if not (shared and found) else ():
                axes = [self.batch, *port.shape[1:]] if port.shape else []
                self._input(own[name], port.dtype.name, axes)
            found.append(own)
        return found

    def call(self, g: Graph, x_in: str, times: Sequence[str], branches: Sequence[int]) -> list[str]:
        """The raw outputs of these branches in the state's dtype.

        x_in   in the model's dtype
        times  t, and for a network of two times the end of the step: (1,) in the dtypes of their ports
        """
        raws: list[str] = []
        networks = self.models
        groups = [[j] for j in branches]
        if self.denoiser.batched:
            groups = [list(own) for _, own in groupby(branches, key=lambda j: id(networks[j]))]
        for group in groups:
            network = networks[group[0]]
            wide = len(group)
            if wide > 1 and isinstance(self.batch, int):
                raise ValueError(
                    f"the network's batch is {self.batch}, and the branches of guidance are one batch of {wide}: use "
                    "Denoiser(batched=False)"
                )
            x = g.cast(g.joined(*[x_in] * wide), network.x.dtype.name, self.model_dtype)
            batch = g.op("Slice", g.op("Shape", x), g.ints(0), g.ints(1))
            if len(network.t.shape) > 1:
                raise ValueError(
                    f"the time input {network.t.name!r} has {len(network.t.shape)} axes; the loop's is (B,)"
                )
            own = self._for_all(g, times[0], network.t, batch)
            cond = {
                name: self._for_all(g, times[1], port, batch)
                if name == self.end
                else self.conds[group[0]][name]
                if wide == 1
                else g.joined(*(self._full(g, self.conds[j][name], port.name, len(port.shape)) for j in group))
                for name, port in network.cond.items()
            }
            raw = self.networks[id(network)](g, x, own, cond)
            raw = g.cast(raw, self.dtype, network.output.dtype.name)
            if wide == 1:
                raws.append(raw)
                continue
            apart = g.op("Reshape", raw, g.joined(g.ints(wide), self.shape))
            raws += [g.op("Gather", apart, g.const(i, "int64"), axis=0) for i in range(wide)]
        return raws

    def _full(self, g: Graph, value: str, name: str, axes: int) -> str:
        """A condition with the batch as its first axis, if it had 1 there."""
        if axes == 0:
            raise ValueError(f"the condition {name!r} has no batch axis: use Denoiser(batched=False)")
        rest = g.op("Slice", g.op("Shape", value), g.ints(1), g.ints(2**31))
        return g.op("Expand", value, g.joined(g.op("Slice", self.shape, g.ints(0), g.ints(1)), rest))

    def _for_all(self, g: Graph, value: str, port: Port, batch: str) -> str:
        """A number (1,) for every sample of a call, or as the one number that a port without an axis takes."""
        return g.op("Expand", value, batch) if port.shape else g.op("Reshape", value, self.main.const([], "int64"))

    def times(self, k: int) -> list[tuple[float, str]]:
        """What the network gets in call k for t, and for the end of the step if it takes that: numbers and dtypes."""
        found, kind = [], time_dtype(self.denoiser, self.model_dtype)
        for t, port in [
            (self.tables[k].t, self.model.t),
            *((s, self.model.cond[self.end]) for s in self.ends[k : k + 1]),
        ]:
            value = float(np.asarray(t, kind))
            if port.dtype.kind == "i" and value != round(value):
                raise ValueError(
                    f"input {port.name!r} of the graph takes whole times, got {value:.9g}: make the grid with "
                    "round_times=True"
                )
            found.append((value, port.dtype.name))
        return found

    def draw(self, g: Graph, number: int) -> str:
        """The normals of a draw, like x."""
        if self.noise:
            return g.op("Gather", self.noise, g.const(self.draws.index(number), "int64"), axis=0)
        at = self.draws.index(number)
        first = at - at % _DRAWS
        group = self.draws[first : first + _DRAWS]
        if first == at:
            self._group = normals(g, self.streams, g.const(group, "uint64"), philox.STEP, self.shape)
        own = g.op("Gather", self._group, g.const(at - first, "int64"), axis=0)
        return g.cast(own, self.dtype, "float32")

    def start(self) -> str:
        """x after the init row."""
        w = init_table(self.program.init, self.dtype)[0, 0]
        sources = {0: self.x}
        if self.program.init.noisy:
            sources[layout.NOISE] = self.draw(self.main, 0)
        return self.main.combine(sources, w, self.shape)

    def unrolled(self) -> str:
        """The stages one after the other; returns the sample's name."""
        g, buffers = self.main, dict[int, str]()
        buffers[self.program.init.writes[0]] = self.start()
        for k, table in enumerate(self.tables):
            x = buffers[self.program.buffer_of_x(k - 1)]
            x_in = x if table.c_in == 1.0 else g.op("Mul", x, g.const(table.c_in, self.dtype))
            times = [g.const([value], kind) for value, kind in self.times(k)]
            raws = self.call(g, g.cast(x_in, self.model_dtype, self.dtype), times, table.branches)
            if table.average in buffers:
                raws.append(buffers[table.average])
            sources = {j: buffers[b] for j, b in enumerate(table.slots) if b is not None}
            sources |= {layout.RAW + j: raw for j, raw in enumerate(raws)}
            if table.p is not None or table.blend is not None:
                sources[layout.PREDICTION] = self._prediction(g, table, sources)
            if table.draw is not None:
                sources[layout.NOISE] = self.draw(g, table.draw)
            new = [g.combine(sources, row, self.shape) for row in table.w[0]]
            buffers.update(zip(table.writes, new, strict=True))
        return buffers[self.program.result]

    def _prediction(self, g: Graph, table: StageTable, sources: Mapping[int, str]) -> str:
        """The x0 prediction, clipped."""
        places = [0, *range(layout.RAW, layout.RAW + layout.RAWS)]
        own = {i: sources[j] for i, j in enumerate(places) if j in sources}
        if table.blend is None:
            assert table.p is not None
            return self.clipped(g, g.combine(own, table.p[0], self.shape))
        terms = [g.op("Mul", own[i], c) for i, c in self._blended(g, table.blend[0], own).items()]
        return self.clipped(g, reduce(lambda a, b: g.op("Add", a, b), terms))

    def _blended(self, g: Graph, blend: NDArray[np.float64], own: Mapping[int, str]) -> dict[int, str]:
        """The coefficients of the prediction that depend on whole samples, (B, 1, ...): `kernels.naive.blend`."""

        def number(value: float) -> str:
            return g.const(value, "float64")

        batch = g.op("Slice", self.shape, g.ints(0), g.ints(1))
        rows = {
            i: g.op("Reshape", g.cast(v, "float64", self.dtype), g.joined(batch, g.ints(-1))) for i, v in own.items()
        }
        whole = g.op("Shape", rows[min(rows)])
        a, b = (g.combine(rows, blend[first : first + 4], whole) for first in (layout.MIX_A, layout.MIX_B))

        def total(kind: str, value: str) -> str:
            return g.op(kind, value, g.ints(1), keepdims=1)

        def deviation(value: str) -> str:
            apart = g.op("Sub", value, total("ReduceMean", value))
            return g.op("Sqrt", total("ReduceMean", g.op("Mul", apart, apart)))

        def ratio(over: str, under: str, above: str, otherwise: float) -> str:
            """over / under where under > above, else the number."""
            there = g.op("Greater", under, above)
            return g.op("Where", there, g.op("Div", over, g.op("Where", there, under, number(1.0))), number(otherwise))

        phi, radius = float(blend[layout.PHI]), float(blend[layout.RADIUS])
        spread = ratio(deviation(b), deviation(a), number(0.0), 1.0)
        f = g.op("Add", g.op("Mul", spread, number(phi)), number(1.0 - phi))
        if radius < math.inf:
            norm = g.op("Sqrt", total("ReduceSum", g.op("Mul", a, a)))
            f = g.op("Mul", f, ratio(number(radius), norm, number(radius), 1.0))
        q = ratio(total("ReduceSum", g.op("Mul", a, b)), total("ReduceSum", g.op("Mul", b, b)), number(0.0), 0.0)
        found = {}
        axes = self._per_sample(g)
        for i in own:
            fixed, scaled, projected = (float(blend[j + i]) for j in (layout.FIXED, layout.SCALED, layout.PROJECTED))
            inner = g.op("Add", g.op("Mul", q, number(projected)), number(scaled))
            c = g.op("Add", g.op("Mul", f, inner), number(fixed))
            found[i] = g.op("Reshape", g.cast(c, self.dtype, "float64"), axes)
        return found

    def clipped(self, g: Graph, m: str) -> str:
        bound, threshold = self.denoiser.bound, self.denoiser.threshold
        if threshold is not None:
            return self._thresholded(g, m, threshold)
        if bound is None:
            return m
        return g.op("Clip", m, g.const(-bound, self.dtype), g.const(bound, self.dtype))

    def _thresholded(self, g: Graph, m: str, threshold: Threshold) -> str:
        """clip(m, -s, s) / s, s the quantile of |m| over a sample, between 1 and the maximum."""
        batch = g.op("Slice", self.shape, g.ints(0), g.ints(1))
        rows = g.op("Reshape", g.op("Abs", m), g.joined(batch, g.ints(-1)))
        last = g.op("Sub", g.op("Slice", g.op("Shape", rows), g.ints(1), g.ints(2)), g.ints(1))
        position = g.op("Mul", g.cast(last, "float64"), g.const(threshold.quantile, "float64"))
        low = g.op("Floor", position)
        share = g.cast(g.op("Sub", position, low), self.dtype, "float64")
        index = g.cast(low, "int64")
        ascending = g.name("sorted")
        count = g.op("Add", last, g.ints(1))
        g.nodes.append(helper.make_node("TopK", [rows, count], [ascending, g.name("places")], axis=1, largest=0))
        below = g.op("Gather", ascending, index, axis=1)
        above = g.op("Gather", ascending, g.op("Min", g.op("Add", index, g.ints(1)), last), axis=1)
        s = g.op("Add", below, g.op("Mul", g.op("Sub", above, below), share))
        s = g.op("Clip", s, g.const(1.0, self.dtype), g.const(threshold.maximum, self.dtype))
        s = g.op("Reshape", s, self._per_sample(g))
        return g.op("Div", g.op("Min", g.op("Max", m, g.op("Neg", s)), s), s)

    def _per_sample(self, g: Graph) -> str:
        """The shape (B, 1, ...) of a number for each sample."""
        batch, inner = g.op("Slice", self.shape, g.ints(0), g.ints(1)), g.op("Shape", self.shape)
        return g.op("Concat", batch, g.op("Expand", g.ints(1), g.op("Sub", inner, g.ints(1))), axis=0)

    def rolled(self) -> str:
        """The stages as iterations of a `Loop`, which carries all buffers; returns the sample's name.

        A stage is one matrix product: rows over (buffers, raw outputs, prediction, noise), each flattened.
        """
        g, dtype, size = self.main, self.dtype, self.program.buffers
        if len({table.branches for table in self.tables}) > 1:
            raise ValueError(
                "unroll=False makes the same calls in every step, and the guidance is off in some: use unroll=True"
            )
        if any(table.blend is not None for table in self.tables):
            raise ValueError(
                "unroll=False has no guidance rescale, APG or CFGZero, which reduce whole samples: unroll=True"
            )
        branches, clip, noisy = self.tables[0].branches, self.tables[0].p is not None, bool(self.draws)
        w, p, read = self._matrices(len(branches), clip, noisy)
        times = [self.times(k) for k in range(len(self.tables))]
        flat = g.ints(1, -1)
        begun = g.op("Reshape", self.start(), flat)
        zero = g.op("Mul", begun, g.const(0.0, dtype)) if size > 1 else ""
        first = g.joined(*(begun if b == self.program.init.writes[0] else zero for b in range(size)))
        body = Graph(g)
        i, going, state = (body.name(part) for part in ("iteration", "going", "state"))

        def at(table: ArrayLike, kind: str = dtype) -> str:
            return body.op("Gather", g.const(table, kind), i, axis=0)

        x_in = body.op("Reshape", body.op("MatMul", at(read), state), self.shape)
        now = [
            body.op("Reshape", at([value for value, _ in column], column[0][1]), g.ints(1))
            for column in zip(*times, strict=True)
        ]
        made = self.call(body, body.cast(x_in, self.model_dtype, dtype), now, branches)
        sources = [state, *(body.op("Reshape", raw, flat) for raw in made)]
        if clip:
            m = body.op("Reshape", body.op("MatMul", at(p), body.joined(*sources)), self.shape)
            sources.append(body.op("Reshape", self.clipped(body, m), flat))
        if noisy:
            # A stage that draws nothing has the coefficient 0, whatever is drawn for it.
            if self.noise:
                places = [0 if t.draw is None else self.draws.index(t.draw) for t in self.tables]
                z = body.op("Gather", self.noise, at(places, "int64"), axis=0)
            else:
                numbers = [0 if t.draw is None else t.draw for t in self.tables]
                own = body.op("Reshape", at(numbers, "uint64"), g.ints(1))
                z = body.cast(normals(body, self.streams, own, philox.STEP, self.shape), dtype, "float32")
            sources.append(body.op("Reshape", z, flat))
        new = body.op("MatMul", at(w), body.joined(*sources))
        on = body.op("Identity", going)
        value = helper.make_tensor_value_info
        axes: list[int | str | None] = [size, "elements"]
        count, true = g.const(len(self.tables), "int64"), g.const(True, "bool")
        result = g.const(self.program.result, "int64")
        # Weights belong to the body: ONNX Runtime fuses and packs less where they come from outside.
        outside = {count, true, result}.union(*(node.input for node in g.nodes))
        graph = helper.make_graph(
            body.nodes,
            "stage",
            [
                value(i, tensor_type("int64"), []),
                value(going, tensor_type("bool"), []),
                value(state, tensor_type(dtype), axes),
            ],
            [value(on, tensor_type("bool"), []), value(new, tensor_type(dtype), axes)],
            [tensor for tensor in g.initializers if tensor.name not in outside],
        )
        g.initializers[:] = [tensor for tensor in g.initializers if tensor.name in outside]
        last = g.op("Loop", count, true, first, body=graph)
        return g.op("Reshape", g.op("Gather", last, result, axis=0), self.shape)

    def _matrices(self, raws: int, clip: bool, noisy: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Of each stage: buffers from sources, the prediction from (buffers, raw outputs), x_in from buffers."""
        size, stages = self.program.buffers, len(self.tables)
        w = np.zeros((stages, size, size + raws + clip + noisy))
        p, read = np.zeros((stages, 1, size + raws)), np.zeros((stages, 1, size))
        for k, table in enumerate(self.tables):
            w[k, :, :size] = np.eye(size)  # what no row writes stays
            for row, buffer in zip(table.w[0], table.writes, strict=True):
                w[k, buffer] = 0.0
                for j, b in enumerate(table.slots):
                    if b is not None:
                        w[k, buffer, b] += row[j]
                w[k, buffer, size : size + raws] = row[layout.RAW : layout.RAW + raws]
                if clip:
                    w[k, buffer, size + raws] = row[layout.PREDICTION]
                if noisy:
                    w[k, buffer, -1] = row[layout.NOISE]
            x = self.program.buffer_of_x(k - 1)
            read[k, 0, x] = table.c_in
            if table.p is not None:
                p[k, 0, x], p[k, 0, size:] = table.p[0, 0], table.p[0, 1 : 1 + raws]
        return w, p, read

    def model_of(self, sample: str) -> onnx.ModelProto:
        g = self.main
        g.nodes.append(helper.make_node("Identity", [sample], ["sample"]))
        graph = helper.make_graph(
            g.nodes,
            f"{self.plan.solver} sampling loop",
            self.inputs,
            [helper.make_tensor_value_info("sample", tensor_type(self.dtype), self.free)],
            g.initializers,
        )
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, v) for d, v in self.domains.items())]
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version, producer_name="fewstep")
        start = self.plan.start
        facts = {"solver": self.plan.solver, "calls": self.plan.nfe, "alpha": start.alpha, "sigma": start.sigma}
        helper.set_model_props(model, {name: str(fact) for name, fact in facts.items()})
        return model


def save_loop(
    denoiser: Denoiser,
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    noise: str = "streams",
    shape: Sequence[int] | None = None,
    unroll: bool = True,
    dtype: DType = "float32",
) -> Path:
    """Write the loop of a denoiser on an `OnnxModel` as one ONNX file. Returns the path.

    path    ends in ".onnx"; the file is written atomically
    noise   of plans that draw: "streams" computes the normals of `Sampler` in the graph (Philox; needs ONNX Runtime
            1.23 or newer), "input" takes them as an input
    shape   of one sample, such as (1, 8, 8): the file then draws the latent, and has no input "x"
    unroll  True writes one call of the network after the other; False a `Loop`, whose file and start do not grow with
            the number of steps
    dtype   of the state: float32 or float64

    Inputs of the file, whose batch is free if the network's is:

    x        (B, ...) at the grid's first point, of scale `plan.start.sigma`
    streams  (B, 3) int64, `philox.streams(seed, B)`: low and high 32 bits of a sample's seed, and its number
    noise    (draws, B, ...) normals, one like x per draw in order
    others   the network's conditions by their names; under guidance of two branches those of the null branch as
             "null.label", unless the denoiser holds `null`; of more branches as "branch0.label", "branch1.label". The
             ends of the steps, which a `FlowMapDenoiser` takes from the plan, are in the file

    The output is "sample". The metadata holds solver, calls of the network, and alpha and sigma of the start.

    Raises TypeError for another network, ValueError for a guidance with a scale for each sample, for a network that
    predicts its variance, and with unroll=False for guidances that reduce whole samples (rescale, APG, CFGZero) or are
    off in some calls.
    """
    check_denoiser(denoiser)
    check_plan(plan, denoiser)
    one_of("noise", noise, ("streams", "input"))
    flag("unroll", unroll)
    kind = state_dtype(dtype)
    if shape is not None:
        instance("shape", shape, (tuple, list), "the sizes of one sample, (1, 8, 8) say")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
            raise ValueError(f"shape must be the sizes of one sample, ints of 1 or more, got {shape!r:.80}")
    if denoiser.variance is not None:
        raise ValueError(
            f"save_loop does not support variance={denoiser.variance!r}: use fewstep.Sampler, or a network that "
            "returns only its prediction"
        )
    instance("path", path, (str, os.PathLike), "a path")
    target = Path(path)
    check_target(target, (".onnx",))
    loop = _Loop(denoiser, plan, kind, noise, shape)
    model = loop.model_of(loop.unrolled() if unroll else loop.rolled())
    if model.ByteSize() >= 2**31:
        raise ValueError(
            f"the file would have {model.ByteSize() / 2**30:.1f} GiB, and an ONNX file holds 2: use fewstep.Sampler "
            "over OnnxModel, whose weights may lie in files of their own"
        )
    write_whole(target, lambda to: onnx.save(model, str(to)))
    return target
