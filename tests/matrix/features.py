"""One function per feature: it runs the feature in a cell and compares the result with an oracle.

The oracle is `oracles.rows.run_plan`, the plan's rows one by one in NumPy float64, with the network, the guidance, the
edits and the noise's addresses written out here. It shares `philox.normals`, which defines the noise, with the package.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracles import adaptive as adaptive_oracle
from oracles import guidance as released
from oracles.rows import run_plan
from scipy.integrate import RK45

import fewstep as fs
from fewstep.kernels import philox
from matrix.axes import EMBEDDED, OPTIONS, Cell

Array = Any
VP, FLOW, VE = fs.VP.linear(), fs.Flow(), fs.VE(0.02, 6.0)
SHAPE = (2, 2, 3, 4)
SEED = 11
EDIT_DOMAIN = 256  # of the first edit's noise

# What the rounding of a dtype may add up to, for samples of size about 3.
TOLERANCES = {"float64": 1e-9, "float32": 2e-4, "float32 / float16": 2e-2, "float32 / bfloat16": 1.5e-1}


@dataclass(frozen=True)
class Feature:
    """name as in the table; `run` raises AssertionError where a result is not the oracle's."""

    name: str
    group: str
    run: Callable[[Case], None]
    graphs: bool  # whether it has a `graph`


FEATURES: dict[str, Feature] = {}
_GROUP = [""]


def feature(name: str, *, graphs: bool = True) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def add(run: Callable[[Case], None]) -> Callable[[Case], None]:
        FEATURES[name] = Feature(name, _GROUP[0], run, graphs)
        return run

    return add


def group(name: str) -> None:
    _GROUP[0] = name


# --- a network, and what a cell makes of it ---


def network(x: Array, t: Array, c: Array = None) -> Array:
    """A prediction in NumPy or torch: of each element alone, bounded slopes; computed in 32 bits or more."""
    half = x.dtype in (np.float16, torch.float16, torch.bfloat16)
    y = x if not half else x.float() if isinstance(x, torch.Tensor) else x.astype(np.float32)
    own = [1] * (x.ndim - 1)
    y = y / (1.0 + y * y) + 0.3 * y + t.reshape(-1, *own) / 4096.0
    if c is not None:
        y = y * (1.0 + 0.125 * c.reshape(-1, *own)) + 0.25 * c.reshape(-1, *own)  # moves mean and deviation
    return y.to(x.dtype) if isinstance(x, torch.Tensor) else y.astype(x.dtype)


def worse(x: Array, t: Array, c: Array = None) -> Array:
    return 0.7 * network(x, t, c)


NULL, MIDDLE, TEXT = np.array([-1.0, -1.0]), np.array([0.5, -0.25]), np.array([1.5, 2.0])


def normals(shape: Sequence[int], streams: Sequence[tuple[int, int]], draw: int, domain: int) -> np.ndarray:
    rows = [philox.normals(math.prod(shape[1:]), seed, sample, draw, domain) for seed, sample in streams]
    return np.stack(rows).reshape(shape).astype(np.float64)


@dataclass(frozen=True)
class Call:
    """A call of the network in the oracle's loop."""

    raws: Sequence[np.ndarray]  # of the branches
    predict: Callable[[np.ndarray], np.ndarray]  # raw -> x0
    at: Any
    step: int
    progress: float


Guide = Callable[[Call], np.ndarray]  # -> the x0 prediction


