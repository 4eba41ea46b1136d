"""Problems whose exact posterior mean is known, to measure the error of a sampler.

The data x0 are Gaussian or a mixture of isotropic Gaussians. Then E[x0 | x] is exact at any noise level, and so is the
probability-flow ODE: all error belongs to the solver.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeGuard, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike

from fewstep.digits_data import load_digits
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Process

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.bindings.denoiser import Denoiser
    from fewstep.solvers.schedule.grid import Grid

A = TypeVar("A", np.ndarray, "Tensor")
Numbers: TypeAlias = "ArrayLike | Tensor"


class _Library(ABC, Generic[A]):
    """The array functions needed here, in the caller's library. Half precision is computed in float32."""

    @abstractmethod
    def array(self, value: Numbers) -> A: ...

    @abstractmethod
    def softmax(self, logits: A) -> A: ...

    @abstractmethod
    def log(self, value: A) -> A: ...

    @abstractmethod
    def like(self, value: A, x: A) -> A:
        """`value` in the dtype of x."""


class _NumPy(_Library[np.ndarray]):
    def __init__(self, x: np.ndarray) -> None:
        self.dtype = np.float64 if x.dtype == np.float64 else np.float32

    def array(self, value: Numbers) -> np.ndarray:
        return np.asarray(value, dtype=self.dtype)

    def softmax(self, logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True))

    def log(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(value))

    def like(self, value: np.ndarray, x: np.ndarray) -> np.ndarray:
        return value.astype(x.dtype)


class _Torch(_Library["Tensor"]):
    def __init__(self, x: Tensor) -> None:
        import torch

        self.device = x.device
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def array(self, value: Numbers) -> Tensor:
        import torch

        return torch.as_tensor(value, dtype=self.dtype, device=self.device)

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def log(self, value: Tensor) -> Tensor:
        return value.log()

    def like(self, value: Tensor, x: Tensor) -> Tensor:
        return value.to(x.dtype)


def _is_torch(x: object) -> TypeGuard[Tensor]:
    return "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor)


def _library(x: A) -> _Library[A]:
    if _is_torch(x) and x.is_floating_point():
        return cast("_Library[A]", _Torch(x))
    if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating):
        return cast("_Library[A]", _NumPy(x))
    kind = f"{type(x).__name__} of {x.dtype}" if hasattr(x, "dtype") else type(x).__name__
    raise TypeError(f"x is a {kind}: it must be a floating-point NumPy array or torch tensor")


def _float64(x: Numbers) -> Array:
    return np.asarray(x.detach().cpu() if _is_torch(x) else x, dtype=np.float64)


def _float64_like(x: A, value: Array) -> A:
    """`value` in the library and on the device of x."""
    result: Array | Tensor = value
    if _is_torch(x):
        import torch

        result = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    return cast("A", result)


