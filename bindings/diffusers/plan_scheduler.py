"""A plan as a diffusers scheduler.

The class here is plain torch, as diffusers' own schedulers are: it applies the rows of a stage to the sample, the
network's output, fresh noise and the slots that it remembers. Its twin (`scheduler.fused`), which
`fewstep.bindings.diffusers` exports, runs each step in one fused pass, as it does for any scheduler.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.diffusers.interface import Timestep
from fewstep.bindings.maps import PREDICTION_TYPES, process_of
from fewstep.kernels import layout
from fewstep.solvers.field_names import solver_hint
from fewstep.solvers.options import counted, instance, number, one_of
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import plan_as_json, plan_from_json, plan_of
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.registry import list_solvers
from fewstep.solvers.plans.tables import stage_tables
from fewstep.solvers.plans.tail import begun, levels, starts
from fewstep.solvers.run.checks import check_tensor
from fewstep.solvers.schedule.grid import list_spacings
from fewstep.solvers.schedule.process import VP, Flow, Process, numbers

if TYPE_CHECKING:
    from fewstep.bindings.diffusers.interface import Scheduler

    class Base:
        """What is used of diffusers' base classes, which a type checker does not see."""

        config: Any

        def register_to_config(self, **values: object) -> None: ...

        @classmethod
        def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any: ...
else:
    Base = type("Base", (SchedulerMixin, ConfigMixin), {})

NAME = "PlanScheduler"

# Entries of a configuration that diffusers adds, and those of the twins.
_HIDDEN = ("_class_name", "_diffusers_version", "_use_default_values", "corrected", "noise")

# Those that the constructor takes.
_OWN = ("plan", "prediction_type", "replaces")

# Relative difference of the log-SNR of two schedules that are the same but for rounding: diffusers' is float32.
_SAME = 1e-3

PlanLike = Plan | str | os.PathLike[str] | Mapping[str, Any]


class Laid(NamedTuple):
    """A plan's rows for one kind of network output.

    rows    (calls, buffers, 2 + buffers) float64: the new buffers over [output, noise, buffers]; zeros for what no
            later call reads
    place   (calls + 1,) the buffer of the sample before each call, and after the last
    times   (calls,) the pipeline's timesteps
    levels  (calls + 1, 2) alpha and sigma of the sample before each call, and after the last
    """

    rows: np.ndarray
    place: np.ndarray
    times: np.ndarray
    levels: np.ndarray


def lay_out(plan: Plan, prediction_type: str) -> Laid:
    """The rows of a plan. Raises ValueError for one that no scheduler's step can make."""
    if plan.init is not None:
        raise ValueError(
            f"a plan of solver {plan.solver!r} that starts with a draw of its own (churn before the first call) cannot "
            "be a scheduler, which acts only after a call: make it with s_churn=0, or with s_tmax below the first sigma"
        )
    program = compile_plan(plan, in_place=True)
    if any(op.unguided for op in program.ops):
        raise ValueError(
            f"a plan of solver {plan.solver!r} reads the unguided prediction, and a pipeline hands its scheduler only "
            "the guided one: use fewstep.Sampler"
        )
    denoiser = Denoiser(_no_network, plan.grid.process, PREDICTION_TYPES[prediction_type])
    tables = stage_tables(program, denoiser, "float64")
    buffers, calls = program.buffers, len(tables)
    rows = np.zeros((calls, buffers, 2 + buffers))
    live = {program.result}
    for k in reversed(range(calls)):
        table = tables[k]
        for buffer in live:
            rows[k, buffer, 2 + buffer] = 1.0
        for buffer, row in zip(table.writes, table.w[0], strict=True):
            rows[k, buffer] = 0.0
            if buffer not in live:
                continue
            rows[k, buffer, :2] = row[layout.RAW], row[layout.NOISE]
            for column, source in enumerate(table.slots):
                if source is not None:
                    rows[k, buffer, 2 + source] += row[column]
        live = {program.ops[k].reads[0], *np.nonzero(rows[k, :, 2:].any(axis=0))[0].tolist()}
    scale = 1000.0 if isinstance(plan.grid.process, Flow) else 1.0
    before = [plan.start, *(stage.to for stage in plan.stages)]
    for k, point in levels(plan).items():
        if k and plan.stages[k - 1].end is None:
            before[k] = point
    return Laid(
        rows,
        np.array([op.reads[0] for op in program.ops] + [program.result]),
        scale * np.array([table.t for table in tables]),
        np.array([(p.alpha, p.sigma) for p in before]),
    )


def _no_network(x: Tensor, t: Tensor) -> Tensor:
    raise NotImplementedError


