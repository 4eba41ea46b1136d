from oracles import first_order as paper
from table import Row

ROWS = [
    Row("ddpm", paper.ddpm, weak=[({}, 1)]),
    Row(
        "ddim",
        paper.ddim,
        orders=[({}, 1)],
        weak=[({"eta": 1.0}, 1), ({"eta": 0.5}, 1)],
        variants=[{"eta": 0.0}, {"eta": 0.4}, {"eta": 1.0}],
    ),
    Row(
        "euler",
        paper.euler,
        orders=[({}, 1)],
        weak=[({"s_churn": 20.0}, 1)],
        variants=[{}, {"s_churn": 5.0, "s_tmin": 0.3, "s_tmax": 3.0, "s_noise": 1.01}],
    ),
    Row(
        "euler_ancestral",
        paper.euler_ancestral,
        orders=[({"eta": 0.0}, 1)],
        weak=[({}, 1)],
        variants=[{"eta": 0.0}, {"eta": 0.7}, {}, {"s_noise": 0.9}],
    ),
    Row("lcm", paper.lcm),
    Row("consistency", paper.consistency, variants=[{}, {"sigma_min": 0.0}]),
]
