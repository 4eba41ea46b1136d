from oracles import policy as paper

from table import Row

ROWS = [
    Row(
        "flow_sde",
        paper.flow_sde,
        orders=[({"eta": 0.0}, 1)],
        weak=[({}, 1), ({"eta": 0.3}, 1)],
        variants=[{}, {"eta": 0.0}, {"eta": 1.0}, {"window": (0, 1)}, {"window": (1, 1)}, {"s_noise": 0.9}],
    ),
    Row(
        "flow_cps",
        paper.flow_cps,
        orders=[({"eta": 0.0}, 1)],
        variants=[{}, {"eta": 0.0}, {"eta": 0.3}, {"eta": 1.0}, {"window": (0, 1)}, {"s_noise": 0.9}],
    ),
]
