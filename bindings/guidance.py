"""How the outputs of a network's branches become one: guidance as data.

Every guidance here is linear in the branches' outputs, with coefficients in a plan's tables. Those of guidance rescale,
APG and CFG-Zero* depend on whole samples: they are blends (`kernels.naive.blend`), made by one reduction per call.

A scale is a number; an array, (B,) for the samples of a batch or (1 or B, steps) for the steps as well; or a function
scale(progress, at) of the fraction of the steps that are finished and the `Point`, which returns a number or (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, Protocol, Self, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.kernels import layout
from fewstep.solvers.options import between, function, number, plain_fields, whole
from fewstep.solvers.plans.guidance import Moment, Shares

# Guidance scales, bounds and factors beyond it overflow float32 in the run.
LARGEST = 1e12

Floats = NDArray[np.float64]


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


# --- scales ---


@dataclass(frozen=True)
class Scales:
    """A scale for each sample, and for each step: the numbers of an array, hashable because guidances are cache keys.

    values  a tuple per sample, each of one number or one per step
    """

    values: tuple[tuple[float, ...], ...]

    @property
    def steps(self) -> int:
        return len(self.values[0])

    def at(self, name: str, moment: Moment) -> Floats:
        if self.steps == 1:
            return np.array(self.values)[:, 0]
        if moment.step is None or moment.steps != self.steps:
            raise ValueError(
                f"{name} holds {self.steps} steps, and the plan has {moment.steps or 'no numbered ones'}: give one "
                "number per step, or a function scale(progress, at)"
            )
        return np.array(self.values)[:, min(moment.step, self.steps - 1)]


class ScaleFunction(Protocol):
    def __call__(self, progress: float, at: Any, /) -> ArrayLike: ...


Scale = float | Scales | ScaleFunction

_WANTED = f"must be a finite number up to {LARGEST:g}, an array (B,) or (1 or B, steps) of them, or a function of them"


def _scale(name: str, value: object) -> Scale:
    """A checked scale. Raises ValueError that names it."""
    if isinstance(value, Scales):  # of another guidance, by dataclasses.replace
        return value
    if is_number(value):
        if abs(number(value)) <= LARGEST:
            return value
    elif callable(value) and not isinstance(value, type):
        return value
    elif hasattr(value, "shape") and hasattr(value, "__array__"):
        array = _numbers(value)
        if array is not None and array.ndim in (1, 2):
            return Scales(tuple(map(tuple, array.reshape(len(array), -1).tolist())))
    raise ValueError(f"{name} {_WANTED}; got {value!r:.80}")


def _numbers(value: object) -> Floats | None:
    """An array of any library as finite float64, or None."""
    detached = value.detach().cpu() if hasattr(value, "detach") else value
    found = np.asarray(detached)
    if found.dtype.kind not in "fiu" or found.size == 0 or not (np.abs(found.astype(np.float64)) <= LARGEST).all():
        return None
    return found.astype(np.float64)


def _value(name: str, scale: Scale, moment: Moment) -> Floats:
    """A scale in one call: (1,) or (B,)."""
    if isinstance(scale, Scales):
        return scale.at(name, moment)
    if not callable(scale):
        return np.array([float(scale)])
    found = _numbers(given := scale(moment.progress, moment.at))
    if found is None or found.ndim > 1:
        raise ValueError(
            f"{name} must return a finite number up to {LARGEST:g}, or (B,) of them; at t = {moment.at.t:g} it "
            f"returned {given!r:.80}"
        )
    return np.atleast_1d(found)


def _side_by_side(columns: Sequence[Floats]) -> Floats:
    """Columns of (1,) or (B,) as (1 or B, branches). Raises ValueError where they hold different batches."""
    try:
        return np.stack(np.broadcast_arrays(*columns), axis=1)
    except ValueError:
        sizes = sorted({len(c) for c in columns if len(c) > 1})
        raise ValueError(f"the guidance scales of the branches hold {sizes} samples: give each the batch's") from None


# --- guidances ---


class _Guided:
    """The base of all guidances: the interval in which they are on, and the interface that a denoiser uses.

    branches        the number of branches, the conditional one last
    reduces         whether coefficients depend on whole samples
    momentum        of a running average over the calls, 0 without one
    one_condition   whether a single condition serves all branches
    """

    momentum: float = 0.0
    one_condition: ClassVar[bool] = False

    start: float
    stop: float
    sigma_lo: float
    sigma_hi: float

    def _check_interval(self) -> None:
        """Checks the interval, which all guidances have, and makes NumPy's numbers Python's."""
        between("guidance start", self.start, 0.0, 1.0)
        between("guidance stop", self.stop, self.start, 1.0)
        between("guidance sigma_lo", self.sigma_lo, 0.0, LARGEST)
        between("guidance sigma_hi", self.sigma_hi, self.sigma_lo, math.inf)
        plain_fields(self)  # type: ignore[arg-type]

    @property
    def branches(self) -> int:
        return 2

    @property
    def reduces(self) -> bool:
        return False

    @property
    def models(self) -> tuple[Callable[..., Any] | None, ...]:
        """The network of each branch, None for the denoiser's."""
        return (None,) * self.branches

    def with_models(self, models: Sequence[Any]) -> Self:
        """The same rule with other networks in the place of its `models`, which are None for the denoiser's."""
        return self

    @property
    def by_step(self) -> str | None:
        """What needs numbered steps, or None."""
        scales = (value for given in vars(self).values() for value in _as_tuple(given))
        return "a scale for each step" if any(isinstance(s, Scales) and s.steps > 1 for s in scales) else None

    @property
    def constant(self) -> bool:
        """Whether it is on in every call."""
        return self.start <= 0.0 and self.stop >= 1.0 and self.sigma_lo <= 0.0 and self.sigma_hi == math.inf

    def on(self, moment: Moment) -> bool:
        """Whether guidance is on in a call."""
        ratio = moment.at.ratio
        above = self.sigma_lo < ratio or self.sigma_lo == 0.0
        return self.start <= moment.progress < self.stop and above and ratio <= self.sigma_hi

    def _alone(self) -> Shares:
        """The conditional branch alone."""
        last = self.branches - 1
        return Shares(np.array([[0.0] * last + [1.0]]), (last,))

    def shares(self, moment: Moment) -> Shares:
        """The weight of each branch, and those to call: those with a weight, and what a rescale is towards."""
        if not self.on(moment):
            return self._alone()
        weights = self._weights(moment)
        used: list[bool] = np.any(weights, axis=0).tolist()
        if self.reduces and not used[-1]:  # a rescale: the last branch is what every guided sample is moved towards
            used[-1] = bool(_guided(weights).any())
        return Shares(weights, tuple(j for j, own in enumerate(used) if own))

    def _weights(self, moment: Moment) -> Floats:
        raise NotImplementedError

    def blend(self, weights: Floats, a: float, b: float, momentum: float) -> Floats:
        """See `solvers.plans.tables.X0Prediction`."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """The numbers of the guidance. Raises ValueError for networks and functions, which no file can hold."""
        found: dict[str, Any] = {"method": type(self).__name__}
        for name, value in vars(self).items():
            found[name] = [_plain(name, own) for own in value] if isinstance(value, tuple) else _plain(name, value)
        return found


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _plain(name: str, value: object) -> Any:
    if isinstance(value, Scales):
        return [list(row) for row in value.values]
    if value is not None and not is_number(value):
        raise ValueError(f"guidance {name} is a function or a network, which a tuned plan cannot record: use numbers")
    return None if value is None else "inf" if value == math.inf else float(value)


def _cfg(scales: Sequence[Floats]) -> Floats:
    """raw_0 + s1 (raw_1 - raw_0) + s2 (raw_2 - raw_1) ... as weights of the branches."""
    if all(len(s) == 1 for s in scales):  # the usual case, without NumPy's slower broadcasting
        numbers = [1.0, *(float(s[0]) for s in scales), 0.0]
        return np.array([[a - b for a, b in pairwise(numbers)]])
    ends = _side_by_side([np.ones(1), *scales, np.zeros(1)])
    return ends[:, :-1] - ends[:, 1:]


def _rescaled(weights: Floats, a: float, b: float, phi: float) -> Floats:
    """The blend of guidance rescale: std of the guided output (mix A) towards that of the last branch's (mix B)."""
    blend = _blend(len(weights))
    raws = slice(1, 1 + weights.shape[1])
    blend[:, layout.MIX_A :][:, raws] = weights
    blend[:, layout.MIX_B + weights.shape[1]] = 1.0
    blend[:, layout.FIXED] = a
    blend[:, layout.SCALED :][:, raws] = b * weights
    # Samples that are not guided in this call are not rescaled either.
    blend[:, layout.PHI] = phi * _guided(weights)
    return blend