class Problem(ABC):
    """Data whose posterior mean is known exactly. `shape` is that of one sample, without the batch axis."""

    shape: tuple[int, ...]

    @abstractmethod
    def draw(self, n: int, seed: int) -> Array:
        """n independent samples of x0, float64 (n, *shape), the same for the same seed."""

    @abstractmethod
    def _posterior(self, lib: _Library[A], x: A, alpha: A, sigma: A) -> tuple[A, A]:
        """(E[x0 | x], E[eps | x]) for x (B, ...) and alpha, sigma that broadcast with it.

        The second is -sigma times the score. It is computed without a division by sigma, so it is finite at sigma = 0.
        """

    @abstractmethod
    def solve(self, x: A, grid: Grid, rtol: float = 1e-10) -> A:
        """Solve the probability-flow ODE from the grid's first point to its last.

        x     (B, *shape) at the marginal of the first point, NumPy or torch
        grid  only its ends matter; the first may have alpha = 0, the last sigma = 0
        rtol  tolerance of the ODE solver; unused where there is a closed form

        Returns (B, *shape) in float64 in x's library. Raises TypeError or ValueError for an x that is not a
        floating-point array of that shape.
        """

    def denoise(self, x: A, alpha: Numbers, sigma: Numbers) -> A:
        """E[x0 | x] for x = alpha x0 + sigma eps, eps ~ N(0, I).

        x      (B, *shape), NumPy or torch, any floating dtype; differentiable in torch
        alpha, sigma  >= 0 and not both 0; a number, or (B,). sigma = 0 gives x / alpha, alpha = 0 the mean

        Returns (B, *shape) in x's library, dtype and device; half precision is computed in float32. Raises TypeError if
        x is not a floating-point NumPy array or torch tensor, ValueError for shapes that do not agree, a negative scale
        or two scales of 0.
        """
        lib = self._checked(x)
        scales = (_scale("alpha", alpha, len(x)), _scale("sigma", sigma, len(x)))
        _check_scales(*scales)
        a, s = (lib.array(v).reshape((-1,) + (1,) * (x.ndim - 1)) for v in scales)
        return lib.like(self._posterior(lib, lib.array(x), a, s)[0], x)

    def denoiser(self, process: Process) -> Denoiser:
        """The exact denoiser as a `fewstep.Denoiser` (predicts="sample") of the process's time.

        The time is mapped to alpha and sigma in float64 on the host.
        """
        from fewstep.bindings.denoiser import Denoiser

        # A float32 time would lose the exactness that these problems are for.
        return Denoiser(PosteriorMean(self, process), process, predicts="sample", time_dtype="float64")

    def _checked(self, x: A) -> _Library[A]:
        lib = _library(x)
        if x.ndim < 1 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}: it must be (B, {', '.join(map(str, self.shape))})")
        return lib


@dataclass(frozen=True, eq=False)
class PosteriorMean:
    """The model of `Problem.denoiser`: a class of its own, because a function made there could not be pickled."""

    problem: Problem
    process: Process

    def __call__(self, x: A, t: A, **cond: object) -> A:
        at = self.process.point(_float64(t))
        return self.problem.denoise(x, at.alpha, at.sigma)


def _scale(name: str, value: Numbers, batch: int) -> Array | Tensor:
    values = value if _is_torch(value) else np.asarray(value, dtype=np.float64)
    if tuple(values.shape) not in ((), (batch,)):
        raise ValueError(f"{name} has shape {tuple(values.shape)}: it must be a number or ({batch},)")
    return values


def _check_scales(alpha: Array | Tensor, sigma: Array | Tensor) -> None:
    # Tensors are not checked: reading them back from a device would cost a synchronisation in each call.
    if _is_torch(alpha) or _is_torch(sigma):
        return
    if not (np.all(alpha >= 0.0) and np.all(sigma >= 0.0) and np.all(alpha + sigma > 0.0)):
        raise ValueError(f"alpha = {alpha}, sigma = {sigma}: they must be >= 0 and not both 0")


def _positive_array(name: str, value: ArrayLike) -> Array:
    array = np.array(value, dtype=np.float64)
    if not (np.all(array > 0.0) and np.all(np.isfinite(array))):
        raise ValueError(f"{name} = {value!r}: every entry must be positive and finite")
    return array


def _finite_array(name: str, value: ArrayLike) -> Array:
    array = np.array(value, dtype=np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} holds NaN or inf")
    return array


class Gaussian(Problem):
    """x0 ~ N(mean, diag(std^2)).

    With v = alpha^2 std^2 + sigma^2, elementwise: E[x0 | x] = mean + alpha std^2 / v (x - alpha mean),
    and (x - alpha mean) / sqrt(v) is constant along the probability-flow ODE.

    mean, std  numbers or arrays that broadcast to the shape of a sample; std > 0. If both are numbers, `shape` is ()
               and each element of any x (B, ...) is a one-dimensional problem of its own

    Raises ValueError for NaN, inf, or a std that is not positive.
    """

    def __init__(self, mean: ArrayLike, std: ArrayLike) -> None:
        self.mean, self.std = _finite_array("mean", mean), _positive_array("std", std)
        self.shape = np.broadcast_shapes(self.mean.shape, self.std.shape)

    def __repr__(self) -> str:
        return f"Gaussian(shape={self.shape})"

    def _checked(self, x: A) -> _Library[A]:
        return super()._checked(x) if self.shape else _library(x)

    def draw(self, n: int, seed: int) -> Array:
        return self.mean + self.std * np.random.default_rng(seed).standard_normal((n, *self.shape))

    def _posterior(self, lib: _Library[A], x: A, alpha: A, sigma: A) -> tuple[A, A]:
        mean, variance = lib.array(self.mean), lib.array(self.std**2)
        whitened = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return mean + alpha * variance * whitened, sigma * whitened

    def solve(self, x: A, grid: Grid, rtol: float = 1e-10) -> A:
        self._checked(x)
        first, last = grid.points[0], grid.points[-1]
        growth = np.hypot(last.alpha * self.std, last.sigma) / np.hypot(first.alpha * self.std, first.sigma)
        start = _float64(x)
        return _float64_like(x, last.alpha * self.mean + (start - first.alpha * self.mean) * growth)


