"""`fewstep.tune_pipeline(pipe, prompts, nfe)`: a plan fitted to a pipeline's own network and conditions."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.diffusers.fitted import FIELD, weights_of
from fewstep.solvers.files import check_target
from fewstep.solvers.options import counted, duration, flag, instance, unknown
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import plan_of, save_plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.process import Process
from fewstep.solvers.tune.fingerprint import digest
from fewstep.solvers.tune.study import reference_grid, speaker
from fewstep.solvers.tune.tuning import check_arguments, tune

if TYPE_CHECKING:
    from fewstep.bindings.diffusers.collect import Collected

NAME = "tune_pipeline"
SEEDS, QUICK_SEEDS = 64, 12
QUICK_REFERENCE = 32  # calls of the reference solution


def tune_pipeline(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    nfe: int,
    *,
    guidance: float | None = None,
    out: str | Path | None = None,
    quick: bool = False,
    seeds: int | None = None,
    resume: str | Path | Plan | None = None,
    batch: int = 8,
    seed: int = 0,
    cache: str | Path | None = "auto",
    progress: bool | Callable[[str], None] = True,
    **options: Any,
) -> Any:
    """Fit a plan of nfe calls to a diffusers pipeline, and run it in place of the pipeline's scheduler.

        pipe = fewstep.tune_pipeline(pipe, ["a cat", "a red car", ...], 6, guidance=7.5, out="plan.json")
        image = pipe("a dog", guidance_scale=7.5, num_inference_steps=6).images[0]

    pipe      a pipeline whose prediction is that of one network, alone or with classifier-free guidance over two
              branches of it, batched or in separate calls; distilled guidance is one of the network's conditions
    prompts   what to fit on, one latent each: texts, or mappings of the pipeline's arguments
    nfe       calls of the plan, >= 2; under guidance a call is two evaluations of the network
    guidance  the pipeline's guidance_scale; None leaves its default
    out       a .json file to write the plan to
    quick     fit on 12 latents against solutions of 32 calls, in place of 64 and 128
    seeds     number of latents to fit on, >= 12; seed i takes prompt i mod len(prompts)
    resume    a plan of an earlier fit, or its file, to start from
    batch     the most samples per network call
    seed, cache  as for `fewstep.tune`; solutions are kept in `cache`, so that a fit that broke off does not repeat them
    progress  True prints what the fit will cost and shows a bar; a callable gets each line
    options   further arguments of each call of the pipeline: height, width, negative_prompt, true_cfg_scale ...

    Returns the pipeline, with a `PlanScheduler`: call it with num_inference_steps=nfe. `pipe.scheduler.plan` is the
    plan; its options["tuning"] record what it was fitted for, which `accelerate` checks, and its errors. Ctrl-C during
    the fit keeps the best plan so far.

    Raises ValueError or TypeError that names the argument; ValueError for a pipeline that cannot be tuned.
    """
    from fewstep.bindings.diffusers.collect import collect, seconds_per_prediction
    from fewstep.bindings.diffusers.pipeline import accelerate

    flag("quick", quick)
    given = _arguments(prompts, guidance, options)
    _check_names(pipe, given)
    count = seeds if seeds is not None else QUICK_SEEDS if quick else SEEDS
    base = "auto" if resume is None else plan_of(resume)
    check_arguments(base, nfe, count, "all", batch)
    if out is not None:
        instance("out", out, (str, os.PathLike), "a path such as 'plan.json'")
        check_target(Path(out), (".json",), "out")
    say = speaker(progress, NAME)
    made = collect(pipe, given)
    denoiser = made.denoiser
    reference = make_plan("unipc", reference_grid(denoiser, QUICK_REFERENCE), order=3) if quick else None
    predictions = cost(denoiser.process, nfe, count, base, reference)
    seconds = seconds_per_prediction(made, batch)
    branches = len(made.cond)
    say(
        f"{type(pipe).__name__}: {made.name} on {counted(len(given), 'prompt')}, latents {made.shape}, "
        + ("no guidance" if made.scale is None else f"guidance {made.scale:g}")
    )
    say(
        f"about {predictions} predictions of one sample, {branches * predictions} evaluations of the network, "
        f"{seconds:.2g} s each in batches of {batch}: {duration(predictions * seconds)}"
    )
    with _bar(made, branches * predictions, progress is True) as describe:
        plan = tune(
            denoiser,
            nfe,
            shape=made.shape,
            cond=made.cond if branches > 1 else made.cond[0],
            seeds=count,
            base=base,
            reference=reference,
            seed=seed,
            batch=batch,
            cache=cache,
            progress=describe or (progress if callable(progress) else False),
        )
    plan = _recorded(plan, pipe, made, given)
    if out is not None:
        save_plan(plan, out)
    if not plan.options["tuning"]["complete"]:
        say(
            "interrupted: this is the best plan so far; go on with resume="
            + ("the plan" if out is None else repr(str(out)))
        )
    errors = plan.options["tuning"]["errors"]
    tuned, hand = (errors[name]["test"]["rmse"] for name in ("tuned", "hand"))
    say(f"error to the ODE's solution on test latents: {tuned:.4g}, best hand-made plan {hand:.4g}")
    say(str(accelerate(pipe, plan=plan)))
    return pipe


def cost(process: Process, nfe: int, seeds: int, base: Plan | str, reference: Plan | None) -> int:
    """About how many predictions of one sample a fit makes: those of the same fit on a small stand-in.

    The stand-in is the exact denoiser of data at -1 and 1, E[x0 | x] = tanh(alpha x / sigma^2).
    """

    def mean(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        at = process.point(np.asarray(t, np.float64))
        alpha, sigma = (np.asarray(v).reshape(-1, *[1] * (x.ndim - 1)) for v in (at.alpha, at.sigma))
        found: np.ndarray = np.tanh(alpha * x / np.maximum(sigma, 1e-6) ** 2)
        return found

    plan = tune(
        Denoiser(mean, process, "sample"), nfe, shape=(2,), seeds=seeds, base=base, reference=reference, cache=None,
        progress=False,
    )  # fmt: skip
    return int(plan.options["tuning"]["calls"])


def _arguments(prompts: object, guidance: float | None, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pipeline's arguments for each prompt."""
    if isinstance(prompts, (list, tuple)) and not prompts:
        raise ValueError(f"prompts is empty, got {prompts!r}: give texts, or mappings of the pipeline's arguments")
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence) or not prompts:
        raise TypeError(f"prompts must be a sequence of texts or of mappings of arguments, got {prompts!r:.80}")
    if guidance is not None:
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not np.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance!r:.80}")
        options = {**options, "guidance_scale": float(guidance)}
    for name in ("num_inference_steps", "timesteps", "sigmas", "latents", "generator", "output_type"):
        if name in options:
            raise ValueError(f"options may not hold {name!r}: the fit sets it")
    found = []
    for i, one in enumerate(prompts):
        if not isinstance(one, (str, Mapping)):
            raise TypeError(f"prompts[{i}] must be a text or a mapping of arguments, got {type(one).__name__}")
        found.append({**options, **({"prompt": one} if isinstance(one, str) else one)})
    return found