class Case:
    """A cell with what features need: its sampler, its arrays, the oracle's loop."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.process, self.shape = cell, VP, SHAPE
        self.streams = [(SEED, i) for i in range(SHAPE[0])]
        self.rounds = True  # whether the oracle rounds what the network reads and returns
        self.tolerance = TOLERANCES[cell.dtype]
        self.last = np.zeros(SHAPE)  # of the oracle's results

    # --- the package's side ---

    @property
    def where(self) -> dict[str, Any]:
        return {"backend": self.cell.backend, "device": "cpu" if self.cell.torch else None}

    def array(self, values: Any, dtype: str | None = None) -> Array:
        found = np.asarray(values, dtype or self.cell.state)
        return torch.from_numpy(found.copy()) if self.cell.torch else found

    def denoiser(self, model: Any = network, **options: Any) -> fs.Denoiser:
        predicts = "flow" if self.process is FLOW else "v"
        return fs.Denoiser(model, self.process, predicts, dtype=self.cell.network, **options)

    def grid(self, more: int = 0, sigma_max: float = 4.0) -> fs.Grid:
        """Of few steps, and fewer where an interpreter runs them."""
        steps = (2 if self.cell.place == "triton" else 5) + more
        if self.process is FLOW:
            return fs.Grid.from_sigmas(FLOW, [*np.geomspace(sigma_max, 0.2, steps), 0.0])
        return fs.grid(self.process, steps, "karras", sigma_max=sigma_max)

    def plan(self, grid: fs.Grid | None = None) -> fs.Plan:
        solver = self.cell.solver
        grid = self.grid() if grid is None else grid
        return fs.plan(solver, grid, dtype=self.cell.state, **OPTIONS.get(solver, {}))

    def sampler(self, denoiser: fs.Denoiser, plan: fs.Plan, **more: Any) -> fs.Sampler:
        own = {"dtype": self.cell.state, "graph": self.cell.graph, "check": False, **self.where, **more}
        return fs.Sampler(denoiser, plan, self.shape, **own)

    def run(self, sampler: fs.Sampler, x: np.ndarray | None = None, **call: Any) -> Array:
        """A call of the sampler. Under graphs its second one, which replays what the first has recorded."""
        if x is None and sampler.plan.start != sampler.plan.grid.points[0]:
            x = self.latent(sampler.plan)  # of a solver that encodes data
        given = None if x is None else self.array(x)
        call = {"seed": SEED, **call}
        if self.cell.graph != "off":
            sampler(None if given is None else 0.5 * given, **{**call, "seed": 3})
        return sampler(given, **call)

    def cond(self, *values: np.ndarray) -> Any:
        found = [{"c": self.array(v)} for v in values]
        return found[0] if len(found) == 1 else found

    # --- the oracle's side ---

    def latent(self, plan: fs.Plan) -> np.ndarray:
        """Data noised to the plan's start, in the state's dtype."""
        rng = np.random.default_rng(5)
        data, z = (rng.standard_normal(self.shape) for _ in range(2))
        return (plan.start.alpha * data + plan.start.sigma * z).astype(self.cell.state).astype(np.float64)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """To the network's dtype and back."""
        if self.cell.network is None or not self.rounds:
            return values
        kind = getattr(torch, self.cell.network)
        return torch.from_numpy(np.asarray(values)).to(kind).double().numpy()

    def loop(
        self,
        plan: fs.Plan,
        *,
        conds: Sequence[np.ndarray | None] = (None,),
        models: Sequence[Any] | None = None,
        guide: Guide | None = None,
        x: np.ndarray | None = None,
        noise: Callable[[int], np.ndarray] | None = None,
        edit_x0: Callable[[np.ndarray, np.ndarray, Any], np.ndarray] | None = None,
        edit: Callable[[int, dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]] | None = None,
    ) -> np.ndarray:
        if x is None:
            encodes = plan.start != plan.grid.points[0]
            drawn = normals(self.shape, self.streams, 0, philox.LATENT)
            x = self.latent(plan) if encodes else plan.start.sigma * drawn
        nets = [network] * len(conds) if models is None else models
        stages, calls = iter(range(plan.nfe)), [0, 0]

        def denoise(x: np.ndarray, at: Any) -> Any:
            k = next(stages)
            t = np.full(len(x), at.t)
            raws = [self.rounded(net(self.rounded(x), t, c)) for net, c in zip(nets, conds, strict=True)]

            def predict(raw: np.ndarray) -> np.ndarray:
                if self.process is FLOW:
                    return (x - at.sigma * raw) / (at.alpha + at.sigma)
                return (at.alpha * x - at.sigma * raw) / (at.alpha**2 + at.sigma**2)

            step = sum(stage.done for stage in plan.stages[:k])
            call = Call(raws, predict, at, step, step / plan.steps)
            m = predict(raws[-1]) if guide is None else guide(call)
            calls[0] += 1
            return m if edit_x0 is None else edit_x0(m, x, at), predict(raws[0])

        def drawn_noise(draw: int) -> np.ndarray:
            return normals(self.shape, self.streams, draw, philox.STEP)

        return np.asarray(run_plan(plan, denoise, x, noise or drawn_noise, edit)[0])

    def equal(self, found: Array, want: np.ndarray, factor: float = 1.0) -> None:
        values = found.detach().double().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, np.float64)
        self.last = want
        np.testing.assert_allclose(values, want, rtol=self.tolerance * factor, atol=self.tolerance * factor)

    def draws(
        self, denoiser: fs.Denoiser | None = None, plan: fs.Plan | None = None, *, call: Any = None, **oracle: Any
    ) -> None:
        """The sampler's sample is the loop's."""
        plan = self.plan() if plan is None else plan
        sampler = self.sampler(self.denoiser() if denoiser is None else denoiser, plan)
        self.equal(self.run(sampler, oracle.get("x"), **(call or {})), self.loop(plan, **oracle))

    def guided(self, guidance: Any, guide: Guide, *conds: np.ndarray, **options: Any) -> None:
        conds = conds or (NULL, TEXT)
        self.draws(self.denoiser(guidance=guidance, **options), call={"cond": self.cond(*conds)}, conds=conds,
                   guide=guide)  # fmt: skip


