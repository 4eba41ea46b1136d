"""Any network as a denoiser: its prediction type, its time input and its guidance."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fewstep.bindings.guidance import LARGEST, Guidance, as_guidance, is_number
from fewstep.solvers.options import between, flag, number, one_of, plain_fields, unknown, warn
from fewstep.solvers.plans.guidance import ALONE, Moment, Shares
from fewstep.solvers.run.arrays import FLOATS, Frame, TorchFrame, dtype_name, first_parameter, frame_of
from fewstep.solvers.run.conditions import check_arrays, stacked, widened
from fewstep.solvers.run.denoising import OneNetwork
from fewstep.solvers.run.network import dtype_reached, without_own_graph
from fewstep.solvers.schedule.process import Flow, Point, Process, math_of

if TYPE_CHECKING:
    from torch.nn import Parameter

Cond = Mapping[str, Any]


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding of the x0 prediction, per sample (Saharia et al. 2022, section 2.3).

    Clips to [-s, s] and divides by s, the given quantile of the absolute values, itself clipped to [1, maximum].
    """

    quantile: float = 0.995
    maximum: float = 1.0

    def __post_init__(self) -> None:
        between("quantile", self.quantile, 0.0, 1.0)
        between("maximum", self.maximum, 1.0, LARGEST)
        plain_fields(self)


def _positive(name: str, value: object) -> float:
    if not (is_number(value) and 0.0 < number(value) <= LARGEST):
        raise ValueError(f"{name} must be a positive finite number, got {value!r:.80}")
    return float(value)


def _no_signal(at: Point) -> bool:
    """Whether alpha is 0, at any of the points."""
    return at.alpha == 0.0 if isinstance(at.alpha, float) else not np.all(at.alpha)


def _epsilon(at: Point, sigma_data: float) -> tuple[float, float]:
    if _no_signal(at):
        raise ValueError(
            f"predicts='epsilon' does not determine x0 at alpha = 0 (t = {at.t:g}): use a model with predicts='v' or "
            "'sample', or a grid that starts below it (spacing='leading', or Grid.tail)"
        )
    return 1.0 / at.alpha, -at.sigma / at.alpha


def _sample(at: Point, sigma_data: float) -> tuple[float, float]:
    return 0.0, 1.0


def _v(at: Point, sigma_data: float) -> tuple[float, float]:
    norm = at.alpha**2 + at.sigma**2
    return at.alpha / norm, -at.sigma / norm


def _flow(at: Point, sigma_data: float) -> tuple[float, float]:
    return 1.0 / (at.alpha + at.sigma), -at.sigma / (at.alpha + at.sigma)


def _edm(at: Point, sigma_data: float) -> tuple[float, float]:
    if _no_signal(at):
        raise ValueError(
            f"predicts='edm' takes ln(sigma/alpha) as time input, infinite at alpha = 0 (t = {at.t:g}): use a grid "
            "that starts below it (spacing='logsnr', or Grid.tail)"
        )
    rho = at.sigma / at.alpha
    norm = rho**2 + sigma_data**2
    return sigma_data**2 / norm / at.alpha, rho * sigma_data / math_of(norm).sqrt(norm)


# x0 prediction = a x + b raw: (point, sigma_data) -> (a, b)
PREDICTIONS: dict[str, Callable[[Point, float], tuple[float, float]]] = {
    "epsilon": _epsilon,  # raw = eps                    (Ho et al. 2020)
    "sample": _sample,  # raw = x0
    "v": _v,  # raw = alpha eps - sigma x0               (Salimans & Ho 2022)
    "flow": _flow,  # raw = eps - x0                     (Liu et al. 2022, Lipman et al. 2022)
    "edm": _edm,  # raw = F of c_skip x + c_out F        (Karras et al. 2022, Table 1)
}