def _guided(weights: Floats) -> NDArray[np.bool_]:
    """Whether the output is made of other branches than the last one, for each sample."""
    others: NDArray[np.bool_] = np.count_nonzero(weights[:, :-1], axis=1) > 0
    return others


def _blend(rows: int) -> Floats:
    blend = np.zeros((rows, layout.BLEND))
    blend[:, layout.RADIUS] = np.inf
    return blend


@dataclass(frozen=True)
class CFG(_Guided):
    """Classifier-free guidance (Ho & Salimans 2022): raw = raw_null + scale (raw_cond - raw_null).

    scale        1 is unguided; see the module for arrays and functions. A pair (s1, s2) combines three outputs as
                 raw_0 + s1 (raw_1 - raw_0) + s2 (raw_2 - raw_1) (Brooks et al. 2023, eq. 3)
    rescale      phi of Lin et al. (2023, section 3.4): moves each sample's standard deviation of the guided output
                 towards that of the conditional output
    start, stop  fractions of the steps between which guidance is on; outside them only the conditional branch is called
    sigma_lo, sigma_hi  levels sigma / alpha between which guidance is on, sigma_lo < sigma / alpha <= sigma_hi
                 (Kynkäänniemi et al. 2024)
    """

    scale: Any
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        given: object = self.scale
        scales = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        if not 1 <= len(scales) <= 2:
            raise ValueError(f"guidance scale takes one number or a pair, got {given!r:.80}")
        checked = tuple(_scale("guidance scale", value) for value in scales)
        # A list becomes a tuple, and an array `Scales`: a guidance is hashable.
        object.__setattr__(self, "scale", checked if isinstance(given, (list, tuple)) else checked[0])
        between("guidance rescale", self.rescale, 0.0, 1.0)
        self._check_interval()

    @property
    def scales(self) -> tuple[Scale, ...]:
        return _as_tuple(self.scale)

    @property
    def branches(self) -> int:
        return len(self.scales) + 1

    @property
    def reduces(self) -> bool:
        return self.rescale != 0.0

    def _weights(self, moment: Moment) -> Floats:
        return _cfg([_value("guidance scale", s, moment) for s in self.scales])

    def blend(self, weights: Floats, a: float, b: float, momentum: float) -> Floats:
        return _rescaled(weights, a, b, self.rescale)

    def as_json(self) -> dict[str, Any]:
        plain = {name: float(getattr(self, name)) for name in ("rescale", "start", "stop")}
        ends = {name: _plain(name, getattr(self, name)) for name in ("sigma_lo", "sigma_hi")}
        interval = ends if ends != {"sigma_lo": 0.0, "sigma_hi": "inf"} else {}
        return {"scale": [_plain("scale", s) for s in self.scales], **plain, **interval}