class Mixture(Problem):
    """x0 ~ sum_k weights_k N(means_k, stds_k^2 I).

    With v_k = alpha^2 stds_k^2 + sigma^2 and r the softmax over k of
    log weights_k - D/2 log v_k - |x - alpha means_k|^2 / (2 v_k),
    E[x0 | x] = sum_k r_k (means_k + alpha stds_k^2 / v_k (x - alpha means_k)).

    means    (K, *shape)
    stds     (K,) or a number, > 0
    weights  (K,), > 0, of any scale; equal if None

    Raises ValueError for shapes that do not agree, NaN, inf, or a std or weight that is not positive.
    """

    def __init__(self, means: ArrayLike, stds: ArrayLike, weights: ArrayLike | None = None) -> None:
        centres = _finite_array("means", means)
        if centres.ndim < 2 or centres.size == 0:
            raise ValueError(f"means has shape {centres.shape}: it must be (K, *shape)")
        count = centres.shape[0]
        arrays = {
            "stds": _positive_array("stds", stds),
            "weights": _positive_array("weights", 1.0 if weights is None else weights),
        }
        for name, array in arrays.items():
            if array.shape not in ((), (count,)):
                raise ValueError(f"{name} has shape {array.shape}: it must be a number or ({count},)")
        self.shape = centres.shape[1:]
        self.means = centres.reshape(count, -1)
        self.stds = np.broadcast_to(arrays["stds"], (count,))
        share = np.broadcast_to(arrays["weights"], (count,))
        self.weights = share / share.sum()
        self._variance, self._log_weights = self.stds**2, np.log(self.weights)
        self._square = (self.means * self.means).sum(-1)

    @classmethod
    def ring(cls, modes: int = 8, radius: float = 0.7, std: float = 0.05) -> Mixture:
        """Equal Gaussians on a circle: means_k = radius (cos, sin)(2 pi k / modes)."""
        angle = 2.0 * np.pi * np.arange(modes) / modes
        return cls(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), std)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(modes={len(self.weights)}, shape={self.shape})"

    def draw(self, n: int, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.weights), size=n, p=self.weights)
        noise = rng.standard_normal((n, self.means.shape[1]))
        return (self.means[k] + self.stds[k, None] * noise).reshape(n, *self.shape)

    def _posterior(self, lib: _Library[A], x: A, alpha: A, sigma: A) -> tuple[A, A]:
        shape = x.shape
        x, alpha, sigma = x.reshape(shape[0], -1), alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        means, variance = lib.array(self.means), lib.array(self._variance)
        v = alpha**2 * variance + sigma**2
        # |x - alpha m|^2 expanded: a matrix product instead of a (B, K, D) array of differences.
        square = (x * x).sum(-1)[:, None] - 2.0 * alpha * (x @ means.T) + alpha**2 * lib.array(self._square)
        log_volume = 0.5 * means.shape[1] * lib.log(v)
        r = lib.softmax(lib.array(self._log_weights) - log_volume - 0.5 * square / v)
        inner, centre = (r / v).sum(-1)[:, None], (r / v) @ means
        gain = (r * variance / v).sum(-1)[:, None]
        # 1 - alpha gain_k = sigma^2 / v_k without the cancellation.
        mean = alpha * gain * x + sigma**2 * centre
        return mean.reshape(shape), (sigma * (inner * x - alpha * centre)).reshape(shape)

    def solve(self, x: A, grid: Grid, rtol: float = 1e-10) -> A:
        """See `Problem.solve`. SciPy's DOP853 on all of x as one system.

        In the angle phi = atan(sigma / alpha), y = x / sqrt(alpha^2 + sigma^2) has
        y' = cos(phi) E[eps | x] - sin(phi) E[x0 | x], which is smooth at both ends, sigma = 0 and alpha = 0.

        Raises ImportError if SciPy is missing, RuntimeError if the ODE solver fails.
        """
        self._checked(x)
        try:
            from scipy.integrate import solve_ivp
        except ImportError as error:
            raise ImportError("the reference solution needs SciPy: pip install 'fewstep[cli]'") from error
        first, last = grid.points[0], grid.points[-1]
        start = _float64(x)
        lib = _NumPy(start)

        def slope(phi: float, flat: Array) -> Array:
            alpha, sigma = np.array(np.cos(phi)), np.array(np.sin(phi))
            x0, eps = self._posterior(lib, flat.reshape(start.shape), alpha, sigma)
            return np.asarray(alpha * eps - sigma * x0).ravel()

        ends = [np.arctan2(point.sigma, point.alpha) for point in (first, last)]
        flat = start.ravel() / np.hypot(first.alpha, first.sigma)
        result = solve_ivp(slope, ends, flat, method="DOP853", rtol=rtol, atol=rtol, t_eval=ends[1:])
        if not result.success:
            raise RuntimeError(f"the reference ODE solver failed: {result.message}")
        end = result.y[:, -1].reshape(start.shape) * np.hypot(last.alpha, last.sigma)
        return _float64_like(x, end)