# Names of other libraries -> what to write here.
_ELSEWHERE = {
    **dict.fromkeys(("x0", "x_0", "x_start", "x0_prediction", "pred_x0"), "pass predicts='sample' (x0)"),
    **dict.fromkeys(("data", "mean", "denoised"), "pass predicts='sample' (x0)"),
    **dict.fromkeys(("noise", "eps", "epsilon_prediction", "noise_prediction"), "pass predicts='epsilon'"),
    **dict.fromkeys(("v_prediction", "v-prediction", "v_pred", "vpred"), "pass predicts='v' (alpha eps - sigma x0)"),
    **dict.fromkeys(("flow_prediction", "rectified_flow", "flow_matching"), "pass predicts='flow' (eps - x0)"),
    "vector_field": "pass predicts='flow' (eps - x0)",
    "velocity": "pass predicts='flow' (eps - x0) for a flow model, predicts='v' (alpha eps - sigma x0) for a VP one",
    "score": "pass predicts='epsilon' and a model that returns -sigma * score",
}


# Noise factor of a network that predicts its variance: (its variance output, the stage's noise number) -> factor
VARIANCES: dict[str, Callable[[Any, float], Any]] = {
    "learned": lambda v, number: number * v**0.5,  # v is the variance of x scaled to VP
    "learned_range": lambda v, number: number ** ((v + 1.0) / 2.0),  # -1: posterior, 1: beta (Nichol & Dhariwal 2021)
}


