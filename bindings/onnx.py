"""Any ONNX network as a model on ONNX Runtime, with bound inputs and outputs: no allocation per call, no torch.

    network = OnnxModel("unet.onnx")
    denoiser = fewstep.Denoiser(network, fewstep.VP.linear(), predicts="v")
    images = fewstep.sample(denoiser, shape=(4, 1, 8, 8), seed=0, cond={"label": labels})

A call reads the loop's own memory where dtypes agree, and writes into one of a few persistent buffers, which the step
kernel reads. `export_onnx` makes the file from a torch module.
"""

from __future__ import annotations

import importlib
import itertools
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from fewstep.solvers.cache import Cache
from fewstep.solvers.files import check_target, write_whole
from fewstep.solvers.run.arrays import NumpyFrame
from fewstep.solvers.run.conditions import Keys, leaves, mapped

if TYPE_CHECKING:
    import onnx
    import torch

# The ONNX tensor types that the loop supports.
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}

# Output buffers: one per branch of guidance, and one in reserve.
_KEPT = 4
# Shapes of samples for which a thread keeps them.
_SHAPES = 4


class _NodeArg(Protocol):
    """ONNX Runtime's description of an input or output."""

    name: str
    type: str
    shape: list[int | str | None]


@dataclass(frozen=True)
class Port:
    """An input or output of the graph. shape: ints, and names or None for free axes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, found: _NodeArg) -> Port:
        if found.type not in DTYPES:
            raise ValueError(f"{found.name!r} of the graph is a {found.type}; the loop supports {', '.join(DTYPES)}")
        return cls(found.name, np.dtype(DTYPES[found.type]), tuple(found.shape))


class OnnxModel:
    """model(x, t, **cond) -> raw on NumPy arrays, run by ONNX Runtime.

    graph      path or bytes of an ONNX file
    x, t       names of the graph's inputs for sample and time; by default the first and second
    output     name of the raw prediction; by default the first output
    providers  ONNX Runtime's execution providers, in order of preference; arrays stay on the host
    threads    per operator; None is ONNX Runtime's default

    All other inputs are conditions under their own names. A nested condition is an input per leaf:
    cond={"added": {"pooled": p}} feeds "added.pooled". x is (B, ...), t is (B,), or a scalar if the graph's t has no
    axis: samples of different times, as of adaptive steps or an `Engine`, are then refused. Arrays are cast to the
    graph's dtypes; an integer input requires whole numbers.

    A returned array is overwritten by the fourth call after it in the same thread.

    Raises FileNotFoundError, ValueError for a graph without these inputs and outputs, ImportError without ONNX Runtime.
    """

    def __init__(
        self,
        graph: str | os.PathLike[str] | bytes,
        *,
        x: str | None = None,
        t: str | None = None,
        output: str | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        try:
            onnxruntime = importlib.import_module("onnxruntime")
        except ImportError:
            raise ImportError("OnnxModel needs ONNX Runtime: pip install 'fewstep[onnx]'") from None
        if not isinstance(graph, bytes) and not Path(graph).is_file():
            raise FileNotFoundError(f"no ONNX file at {os.fspath(graph)}")
        self._made = partial(OnnxModel, x=x, t=t, output=output, providers=providers, threads=threads)
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        source = graph if isinstance(graph, bytes) else os.fspath(graph)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's error classes share no narrower base
            raise ValueError(f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0]}") from error
        inputs = {port.name: port for port in map(Port.of, self.session.get_inputs())}
        outputs = {port.name: port for port in map(Port.of, self.session.get_outputs())}
        names = list(inputs)
        if len(names) < 2:
            raise ValueError(f"the graph has the inputs {names}: a denoiser needs at least x and t")
        self.x = inputs[_named("x", x, names)]
        self.t = inputs[_named("t", t, [n for n in names if n != self.x.name])]
        self.output = outputs[_named("output", output, list(outputs))]
        self.cond = {name: port for name, port in inputs.items() if name not in (self.x.name, self.t.name)}
        self.graph = graph
        self.frame = NumpyFrame()
        self._local = threading.local()

    def __repr__(self) -> str:
        name = "" if isinstance(self.graph, bytes) else f"{os.fspath(self.graph)!r}, "
        cond = f", cond={sorted(self.cond)}" if self.cond else ""
        return f"OnnxModel({name}x={self.x.name!r}, t={self.t.name!r}, output={self.output.name!r}{cond})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles load the graph anew: sessions cannot be copied."""
        return self._made, (self.graph,)

    def __call__(self, x: np.ndarray, t: np.ndarray, /, **cond: Any) -> np.ndarray:
        """The raw prediction, of x's shape or the one declared in the graph, from x (B, ...), t (B,) and conditions."""
        given = by_name(cond)
        if given.keys() != self.cond.keys():
            raise ValueError(f"the graph takes the conditions {sorted(self.cond)}, got {sorted(given)}")
        work = self._work(x.shape)
        time = np.asarray(t)
        if not self.t.shape:
            if np.any(time != time[0]):
                raise ValueError(
                    f"input {self.t.name!r} of the graph is one time for the whole batch, got {time.min():.9g} to "
                    f"{time.max():.9g}: export the network with a time for each sample, t of shape (batch,)"
                )
            time = time[0]
        work.bind(self.t, time)
        work.bind(self.x, x)
        for name, port in self.cond.items():
            work.bind(port, given[name])
        return work.run()

    def proto(self) -> onnx.ModelProto:
        """The graph itself, read anew."""
        import onnx

        if isinstance(self.graph, bytes):
            return onnx.load_model_from_string(self.graph)
        return onnx.load_model(os.fspath(self.graph))

    def _work(self, shape: tuple[int, ...]) -> _Work:
        """This thread's buffers for samples of that shape."""
        works: Cache[_Work] | None = getattr(self._local, "works", None)
        if works is None:
            works = self._local.works = Cache(_SHAPES)
        return works.get(shape, lambda: _Work(self.session, self.output, self.t, shape))


