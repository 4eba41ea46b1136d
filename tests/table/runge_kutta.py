import math

from oracles import runge_kutta as paper
from table import Row, heun_times, rk4_times

CHURN = [
    {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
    {"s_churn": 80.0, "s_tmin": 0.0, "s_tmax": math.inf},
    {"s_churn": 5.0, "s_tmin": 0.3, "s_tmax": 3.0, "s_noise": 1.01},
]

ROWS = [
    Row("heun", paper.heun, orders=[({}, 2)], variants=[{}, {"frame": "sigma"}, *CHURN], times=heun_times),
    Row("rk4", paper.rk4, orders=[({}, 4)], variants=[{}, {"frame": "sigma"}], times=rk4_times),
    Row(
        "edm",
        paper.edm,
        orders=[({"s_churn": 0.0}, 2)],
        weak=[({"s_churn": 20.0, "s_tmin": 0.0, "s_tmax": math.inf}, 1)],
        variants=[{"s_churn": 0.0}, {}, *CHURN],
        times=heun_times,
        times_options={"s_churn": 0.0},
    ),
]