@dataclass(frozen=True)
class APG(_Guided):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), on x0 predictions m:

        d = m_cond - m_null + momentum d_before,  d = d min(1, norm_threshold / |d|)
        m = m_cond + (scale - 1) (d_orthogonal + eta d_parallel)

    with d_parallel the part of d along m_cond, norms and products over a whole sample.

    scale           as for `CFG`, of two branches
    eta             of the part that saturates, 0 to 1; 1 keeps all of it, which is CFG
    norm_threshold  the largest norm of d, in units of x0 over the whole sample; inf for none
    momentum        of the running average, updated once per call; the paper's values are negative
    start, stop, sigma_lo, sigma_hi  as for `CFG`
    """

    scale: Any
    eta: float = 0.0
    norm_threshold: float = math.inf
    momentum: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale("guidance scale", self.scale))
        between("guidance eta", self.eta, 0.0, 1.0)
        if not number(self.norm_threshold) > 0.0:
            raise ValueError(
                f"guidance norm_threshold must be a positive number or inf, got {self.norm_threshold!r:.80}"
            )
        between("guidance momentum", self.momentum, -1.0, 1.0)
        self._check_interval()

    @property
    def reduces(self) -> bool:
        return True

    @property
    def by_step(self) -> str | None:
        return "momentum" if self.momentum else super().by_step

    def shares(self, moment: Moment) -> Shares:
        if not self.on(moment):
            return self._alone()
        weights = _cfg([_value("guidance scale", self.scale, moment)])
        # A scale of 0 still needs the conditional output; the average is updated even where the scale is 1.
        return Shares(weights, (0, 1)) if weights[:, 0].any() or self.momentum else self._alone()

    def blend(self, weights: Floats, a: float, b: float, momentum: float) -> Floats:
        blend, strength = _blend(len(weights)), weights[:, -1:] - 1.0
        conditional, d = np.array([a, 0.0, b, 0.0]), np.array([0.0, -b, b, momentum])
        for at, four in (
            (layout.MIX_A, d),
            (layout.MIX_B, conditional),
            (layout.FIXED, conditional),
            (layout.SCALED, strength * d),
            (layout.PROJECTED, -strength * (1.0 - self.eta) * conditional),
        ):
            blend[:, at : at + 4] = four
        blend[:, layout.RADIUS] = self.norm_threshold
        return blend


@dataclass(frozen=True)
class CFGZero(_Guided):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): CFG from the null output times its best scale for each sample,

        raw = s raw_null + scale (raw_cond - s raw_null),  s = <raw_cond, raw_null> / |raw_null|^2

    scale       as for `CFG`, of two branches
    zero_steps  the first steps, whose velocity is 0 and in which no branch is called; needs predicts="flow". The
                paper's zero-init is one step
    start, stop, sigma_lo, sigma_hi  as for `CFG`
    """

    scale: Any
    zero_steps: int = 0
    start: float = 0.0
    stop: float = 1.0
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale("guidance scale", self.scale))
        whole("guidance zero_steps", self.zero_steps, 0)
        self._check_interval()

    @property
    def reduces(self) -> bool:
        return True

    @property
    def by_step(self) -> str | None:
        return "zero_steps" if self.zero_steps else super().by_step

    def shares(self, moment: Moment) -> Shares:
        if moment.step is not None and moment.step < self.zero_steps:
            return Shares(np.zeros((1, 2)), ())
        if not self.on(moment):
            return self._alone()
        weights = _cfg([_value("guidance scale", self.scale, moment)])
        return Shares(weights, (0, 1)) if weights[:, 0].any() else self._alone()

    def blend(self, weights: Floats, a: float, b: float, momentum: float) -> Floats:
        blend, scale = _blend(len(weights)), weights[:, -1]
        blend[:, layout.MIX_A + 2] = blend[:, layout.MIX_B + 1] = 1.0  # q = <conditional, null> / |null|^2
        blend[:, layout.FIXED], blend[:, layout.FIXED + 2] = a, b * scale
        blend[:, layout.PROJECTED + 1] = b * (1.0 - scale)
        return blend