class Denoiser:
    """A network with its noising process and prediction type.

        model(x_in, t, **cond) -> raw

    model       a torch module, or any callable on NumPy arrays or torch tensors; x_in (B, ...), t (B,),
                raw like x_in
    process     the noising process that the network was trained on
    predicts    "epsilon", "sample" (x0), "v", "flow" (eps - x0) or "edm" (F inside the preconditioning)
    guidance    the scale of a `CFG`, or a `CFG`, `APG`, `CFGZero`, `AutoGuidance` or `Branches`; None or 1 calls the
                network once
    clip        a bound for a static clip of the x0 prediction, or a `DynamicThreshold`
    null        the condition of the null branch, so that `cond` holds only the other one
    batched     True runs the branches of guidance as one batch of 2 B, False as separate calls
    time_scale  multiplies the network's time input (1000 for flow networks trained on 0 .. 1000)
    dtype       of x_in; by default that of the module's parameters, else the state's (of a float64 state, that of the
                weights which a plain callable reaches)
    time_dtype  of t; by default float32 (float64 for a float64 network)
    sigma_data  for "edm"; by default the process's
    variance    "learned" or "learned_range" for a network that returns (B, 2 C, ...), its prediction followed by its
                variance; only the solver ddpm with that option uses the variance. Under guidance it is the last
                branch's, which a step with noise calls whatever its weight is

    Conditions may nest mappings, lists and tuples of arrays; an array at any depth has the batch (or 1) as its first
    axis. Under guidance the network is given (1, ...) as (B, ...), in whichever calls; without it, conditions as they
    are. What cannot be batched so, such as a list with an entry per sample, needs batched=False, which leaves what is
    nested as it is.

    The network's inputs are x and the process's time t; with "edm" they are c_in x and ln(sigma) / 4.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        process: Process,
        predicts: str = "epsilon",
        guidance: float | Guidance | None = None,
        clip: float | DynamicThreshold | None = None,
        *,
        null: Cond | None = None,
        batched: bool = True,
        time_scale: float = 1.0,
        dtype: Any = None,
        time_dtype: Any = None,
        sigma_data: float | None = None,
        variance: str | None = None,
    ) -> None:
        if not callable(model) or isinstance(model, type):
            found = (
                f"the class {model.__name__}: make an object of it" if isinstance(model, type) else type(model).__name__
            )
            raise TypeError(f"model must be callable as model(x, t, **cond), got {found}")
        if not (hasattr(process, "point") and hasattr(process, "point_at_sigma")):
            raise TypeError(f"process must be a fewstep process (VP, VE, EDM, Flow), got {type(process).__name__}")
        known_elsewhere = _ELSEWHERE.get(predicts.lower()) if isinstance(predicts, str) else None
        if known_elsewhere is not None:
            raise ValueError(f"unknown prediction type {predicts!r}: {known_elsewhere}")
        if not isinstance(predicts, str) or predicts not in PREDICTIONS:
            raise ValueError(unknown("prediction type", predicts, tuple(PREDICTIONS)))
        if not (clip is None or isinstance(clip, DynamicThreshold)):
            if not (is_number(clip) and 0.0 < number(clip) <= LARGEST):
                raise ValueError(f"clip must be a positive bound on |x0| or a DynamicThreshold, got {clip!r:.80}")
            clip = float(clip)
        if not (null is None or isinstance(null, Mapping)):
            raise TypeError(f"null must be a mapping of the model's keyword arguments, got {type(null).__name__}")
        self.model = model
        self.process = process
        self.predicts = predicts
        self.guidance = as_guidance(guidance)
        self.clip = clip
        self.null = null
        flag("batched", batched)
        self.batched = batched
        self.time_scale = _positive("time_scale", time_scale)
        self.dtype = None if dtype is None else dtype_name(dtype)
        if self.dtype is not None and self.dtype not in FLOATS:
            raise ValueError(f"dtype of x_in must be one of {', '.join(FLOATS)}, got {self.dtype}")
        self.time_dtype = None if time_dtype is None else dtype_name(time_dtype, "time_dtype")
        own = getattr(process, "sigma_data", 0.5)
        self.sigma_data = own if sigma_data is None else _positive("sigma_data", sigma_data)
        one_of("variance", variance, (None, *VARIANCES))
        self.variance = variance
        self._check_guidance()

    def __repr__(self) -> str:
        model = getattr(self.model, "__name__", type(self.model).__name__)  # a module's own repr has a line per layer
        guidance = "" if self.guidance is None else f", guidance={self.guidance!r:.80}"
        return f"{type(self).__name__}({model}, {self.process!r}, predicts={self.predicts!r}{guidance})"

    def with_guidance(self, guidance: float | Guidance | None) -> Self:
        """The same denoiser, of the same class, under another guidance."""
        other = copy.copy(self)
        other.guidance = as_guidance(guidance)
        other._check_guidance()
        return other

    def _check_guidance(self) -> None:
        """Raises ValueError for a guidance that does not fit the network."""
        if getattr(self.guidance, "zero_steps", 0) and (self.predicts != "flow" or self.variance is not None):
            raise ValueError(
                "guidance zero_steps sets the velocity of a flow network to 0, and this one predicts "
                f"{self.predicts!r}: use zero_steps=0, or predicts='flow'"
            )
        own = self.frame
        for network in self.networks:
            other = frame_of(network)
            if own is not None and other is not None and (other.name, other.device) != (own.name, own.device):
                raise ValueError(
                    f"a network of the guidance is on {other.name} {other.device}, the model on {own.name} "
                    f"{own.device}: move one of them"
                )

    # --- used by the loop ---

    @property
    def bound(self) -> float | None:
        """Of a static clip."""
        return None if isinstance(self.clip, DynamicThreshold) else self.clip

    @property
    def threshold(self) -> DynamicThreshold | None:
        return self.clip if isinstance(self.clip, DynamicThreshold) else None

    @property
    def branches(self) -> int:
        """The number of branches of guidance, 1 without it."""
        return self.guidance.branches if self.guidance else 1

    @property
    def networks(self) -> tuple[Callable[..., Any], ...]:
        """The network of each branch."""
        models = self.guidance.models if self.guidance else (None,)
        return tuple(self.model if model is None else model for model in models)

    @property
    def reduces(self) -> bool:
        """Whether the coefficients of the branches depend on whole samples."""
        return self.guidance is not None and self.guidance.reduces

    @property
    def momentum(self) -> float:
        """Of the guidance's running average."""
        return self.guidance.momentum if self.guidance else 0.0

    @property
    def by_step(self) -> str | None:
        """What of the guidance needs numbered steps, or None."""
        return self.guidance.by_step if self.guidance else None

    def shares(self, moment: Moment) -> Shares:
        """The weight of each branch in a call, and the branches to call."""
        return self.guidance.shares(moment) if self.guidance else ALONE

    def blend(self, weights: np.ndarray, a: float, b: float, momentum: float) -> np.ndarray:
        """The numbers of a reducing guidance in a call, see `solvers.plans.tables.X0Prediction`."""
        assert self.guidance is not None
        return self.guidance.blend(weights, a, b, momentum)

    def prologue(self, at: Point) -> tuple[float, float]:
        """(a, b) of the x0 prediction a x + b raw. Raises ValueError where raw does not determine x0.

        This, `c_in` and `time` take one point, or arrays of points.
        """
        if self.predicts == "epsilon" and isinstance(self.process, Flow) and _no_signal(at):
            raise ValueError(
                f"predicts='epsilon' does not determine x0 at alpha = 0 (t = {at.t:g}): a rectified-flow network "
                "predicts the velocity eps - x0, predicts='flow'; else use a grid that starts below it (Grid.tail)"
            )
        return PREDICTIONS[self.predicts](at, self.sigma_data)

    def c_in(self, at: Point) -> float:
        """The factor on x before the network."""
        if self.predicts != "edm":
            return 1.0
        factor: float = 1.0 / math_of(at.sigma).hypot(at.sigma, self.sigma_data * at.alpha)
        return factor

    def noise_factor(self, output: Any, number: float) -> Any:
        """The elementwise factor on a stage's noise from the network's variance output."""
        return VARIANCES[self.variance or ""](output, number)

    def time(self, at: Point) -> float:
        """The network's time input. Raises ValueError for a fractional time under an integer `time_dtype`."""
        edm = self.predicts == "edm"
        scaled = at.t if self.time_scale == 1.0 else at.t * self.time_scale
        t: float = math_of(at.sigma).log(at.sigma / at.alpha) / 4.0 if edm else scaled
        if self.time_dtype in FLOATS or self.time_dtype is None:
            return t
        if abs(t - round(t)) > 1e-6:
            raise ValueError(
                f"time_dtype={self.time_dtype!r}, but the plan calls the model at t = {t:.9g}: make the grid with "
                "round_times=True, or use a float time_dtype"
            )
        return float(round(t))

    @property
    def frame(self) -> Frame | None:
        """The model's array library and device; None for a plain callable."""
        return frame_of(self.model)

    def model_dtype(self, state: str) -> str:
        """The dtype of x_in for a state of that dtype."""
        if self.dtype is not None:
            return self.dtype
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(self.model, torch.nn.Module):
            parameter = first_parameter(self.model)
            if parameter is None or parameter.is_floating_point():
                return state if parameter is None else dtype_name(parameter.dtype)
        parameters = getattr(self.model, "parameters", None)
        floating = (p for p in parameters() if p.is_floating_point()) if callable(parameters) else iter(())
        first: Any = next(floating, None)
        if first is not None:
            return dtype_name(first.dtype)
        # A function of a network takes float32 states as they are and may cast itself. Few take `tune`'s float64.
        return (dtype_reached(self.model) or state) if state == "float64" else state

    def conditions(self, cond: Cond | Sequence[Cond] | None) -> list[Cond]:
        """One mapping of keyword arguments per branch, the null branch first."""
        branches = self.branches
        listed: Sequence[Any] = cond if isinstance(cond, (tuple, list)) else [{} if cond is None else cond]
        for one in listed:  # `isinstance` of an ABC fetches microseconds of code between two runs of a network
            if type(one) is not dict and not isinstance(one, Mapping):
                kinds = ", ".join(type(c).__name__ for c in listed)
                raise TypeError(
                    "cond must be a mapping of the model's keyword arguments, such as {'labels': labels}, or a "
                    f"sequence of them, the null condition first; got {kinds}"
                )
            for key in one:
                if not isinstance(key, str):
                    raise TypeError(
                        f"cond has the key {key!r:.80}: its keys are the names of the model's keyword arguments"
                    )
        given = [*map(dict, listed)]
        if len(given) == branches:
            return given  # type: ignore[return-value]
        if len(given) == 1 and branches == 2 and self.null is not None:
            return [dict(self.null), *given]
        if len(given) == 1 and self.guidance is not None and self.guidance.one_condition:
            return given * branches  # type: ignore[return-value]
        if branches == 1 and len(given) == 2:
            if self.guidance is None:
                warn(
                    "cond holds a null condition and another one, but the denoiser has no guidance: only the second is "
                    "used. Pass guidance= to Denoiser (or denoiser.with_guidance(scale)), or the condition alone"
                )
            return given[1:]  # type: ignore[return-value]
        raise ValueError(
            f"guidance over {branches} branches needs cond as a sequence of {branches} mappings, the null condition "
            f"first, or Denoiser(null=...); got {len(given)}"
        )

    def bind(
        self, frame: Frame, batch: int, cond: Cond | Sequence[Cond] | None
    ) -> Callable[[tuple[int, ...], Any, Any], tuple[Any, ...]]:
        """The network with its conditions prepared: call(branches, x_in, t) -> one raw per branch.

        branches  the branches to call; if they are batched, x_in and t hold one copy of the batch per branch

        Raises ValueError if the conditions of the branches do not fit each other or the batch.
        """
        # By the shortest way where there is one network: beside it, each Python call takes microseconds.
        if self.guidance is not None:
            return self._bind_branches(frame, batch, cond)
        network = _watched(self.model, frame)
        if cond is not None:
            (own,) = conds = self.conditions(cond)
            check_arrays(conds, frame, batch, nested=False)
            network = functools.partial(network, **own)
        one = OneNetwork(lambda branches: network, frame, batch)
        one.networks[(0,)] = network  # what nearly every call asks for
        return one

    def _bind_branches(
        self, frame: Frame, batch: int, cond: Cond | Sequence[Cond] | None
    ) -> Callable[[tuple[int, ...], Any, Any], tuple[Any, ...]]:
        """`bind` under guidance."""
        models = tuple(_watched(network, frame) for network in self.networks)
        conds = self.conditions(cond)
        check_arrays(conds, frame, batch, nested=False)
        networks = self.networks

        def bound(branches: tuple[int, ...]) -> Callable[[Any, Any], Any]:
            """The one network of these branches, with their conditions."""
            if not branches:
                return lambda x_in, t: None
            if len(branches) > 1:
                own = stacked([conds[j] for j in branches], frame, batch)
            else:  # as in the batch, where there is one
                own = widened(conds[branches[0]], frame, batch, nested=branches[0] in batched)
            return functools.partial(models[branches[0]], **own)

        def by_network(branches: tuple[int, ...]) -> list[tuple[int, ...]]:
            return [tuple(own) for _, own in groupby(branches, key=lambda j: id(networks[j]))]

        def call(branches: tuple[int, ...], x_in: Any, t: Any) -> tuple[Any, ...]:
            if len(branches) <= 1:
                return together(branches, x_in, t)
            raws: list[Any] = []
            for own in by_network(branches) if self.batched else [(j,) for j in branches]:
                part = slice(len(raws) * batch, (len(raws) + len(own)) * batch) if self.batched else slice(None)
                inputs, last = (x_in[part], t[part]), len(raws) + len(own) == len(branches)
                # A model may modify or return its arguments, and return the same memory in each call.
                if not (self.batched or last):
                    inputs = frame.concatenate([x_in]), frame.concatenate([t])
                found = together(own, *inputs)
                raws += found if last else [frame.concatenate([r]) if frame.is_array(r) else r for r in found]
            return tuple(raws)

        together, groups = OneNetwork(bound, frame, batch), by_network(tuple(range(len(conds))))
        batched = {j for alike in groups if self.batched and len(alike) > 1 for j in alike}
        if not self.batched:
            return call
        for alike in groups:
            together.network(alike)
        return together if len(groups) == 1 else call


