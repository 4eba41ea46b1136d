"""Problems whose exact posterior mean is known, with which the error of a sampler is measured.

The data x0 of each is a Gaussian or a mixture of isotropic Gaussians, so that E[x0 | x] at any noise level,
and through it the probability-flow ODE, is exact: what is left of an error belongs to the solver.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Process

if TYPE_CHECKING:
    from fewstep.bindings.denoiser import Denoiser
    from fewstep.solvers.schedule.grid import Grid


class _NumPy:
    """The few array functions needed here, in the caller's library; half precision is computed in float32."""

    def __init__(self, x: Any, dtype: Any = None) -> None:
        self.dtype = dtype or (np.float64 if x.dtype == np.float64 else np.float32)

    def array(self, value: Any) -> Any:
        return np.asarray(value, dtype=self.dtype)

    def softmax(self, logits: Any) -> Any:
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def log(self, value: Any) -> Any:
        return np.log(value)

    def cast(self, value: Any, x: Any) -> Any:
        return value.astype(x.dtype)


class _Torch:
    def __init__(self, x: Any, dtype: Any = None) -> None:
        import torch

        self.torch = torch
        self.device = x.device
        self.dtype = dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)

    def array(self, value: Any) -> Any:
        return self.torch.as_tensor(value, dtype=self.dtype, device=self.device)

    def softmax(self, logits: Any) -> Any:
        return self.torch.softmax(logits, dim=-1)

    def log(self, value: Any) -> Any:
        return self.torch.log(value)

    def cast(self, value: Any, x: Any) -> Any:
        return value.to(x.dtype)


def _is_torch(x: Any) -> bool:
    return "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor)


def _library(x: Any) -> Any:
    if _is_torch(x) and x.is_floating_point():
        return _Torch(x)
    if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating):
        return _NumPy(x)
    kind = f"{type(x).__name__} of {x.dtype}" if hasattr(x, "dtype") else type(x).__name__
    raise TypeError(f"x is a {kind}: it must be a floating-point NumPy array or torch tensor")


def _to_numpy(x: Any) -> Any:
    return x.detach().cpu().double().numpy() if _is_torch(x) else x