@dataclass(frozen=True)
class AutoGuidance(_Guided):
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507): raw = raw_guide + scale (raw - raw_guide).

    guide   a worse version of the denoiser's network, on the same inputs and of the same prediction type. `cond` is one
            condition for both networks, or a pair, the guide's first
    scale, start, stop, sigma_lo, sigma_hi  as for `CFG`
    """

    guide: Callable[..., Any]
    scale: Any
    start: float = 0.0
    stop: float = 1.0
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf
    one_condition: ClassVar[bool] = True

    def __post_init__(self) -> None:
        function("guidance guide", self.guide, classes=False)
        object.__setattr__(self, "scale", _scale("guidance scale", self.scale))
        self._check_interval()

    @property
    def models(self) -> tuple[Callable[..., Any] | None, ...]:
        return self.guide, None

    def with_models(self, models: Sequence[Any]) -> Self:
        return replace(self, guide=models[0])

    def _weights(self, moment: Moment) -> Floats:
        return _cfg([_value("guidance scale", self.scale, moment)])


@dataclass(frozen=True)
class Branches(_Guided):
    """Free weights on two or three branches: raw = sum_j weights[j] raw_j.

        fs.Branches((1 - s, -k, s + k))  skip-layer guidance: null, perturbed and conditional branch

    weights  one per branch, each as a scale of `CFG`; they should sum to 1. The last branch is the conditional one
    models   the network of each branch, None for the denoiser's; by default all are the denoiser's
    rescale, start, stop, sigma_lo, sigma_hi  as for `CFG`

    `cond` is a sequence of one condition per branch. A branch is not called where its weight is 0, except for the
    conditional one where it is what a rescale of the others goes towards.
    """

    weights: Any
    models: Any = ()
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        weights: object = self.weights
        if not isinstance(weights, (list, tuple)) or not 2 <= len(weights) <= layout.RAWS:
            raise ValueError(f"guidance weights must be 2 or 3 numbers, the conditional one last; got {weights!r:.80}")
        object.__setattr__(self, "weights", tuple(_scale("guidance weights", w) for w in weights))
        models: object = self.models
        if isinstance(models, tuple) and not models:
            models = (None,) * len(weights)
        if not isinstance(models, (list, tuple)) or len(models) != len(weights):
            raise ValueError(f"guidance models must be one network or None per branch, got {models!r:.80}")
        for model in models:
            function("guidance models", model, optional=True, classes=False)
        object.__setattr__(self, "models", tuple(models))
        between("guidance rescale", self.rescale, 0.0, 1.0)
        self._check_interval()

    @property
    def branches(self) -> int:
        return len(self.weights)

    def with_models(self, models: Sequence[Any]) -> Self:
        return replace(self, models=tuple(models))

    @property
    def reduces(self) -> bool:
        return self.rescale != 0.0

    def _weights(self, moment: Moment) -> Floats:
        return _side_by_side([_value("guidance weights", w, moment) for w in self.weights])

    def blend(self, weights: Floats, a: float, b: float, momentum: float) -> Floats:
        return _rescaled(weights, a, b, self.rescale)


Guidance = CFG | APG | CFGZero | AutoGuidance | Branches


def as_guidance(value: object) -> Guidance | None:
    """None, a guidance, or a number for the scale of a `CFG`; anything else is a TypeError."""
    if value is None or isinstance(value, (CFG, APG, CFGZero, AutoGuidance, Branches)):
        return value
    if not is_number(value):
        raise TypeError(
            "guidance must be a number (the scale), a CFG, APG, CFGZero, AutoGuidance or Branches, or None; "
            f"got {value!r:.80}"
        )
    return CFG(value if math.isnan(number(value)) else float(value))  # an int may be beyond a float
