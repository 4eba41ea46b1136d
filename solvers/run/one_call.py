"""`sample`, and what it keeps for its next calls: plans, and the samplers of denoisers that are still in use.

A plan is known by its solver, options, grid and dtype. A sampler is known by its denoiser, by what its tables and
memory take from that denoiser, and by the plan, shape, dtype, device and backend: an edited denoiser has another
sampler. The network and its null condition are read in each call; a sampler that holds a copy of its denoiser for a
plan is known by them, too. A sampler refers weakly to its denoiser and is forgotten with it. Arguments that can change,
such as lists and functions, are not compared: their calls keep nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from fewstep.solvers.cache import MIB, Cache, exactly
from fewstep.solvers.options import named, number
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import get_solver
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.arrays import Array, Device, DType, Frame, inference, state_dtype
from fewstep.solvers.run.checks import BACKENDS, check_shape, check_source, device_of_inputs, model_frame
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.run.dlpack import any_library
from fewstep.solvers.run.edits import Edit
from fewstep.solvers.run.engine import NoiseSource
from fewstep.solvers.run.loop import StepInfo
from fewstep.solvers.run.network import warn_if_training
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid

PLANS: Cache[Plan] = Cache(64, 16 * MIB, lambda plan: 2048 * plan.nfe)
SAMPLERS: Cache[Sampler] = Cache(32, 256 * MIB, lambda sampler: sampler.nbytes)


def laid_out(
    solver: str, grid: Callable[[], Grid], where: Iterable[object], dtype: str, options: Mapping[str, Any]
) -> tuple[Hashable, Callable[[], Plan]]:
    """(key, make): what a plan is known by, None if it cannot be, and a function that finds it or makes it.

    where  what `grid` makes its grid from
    """

    def make() -> Plan:
        return make_plan(solver, grid(), dtype=dtype, **options)

    try:
        own = exactly(where) + (exactly(sorted(options.items())) if options else [])
        key = solver, get_solver(solver).build, dtype, *own
    except TypeError:
        return None, make
    return key, lambda: PLANS.get(key, make)


def kept(key: Hashable | None, make: Callable[[], Sampler]) -> Sampler:
    """The sampler of a key, made and kept if there is none; without a key a new one."""
    if key is None:
        return make()
    found = SAMPLERS.find(key)
    if found is not None:
        return found
    made = make()
    # Not one that holds CUDA graphs, which would replay a network that has been edited since, or the naive one's arrays
    # of any kind that torch has, fake ones included.
    if made.backend == "numba" or (made.backend == "triton" and made.graph == "off"):
        SAMPLERS.put(key, made)
    return made


def _key(denoiser: DenoiserLike, state: str, frame: Frame, layout: Hashable, *others: object) -> Hashable | None:
    """What a denoiser's sampler is known by; None if it takes what can change, or if nothing can refer to it weakly.

    state, frame  the dtype of its slots, and the frame of its network
    layout        of its plan; others: the other arguments that make it
    """
    try:
        settings = vars(denoiser)
        own = exactly([value for name, value in settings.items() if name not in ("model", "null")])
        reference = weakref.ref(denoiser)  # once its denoiser is gone, it equals no other
        hash(reference)
        made_for: tuple[Hashable, ...] = frame.name, frame.device, denoiser.model_dtype(state), inference(frame)
        if hasattr(denoiser, "for_plan"):  # the sampler keeps both alive, and with them their identities
            made_for = (*made_for, id(denoiser.model), id(denoiser.null))
        return layout, id(denoiser), reference, type(denoiser), *settings, *own, *made_for, state, *exactly(others)
    except TypeError:
        return None


# Names of other libraries' arguments -> what to write here.
_GUIDED = "denoiser=denoiser.with_guidance({value!r}), and cond=(null, cond)"
_ELSEWHERE = {
    **dict.fromkeys(("guidance", "guidance_scale", "cfg", "cfg_scale", "cond_scale"), _GUIDED),
    **dict.fromkeys(("num_inference_steps", "num_steps", "n_steps", "nfe"), "steps={value!r}"),
    "sigmas": "grid=fs.Grid.from_sigmas(denoiser.process, sigmas), with the end, 0, included",
    "timesteps": "grid=fs.Grid.from_times(denoiser.process, timesteps), with the clean end (process.clean.t) included",
    **dict.fromkeys(
        ("sigma_min", "sigma_max", "rho"), "grid=fs.grid(denoiser.process, steps, 'karras', {name}={value!r})"
    ),
    **dict.fromkeys(("generator", "rng", "random_state"), "seed=0 (an int, or one per sample)"),
    **dict.fromkeys(("latents", "latent"), "x=latents, at the level of the grid's first point"),
    **dict.fromkeys(
        ("mask", "mask_image", "inpaint_mask", "noise_mask", "denoise_mask"),
        "edit=fs.edits.Inpaint(mask, image), with the mask 1 where x is sampled",
    ),
    **dict.fromkeys(("uncond", "negative", "negative_cond", "null"), "cond=(null, cond), the null branch first"),
    **dict.fromkeys(("image", "init_image", "init_latent"), "x=, noised to the grid's first point, and strength="),
    "scheduler": "solver= (fs.list_solvers()) and spacing= (fs.list_spacings())",
    **dict.fromkeys(("sampler", "sampler_name", "method"), "solver= (fs.list_solvers())"),
    **dict.fromkeys(("schedule", "use_karras_sigmas"), "spacing= (fs.list_spacings())"),
    **dict.fromkeys(("batch_size", "num_samples", "size"), "shape=(batch_size, ...)"),
    **dict.fromkeys(("denoise", "denoising_strength"), "strength={value!r}"),
    **dict.fromkeys(("condition", "conditions", "conditioning"), "cond= (the model's keyword arguments)"),
    **dict.fromkeys(("model_kwargs", "extra_args"), "cond= (the model's keyword arguments)"),
}


@any_library
def sample(
    denoiser: DenoiserLike,
    x: Array | None = None,
    *,
    shape: Sequence[int] | None = None,
    solver: str = "dpmpp_2m",
    steps: int = 20,
    spacing: str | None = None,
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = None,
    noise: NoiseSource | None = None,
    cond: Condition = None,
    start: float = 0.0,
    strength: float | None = None,
    first_sample: int = 0,
    backend: str = "auto",
    device: Device | None = None,
    dtype: DType | None = None,
    check: bool | None = None,
    parallel: bool = False,
    edit: Edit | Sequence[Edit] | None = None,
    edit_x0: Edit | Sequence[Edit] | None = None,
    every: str = "step",
    progress: bool = False,
    callback: Callable[[StepInfo], None] | None = None,
    log_prob: bool = False,
    reduce: str = "sum",
    unnormalised: bool = False,
    **solver_options: Any,
) -> Array:
    """Draw samples in one call.

        images = fewstep.sample(denoiser, shape=(16, 1, 8, 8), solver="unipc", steps=8, seed=0)

    x, shape  exactly one: a latent (B, ...) already at the grid's first point, or the shape to draw one from `seed`
    solver    a name from `list_solvers()`; its options follow as keywords (eta=1.0, order=3, s_churn=40 ...)
    steps, spacing  the grid on the denoiser's process, unless `grid` is given; the solver's default spacing if None
    start     skip this fraction of the steps, rounded down: 1 - k / steps runs k steps; x is then at the later point
    strength  instead of `start`: run this fraction of the steps, int(steps * strength), as diffusers does
    log_prob  return a `Sampled`, x with the log-probability of each step's draw, for a stochastic solver

    The other arguments are those of `Sampler` and its call. On a CPU the plan and the sampler are kept for later calls
    with the same arguments, at most until the denoiser is freed.

    Raises ValueError or TypeError that names the argument, before the model is called.
    """
    for name, value in solver_options.items():
        if name in _ELSEWHERE and name not in get_solver(solver).options:
            raise TypeError(f"sample has no argument {name!r}: pass {_ELSEWHERE[name].format(name=name, value=value)}")
    outer = check_source(denoiser, x, shape)
    process = denoiser.process
    if grid is None and spacing is None:
        spacing = get_solver(solver).spacing(process)
    if grid is not None and not isinstance(grid, Grid):
        raise TypeError(f"grid must be a fewstep.Grid, got {type(grid).__name__}")

    def points() -> Grid:
        whole = make_grid(process, steps, spacing) if grid is None else grid
        return whole if strength is None and number(start) == 0.0 else whole.tail(start, strength=strength)

    if x is None and (0.0 < number(start) < 1.0 or (strength is not None and 0.0 < number(strength) < 1.0)):
        which = f"start = {start!r}" if strength is None else f"strength = {strength!r}"
        raise ValueError(
            f"{which} begins at data with noise, which shape= cannot draw: pass x = alpha * data + sigma * noise"
        )
    if dtype is None and x is not None and outer is not None and outer.dtype_of(x) == "float64":
        dtype = "float64"
    device = device_of_inputs(denoiser, outer, cond, device)
    named("backend", backend, BACKENDS)
    if backend == "auto" and getattr(x, "requires_grad", False):
        backend = "naive"  # the fused kernels record no gradients
    kind = None if dtype is None else state_dtype(dtype)
    state = "float64" if kind == "float64" else "float32"
    where = (process, steps, spacing) if grid is None else (grid,)
    layout, plan = laid_out(solver, points, (*where, start, strength), state, solver_options)
    sizes = check_shape(() if shape is None else shape) if x is None else tuple(x.shape)
    frame = model_frame(denoiser, device)

    def make(denoiser: DenoiserLike) -> Sampler:
        return Sampler(
            denoiser, plan(), sizes, backend=backend, device=device, dtype=dtype, check=check, parallel=parallel
        )

    key = layout and _key(denoiser, state, frame, layout, sizes, kind, backend, check, parallel)
    if key is None:
        sampler = make(denoiser)
    else:
        made: list[Sampler] = []
        forget = SAMPLERS.pop  # the module's names may be gone before the denoiser

        def make_weakly() -> Sampler:
            made.append(make(weakref.proxy(denoiser, lambda _: forget(key))))
            return made[0]

        sampler = kept(key, make_weakly)
        if not made:
            warn_if_training(denoiser.networks if denoiser.guidance is not None else (denoiser.model,))
            sampler._tried = None  # as in a new sampler's first call, the network's outputs are looked at
    idle = sampler._now.idle
    held = [*map(len, idle)]
    try:
        return sampler(
            x, seed=seed, noise=noise, cond=cond, first_sample=first_sample, edit=edit, edit_x0=edit_x0, every=every,
            callback=callback, progress=progress, log_prob=log_prob, reduce=reduce, unnormalised=unnormalised,
        )  # fmt: skip
    finally:
        if [*map(len, idle)] != held:  # calls at once leave it more memory
            SAMPLERS.weigh(key)
