"""A sampling loop as a torch module, which can be compiled, exported and differentiated.

The loop is the unrolled plan: one `fewstep::stage` per stage, with the tables as buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.bindings.denoiser import Denoiser
from fewstep.kernels import philox, torch_ops
from fewstep.solvers.options import flag
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.tables import init_table, stage_tables
from fewstep.solvers.run.arrays import DType, TorchFrame, state_dtype
from fewstep.solvers.run.checks import check_plan
from fewstep.solvers.run.denoising import Condition, check_denoiser, check_output, copies, for_plan, time_dtype
from fewstep.solvers.run.functional import stage


class SamplerModule(nn.Module):
    """forward(x, streams=None, cond=None, noise=None) -> the sample, like x.

        loop = torch.compile(SamplerModule(denoiser, plan), fullgraph=True)

    x           (B, ...) float32 or float64 at the grid's first point; gradients flow back to it, to the network's
                parameters and to the conditions
    streams     (B, 3) int64 from `fewstep.kernels.philox.streams(seed, B)`, for plans that draw noise
    noise       (`len(self.draws)`, B, ...) normals instead of `streams`, one per draw in order (`self.noise`)
    checkpoint  recompute each denoiser call in the backward pass instead of keeping its activations

    Raises ValueError for dynamic thresholding and guidances that reduce whole samples (rescale, APG, CFGZero), and for
    networks that predict their variance: use `fewstep.Sampler`.
    """

    def __init__(self, denoiser: Denoiser, plan: Plan, *, dtype: DType = "float32", checkpoint: bool = False) -> None:
        super().__init__()
        check_denoiser(denoiser)
        check_plan(plan, denoiser)
        flag("checkpoint", checkpoint)
        dtype = state_dtype(dtype)
        if denoiser.reduces or denoiser.threshold is not None:
            raise ValueError(
                "SamplerModule does not support guidance rescale, APG, CFGZero or DynamicThreshold, which reduce whole "
                "samples: use fewstep.Sampler, or a static clip"
            )
        if any(network is not denoiser.model for network in denoiser.networks):
            raise ValueError("SamplerModule holds one network, and the guidance calls others: use fewstep.Sampler")
        if denoiser.variance is not None:
            raise ValueError(
                f"SamplerModule does not support variance={denoiser.variance!r}: use fewstep.Sampler, or a model that "
                "returns only its prediction"
            )
        program = compile_plan(plan)
        self.tables = stage_tables(program, denoiser, dtype)
        self.program, self.denoiser, self.checkpoint = program, for_plan(denoiser, plan), checkpoint
        self.noisy_start = program.init.noisy
        self.draws = [0] * self.noisy_start + [table.draw for table in self.tables if table.draw is not None]
        self.model = denoiser.model if isinstance(denoiser.model, nn.Module) else None
        self.state = getattr(torch, dtype)
        self.model_dtype = getattr(torch, denoiser.model_dtype(dtype))
        self.time_dtype = getattr(torch, time_dtype(denoiser, denoiser.model_dtype(dtype)))
        self._keep("init", init_table(program.init, dtype))
        self._keep("limit", None if denoiser.bound is None else [[denoiser.bound, 1.0, 0.0, 0.0]])
        for k, table in enumerate(self.tables):
            self._keep(f"w{k}", table.w)
            self._keep(f"p{k}", table.p)
            self._keep(f"c_in{k}", [table.c_in])

    def _keep(self, name: str, values: ArrayLike | None) -> None:
        if values is None:  # a plain attribute: torch.export miscounts buffers that are None
            setattr(self, name, None)
        else:
            with torch.inference_mode(False):  # calls outside inference mode may record gradients
                numbers = torch.as_tensor(values, dtype=self.state, device="cpu")
            self.register_buffer(name, numbers, persistent=False)

    def noise(self, streams: Tensor, shape: Sequence[int]) -> Tensor:
        """The draws of `streams`, (`len(self.draws)`, *shape), as forward takes them in `noise`."""
        return torch.stack([self._drawn(streams, shape, draw) for draw in self.draws])

    def _drawn(self, streams: Tensor, shape: Sequence[int], draw: int) -> Tensor:
        drawn: Tensor = torch_ops.normals(streams, list(shape), draw, philox.STEP)
        return drawn.to(self.state)

    def forward(
        self, x: Tensor, streams: Tensor | None = None, cond: Condition = None, noise: Tensor | None = None
    ) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim == 0 or not x.is_floating_point() or x.layout is not torch.strided:
            raise TypeError(f"x must be a dense floating-point tensor (B, ...), got {_shown(x)}")
        plan, batch, frame = self.program.plan, x.shape[0], TorchFrame(x.device)
        if streams is not None and not (
            isinstance(streams, Tensor) and streams.dtype == torch.int64 and tuple(streams.shape) == (batch, 3)
        ):
            raise TypeError(
                f"streams must be an int64 tensor (B, 3), philox.streams(seed, B), got {_shown(streams)}: the model's "
                "conditions go to cond="
            )
        if noise is not None:
            if not isinstance(noise, Tensor):
                raise TypeError(f"noise must be a tensor, got {_shown(noise)}")
            wanted = (len(self.draws), *x.shape)
            if streams is not None:
                raise ValueError("pass streams or noise, not both: either gives the normals of the draws")
            if tuple(noise.shape) != wanted:
                raise ValueError(
                    f"noise must have shape {wanted}, one tensor like x per draw of {plan.solver}; "
                    f"got {tuple(noise.shape)}"
                )
        call = self.denoiser.bind(frame, batch, cond)
        buffers: list[Tensor | None] = [None] * self.program.buffers
        buffers[0] = x.to(self.state)

        def drawn(draw: int) -> Tensor:
            if noise is not None:
                return noise[self.draws.index(draw)].to(self.state)
            if streams is None:
                raise ValueError(f"{plan.solver} draws noise: pass streams=philox.streams(seed, {batch}), or noise")
            return self._drawn(streams, x.shape, draw)

        op = self.program.init
        z = drawn(0) if self.noisy_start else None
        x_in: Tensor
        buffers[op.writes[0]], x_in = stage(
            [buffers[0]], [], self.init, z=z, c_in=self.c_in0, copies=self._copies(0), model_dtype=self.model_dtype
        )
        for k, table in enumerate(self.tables):
            t = torch.full((x_in.shape[0],), table.t, dtype=self.time_dtype, device=x.device)
            if self.checkpoint and torch.is_grad_enabled():
                raws = checkpoint(call, table.branches, x_in, t, use_reentrant=False)
            else:
                raws = call(table.branches, x_in, t)
            for raw in raws:
                check_output(raw, x.shape, frame)
            after = k + 1 < len(self.tables)
            outputs = stage(
                [None if b is None else buffers[b] for b in table.slots],
                raws,
                getattr(self, f"w{k}"),
                z=None if table.draw is None else drawn(table.draw),
                p=getattr(self, f"p{k}"),
                limit=self.limit,
                c_in=getattr(self, f"c_in{k + 1}") if after else None,
                copies=self._copies(k + 1) if after else 0,
                model_dtype=self.model_dtype,
            )
            for buffer, tensor in zip(table.writes, outputs, strict=False):
                buffers[buffer] = tensor
            if after:
                x_in = outputs[-1]
        result = buffers[self.program.result]
        assert result is not None
        return result.to(x.dtype)

    def _copies(self, k: int) -> int:
        return copies(self.denoiser, self.tables[k].branches)


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a {value.layout} tensor of {value.dtype} with shape {tuple(value.shape)}"