class Around:
    """A callable around a network, with the network's device and dtype."""

    def __init__(self, network: object) -> None:
        self.network: Any = network

    @property
    def frame(self) -> Frame | None:
        return frame_of(self.network)

    def parameters(self) -> Iterator[Parameter]:
        own = getattr(self.network, "parameters", None)
        return iter(own() if callable(own) else ())


def _watched(model: Callable[..., Any], frame: Frame) -> Callable[..., Any]:
    """The network for arrays of this frame. torch.compile traces this, and must not meet `sys.modules`: it goes through
    the whole of it, which another thread's import changes meanwhile."""
    if isinstance(frame, TorchFrame):
        return without_own_graph(model) if frame.torch.is_grad_enabled() else model
    return _on_numpy(model) if "torch" in sys.modules else model


def _on_numpy(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, with an error that names the remedy if it is a torch model that gets NumPy arrays."""
    if frame_of(model) is not None:
        return model

    def call(x_in: Any, t: Any, /, **cond: Any) -> Any:
        try:
            return model(x_in, t, **cond)
        except (AttributeError, TypeError) as error:
            if "numpy" not in str(error):
                raise
            raise TypeError(
                f"the model failed on NumPy arrays ({error}). If it is a torch model, pass device='cpu' or "
                "'cuda', or give x as a torch tensor"
            ) from error

    return call
