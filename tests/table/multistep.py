import itertools

from oracles import multistep as paper
from table import Row

UNIPC = [
    {"order": p, "variant": v, "corrector": c}
    for p, v, c in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False))
]

ROWS = [
    Row("dpmpp_2m", paper.dpmpp_2m, orders=[({}, 2), ({"variant": "heun"}, 2)], variants=[{}, {"variant": "heun"}]),
    Row(
        "dpmpp_2m_sde",
        paper.dpmpp_2m_sde,
        orders=[({"eta": 0.0}, 2)],
        weak=[({}, 2), ({"variant": "heun"}, 2), ({"eta": 0.5}, 2)],
        variants=[{}, {"variant": "heun"}, {"eta": 0.5}, {"eta": 0.0}, {"s_noise": 0.9}],
    ),
    # UniC-p after UniP-p has order p + 1 (Zhao et al. 2023, theorem 3.1).
    Row("unipc", paper.unipc, orders=[(o, o["order"] + o["corrector"]) for o in UNIPC], variants=UNIPC, graded=True),
]
