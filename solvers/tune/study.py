"""What fits are judged by: latents, the end points of their ODE, and the hand-made plans by their errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fewstep.solvers.files import make_folder, write_whole
from fewstep.solvers.options import function
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.arrays import FLOATS, Device
from fewstep.solvers.run.arrays import Array as ModelArray
from fewstep.solvers.run.conditions import leaves, name_of
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.candidates import Ranked, candidates, errors, rank, usable
from fewstep.solvers.tune.ensemble import Ensemble, Features, Unrolled, latents, unroll
from fewstep.solvers.tune.fingerprint import PROBES, digest, fingerprints, guidance_as_json, keep_conditions

REFERENCE_CALLS = 128

Reference = Plan | Callable[[ModelArray], ModelArray]


# --- errors ---


def statistics(squares: Array) -> dict[str, float]:
    """From the mean square error of each sample (n,): the RMSE, the median, and the RMSE without the worst 5 %."""
    kept = np.sort(squares)[: max(1, round(0.95 * len(squares)))]
    return {
        "rmse": float(np.sqrt(np.mean(squares))),
        "median": float(np.sqrt(np.median(squares))),
        "trimmed": float(np.sqrt(np.mean(kept))),
    }


# --- reference end points ---


def reference_grid(denoiser: DenoiserLike, calls: int = REFERENCE_CALLS) -> Grid:
    """A grid uniform in log-SNR from the process's first point, or its largest finite ratio if x0 is undefined there.

    It ends with the prediction at the process's smallest level, below which networks are not trained.
    """
    process = denoiser.process
    grid = make_grid(process, calls, "logsnr")
    first = process.point(process.t_first)
    if first.ratio <= grid.ratio[0] * (1.0 + 1e-9):
        return grid
    try:
        denoiser.prologue(first)
    except ValueError:
        return grid
    return Grid.from_sigmas(process, [first.ratio, *grid.ratio[:-2], grid.ratio[-1]])


def cache_folder() -> Path:
    """The folder of stored reference solutions: fewstep in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def folder_of(cache: str | Path | None) -> Path | None:
    """The folder that an argument `cache` names, made where it is missing; None for none."""
    folder = cache_folder() if cache == "auto" else None if cache is None else Path(cache)
    if folder is not None:
        make_folder(folder, "cache")
    return folder


