"""Adams-Bashforth family."""

import itertools

from oracles import adams as paper

from table import Row

# The first step is Euler's: unless it is small, it limits every order to two.
LMS = [{"order": p} for p in (1, 2, 3, 4)]


def pndm_times(sigmas):
    """Three pseudo Runge-Kutta steps (the middle in time is that in sigma here), then one call a step."""
    steps = list(itertools.pairwise(sigmas))
    warm = [v for s, t in steps[:3] for v in ((s, (s + t) / 2, (s + t) / 2, t) if t > 0 else (s,))]
    return [*warm, *(s for s, _ in steps[3:])]


ROWS = [
    Row(
        "lms",
        paper.lms,
        orders=[(o, o["order"]) for o in LMS],
        variants=[*LMS, {"final_order": 2}, {"to_zero": False}, {"frame": "sigma"}, {"order": 3, "frame": "flow"}],
        graded=True,
    ),
    # Fixed weights: their order needs a grid that is uniform in the frame's clock, which these are in flow time.
    # The graded start is not uniform either; see test_adams.py.
    Row(
        "ipndm",
        paper.ipndm,
        orders=[({"order": p}, min(p, 2)) for p in (1, 2)],
        variants=[*LMS, {"final_order": 1}, {"to_zero": True}, {"frame": "sigma"}],
    ),
    Row(
        "ipndm_v",
        paper.ipndm_v,
        orders=[*((o, o["order"]) for o in LMS), ({"order": 3, "released": True}, 2)],
        variants=[
            *LMS,
            {"final_order": 1},
            {"to_zero": True},
            {"frame": "sigma"},
            {"order": 3, "released": True},
            {"released": True},
        ],
        graded=True,
    ),
    # Second order (Liu et al. 2022, theorem 3.4); higher where clock and time are one: see test_adams.py.
    Row(
        "pndm",
        paper.pndm,
        orders=[({"skip_prk": True}, 2), ({}, 2)],
        variants=[{}, {"skip_prk": True}, {"frame": "sigma"}, {"frame": "flow"}],
        times=pndm_times,
        on=("edm", "vp"),
    ),
]