# --- arguments of a call ---

group("Latents, noise and outputs")


@feature("drawn from a seed")
def plain(c: Case) -> None:
    c.draws()


@feature("a latent given")
def latent(c: Case) -> None:
    c.draws(x=c.latent(c.plan()))


@feature("image to image: a grid's tail")
def image_to_image(c: Case) -> None:
    grid = c.grid(2)
    plan = c.plan(grid.tail(2 / grid.steps))
    c.draws(plan=plan, x=c.latent(plan))


@feature("`noise=` from outside")
def outside_noise(c: Case) -> None:
    z = np.random.default_rng(1).standard_normal((99, *SHAPE)).astype(c.cell.state)
    c.draws(call={"noise": lambda draw, at, to, shape: z[draw]}, noise=lambda draw: z[draw].astype(np.float64))


@feature("a seed for each sample")
def seeds(c: Case) -> None:
    c.streams = [(2**40 + 5, 0), (7, 0)]
    c.draws(call={"seed": [2**40 + 5, 7]})


@feature("`first_sample=`")
def first_sample(c: Case) -> None:
    c.streams = [(SEED, 4), (SEED, 5)]
    c.draws(call={"first_sample": 4})


@feature("`callback=`")
def callback(c: Case) -> None:
    seen: list[fs.StepInfo] = []
    plan = c.plan()
    x = c.run(c.sampler(c.denoiser(), plan), callback=seen.append)
    trace: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(k: int, slots: dict[str, np.ndarray], m: np.ndarray) -> dict[str, np.ndarray]:
        if plan.stages[k].done:
            trace.append((slots["x"], m))
        return slots

    c.equal(x, c.loop(plan, edit=keep))
    seen = seen[-plan.steps :]  # those of the second call
    assert [info.step for info in seen] == [*range(plan.steps)]
    for info, (own, m) in zip(seen, trace, strict=True):
        c.equal(info.x, own)
        c.equal(info.x0, m)


@feature("`out=`")
def out(c: Case) -> None:
    plan = c.plan()
    own = c.array(np.full(SHAPE, np.nan))
    found = c.run(c.sampler(c.denoiser(), plan), out=own)
    assert found is own
    c.equal(own, c.loop(plan))


@feature("`fs.sample`", graphs=False)
def one_call(c: Case) -> None:
    plan = c.plan()
    encodes = plan.start != plan.grid.points[0]
    x = c.array(c.latent(plan)) if encodes else None
    options: dict[str, Any] = {"x": x} if encodes else {"shape": SHAPE}
    solver, grid = c.cell.solver, plan.grid
    for _ in range(2):  # the second call finds what the first has kept
        found = fs.sample(c.denoiser(), solver=solver, grid=grid, seed=SEED, dtype=c.cell.state, check=False,
                          **options, **c.where, **OPTIONS.get(solver, {}))  # fmt: skip
        c.equal(found, c.loop(plan))


# --- conditions and predictions ---

group("Conditions and predictions")


@feature("a condition")
def condition(c: Case) -> None:
    c.draws(call={"cond": c.cond(TEXT)}, conds=[TEXT])


@feature("nested conditions")
def nested(c: Case) -> None:
    def model(x: Array, t: Array, added: Any) -> Array:
        return network(x, t, added["shift"][0] * added["scale"])

    cond = {"added": {"shift": (c.array(0.5 * TEXT),), "scale": 2.0}}
    c.draws(c.denoiser(model), call={"cond": cond}, conds=[TEXT])


@feature("clip")
def clip(c: Case) -> None:
    c.draws(c.denoiser(clip=0.6), guide=lambda call: call.predict(call.raws[-1]).clip(-0.6, 0.6))


def thresholded(m: np.ndarray, quantile: float, maximum: float) -> np.ndarray:
    s = np.quantile(np.abs(m.reshape(len(m), -1)), quantile, axis=1).clip(1.0, maximum).reshape(-1, *[1] * (m.ndim - 1))
    return np.asarray(m.clip(-s, s) / s)


@feature("dynamic threshold")
def threshold(c: Case) -> None:
    limit = fs.DynamicThreshold(0.8, 2.0)
    c.draws(c.denoiser(clip=limit), guide=lambda call: thresholded(call.predict(call.raws[-1]), 0.8, 2.0))


@feature("a float64 network under any state")
def wide_network(c: Case) -> None:
    def model(x: Array, t: Array) -> Array:
        y = network(x, t)
        return y.double() if isinstance(y, torch.Tensor) else y.astype(np.float64)

    c.draws(c.denoiser(model))