class _Work:
    """One binding of a session, with buffers for its outputs and for inputs that need a cast.

    It knows nothing of its model, which holds it and is freed, with the session, as soon as nobody uses it.

    output, t  the ports of the result and the time; shape: of the samples
    """

    def __init__(self, session: Any, output: Port, t: Port, shape: tuple[int, ...]) -> None:
        self.session, self.output, self.t, self.binding = session, output, t, session.io_binding()
        stated = output.shape if len(output.shape) == len(shape) else shape
        sizes = [size if isinstance(size, int) else own for size, own in zip(stated, shape, strict=True)]
        self.outputs = itertools.cycle([NumpyFrame().empty(sizes, output.dtype.name) for _ in range(_KEPT)])
        self.casts: dict[str, np.ndarray] = {}
        self.held: list[np.ndarray] = []  # until the run

    def bind(self, port: Port, value: ArrayLike) -> None:
        array = np.asarray(value)
        if array.dtype != port.dtype or not array.flags.c_contiguous:
            if port.dtype.kind == "i" and array.dtype.kind == "f" and not np.all(array == np.rint(array)):
                what = "times" if port is self.t else "numbers"
                hint = ": make the grid with round_times=True" if port is self.t else ""
                bad = array[array != np.rint(array)].flat[0]
                raise ValueError(f"input {port.name!r} of the graph takes whole {what}, got {bad:.9g}{hint}")
            own = self.casts.get(port.name)
            if own is None or own.shape != array.shape:
                own = self.casts[port.name] = np.empty(array.shape, port.dtype)
            np.copyto(own, array, casting="unsafe")
            array = own
        self.held.append(array)
        self.binding.bind_input(port.name, "cpu", 0, port.dtype, array.shape, array.ctypes.data)

    def run(self) -> np.ndarray:
        out: np.ndarray = next(self.outputs)
        self.binding.bind_output(self.output.name, "cpu", 0, self.output.dtype, out.shape, out.ctypes.data)
        self.session.run_with_iobinding(self.binding)
        self.held.clear()
        return out


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path))


def by_name(cond: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a condition by their names in a graph."""
    return {_dotted(path): value for path, value in leaves(cond)}


def _named(what: str, asked: str | None, names: Sequence[str]) -> str:
    """The name that was asked for, by default the first."""
    if asked is None:
        return names[0]
    if asked not in names:
        raise ValueError(f"{what} = {asked!r} is not in the graph, which has {', '.join(names)}")
    return asked


def export_onnx(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    x: torch.Tensor,
    cond: Mapping[str, Any] | None = None,
    *,
    opset: int = 17,
) -> None:
    """Write a torch module, module(x, t, **cond) -> raw, as an ONNX file with a free batch axis.

    x     (B, ...) an example of the sample
    cond  examples of the conditions by the names of the module's arguments; a nested one ({"added": {"pooled": p}})
          becomes inputs of its leaves ("added.pooled")

    Uses torch's TorchScript exporter, which needs no further package. The file is written atomically. Raises TypeError
    unless it is a module that returns a tensor, ValueError for one in bfloat16.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}: call it in a module's forward")
    if any(weights.dtype == torch.bfloat16 for weights in module.parameters()):
        raise ValueError("OnnxModel takes no bfloat16 network: export copy.deepcopy(module).float(), or .half()")
    check_target(Path(path), (".onnx",))
    given = by_name(cond or {})
    t = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    names = ["x", "t", *given]

    class Flat(torch.nn.Module):
        """The module with the leaves of its conditions as arguments."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor, t: torch.Tensor, *values: torch.Tensor) -> Any:
            own = dict(zip(given, values, strict=True))
            raw = self.module(x, t, **mapped(lambda path, _: own[_dotted(path)], dict(cond or {}), path=()))
            if not isinstance(raw, torch.Tensor):
                raise TypeError(
                    f"the module returned {type(raw).__name__}: export a module whose forward returns the raw "
                    "prediction alone, such as self.network(x, t, **cond).sample"
                )
            return raw

    def write(to: Path) -> None:
        torch.onnx.export(
            Flat().train(module.training),
            (x, t, *given.values()),
            str(to),
            input_names=names,
            output_names=["raw"],
            dynamic_axes={name: {0: "batch"} for name in (*names, "raw")},
            opset_version=opset,
            dynamo=False,
        )

    with warnings.catch_warnings():
        # Of torch, about the exporter that this function has chosen.
        for text in ("You are using the legacy TorchScript-based ONNX export", "The feature will be removed"):
            warnings.filterwarnings("ignore", text, DeprecationWarning)
        write_whole(Path(path), write)
