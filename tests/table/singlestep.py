"""Exponential singlestep samplers."""

import itertools
import math

from oracles import singlestep as paper

from table import Row

BOTH = [{}, {"variant": "taylor"}]
SECOND = [*BOTH, {"r1": 0.3}, {"r1": 0.7, "variant": "taylor"}, {"r1": 1.0}]
THIRD = [*BOTH, {"r1": 0.5}, {"r1": 0.2, "r2": 0.9, "variant": "taylor"}]

# The error of the call at r1 cancels at r2 = 2/3 alone.
THIRD_ORDERS = [
    *[({"r1": r, "variant": v}, 3) for r in (1 / 3, 0.5) for v in ("dpmsolver", "taylor")],
    ({"r2": 0.9}, 2),
    ({"r2": 0.9, "variant": "taylor"}, 2),
]


def calls(*nodes):
    """-> the calls of a step at nodes in log sigma, the first one alone where a step ends at 0."""

    def times(sigmas):
        steps = itertools.pairwise(sigmas)
        return [s * (t / s) ** c for s, t in steps for c in ((0.0, *nodes) if t > 0 else (0.0,))]

    return times


def fast_times(sigmas):
    """The last call goes to 0; 6 before it are of order 3, 2, 1 on three steps, 1 is of order 1."""
    knots = {0: [], 1: [0.0], 6: [0, 1 / 9, 2 / 9, 1 / 3, 1 / 2, 2 / 3]}[len(sigmas) - 2]
    ratio = math.log(sigmas[-2] / sigmas[0])
    return [*(sigmas[0] * math.exp(ratio * c) for c in knots), sigmas[-2]]


def ancestral_times(sigmas):
    """At eta = 1 the step down doubles the step in log sigma, so that its middle is the next sigma."""
    return [v for s, t in itertools.pairwise(sigmas) for v in ((s, t) if t > 0 else (s,))]


ROWS = [
    Row("dpm_solver_1s", paper.dpm_solver_1s, orders=[({}, 1)]),
    Row(
        "dpm_solver_2s",
        paper.dpm_solver_2s,
        orders=[(o, 2) for o in SECOND],
        variants=SECOND,
        times=calls(0.5),
    ),
    Row(
        "dpm_solver_3s",
        paper.dpm_solver_3s,
        orders=THIRD_ORDERS,
        variants=THIRD,
        times=calls(1 / 3, 2 / 3),
    ),
    # Order 3 ends on lower orders that depend on the budget: see test_singlestep.py.
    Row(
        "dpm_solver_fast",
        paper.dpm_solver_fast,
        orders=[({"order": 2}, 2), ({"order": 1}, 1)],
        weak=[({"order": 2, "eta": 1.0}, 2)],
        variants=[{}, {"order": 2}, {"order": 1}, {"eta": 0.6}, {"eta": 1.0, "s_noise": 0.9}],
        times=fast_times,
    ),
    Row("dpmpp_2s", paper.dpmpp_2s, orders=[(o, 2) for o in SECOND], variants=SECOND, times=calls(0.5)),
    Row("dpmpp_3s", paper.dpmpp_3s, orders=THIRD_ORDERS, variants=THIRD, times=calls(1 / 3, 2 / 3)),
    Row(
        "dpmpp_2s_ancestral",
        paper.dpmpp_2s_ancestral,
        orders=[({"eta": 0.0}, 2)],
        weak=[({}, 2), ({"eta": 0.5}, 2), ({"frame": "flow"}, 2)],
        variants=[
            {},
            {"eta": 0.0},
            {"eta": 0.6},
            {"s_noise": 0.9},
            {"frame": "flow"},
            {"frame": "sigma", "eta": 0.8},
            {"after_one": 0.9999},
        ],
        times=ancestral_times,
    ),
    Row(
        "dpmpp_sde",
        paper.dpmpp_sde,
        orders=[({"eta": 0.0}, 2)],
        # A step's two draws must belong to one Brownian path: independent ones are of order 1.
        weak=[({}, 2), ({"eta": 0.5}, 2), ({"path": "sigma"}, 2), ({"path": None}, 1)],
        variants=[
            {},
            {"eta": 0.0},
            {"eta": 0.6, "r": 0.3},
            {"r": 1.0},
            {"path": "sigma"},
            {"path": None, "s_noise": 0.9},
        ],
        times=calls(0.5),
    ),
    Row(
        "res_2s",
        paper.res_2s,
        orders=[({}, 2), ({"c2": 0.8}, 2)],
        variants=[{}, {"c2": 0.8}, {"c2": 1.0}],
        times=calls(0.5),
    ),
    Row(
        "res_3s",
        paper.res_3s,
        orders=[({}, 3), ({"c2": 0.3, "c3": 0.8}, 3)],
        variants=[{}, {"c2": 0.3, "c3": 0.8}, {"c2": 0.75}],
        times=calls(0.5, 1.0),
    ),
    Row(
        "etdrk4",
        paper.etdrk4,
        orders=[({}, 4), ({"variant": "cox_matthews"}, 4)],
        variants=[{}, {"variant": "cox_matthews"}],
        times=calls(0.5, 0.5, 1.0),
    ),
    Row("lawson4", paper.lawson4, orders=[({}, 4)], times=calls(0.5, 0.5, 1.0)),
    Row(
        "seeds_2",
        paper.seeds_2,
        orders=[({"eta": 0.0}, 2), ({"eta": 0.0, "variant": "phi_2"}, 2)],
        weak=[({}, 2), ({"eta": 0.5, "r1": 0.3}, 2), ({"variant": "phi_2"}, 2)],
        variants=[
            {},
            {"eta": 0.0},
            {"eta": 0.5, "r1": 0.3, "variant": "phi_2"},
            {"r1": 1.0},
            {"s_noise": 0.9},
        ],
        times=calls(0.5),
    ),
    Row(
        "seeds_3",
        paper.seeds_3,
        orders=[({"eta": 0.0}, 3)],
        weak=[({}, 2)],
        variants=[{}, {"eta": 0.0}, {"eta": 0.5, "r1": 0.2, "r2": 0.5}, {"s_noise": 0.9}],
        times=calls(1 / 3, 2 / 3),
    ),
]