# --- guidance ---

group("Guidance")


def cfg(call: Call, *scales: Any) -> np.ndarray:
    """raw_0 + s1 (raw_1 - raw_0) + s2 (raw_2 - raw_1)."""
    raw = call.raws[0]
    for scale, (a, b) in zip(scales, zip(call.raws[:-1], call.raws[1:], strict=True), strict=True):
        raw = raw + np.reshape(scale, (-1, 1, 1, 1)) * (b - a)
    return call.predict(raw)


@feature("CFG")
def plain_cfg(c: Case) -> None:
    c.guided(2.5, lambda call: cfg(call, 2.5))


@feature("CFG, `batched=False`")
def unbatched(c: Case) -> None:
    c.guided(2.5, lambda call: cfg(call, 2.5), batched=False)


@feature("CFG, `null=` of the denoiser")
def null(c: Case) -> None:
    denoiser = c.denoiser(guidance=2.5, null={"c": c.array(NULL)})
    c.draws(denoiser, call={"cond": c.cond(TEXT)}, conds=(NULL, TEXT), guide=lambda call: cfg(call, 2.5))


@feature("CFG with clip")
def clipped_cfg(c: Case) -> None:
    c.guided(2.5, lambda call: cfg(call, 2.5).clip(-0.6, 0.6), clip=0.6)


@feature("CFG, two scales over three branches")
def two_scales(c: Case) -> None:
    c.guided(fs.CFG((1.5, 2.5)), lambda call: cfg(call, 1.5, 2.5), NULL, MIDDLE, TEXT)


def on_torch(rule: Callable[..., torch.Tensor], *arrays: np.ndarray) -> np.ndarray:
    return rule(*map(torch.from_numpy, arrays)).numpy()


@feature("CFG with rescale")
def rescale(c: Case) -> None:
    def guide(call: Call) -> np.ndarray:
        raw = call.raws[0] + 2.5 * (call.raws[1] - call.raws[0])
        return call.predict(on_torch(lambda g, r: released.rescaled(g, r, 0.7), raw, call.raws[1]))

    c.guided(fs.CFG(2.5, rescale=0.7), guide)


def apg(rule: released.Apg) -> Guide:
    return lambda call: on_torch(rule, *(call.predict(raw) for raw in reversed(call.raws)))


@feature("APG")
def plain_apg(c: Case) -> None:
    c.guided(fs.APG(2.5, eta=0.2, norm_threshold=3.0), apg(released.Apg(2.5, 0.2, 3.0, 0.0)))


@feature("APG with momentum")
def momentum(c: Case) -> None:
    c.guided(fs.APG(2.5, norm_threshold=3.0, momentum=-0.5), apg(released.Apg(2.5, 0.0, 3.0, -0.5)))


def cfg_zero(call: Call) -> np.ndarray:
    return call.predict(on_torch(lambda null, cond: released.cfg_zero(cond, null, 2.5), *call.raws))


# The released code adds 1e-8 to |r_0|^2, which moves a sample by about as much: the tolerance in float64.


@feature("CFG-Zero*")
def plain_cfg_zero(c: Case) -> None:
    c.tolerance = max(c.tolerance, 2e-8)
    c.guided(fs.CFGZero(2.5), cfg_zero)


@feature("CFG-Zero* with zero-init")
def zero_init(c: Case) -> None:
    c.process, c.tolerance = FLOW, max(c.tolerance, 2e-8)
    c.guided(
        fs.CFGZero(2.5, zero_steps=1),
        lambda call: call.predict(np.zeros(SHAPE)) if call.step < 1 else cfg_zero(call),
    )


@feature("autoguidance")
def autoguidance(c: Case) -> None:
    denoiser = c.denoiser(guidance=fs.AutoGuidance(worse, 2.0))
    c.draws(denoiser, call={"cond": c.cond(TEXT)}, conds=(TEXT, TEXT), models=(worse, network),
            guide=lambda call: cfg(call, 2.0))  # fmt: skip


@feature("free weights, three branches")
def branches(c: Case) -> None:
    weights = (-1.0, -0.5, 2.5)
    denoiser = c.denoiser(guidance=fs.Branches(weights, models=(None, worse, None)))
    conds = (NULL, TEXT, TEXT)
    c.draws(denoiser, call={"cond": c.cond(*conds)}, conds=conds, models=(network, worse, network),
            guide=lambda call: call.predict(np.tensordot(weights, np.stack(call.raws), 1)))  # fmt: skip


def within(guide: Guide, on: Callable[[Call], bool]) -> Guide:
    return lambda call: guide(call) if on(call) else call.predict(call.raws[-1])