def _check_names(pipe: object, given: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for an argument that the pipeline does not name.

    Many of diffusers' own take **kwargs as well, for names that they no longer have, and drop all others in silence.
    """
    if not callable(pipe) or not type(pipe).__module__.startswith("diffusers."):
        return
    known = [name for name in inspect.signature(pipe).parameters if name != "kwargs"]
    for name in dict.fromkeys(name for one in given for name in one):
        if name not in known:
            raise ValueError(f"{type(pipe).__name__}: {unknown('argument', name, known)}")


def _recorded(plan: Plan, pipe: object, made: Collected, given: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan with a record of the pipeline that it was fitted for."""
    plain = {k: v for k, v in given[0].items() if isinstance(v, (str, int, float, bool)) and k != "prompt"}
    own = {
        "pipeline": type(pipe).__name__,
        "component": made.name,
        "network": type(made.network).__name__,
        "weights": weights_of(made.network),
        "guidance": made.scale,
        "arguments": plain,
        "prompts": len(given),
        "conditions": digest(*(v.float().cpu().numpy() for one in made.cond for v in one.values())),
    }
    return replace(plan, options={**plan.options, "tuning": {**plan.options["tuning"], FIELD: own}})


@contextlib.contextmanager
def _bar(made: Collected, total: int, shown: bool) -> Iterator[Callable[[str], None] | None]:
    """A bar over the rows that the network is called with, and a function that describes what is going on."""
    if not shown:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield speaker(True, NAME)
        return
    with tqdm(total=total, unit="row") as bar:

        def update(rows: int) -> None:
            bar.total = max(bar.total, bar.n + rows)  # the total is an estimate
            bar.update(rows)

        made.watchers.append(update)
        try:
            yield bar.set_description_str
        finally:
            made.watchers.remove(update)
