"""A CUDA graph that repeats a recorded step as often as a number on the device says: `graph="while"`, experimental.

A graph of n calls has n copies of its nodes. A conditional node of type WHILE holds one step instead, and a kernel at
the end of the step decides on the device whether it runs again. torch records neither, but it gives out the graphs that
it has recorded (`CUDAGraph(keep_graph=True).raw_cuda_graph()`), and cuda-bindings builds one around them:

    prelude (child graph) -> WHILE [ step (child graph) -> go_on ]

No part of this has run on a GPU yet. `go_on` calls CUDA's device function `cudaGraphSetConditional`, which no library
defines: the driver provides it when it loads the code. Graphs that draw torch's random numbers would repeat them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# left -= 1; the body runs again if left > 0.
GO_ON = b"""
.version 8.3
.target sm_80
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry go_on(.param .u64 handle, .param .u64 left)
{
    .reg .b64 %rd<4>;
    .reg .b32 %r<4>;
    .reg .pred %p<2>;
    ld.param.u64 %rd1, [handle];
    ld.param.u64 %rd2, [left];
    cvta.to.global.u64 %rd3, %rd2;
    ld.global.u32 %r1, [%rd3];
    add.s32 %r1, %r1, -1;
    st.global.u32 [%rd3], %r1;
    setp.gt.s32 %p1, %r1, 0;
    selp.u32 %r2, 1, 0, %p1;
    {
        .param .b64 a;
        .param .b32 b;
        st.param.b64 [a], %rd1;
        st.param.b32 [b], %r2;
        call.uni cudaGraphSetConditional, (a, b);
    }
    ret;
}
\0"""


def bindings() -> Any:
    """`cuda.bindings.driver`. Raises ImportError without it, or with one of CUDA 12, whose functions differ."""
    from cuda.bindings import __version__, driver

    if int(__version__.partition(".")[0]) < 13:
        raise ImportError(f"cuda-bindings {__version__} is older than 13")
    return driver


class WhileGraph:
    """A recorded prelude, and a recorded step that is repeated, as one graph.

    prelude, step  from `torch.cuda.CUDAGraph(keep_graph=True)`; they are freed with this graph
    left           int32 (1,) on the device, counted down by the graph
    steps          how many steps the next replay takes, at least 1

    Raises RuntimeError with CUDA's own name for what failed.
    """

    def __init__(
        self, prelude: torch.cuda.CUDAGraph, step: torch.cuda.CUDAGraph, left: torch.Tensor, steps: Callable[[], int]
    ) -> None:
        self._driver = driver = bindings()
        self._parts, self._left, self._steps = (prelude, step), left, steps
        (context,) = self._done(driver.cuCtxGetCurrent())
        (self._module,) = self._done(driver.cuModuleLoadData(GO_ON))
        (go_on,) = self._done(driver.cuModuleGetFunction(self._module, b"go_on"))
        (self._graph,) = self._done(driver.cuGraphCreate(0))
        # 1 at the begin of each launch: the first step always runs.
        (handle,) = self._done(
            driver.cuGraphConditionalHandleCreate(self._graph, context, 1, driver.CU_GRAPH_COND_ASSIGN_DEFAULT)
        )
        (start,) = self._done(
            driver.cuGraphAddChildGraphNode(self._graph, None, 0, driver.CUgraph(prelude.raw_cuda_graph()))
        )
        condition = driver.CUDA_CONDITIONAL_NODE_PARAMS()
        condition.handle, condition.size, condition.ctx = handle, 1, context
        condition.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional = condition
        self._done(driver.cuGraphAddNode(self._graph, [start], None, 1, node))
        body = node.conditional.phGraph_out[0]
        (once,) = self._done(driver.cuGraphAddChildGraphNode(body, None, 0, driver.CUgraph(step.raw_cuda_graph())))
        kernel = driver.CUDA_KERNEL_NODE_PARAMS()
        kernel.func, kernel.ctx = go_on, context
        kernel.gridDimX = kernel.gridDimY = kernel.gridDimZ = 1
        kernel.blockDimX = kernel.blockDimY = kernel.blockDimZ = 1
        kernel.kernelParams = ((int(handle), left.data_ptr()), (ctypes.c_uint64, ctypes.c_uint64))
        self._done(driver.cuGraphAddKernelNode(body, [once], 1, kernel))
        (self._executable,) = self._done(driver.cuGraphInstantiate(self._graph, 0))

    @staticmethod
    def _done(result: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *found = result
        if int(status):
            raise RuntimeError(f"CUDA refuses the while node: {status.name}")
        return tuple(found)

    def replay(self) -> None:
        """Launch the prelude and `steps()` steps on the current stream."""
        import torch

        self._left.fill_(self._steps())
        stream = torch.cuda.current_stream(self._left.device).cuda_stream
        self._done(self._driver.cuGraphLaunch(self._executable, stream))

    def reset(self) -> None:
        """Free the graph."""
        driver = self._driver
        self._done(driver.cuGraphExecDestroy(self._executable))
        self._done(driver.cuGraphDestroy(self._graph))
        self._done(driver.cuModuleUnload(self._module))
        for part in self._parts:
            part.reset()