@feature("an interval of the steps")
def interval(c: Case) -> None:
    c.guided(
        fs.CFG(2.5, start=0.3, stop=0.9),
        within(lambda call: cfg(call, 2.5), lambda call: 0.3 <= call.progress < 0.9),
    )


@feature("an interval of sigma")
def sigma_interval(c: Case) -> None:
    c.guided(
        fs.CFG(2.5, sigma_lo=0.2, sigma_hi=2.5),
        within(lambda call: cfg(call, 2.5), lambda call: 0.2 < call.at.ratio <= 2.5),
    )


@feature("a scale for each sample")
def by_sample(c: Case) -> None:
    scales = np.array([1.5, 3.0])
    c.guided(fs.CFG(scales), lambda call: cfg(call, scales))


@feature("a scale for each step")
def by_step(c: Case) -> None:
    scales = np.linspace(3.0, 1.5, c.plan().steps)
    c.guided(fs.CFG(scales[None]), lambda call: cfg(call, scales[call.step]))


@feature("a scale as a function")
def by_function(c: Case) -> None:
    c.guided(fs.CFG(lambda progress, at: 1.5 + progress), lambda call: cfg(call, 1.5 + call.progress))


# --- edits ---

group("Edits")


class _Own:
    """The edits of this table, in the package's form and in the loop's."""

    def __init__(self, c: Case, plan: fs.Plan) -> None:
        self.c, self.plan = c, plan

    def x(self, info: fs.EditInfo) -> Array:
        for slot in info.slots.values():
            slot *= 0.75
        return 0.9 * info.x + 0.125 * info.to.sigma * info.normals() + 0.0625 * info.x0

    def loop_x(self, every: str = "step") -> Any:
        def edit(k: int, slots: dict[str, np.ndarray], m: np.ndarray) -> dict[str, np.ndarray]:
            stage = self.plan.stages[k]
            if every == "step" and not stage.done:
                return slots
            z = normals(SHAPE, self.c.streams, k + 1, EDIT_DOMAIN)
            x = 0.9 * slots["x"] + 0.125 * stage.to.sigma * z + 0.0625 * m
            return {name: 0.75 * values for name, values in slots.items()} | {"x": x}

        return edit

    def x0(self, info: fs.EditInfo) -> Array:
        return 0.8 * info.x0 + 0.05 * info.x

    def loop_x0(self, m: np.ndarray, x: np.ndarray, at: Any) -> np.ndarray:
        return 0.8 * m + 0.05 * x


@feature("`edit=`")
def edit(c: Case) -> None:
    plan = c.plan()
    own = _Own(c, plan)
    c.draws(plan=plan, call={"edit": own.x}, edit=own.loop_x())


@feature('`edit=`, `every="stage"`')
def edit_stages(c: Case) -> None:
    plan = c.plan()
    own = _Own(c, plan)
    c.draws(plan=plan, call={"edit": own.x, "every": "stage"}, edit=own.loop_x("stage"))


@feature("`edit_x0=`")
def edit_x0(c: Case) -> None:
    plan = c.plan()
    own = _Own(c, plan)
    c.draws(plan=plan, call={"edit_x0": own.x0}, edit_x0=own.loop_x0)


@feature("both, under CFG")
def edit_both(c: Case) -> None:
    plan = c.plan()
    own = _Own(c, plan)
    c.draws(c.denoiser(guidance=2.5), plan, call={"edit": own.x, "edit_x0": own.x0, "cond": c.cond(NULL, TEXT)},
            conds=(NULL, TEXT), guide=lambda call: cfg(call, 2.5), edit=own.loop_x(), edit_x0=own.loop_x0)  # fmt: skip


MASK = np.arange(12.0).reshape(3, 4) % 3 / 2
IMAGE = np.linspace(-1.0, 1.0, 24).reshape(1, 2, 3, 4)


@feature("`edits.Inpaint`")
def inpaint(c: Case) -> None:
    plan = c.plan()

    def known(k: int, slots: dict[str, np.ndarray], m: np.ndarray) -> dict[str, np.ndarray]:
        stage = plan.stages[k]
        if not stage.done:
            return slots
        noised = stage.to.alpha * IMAGE + stage.to.sigma * normals(SHAPE, c.streams, k + 1, EDIT_DOMAIN)
        return slots | {"x": MASK * slots["x"] + (1.0 - MASK) * noised}

    c.draws(plan=plan, call={"edit": fs.edits.Inpaint(MASK, IMAGE)}, edit=known)


@feature("`edits.Inpaint` at x0")
def inpaint_x0(c: Case) -> None:
    c.draws(call={"edit_x0": fs.edits.Inpaint(MASK, IMAGE)},
            edit_x0=lambda m, x, at: MASK * m + (1.0 - MASK) * IMAGE)  # fmt: skip