def read(plan: PlanLike) -> Plan:
    """A plan from a plan, a path, or the fields of a plan file."""
    if isinstance(plan, Mapping):
        return plan_from_json(dict(plan), f"{NAME}'s plan")
    if isinstance(plan, (str, os.PathLike)):
        meant = solver_hint(plan, list_solvers(), list_spacings())
        if meant is not None and not Path(plan).exists():
            raise ValueError(
                f"plan = {str(plan)!r} is no file but a name, of {meant}: make the plan by "
                "fewstep.plan(solver, fewstep.grid(process, steps, spacing)), with the pipeline's own process, "
                "fewstep.bindings.maps.from_diffusers(network, pipe.scheduler).process"
            )
    return plan_of(plan)


def check_process(plan: Plan, process: Process, owner: str) -> None:
    """Raises ValueError unless a plan was made on this noising process, up to the rounding of its schedule."""
    own = plan.grid.process
    same = own == process
    if isinstance(own, Flow) and isinstance(process, Flow):
        same = True  # a shift only lays out grids
    elif isinstance(own, VP) and isinstance(process, VP) and own.timesteps == process.timesteps:
        a, b = (np.log1p(-p.alphas_cumprod) - np.log(np.maximum(p.alphas_cumprod, 1e-12)) for p in (own, process))
        same = bool(np.all(np.abs(a - b) <= _SAME * (1.0 + np.abs(a))))
    if not same:
        raise ValueError(
            f"this plan was made on {own!r}, and {owner} has {process!r}: make the plan on the pipeline's own process, "
            "fewstep.bindings.maps.from_diffusers(network, pipe.scheduler).process"
        )


def scheduler_of(config: Mapping[str, Any]) -> Scheduler:
    """The diffusers scheduler that a configuration is of; without its name, one of the same process."""
    name = config.get("_class_name")
    if name is None:  # only a saved configuration has it
        name = "DDPMScheduler" if "beta_schedule" in config else "FlowMatchEulerDiscreteScheduler"
    if not hasattr(diffusers.schedulers, str(name)):
        raise ValueError(f"config is of the class {name!r}, which is no scheduler of diffusers")
    made: Scheduler = getattr(diffusers.schedulers, name).from_config(
        {key: value for key, value in config.items() if key not in _HIDDEN}
    )
    return made


def described(scheduler: Scheduler) -> dict[str, Any]:
    """A scheduler's class and configuration, from which `scheduler_of` makes it again."""
    # A scheduler made from the configuration of a PlanScheduler keeps its entries, and has no plan.
    foreign = _HIDDEN if issubclass(type(scheduler), PlanScheduler) else (*_HIDDEN, "plan", "replaces")
    own = {key: value for key, value in dict(scheduler.config).items() if key not in foreign}
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in own.items()}
    return {**plain, "_class_name": type(scheduler).__name__}