def reference_ends(
    ensemble: Ensemble, reference: Reference | None, key: Sequence[Any], cache: Path | None
) -> tuple[Array, float | None]:
    """The end point of every latent (n, elements), and an estimate of its RMS error (None for a callable or a plan).

    key    everything that the end points depend on beside the plan; they are stored in `cache` under its digest
    """
    if reference is not None and not isinstance(reference, Plan):
        grid = reference_grid(ensemble.denoiser)
        x = grid.points[0].sigma * ensemble.z.reshape(-1, *ensemble.sample)
        dtype = "float64"
        found = np.asarray(ensemble.frame.to_numpy(reference(ensemble.frame.array(x, dtype))), np.float64)
        if found.shape != x.shape:
            raise ValueError(f"reference returned shape {found.shape} for latents of shape {x.shape}")
        return found.reshape(len(x), -1), None
    plans = [reference]
    if reference is None:
        plans = [
            make_plan("unipc", reference_grid(ensemble.denoiser, n), order=3)
            for n in (REFERENCE_CALLS, REFERENCE_CALLS // 2)
        ]
    name = digest(
        *key, ensemble.z, *(part for p in plans if p for form in [unroll(p)] for part in (form.w, form.points))
    )
    path = None if cache is None else cache / f"reference-{name}.npz"
    kept = None if path is None else _read(path, ensemble.z.shape)
    if kept is None:
        ends = [ensemble.reference(p) for p in plans if p is not None]
        error = float(np.sqrt(np.mean((ends[0] - ends[-1]) ** 2))) if len(ends) > 1 else np.nan
        kept = ends[0], error
        if path is not None and np.all(np.isfinite(ends[0])):
            make_folder(path.parent, "cache")
            write_whole(path, lambda to: np.savez(to, ends=ends[0], error=np.array(error)))
    if not np.all(np.isfinite(kept[0])):
        raise ValueError(
            "the reference solution is not finite: the denoiser returns NaN or inf, or the integration diverges"
        )
    return kept[0], None if np.isnan(kept[1]) else kept[1]


def _read(path: Path, shape: tuple[int, ...]) -> tuple[Array, float] | None:
    """The stored result of `reference_ends`; None if there is none, or the file is damaged."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            ends, error = file["ends"], float(file["error"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return (ends, error) if ends.shape == shape and ends.dtype == np.float64 else None


# --- the study of one denoiser: latents, end points, hand-made plans ---


@dataclass(frozen=True)
class Study:
    """A denoiser with the data and the hand-made plans that fits are compared with. Made by `study`.

    ranked  the hand-made plans by their error on the training seeds, best first
    tried   the number of hand-made plans before `rank` dropped any
    """

    ensemble: Ensemble
    target: Array
    splits: Mapping[str, range]
    ranked: list[Ranked]
    tried: int
    reference_error: float | None
    identity: Mapping[str, Any]

    def errors(self, plan: Unrolled, split: str) -> Array:
        """The mean square error of each sample of a split."""
        found: Array = errors(self.ensemble, [plan], self.target, self.splits[split])[0]
        return found

    def statistics(self, plan: Unrolled, split: str = "validation") -> dict[str, float]:
        return statistics(self.errors(plan, split))

    def rmse(self, plan: Unrolled, split: str = "validation") -> float:
        return self.statistics(plan, split)["rmse"]


def study(
    denoiser: DenoiserLike,
    nfe: int,
    *,
    shape: Sequence[int],
    cond: Condition,
    splits: Mapping[str, int],
    seed: int,
    reference: Reference | None,
    device: Device | None,
    batch: int,
    cache: str | Path | None,
    say: Callable[[str], None],
    features: Features | None = None,
) -> Study:
    """Draw latents, solve the ODE from them, and rank every hand-made plan of at most nfe calls."""
    check_times(denoiser)
    folder_of(cache)  # before the network is called
    total = sum(splits.values())
    ensemble = Ensemble(denoiser, latents(total, shape, seed), cond, device=device, batch=batch, features=features)
    found = usable(denoiser, candidates(denoiser.process, nfe))
    identity = identity_of(denoiser, ensemble, shape, cond, device, seed, splits)
    say(f"{total} reference solutions")
    target, error = reference_of(ensemble, cond, identity, cache, reference)
    target = ensemble.observed(target)
    ends = np.cumsum([0, *splits.values()])
    parts = {name: range(int(a), int(b)) for name, a, b in zip(splits, ends[:-1], ends[1:], strict=True)}
    say(f"ranking {len(found)} hand-made plans")
    ranked = rank(ensemble, found, target, parts["train"])
    return Study(ensemble, target, parts, ranked, len(found), error, identity)


def check_times(denoiser: DenoiserLike) -> None:
    if denoiser.time_dtype is not None and denoiser.time_dtype not in FLOATS:
        raise ValueError(
            f"time_dtype={denoiser.time_dtype!r}: the reference solution and tuned plans call the network at "
            "fractional times; use a Denoiser with a float time_dtype"
        )


def identity_of(
    denoiser: DenoiserLike,
    ensemble: Ensemble,
    shape: Sequence[int],
    cond: Condition,
    device: Device | None,
    seed: int,
    splits: Mapping[str, int],
) -> dict[str, Any]:
    """What a plan's record says of its denoiser and latents, for `fingerprint.check_plan`."""
    features = ensemble.features
    return {
        **fingerprints(denoiser, shape, cond, device),
        "cond": keep_conditions(denoiser, ensemble.frame, cond),
        "guidance": guidance_as_json(denoiser.guidance),
        "features": None if features is None else getattr(features, "__name__", type(features).__name__),
        "shape": list(shape),
        "seed": int(seed),
        "seeds": {name: int(count) for name, count in splits.items()},  # JSON has no numbers of NumPy
    }


def reference_of(
    ensemble: Ensemble,
    cond: Condition,
    identity: Mapping[str, Any],
    cache: str | Path | None,
    reference: Reference | None = None,
) -> tuple[Array, float | None]:
    """`reference_ends`, stored under the denoiser's fingerprints, guidance, process, device and conditions."""
    folder = folder_of(cache)
    denoiser, conds = ensemble.denoiser, _as_bytes(ensemble, cond)
    probed = [identity[name] for name in PROBES]
    key = (probed, identity["guidance"], repr(denoiser.process), ensemble.frame.device, conds)
    return reference_ends(ensemble, reference, key, folder)


def speaker(progress: bool | Callable[[str], None], name: str = "tune") -> Callable[[str], None]:
    """What takes lines of progress: the caller's function, the standard error or nothing."""
    if not isinstance(progress, bool):
        function("progress", progress)
        return progress
    return (lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True)) if progress else lambda text: None


def _as_bytes(ensemble: Ensemble, cond: Condition) -> list[dict[str, object]]:
    """The conditions as values whose repr identifies them, for `digest`."""
    frame = ensemble.frame
    return [
        {name_of(path): frame.to_numpy(v).tolist() if frame.is_array(v) else repr(v) for path, v in leaves(one)}
        for one in ensemble.denoiser.conditions(cond)
    ]


def best_hand_made(made: Study) -> Ranked:
    """The best plan on the validation seeds among the first twelve on the training seeds."""
    return min(made.ranked[:12], key=lambda r: made.rmse(r.candidate.unrolled))