@feature("`edits.Prefix`")
def prefix(c: Case) -> None:
    kept = np.linspace(0.5, 1.0, 12).reshape(1, 1, 3, 4)  # the first of two actions along axis 1
    plan = c.plan()

    def put_back(k: int, slots: dict[str, np.ndarray], m: np.ndarray) -> dict[str, np.ndarray]:
        stage = plan.stages[k]
        if not stage.done:
            return slots
        noised = stage.to.alpha * kept + stage.to.sigma * normals(SHAPE, c.streams, k + 1, EDIT_DOMAIN)[:, :1]
        return slots | {"x": np.concatenate([noised, slots["x"][:, 1:]], 1)}

    def known(m: np.ndarray, x: np.ndarray, at: Any) -> np.ndarray:
        return np.concatenate([np.broadcast_to(kept, (2, 1, 3, 4)), m[:, 1:]], 1)

    own = fs.edits.Prefix(kept, 1)
    c.draws(plan=plan, call={"edit": own, "edit_x0": own}, edit=put_back, edit_x0=known)


@feature("`edits.DynamicThreshold` at x0")
def threshold_edit(c: Case) -> None:
    own = fs.edits.DynamicThreshold(0.8, 2.0)
    c.draws(call={"edit_x0": own}, edit_x0=lambda m, x, at: thresholded(m, 0.8, 2.0))


# --- one sampler, many plans ---

group("Samplers in use")


def _other(c: Case) -> fs.Plan:
    return c.plan(c.grid(sigma_max=2.5))


@feature("`update(plan, guidance=)`")
def update(c: Case) -> None:
    plan, later = c.plan(), _other(c)
    sampler = c.sampler(c.denoiser(guidance=2.0), plan)
    cond = c.cond(NULL, TEXT)
    oracle = {"conds": (NULL, TEXT)}
    c.equal(c.run(sampler, cond=cond), c.loop(plan, guide=lambda call: cfg(call, 2.0), **oracle))
    sampler.update(later, guidance=3.0)
    c.equal(c.run(sampler, cond=cond), c.loop(later, guide=lambda call: cfg(call, 3.0), **oracle))


@feature("`prepare`, then `update`")
def prepare(c: Case) -> None:
    plan, later = c.plan(), _other(c)
    sampler = c.sampler(c.denoiser(guidance=2.0), plan)
    cond, oracle = c.cond(NULL, TEXT), {"conds": (NULL, TEXT)}
    ready, stronger = sampler.prepare(later), sampler.prepare(guidance=3.0)
    sampler.update(cond=cond)
    for prepared, own, scale in ((ready, later, 2.0), (stronger, plan, 3.0), (ready, later, 2.0)):
        sampler.update(prepared)
        c.equal(c.run(sampler), c.loop(own, guide=lambda call, s=scale: cfg(call, s), **oracle))


def _mixed(c: Case, guidance: Sequence[Any], guides: Sequence[Guide]) -> None:
    """Two requests, the second admitted after the first one's first call."""
    plans = [c.plan(), fs.plan("ddpm", c.grid(-1))]
    run = fs.MixedRun(c.denoiser(guidance=guidance[0]), plans, SHAPE, **c.where)
    cond = c.cond(NULL, TEXT)
    given = [c.latent(plan) if plan.start != plan.grid.points[0] else None for plan in plans]
    for place, plan in enumerate(plans):
        x = given[place]
        own = None if x is None else c.array(x[place])
        run.admit(place, plan, seed=SEED + place, x=own, guidance=guidance[place])
        run.step(cond)
    while not (run.done(0) and run.done(1)):
        run.step(cond)
    for place, plan in enumerate(plans):
        c.streams = [(SEED + place, 0), (SEED + place, 0)]
        want = c.loop(plan, x=given[place], conds=(NULL, TEXT), guide=guides[place])
        c.equal(run.result(place), want[place])


@feature("`parallel=True`, CFG with clip")
def parallel(c: Case) -> None:
    sizes: list[int] = []

    def watched(x: Array, t: Array, c: Array = None) -> Array:
        sizes.append(len(x))
        return network(x, t, c)

    plan = c.plan()
    sampler = c.sampler(c.denoiser(watched, guidance=2.5, clip=0.6), plan, parallel=True)
    found = c.run(sampler, cond=c.cond(NULL, TEXT))
    c.equal(found, c.loop(plan, conds=(NULL, TEXT), guide=lambda call: cfg(call, 2.5).clip(-0.6, 0.6)))
    assert sizes[: len(plan.rounds)] == [2 * SHAPE[0] * calls for calls in plan.rounds]
    assert len(sizes) == len(plan.rounds) * (1 if c.cell.graph == "off" else 3)  # a loop: two warm-ups, one recording