class Problem(ABC):
    """Data whose posterior mean is known exactly.

    Attributes:
        shape: shape of one sample, without the batch axis.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def draw(self, n: int, seed: int) -> Array:
        """n independent samples of x0, float64 (n, *shape), the same for the same seed."""

    @abstractmethod
    def _posterior(self, lib: Any, x: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """(E[x0 | x], E[eps | x]) for x (B, ...) and alpha, sigma that broadcast with it.

        The second is -sigma times the score and never divides by sigma, so it is finite at sigma = 0.
        """

    @abstractmethod
    def solve(self, x: Any, grid: Grid, rtol: float = 1e-10) -> Any:
        """Where the probability-flow ODE takes x from the grid's first point to its last.

        Args:
            x: (B, *shape) at the marginal of the grid's first point, NumPy or torch.
            grid: only its two ends matter; the first may have alpha = 0, the last sigma = 0.
            rtol: tolerance of the ODE solver; not used where there is a closed form.

        Returns:
            (B, *shape) in float64 in x's library.

        Raises:
            TypeError, ValueError: for an x that is not a floating-point array of that shape.
        """

    def denoise(self, x: Any, alpha: Any, sigma: Any) -> Any:
        """E[x0 | x] for x = alpha x0 + sigma eps, eps ~ N(0, I).

        Args:
            x: (B, *shape), NumPy or torch, any floating dtype; differentiable in torch.
            alpha, sigma: >= 0, not both 0; a number, or (B,). sigma = 0 gives x / alpha, alpha = 0 the mean.

        Returns:
            (B, *shape), x's library, dtype and device. Half precision is computed in float32.

        Raises:
            TypeError: x is not a floating-point NumPy array or torch tensor.
            ValueError: a shape that does not agree; a negative scale; both scales 0.
        """
        lib = self._checked(x)
        scales = (_scale("alpha", alpha, x), _scale("sigma", sigma, x))
        _check_scales(*scales)
        a, s = (lib.array(v).reshape((-1,) + (1,) * (x.ndim - 1)) for v in scales)
        return lib.cast(self._posterior(lib, lib.array(x), a, s)[0], x)

    def denoiser(self, process: Process) -> Denoiser:
        """The exact denoiser as a :class:`fewstep.Denoiser` (predicts="sample"), told the process's time.

        The time is mapped to alpha and sigma in float64 on the host.
        """
        from fewstep.bindings.denoiser import Denoiser

        def model(x: Any, t: Any, **cond: Any) -> Any:
            at = process.point(_to_numpy(t))
            return self.denoise(x, at.alpha, at.sigma)

        # A float32 time would cost the exactness that these problems are for.
        return Denoiser(model, process, predicts="sample", time_dtype="float64")

    def _checked(self, x: Any) -> Any:
        lib = _library(x)
        if x.ndim < 1 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}: it must be (B, {', '.join(map(str, self.shape))})")
        return lib


def _scale(name: str, value: Any, x: Any) -> Any:
    if not _is_torch(value):
        value = np.asarray(value, dtype=np.float64)
    if tuple(value.shape) not in ((), (x.shape[0],)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be a number or ({x.shape[0]},)")
    return value


def _check_scales(alpha: Any, sigma: Any) -> None:
    # Tensors on a device are not read back: the check would cost a synchronisation at each call.
    if _is_torch(alpha) or _is_torch(sigma):
        return
    if not (np.all(alpha >= 0.0) and np.all(sigma >= 0.0) and np.all(alpha + sigma > 0.0)):
        raise ValueError(f"alpha = {alpha}, sigma = {sigma}: they must be >= 0 and not both 0")


def _as_float64_like(x: Any, value: Array) -> Any:
    if _is_torch(x):
        import torch

        return torch.as_tensor(value, dtype=torch.float64, device=x.device)
    return value


def _positive(name: str, value: ArrayLike) -> Array:
    array = np.array(value, dtype=np.float64)
    if not (np.all(array > 0.0) and np.all(np.isfinite(array))):
        raise ValueError(f"{name} = {value!r}: every entry must be positive and finite")
    return array


def _finite(name: str, value: ArrayLike) -> Array:
    array = np.array(value, dtype=np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} holds NaN or inf")
    return array


class Gaussian(Problem):
    """x0 ~ N(mean, diag(std^2)).

    With v = alpha^2 std^2 + sigma^2, elementwise: E[x0 | x] = mean + alpha std^2 / v (x - alpha mean),
    and along the probability-flow ODE (x - alpha mean) / sqrt(v) stays as it is.

    Args:
        mean, std: numbers or arrays that broadcast to the shape of a sample; std > 0. If both are numbers,
            ``shape`` is () and each element of any x (B, ...) is its own one-dimensional problem.

    Raises:
        ValueError: NaN, inf, or a std that is not positive.
    """

    def __init__(self, mean: ArrayLike, std: ArrayLike) -> None:
        self.mean, self.std = _finite("mean", mean), _positive("std", std)
        self.shape = np.broadcast_shapes(self.mean.shape, self.std.shape)

    def __repr__(self) -> str:
        return f"Gaussian(shape={self.shape})"

    def _checked(self, x: Any) -> Any:
        return super()._checked(x) if self.shape else _library(x)

    def draw(self, n: int, seed: int) -> Array:
        return self.mean + self.std * np.random.default_rng(seed).standard_normal((n, *self.shape))

    def _posterior(self, lib: Any, x: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        mean, variance = lib.array(self.mean), lib.array(self.std**2)
        whitened = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return mean + alpha * variance * whitened, sigma * whitened

    def solve(self, x: Any, grid: Grid, rtol: float = 1e-10) -> Any:
        self._checked(x)
        first, last = grid.points[0], grid.points[-1]
        growth = np.hypot(last.alpha * self.std, last.sigma) / np.hypot(first.alpha * self.std, first.sigma)
        start = _to_numpy(x).astype(np.float64)
        return _as_float64_like(x, last.alpha * self.mean + (start - first.alpha * self.mean) * growth)


class Mixture(Problem):
    """x0 ~ sum_k weights_k N(means_k, stds_k^2 I).

    With v_k = alpha^2 stds_k^2 + sigma^2 and r the softmax over k of
    log weights_k - D/2 log v_k - |x - alpha means_k|^2 / (2 v_k),
    E[x0 | x] = sum_k r_k (means_k + alpha stds_k^2 / v_k (x - alpha means_k)).

    Args:
        means: (K, *shape).
        stds: (K,) or a number, > 0.
        weights: (K,), > 0, any scale; equal if None.

    Raises:
        ValueError: shapes that do not agree, NaN, inf, or a std or weight that is not positive.
    """

    def __init__(self, means: ArrayLike, stds: ArrayLike, weights: ArrayLike | None = None) -> None:
        centres = _finite("means", means)
        if centres.ndim < 2 or centres.size == 0:
            raise ValueError(f"means has shape {centres.shape}: it must be (K, *shape)")
        count = centres.shape[0]
        arrays = {
            "stds": _positive("stds", stds),
            "weights": _positive("weights", 1.0 if weights is None else weights),
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
        """``modes`` equal Gaussians on a circle: means_k = radius (cos, sin)(2 pi k / modes)."""
        angle = 2.0 * np.pi * np.arange(modes) / modes
        return cls(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), std)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(modes={len(self.weights)}, shape={self.shape})"

    def draw(self, n: int, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.weights), size=n, p=self.weights)
        noise = rng.standard_normal((n, self.means.shape[1]))
        return (self.means[k] + self.stds[k, None] * noise).reshape(n, *self.shape)

    def _posterior(self, lib: Any, x: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        shape = x.shape
        x, alpha, sigma = x.reshape(shape[0], -1), alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        means, variance = lib.array(self.means), lib.array(self._variance)
        v = alpha**2 * variance + sigma**2
        # |x - alpha m|^2 multiplied out: a matrix product instead of a (B, K, D) array of differences.
        square = (x * x).sum(-1)[:, None] - 2.0 * alpha * (x @ means.T) + alpha**2 * lib.array(self._square)
        log_volume = 0.5 * means.shape[1] * lib.log(v)
        r = lib.softmax(lib.array(self._log_weights) - log_volume - 0.5 * square / v)
        inner, centre = (r / v).sum(-1)[:, None], (r / v) @ means
        gain = (r * variance / v).sum(-1)[:, None]
        # 1 - alpha gain_k = sigma^2 / v_k without the cancellation.
        mean = alpha * gain * x + sigma**2 * centre
        return mean.reshape(shape), (sigma * (inner * x - alpha * centre)).reshape(shape)

    def solve(self, x: Any, grid: Grid, rtol: float = 1e-10) -> Any:
        """See :meth:`Problem.solve`. DOP853 (SciPy) over all of x as one system.

        It runs in the angle phi = atan(sigma / alpha), in which y = x / sqrt(alpha^2 + sigma^2) has
        y' = cos(phi) E[eps | x] - sin(phi) E[x0 | x]: smooth at both ends, sigma = 0 and alpha = 0.

        Raises:
            ImportError: SciPy is missing.
            RuntimeError: the ODE solver gave up.
        """
        self._checked(x)
        try:
            from scipy.integrate import solve_ivp
        except ImportError as error:
            raise ImportError("the reference solution needs SciPy: pip install 'fewstep[cli]'") from error
        first, last = grid.points[0], grid.points[-1]
        start = _to_numpy(x).astype(np.float64)
        lib = _NumPy(start)

        def slope(phi: float, flat: Array) -> Array:
            alpha, sigma = np.array(np.cos(phi)), np.array(np.sin(phi))
            x0, eps = self._posterior(lib, flat.reshape(start.shape), alpha, sigma)
            return np.asarray(alpha * eps - sigma * x0).ravel()

        ends = [np.arctan2(point.sigma, point.alpha) for point in (first, last)]
        flat = start.ravel() / np.hypot(first.alpha, first.sigma)
        result = solve_ivp(slope, ends, flat, method="DOP853", rtol=rtol, atol=rtol, t_eval=ends[1:])
        if not result.success:
            raise RuntimeError(f"the reference ODE solver gave up: {result.message}")
        end = result.y[:, -1].reshape(start.shape) * np.hypot(last.alpha, last.sigma)
        return _as_float64_like(x, end)


class Digits(Mixture):
    """scikit-learn's 1797 handwritten digits, pixels x/8 - 1, each blurred to an isotropic Gaussian.

    A sample has shape (1, 8, 8) and its mean lies in [-1, 1].

    Args:
        blur: standard deviation of each Gaussian, > 0.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: blur is not positive.
    """

    def __init__(self, blur: float = 0.15) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits need scikit-learn: pip install 'fewstep[cli]'") from error
        super().__init__(load_digits().images[:, None] / 8.0 - 1.0, blur)


def energy_distance(a: ArrayLike, b: ArrayLike, *, unbiased: bool = True, chunk: int = 512) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely & Rizzo, 2013) of two sets of samples.

    Unbiased, it is 0 in expectation, and so negative half of the time, for samples of one distribution. Biased, it
    is the squared distance of the two empirical distributions: never negative, about E|X - X'| (1/n + 1/m) for
    samples of one distribution, and so to be read beside that of other sets as large.

    Args:
        a, b: (n, ...) and (m, ...) samples, n, m >= 2, of one shape; NumPy arrays or CPU tensors.
        unbiased: leave each sample's distance 0 to itself out of the means (the U-statistic).
        chunk: rows of the distance matrix held at a time: memory is chunk * max(n, m) float64.

    Raises:
        ValueError: fewer than two samples, or shapes that do not agree.
    """
    first, second = (np.asarray(_to_numpy(v), dtype=np.float64) for v in (a, b))
    if first.ndim < 1 or second.ndim < 1 or first.shape[1:] != second.shape[1:]:
        raise ValueError(f"a has shape {first.shape}, b {second.shape}: they must be (n, ...) and (m, ...)")
    n, m = len(first), len(second)
    if n < 1 + unbiased or m < 1 + unbiased:
        raise ValueError(f"a has {n} samples, b {m}: it takes at least {1 + unbiased} of each")
    x, y = first.reshape(n, -1), second.reshape(m, -1)
    cross = _distances(x, y, chunk) / (n * m)
    own = (_distances(v, v, chunk) / (len(v) * (len(v) - unbiased)) for v in (x, y))
    return 2.0 * cross - sum(own)


def _distances(x: Array, y: Array, chunk: int) -> float:
    """The sum of |x_i - y_j| over all pairs, without (n, m, D) differences."""
    # About a common centre, so that multiplying the square out cancels as little as possible.
    centre = x.mean(axis=0)
    x, y = x - centre, y - centre
    squares = (y * y).sum(-1)
    total = 0.0
    for i in range(0, len(x), chunk):
        rows = x[i : i + chunk]
        square = (rows * rows).sum(-1)[:, None] - 2.0 * rows @ y.T + squares
        total += float(np.sqrt(np.maximum(square, 0.0)).sum())
    return total