class Digits(Mixture):
    """scikit-learn's 1797 handwritten digits, pixels x/8 - 1, each blurred to an isotropic Gaussian.

    A sample has shape (1, 8, 8), the means lie in [-1, 1].

    blur  standard deviation of each Gaussian, > 0

    Raises ImportError if scikit-learn is missing, ValueError if blur is not positive.
    """

    def __init__(self, blur: float = 0.15) -> None:
        super().__init__(load_digits()[0], blur)


def energy_distance(a: Numbers, b: Numbers, *, unbiased: bool = True, chunk: int = 512) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely & Rizzo, 2013) of two sets of samples.

    For samples of one distribution the unbiased estimate is 0 in expectation, and so negative half of the time. The
    biased one is the squared distance of the two empirical distributions: never negative, and about
    E|X - X'| (1/n + 1/m) for samples of one distribution, so compare it only between sets of the same size.

    a, b      (n, ...) and (m, ...) samples, n, m >= 2, of one shape; NumPy arrays or CPU tensors
    unbiased  leave the distance of each sample to itself out of the means (the U-statistic)
    chunk     rows of the distance matrix held at a time: memory is chunk * max(n, m) float64

    Raises ValueError for fewer than two samples, or shapes that do not agree.
    """
    first, second = _float64(a), _float64(b)
    if first.ndim < 1 or second.ndim < 1 or first.shape[1:] != second.shape[1:]:
        raise ValueError(f"a has shape {first.shape}, b {second.shape}: they must be (n, ...) and (m, ...)")
    n, m = len(first), len(second)
    if n < 1 + unbiased or m < 1 + unbiased:
        raise ValueError(f"a has {n} samples, b {m}: each must have at least {1 + unbiased}")
    x, y = first.reshape(n, -1), second.reshape(m, -1)
    cross = _distances(x, y, chunk) / (n * m)
    own = (_distances(v, v, chunk) / (len(v) * (len(v) - unbiased)) for v in (x, y))
    return 2.0 * cross - sum(own)


def _distances(x: Array, y: Array, chunk: int) -> float:
    """Sum of |x_i - y_j| over all pairs, without an (n, m, D) array of differences."""
    # Centred, so that the expanded square loses as few digits as possible to cancellation.
    centre = x.mean(axis=0)
    x, y = x - centre, y - centre
    squares = (y * y).sum(-1)
    total = 0.0
    for i in range(0, len(x), chunk):
        rows = x[i : i + chunk]
        square = (rows * rows).sum(-1)[:, None] - 2.0 * rows @ y.T + squares
        total += float(np.sqrt(np.maximum(square, 0.0)).sum())
    return total