@feature("`MixedRun`, CFG of each request", graphs=False)
def mixed(c: Case) -> None:
    _mixed(c, [2.5, 1.5], [lambda call: cfg(call, 2.5), lambda call: cfg(call, 1.5)])


@feature("`MixedRun` under APG", graphs=False)
def mixed_apg(c: Case) -> None:
    rules = [apg(released.Apg(scale, 0.2, 3.0, 0.0)) for scale in (2.5, 1.5)]
    _mixed(c, [fs.APG(scale, eta=0.2, norm_threshold=3.0) for scale in (2.5, 1.5)], rules)


@feature("`Engine`, an edit of one request", graphs=False)
def engine(c: Case) -> None:
    """Two requests, of which the first is edited."""
    plans = [c.plan(), fs.plan("ddpm", c.grid(-1))]
    own = _Own(c, plans[0])
    given = [c.latent(plan) if plan.start != plan.grid.points[0] else None for plan in plans]
    with fs.Engine(c.denoiser(guidance=2.5), SHAPE, plans, previews=True, **c.where) as serving:
        futures = []
        for place, plan in enumerate(plans):
            x, one = given[place], slice(place, place + 1)
            futures.append(
                serving.submit(
                    plan, seed=SEED + place, x=None if x is None else c.array(x[place]), guidance=2.5 - place,
                    cond=c.cond(NULL[one], TEXT[one]), edit=None if place else own.x,
                )
            )  # fmt: skip
        samples = [future.result(300.0) for future in futures]
    for place, plan in enumerate(plans):
        c.streams = [(SEED + place, 0), (SEED + place, 0)]
        scale, edit = 2.5 - place, None if place else own.loop_x()
        want = c.loop(plan, x=given[place], conds=(NULL, TEXT), guide=lambda call, s=scale: cfg(call, s), edit=edit)
        c.equal(samples[place], want[place])


@feature("`sample_sharded`", graphs=False)
def sharded(c: Case) -> None:
    plan = c.plan()
    c.shape = (2, *SHAPE[1:])
    with tempfile.TemporaryDirectory() as folder:
        found = fs.sample_sharded(c.denoiser(), plan, c.shape, 4, Path(folder) / "out", seed=SEED, chunk=2,
                                  dtype=c.cell.state, **c.where)  # fmt: skip
        for first, file in zip((0, 2), found.files, strict=True):
            c.streams = [(SEED, first), (SEED, first + 1)]
            c.equal(np.load(file), c.loop(plan))


# --- other runs of a plan ---

group("Other runs")


def _steps_noise(c: Case, plan: fs.Plan) -> Iterator[tuple[float, np.ndarray]]:
    """The standard deviation and the draw of each step."""
    for k, stage in enumerate(plan.stages):
        if stage.done:
            std = abs(stage.rows["x"].get("z", 0.0)) * plan.noise_scale * stage.noise
            yield std, normals(SHAPE, c.streams, k + 1, philox.STEP)


@feature("`sample_levels`, a pyramid", graphs=False)
def levels(c: Case) -> None:
    """Each token has the sample of a loop over that token alone."""

    def tokens(x: Array, t: Array, c: Array) -> Array:
        return network(x.reshape(4, 3, 4), t.reshape(4), c.reshape(4)).reshape(x.shape)

    plan = c.plan()
    shift = np.array([[0.5, -0.25], [1.0, -0.5]])  # of each token
    c.shape = (4, 3, 4)
    x = c.latent(plan) if plan.start != plan.grid.points[0] else None
    found = fs.sample_levels(
        c.denoiser(tokens), plan, SHAPE, "pyramid", seed=SEED, x=None if x is None else c.array(x.reshape(SHAPE)),
        cond=c.cond(shift), dtype=c.cell.state, **c.where,
    )  # fmt: skip
    c.streams = [(SEED, 65536 * i + j) for i in range(2) for j in range(2)]
    c.equal(found, c.loop(plan, x=x, conds=[shift.reshape(4)]).reshape(SHAPE))


@feature("`rollout` and `log_prob`", graphs=False)
def log_prob(c: Case) -> None:
    plan = c.plan()
    options: dict[str, Any] = {"cond": c.cond(TEXT)}
    path = fs.rollout(c.denoiser(), plan, SHAPE, seed=SEED, dtype=c.cell.state, **options, **c.where)
    c.equal(path.x, c.loop(plan, conds=[TEXT]))
    densities = []
    for std, z in _steps_noise(c, plan):
        own = -0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi) if std else 0.0 * z
        densities.append(own.reshape(2, -1).sum(1))
    np.testing.assert_allclose(path.log_prob, np.stack(densities, 1), rtol=0, atol=1e-4)
    again = fs.log_prob(c.denoiser(), plan, path.states, device=c.where["device"], **options)
    # A deviation of d in the mean changes the density by about d / std for each element.
    least = min(std for std, _ in _steps_noise(c, plan) if std)
    c.equal(again.log_prob, np.stack(densities, 1), 24 / least)


