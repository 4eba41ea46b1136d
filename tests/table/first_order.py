from oracles import first_order as paper

from table import Row

ROWS = [
    Row(
        "ddpm",
        paper.ddpm,
        weak=[({}, 1), ({"variance": "fixed_large"}, 1)],
        variants=[{}, {"variance": "fixed_large"}],
    ),
    Row(
        "ddim",
        paper.ddim,
        orders=[({}, 1)],
        weak=[({"eta": 1.0}, 1), ({"eta": 0.5}, 1)],
        variants=[{"eta": 0.0}, {"eta": 0.4}, {"eta": 1.0}],
    ),
    # Its order, from the clean end to the noisy one, is measured in test_inverse.py.
    Row(
        "ddim_inverse",
        paper.ddim_inverse,
        variants=[{}, {"at": "current"}],
        times=lambda sigmas: list(sigmas[-2::-1]),
        end=0,
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
        weak=[({}, 1), ({"frame": "flow"}, 1)],
        variants=[{"eta": 0.0}, {"eta": 0.7}, {}, {"s_noise": 0.9}, {"frame": "sigma"}, {"frame": "flow", "eta": 0.7}],
    ),
    Row("lcm", paper.lcm),
    Row(
        "tcd",
        paper.tcd,
        orders=[({"gamma": 0.0}, 1)],
        variants=[{}, {"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 0.97}, {"gamma": 1.0}],
    ),
    Row("consistency", paper.consistency, variants=[{}, {"sigma_min": 0.0}]),
]
