"""What a cell is expected to do: work, be refused with a reason, or not exist."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from matrix.axes import EMBEDDED, SOLVERS, Cell, cells, covering
from matrix.features import FEATURES, Case


@dataclass(frozen=True)
class Refusal:
    """reason  as the page states it
    match   a regular expression that the error's text holds
    where   axis -> the values for which it holds, all of them together; an axis left out stands for all values
    error   its type
    """

    reason: str
    match: str
    where: dict[str, Sequence[str]]
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class Absent:
    """A cell that nobody can ask for: the feature has no such argument, the library no such thing."""

    reason: str
    where: dict[str, Sequence[str]] = field(default_factory=dict)


CPU = ("naive NumPy", "naive torch", "numba NumPy", "numba torch")
NUMPY = ("naive NumPy", "numba NumPy")

PARALLEL = "`parallel=True`, CFG with clip"
POLICY, SHARDED = "`rollout` and `log_prob`", "`sample_sharded`"
GRADIENTS = "gradients"
MODULE_APG = "`SamplerModule` under APG"
MODULES = ("an exported loop, `SamplerModule`", "`SamplerModule` under CFG, with clip", MODULE_APG)
ADAPTIVE, ADAPTIVE_CFG = "`sample_adaptive`", "`sample_adaptive` under CFG"
MIXED, MIXED_APG = "`MixedRun`, CFG of each request", "`MixedRun` under APG"
ENGINE, LEVELS = "`Engine`, an edit of one request", "`sample_levels`, a pyramid"

AT_X0 = ("`edit_x0=`", "both, under CFG", "`edits.Inpaint` at x0", "`edits.Prefix`", "`edits.DynamicThreshold` at x0")
PLANS = tuple(name for name in FEATURES if name not in (ADAPTIVE, ADAPTIVE_CFG))

INSIDE = ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "restart", "seeds_2", "seeds_3")
POLICIES = (
    "consistency", "ddpm", "dpm2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "euler_ancestral", "flow_cps",
    "flow_sde", "lcm", "sa_solver", "tcd",
)  # fmt: skip
NO_NOISE = tuple(s for s in SOLVERS if s not in (*POLICIES, *INSIDE, *EMBEDDED, "edm", "euler_ancestral_cfg_pp"))

# The first that holds counts.
RULES: list[Absent | Refusal] = [
    Absent("NumPy has no gradients", {"feature": [GRADIENTS], "place": NUMPY}),
    Absent(
        "a torch module, which chooses its kernels by device",
        {"feature": MODULES, "place": ["naive NumPy", "naive torch", "numba NumPy", "triton"]},
    ),
    Absent("its state is float32", {"feature": [MIXED, MIXED_APG, ENGINE], "dtype": ["float64"]}),
    Refusal(
        "an embedded pair, which `sample_adaptive` takes",
        "is an embedded pair of adaptive steps",
        {"feature": PLANS, "solver": EMBEDDED},
    ),
    Refusal(
        "`sample_adaptive` takes embedded pairs",
        "unknown adaptive solver",
        {"feature": [ADAPTIVE, ADAPTIVE_CFG], "solver": [s for s in SOLVERS if s not in EMBEDDED]},
    ),
    Refusal(
        "graphs need a CUDA device",
        "needs a CUDA device and the triton backend",
        {"place": CPU, "graph": ["step", "loop"]},
    ),
    Refusal(
        "each call depends on the one before it",
        "each call of this plan of solver",
        {
            "feature": [PARALLEL],
            "solver": [s for s in SOLVERS if s not in ("epd", *EMBEDDED)],
            "graph": ["off", "loop"],
        },
    ),
    Refusal(
        "the calls of a round are made at once",
        "records one call and its update",
        {"feature": [PARALLEL], "graph": ["step"]},
    ),
    Refusal("the plan draws no noise", "draws no noise", {"feature": [POLICY], "solver": NO_NOISE}),
    Refusal("noise inside of a step", "draws noise inside of a step", {"feature": [POLICY], "solver": INSIDE}),
    Refusal(
        "churn before the first call",
        "changes the latent before its first call",
        {"feature": [POLICY], "solver": ["edm"]},
    ),
    Refusal(
        "the mean reads the unguided prediction",
        "reads the unguided prediction",
        {"feature": [POLICY], "solver": ["euler_ancestral_cfg_pp"]},
    ),
    Refusal(
        "it encodes data, tokens are drawn",
        "does not run from noise to data, as tokens do",
        {"feature": [LEVELS], "solver": ["ddim_inverse"]},
    ),
    Refusal("NumPy has no bfloat16", "NumPy has no bfloat16", {"place": NUMPY, "dtype": ["float32 / bfloat16"]}),
    Refusal(
        "its kernels keep the state in float32",
        "backend='triton' keeps",
        {"place": ["triton"], "dtype": ["float64"]},
    ),
    Refusal(
        "it encodes data, and nothing is drawn",
        "it encodes data, draws none",
        {"feature": [SHARDED], "solver": ["ddim_inverse"]},
    ),
    Refusal(
        "called on the host for every draw",
        "noise= is called on the host for every draw",
        {"feature": ["`noise=` from outside"], "graph": ["step", "loop"]},
    ),
    Refusal(
        "a whole sample is one launch",
        "without callbacks or a progress bar: use graph='step'",
        {"feature": ["`callback=`"], "graph": ["loop"]},
    ),
    Refusal(
        "it acts inside of a step's launch",
        "edit_x0 acts inside of a call's update",
        {"feature": AT_X0, "graph": ["step"]},
    ),
    Refusal(
        "requests share each call, and this one needs whole samples",
        "cannot mix plans under guidance rescale, APG",
        {"feature": [MIXED_APG], "place": ["triton"]},
    ),
    Refusal(
        "it reduces whole samples",
        "does not support guidance rescale, APG",
        {"feature": [MODULE_APG]},
    ),
    Refusal(
        "the fused kernels record no gradients",
        "records no gradients",
        {"feature": [GRADIENTS], "place": ["numba torch", "triton"]},
    ),
]


def expected(cell: Cell) -> Absent | Refusal | None:
    """None for a cell that works."""
    if cell.graph != "off" and not FEATURES[cell.feature].graphs:
        return NO_GRAPH
    return next((rule for rule in RULES if all(getattr(cell, k) in values for k, values in rule.where.items())), None)


NO_GRAPH = Absent("the call has no argument `graph`")


def kind(cell: Cell) -> str | None:
    """For `axes.covering`."""
    rule = expected(cell)
    return None if isinstance(rule, Absent) else "works" if rule is None else rule.reason


@functools.cache
def covering_set() -> list[Cell]:
    """The cells that CI runs."""
    return covering(cells(FEATURES), kind)


def check(cell: Cell) -> None:
    """Run a cell. Raises AssertionError if it does not do what is expected."""
    rule, run = expected(cell), FEATURES[cell.feature].run
    assert not isinstance(rule, Absent), cell
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            run(Case(cell))
        except AssertionError as error:
            raise AssertionError(f"{cell}: {error}") from None
        except Exception as error:
            if isinstance(rule, Refusal) and type(error) is rule.error and re.search(rule.match, str(error)):
                return
            raise AssertionError(f"{cell} expected {rule}, raised {type(error).__name__}: {error}") from error
    assert rule is None, f"{cell} expected {rule}, and works"