@feature("gradients", graphs=False)
def gradients(c: Case) -> None:
    """Along a direction, against central differences of the loop."""
    plan = c.plan()
    c.rounds = False  # what is rounded has no derivative
    rng = np.random.default_rng(2)
    x, weights, along = c.latent(plan), *(rng.standard_normal(SHAPE) for _ in range(2))
    given = c.array(x).requires_grad_(True)
    (c.sampler(c.denoiser(), plan)(given, seed=SEED) * c.array(weights)).sum().backward()
    ends = [(weights * c.loop(plan, x=x + h * along)).sum() for h in (1e-5, -1e-5)]
    c.tolerance = max(c.tolerance, 1e-7)
    c.equal((given.grad.double().numpy() * along).sum(), np.asarray((ends[0] - ends[1]) / 2e-5), 5.0)


@feature("an exported loop, `SamplerModule`", graphs=False)
def exported(c: Case) -> None:
    from fewstep.bindings.export.sampler_module import SamplerModule

    plan = c.plan()
    x = c.latent(plan)
    streams = torch.from_numpy(philox.streams(SEED, SHAPE[0]).astype(np.int64))
    found = SamplerModule(c.denoiser(), plan, dtype=c.cell.state)(c.array(x), streams, c.cond(TEXT))
    c.equal(found, c.loop(plan, x=x, conds=[TEXT]))


@feature("`SamplerModule` under CFG, with clip", graphs=False)
def exported_guided(c: Case) -> None:
    from fewstep.bindings.export.sampler_module import SamplerModule

    plan = c.plan()
    x = c.latent(plan)
    streams = torch.from_numpy(philox.streams(SEED, SHAPE[0]).astype(np.int64))
    module = SamplerModule(c.denoiser(guidance=2.5, clip=0.6), plan, dtype=c.cell.state)
    want = c.loop(plan, x=x, conds=(NULL, TEXT), guide=lambda call: cfg(call, 2.5).clip(-0.6, 0.6))
    c.equal(module(c.array(x), streams, c.cond(NULL, TEXT)), want)


@feature("`SamplerModule` under APG", graphs=False)
def exported_apg(c: Case) -> None:
    from fewstep.bindings.export.sampler_module import SamplerModule

    SamplerModule(c.denoiser(guidance=fs.APG(2.5)), c.plan(), dtype=c.cell.state)


@feature("`sample_adaptive`", graphs=False)
def adaptive(c: Case) -> None:
    _adaptive(c, None)


@feature("`sample_adaptive` under CFG", graphs=False)
def adaptive_guided(c: Case) -> None:
    _adaptive(c, 1.5)


def _adaptive(c: Case, scale: float | None) -> None:
    """VE has alpha = 1, as the loops of the oracle."""
    c.process = VE
    high, low = 4.0, 0.1
    pair = c.cell.solver
    rtol = atol = 1e-3 if pair == "dormand_prince" and c.cell.network is None else 0.05
    options: dict[str, Any] = {"frame": "logsnr"} if pair == "dormand_prince" else {}
    found = fs.sample_adaptive(
        c.denoiser(guidance=scale),
        shape=SHAPE,
        seed=SEED,
        cond=c.cond(TEXT) if scale is None else c.cond(NULL, TEXT),
        solver=pair,
        rtol=rtol,
        atol=atol,
        sigma_max=high,
        sigma_min=low,
        final_zero=False,
        dtype=c.cell.state,
        **options,
        **c.where,
    )
    assert pair in EMBEDDED
    x = high * normals(SHAPE, c.streams, 0, philox.LATENT)
    for i in range(len(x)):

        def denoise(v: np.ndarray, sigma: float, i: int = i) -> np.ndarray:
            t = np.array([sigma])
            null, text = (c.rounded(network(c.rounded(v), t, own[i : i + 1])) for own in (NULL, TEXT))
            raw = text if scale is None else null + scale * (text - null)
            return (v - sigma * raw) / (1.0 + sigma**2)

        own = x[i : i + 1]
        if pair == "dormand_prince":
            tableau = RK45.A, RK45.B, RK45.E
            want = adaptive_oracle.dormand_prince(denoise, own, high, low, *tableau, rtol, atol)
        else:
            order = 2 if pair == "dpm_solver_12" else 3
            want = adaptive_oracle.dpm_solver_adaptive(denoise, own, high, low, order, rtol, atol)
        assert (found.accepted[i], found.rejected[i]) == want[1:]
        c.equal(found.x[i : i + 1], want[0], 2.0)