class PlanScheduler(Base):
    """A plan as a scheduler of a diffusers pipeline.

        pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, plan="plan.json")
        image = pipe(prompt, num_inference_steps=pipe.scheduler.plan.nfe).images[0]

    plan             a `Plan`, or the path of a file by `fewstep.save_plan`; on VP or Flow, from noise to data. The
                     configuration holds it as JSON, so that the scheduler is saved and loaded like any other
    prediction_type  of the network: "epsilon", "v_prediction", "sample" or "flow_prediction"; by default epsilon on VP
                     and flow_prediction on Flow
    replaces         the configuration of the scheduler that it replaces, which `fewstep.restore` puts back

    A call of the pipeline makes the calls of the plan, so num_inference_steps must be `plan.nfe`. A run may begin at
    a later call (image-to-image): see `fewstep.solvers.plans.tail.begun`. Latents are unit normals, as with the VP and
    flow schedulers of diffusers.

    Raises ValueError for a plan that no scheduler can run, and for one made on another process than `replaces`.
    """

    config_name = "scheduler_config.json"
    _compatibles: ClassVar[list[str]] = []
    order = 1

    timesteps: Tensor
    sigmas: Tensor
    times: np.ndarray
    slots: list[Tensor | None]
    _step_index: int | None
    _begin_index: int | None

    def __init__(
        self,
        plan: PlanLike,
        prediction_type: str | None = None,
        replaces: Mapping[str, Any] | None = None,
    ) -> None:
        # As it will be read again: the order of names decides in which order numbers are added.
        fields = json.loads(json.dumps(plan_as_json(read(plan)), sort_keys=True))
        made = read(fields)
        process = made.grid.process
        if not isinstance(process, (VP, Flow)):
            raise ValueError(f"a plan for a pipeline is made on VP or Flow, this one on {process!r}")
        if prediction_type is None:
            prediction_type = "flow_prediction" if isinstance(process, Flow) else "epsilon"
        one_of("prediction_type", prediction_type, tuple(PREDICTION_TYPES))
        if replaces is not None:
            instance("replaces", replaces, Mapping, "the configuration of a scheduler")
            other = scheduler_of(replaces)
            check_process(made, process_of(other)[0], type(other).__name__)
            trained = other.config.num_train_timesteps
            if isinstance(process, Flow) and trained != 1000:
                raise ValueError(f"a flow pipeline must have 1000 training timesteps, this one has {trained}")
        if made.start.sigma < made.start.alpha:
            raise ValueError(
                f"this plan starts at sigma = {made.start.sigma:.4g} and alpha = {made.start.alpha:.4g}, a pipeline at "
                "noise: make the plan on a whole grid, and skip its first calls by strength="
            )
        laid = lay_out(made, prediction_type)
        count = process.timesteps if isinstance(process, VP) else 1000
        own = {"plan": fields, "prediction_type": prediction_type, "num_train_timesteps": count}
        # A caller may swap the scheduler for one made from this configuration, which must have the trained betas.
        shared = {name: value for name, value in (replaces or {}).items() if name[0] != "_"}
        self.register_to_config(**{**shared, **own, "replaces": None if replaces is None else dict(replaces)})
        if isinstance(process, VP):
            self.alphas_cumprod = torch.tensor(process.alphas_cumprod, dtype=torch.float32)
        self.init_noise_sigma = 1.0
        self._lay(laid, 0)
        self._reset()
        self.timesteps = torch.tensor(laid.times, dtype=torch.float32)
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a configuration of its own, or from another scheduler's and `plan=`, on the same process."""
        if "plan" in config and "plan" not in kwargs:
            own = {name: config[name] for name in (*_OWN, *_HIDDEN) if name in config}
            return super().from_config(own, return_unused_kwargs, **kwargs)
        if "plan" not in kwargs:
            raise ValueError("PlanScheduler.from_config on another scheduler's configuration needs plan=")
        replaced = config["replaces"] if "plan" in config else config
        if replaced is None:
            new = read(kwargs["plan"])
            check_process(new, read(config["plan"]).grid.process, "the plan that it replaces")
            return cls(**{"prediction_type": config["prediction_type"], **kwargs, "plan": new})
        other = scheduler_of(replaced)
        predicts = next(name for name, own in PREDICTION_TYPES.items() if own == process_of(other)[1])
        return cls(**{"prediction_type": predicts, "replaces": described(other), **kwargs})

    @property
    def plan(self) -> Plan:
        """The plan, from the configuration."""
        return read(self.config["plan"])

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at this call of the plan (image-to-image)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run of the plan.

        num_inference_steps  the plan's number of calls
        timesteps, sigmas    the plan's own, or for sigmas the ramp 1, 1 - 1/n, .. 1/n that flow pipelines pass where
                             their user gave none
        mu                   the shift for the resolution in pipelines of flow models; a plan's times are fixed

        Raises ValueError for anything else, which the plan could not follow.
        """
        calls = len(self.rows) + self.first
        if num_inference_steps is None and timesteps is None and sigmas is None:
            raise ValueError(f"give num_inference_steps, which is {calls} for the plan of this scheduler")
        if num_inference_steps is not None and number(num_inference_steps) != calls:
            raise ValueError(
                f"num_inference_steps = {num_inference_steps!r:.80}, and the plan of this scheduler makes "
                f"{counted(calls, 'call')}: pass num_inference_steps={calls}, or another plan"
            )
        _check_own("timesteps", timesteps, self.times)
        _check_own("sigmas", sigmas, self.sigmas[:-1].numpy(), np.linspace(1.0, 1.0 / calls, calls))
        if self.first:
            self._lay(lay_out(self.plan, self.config["prediction_type"]), 0)
        self.num_inference_steps = calls
        self.timesteps = torch.tensor(self.times, dtype=torch.float32).to(device)
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample itself: on VP and Flow the network sees it as it is."""
        return sample

    def index_for_timestep(self, timestep: Timestep) -> int:
        """The call at a timestep of the plan; the first that begins a step, if several are made there."""
        alone = isinstance(timestep, (Tensor, np.ndarray)) and math.prod(timestep.shape) == 1
        time = number(timestep.item() if alone else timestep)  # type: ignore[union-attr]
        if math.isnan(time):
            raise TypeError(f"timestep must be one of the plan's, {_shown(self.times)}, got {timestep!r:.80}")
        away = np.abs(self.times - time)
        if not away.min() <= 1e-3 * max(1.0, abs(time)):
            raise IndexError(f"timestep = {time:g} is none of the plan's, {_shown(self.times)}")
        found = np.flatnonzero(away <= away.min() + 1e-9)
        return int(next((k for k in found if k in self.begins), found[0]))

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample after a call of the plan.

        variance_noise  standard normals like the sample, in place of those from the generator
        """
        check_tensor("model_output", model_output)
        check_tensor("sample", sample)
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} and sample {tuple(sample.shape)}: a plan takes "
                "the prediction alone, without a learned variance"
            )
        if variance_noise is not None:
            check_tensor("variance_noise", variance_noise)
            if variance_noise.shape != sample.shape:
                raise ValueError(
                    f"variance_noise has shape {tuple(variance_noise.shape)} and sample {tuple(sample.shape)}: pass "
                    "torch.randn_like(sample), or a generator"
                )
        call = self._first_call(timestep) if self._step_index is None else self._step_index
        index = call - self.first
        if index >= len(self.rows):
            raise IndexError(f"the plan's {len(self.times)} calls are made: begin the next run with set_timesteps")
        rows = self.rows[index]
        here, there = int(self.place[index]), int(self.place[index + 1])
        wide = torch.float64 if torch.float64 in (sample.dtype, model_output.dtype) else torch.float32
        noise = None
        if rows[:, 1].any():
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
        slots: list[Tensor | None] = list(self.slots)
        slots[here] = sample
        sources = [model_output, noise, *slots]
        new: list[Tensor | None] = []
        for j, row in enumerate(rows):
            used = np.flatnonzero(row)
            if not used.size:
                new.append(None)
            elif used.size == 1 and used[0] == 2 + j and row[2 + j] == 1.0 and j != there:
                new.append(slots[j])
            else:
                terms = [float(row[i]) * sources[i].to(wide) for i in used]  # type: ignore[union-attr]
                new.append(sum(terms[1:], terms[0]))
        after = new[there]
        assert after is not None
        new[there] = None
        self.slots = new
        self._step_index = call + 1
        after = after.to(sample.dtype)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at the levels of the sample before the calls at these timesteps of the plan."""
        check_tensor("original_samples", original_samples)
        check_tensor("noise", noise)
        if isinstance(timesteps, (Tensor, np.ndarray)):
            timesteps = timesteps.reshape(-1)
        index = [self.index_for_timestep(t) for t in (timesteps if isinstance(timesteps, Iterable) else [timesteps])]
        shapes = tuple(original_samples.shape), tuple(noise.shape)
        try:
            np.broadcast_shapes(*shapes, (len(index), *[1] * (original_samples.ndim - 1)))
        except ValueError:
            raise ValueError(
                f"original_samples has shape {shapes[0]}, noise {shapes[1]}, and timesteps length {len(index)}: pass "
                "noise like the samples, and one timestep for all or one for each"
            ) from None
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        levels = torch.tensor(self.levels[index], dtype=wide, device=original_samples.device)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        noisy = levels[:, 0].reshape(shape) * original_samples + levels[:, 1].reshape(shape) * noise
        return noisy.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`add_noise` under the name and with the arguments that pipelines of flow models use."""
        if noise is None:
            raise TypeError("scale_noise needs noise=")
        check_tensor("sample", sample)
        return self.add_noise(sample, noise, timestep.reshape(-1) if isinstance(timestep, Tensor) else timestep)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def _first_call(self, timestep: Timestep) -> int:
        """The first call of a run, whose rows are laid out."""
        index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if index:
            self._lay(lay_out(begun(self.plan, index), self.config["prediction_type"]), index)
        return index

    def _lay(self, laid: Laid, first: int) -> None:
        """Take up the rows of a plan, or of what is left of it from call `first` on."""
        self.rows, self.place, self.first = laid.rows, laid.place, first
        self.slots = [None] * laid.rows.shape[1]
        if not first:
            self.times, self.levels = laid.times, laid.levels
            flow = isinstance(self.plan.grid.process, Flow)
            ratio = laid.levels[:, 1] if flow else laid.levels[:, 1] / np.maximum(laid.levels[:, 0], 1e-12)
            self.sigmas = torch.tensor(ratio, dtype=torch.float32)
            self.begins = np.array(starts(self.plan))

    def _reset(self) -> None:
        self._step_index = self._begin_index = None
        self.slots = [None] * self.rows.shape[1]


def _check_own(name: str, given: Any, *own: np.ndarray) -> None:
    """Raises ValueError unless the values, if there are any, are one of these arrays but for rounding."""
    if given is None:
        return
    found = numbers(name, given)
    if not any(
        found.shape == values.shape and np.all(np.abs(found - values) <= 1e-3 * np.maximum(1.0, np.abs(values)))
        for values in own
    ):
        shown = _shown(found) if found.ndim == 1 else f"{given!r:.80}"
        raise ValueError(f"{name} = {shown} are not the plan's own, {_shown(own[0])}: omit them")


def _shown(values: Any) -> str:
    return "[" + ", ".join(f"{float(v):.6g}" for v in values) + "]"
