import itertools
import math

from oracles import runge_kutta as paper

from table import Row, heun_times, rk4_times

CHURN = [
    {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
    {"s_churn": 80.0, "s_tmin": 0.0, "s_tmax": math.inf},
    {"s_churn": 5.0, "s_tmin": 0.3, "s_tmax": 3.0, "s_noise": 1.01},
]
# Churn of the frame that k-diffusion has.
IN_SIGMA = [{"frame": "sigma", **churn} for churn in CHURN]
FRAMES = [{"frame": "sigma"}, {"frame": "flow"}, {"frame": "logsnr"}]
KUTTA3 = ([[], [0.5], [-1.0, 2.0]], [1 / 6, 2 / 3, 1 / 6])
GENERAL = [
    {"schedule": schedule, "scaling": scaling} for schedule in ("linear", "ve", "vp") for scaling in ("none", "vp")
]


def bogacki_shampine_times(sigmas):
    return [s + (t - s) * c for s, t in itertools.pairwise(sigmas) for c in ((0.0, 0.5, 0.75) if t > 0 else (0.0,))]


def epd_times(sigmas):
    places = (0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6)
    return [s + (t - s) * c for s, t in itertools.pairwise(sigmas) for c in ((0.0, *places) if t > 0 else (0.0,))]


def dpm2_times(sigmas):
    return [v for s, t in itertools.pairwise(sigmas) for v in ((s, math.sqrt(s * t)) if t > 0 else (s,))]


def heunpp2_times(sigmas):
    return [v for i in range(len(sigmas) - 1) for v in sigmas[i : i + 3] if v > 0]


ROWS = [
    Row(
        "heun",
        paper.heun,
        orders=[({}, 2), ({"alpha": 2 / 3}, 2), *[(o, 2) for o in FRAMES]],
        variants=[{}, *FRAMES, {"alpha": 0.5}, {"alpha": 2 / 3, "frame": "logsnr"}, *CHURN],
        times=heun_times,
    ),
    Row("rk4", paper.rk4, orders=[({}, 4), *[(o, 4) for o in FRAMES]], variants=[{}, *FRAMES], times=rk4_times),
    Row(
        "runge_kutta",
        paper.runge_kutta,
        # Dormand-Prince meets rounding too soon for this table: test_runge_kutta.py.
        orders=[
            ({}, 3),
            *[(o, 3) for o in FRAMES],
            ({"tableau": KUTTA3}, 3),
            ({"tableau": "rk4_38"}, 4),
        ],
        variants=[
            {},
            *FRAMES,
            {"tableau": KUTTA3},
            {"tableau": "rk4"},
            {"tableau": "dormand_prince"},
            {"tableau": "dormand_prince", "frame": "logsnr"},
        ],
        times=bogacki_shampine_times,
    ),
    Row(
        "epd",
        paper.epd,
        orders=[
            *[(o, 2) for o in FRAMES],
            ({"places": (0.2, 0.5, 0.8), "weights": (0.3, 0.4, 0.3)}, 2),
            # Off the middle on average: order one.
            ({"places": (0.2, 0.6), "weights": (0.5, 0.5)}, 1),
        ],
        variants=[
            {},
            *FRAMES,
            {"places": (0.5,), "weights": (1.0,)},
            {"places": (0.7, 0.1, 0.4, 0.9), "weights": (0.3, -0.2, 0.5, 0.4), "frame": "flow"},
        ],
        times=epd_times,
    ),
    Row(
        "dpm2",
        paper.dpm2,
        orders=[({}, 2), ({"frame": "sigma"}, 2)],
        variants=[{}, {"frame": "sigma"}, {"frame": "flow"}, *IN_SIGMA],
        times=dpm2_times,
    ),
    Row(
        "dpm2_ancestral",
        paper.dpm2_ancestral,
        orders=[({"eta": 0.0}, 2)],
        weak=[({}, 2), ({"frame": "flow"}, 2), ({"eta": 0.5}, 2)],
        variants=[{}, {"eta": 0.0}, {"eta": 0.6, "s_noise": 0.9}, {"frame": "sigma"}, {"frame": "flow"}],
        # At eta = 1 the way down is twice the step in log sigma.
        times=heun_times,
    ),
    Row(
        "heunpp2",
        paper.heunpp2,
        orders=[({}, 1)],
        variants=[{}, {"frame": "sigma"}, {"frame": "flow"}, *IN_SIGMA],
        times=heunpp2_times,
    ),
    Row(
        "edm",
        paper.edm,
        orders=[({"s_churn": 0.0}, 2), ({"s_churn": 0.0, "alpha": 2 / 3}, 2)],
        weak=[({"s_churn": 20.0, "s_tmin": 0.0, "s_tmax": math.inf}, 1)],
        variants=[{"s_churn": 0.0}, {}, {"alpha": 2 / 3}, *CHURN],
        times=heun_times,
        times_options={"s_churn": 0.0},
    ),
    Row(
        "edm_general",
        paper.edm_general,
        orders=[
            *[(o, 2) for o in GENERAL],
            ({"schedule": "vp", "scaling": "vp", "alpha": 2 / 3}, 2),
            ({"schedule": "vp", "method": "euler"}, 1),
        ],
        # Other schedules on the grids that they are meant for: test_runge_kutta.py.
        variants=[{}, {"scaling": "vp"}, {"alpha": 0.5, **CHURN[0]}, {"method": "euler", **CHURN[2]}],
        times=heun_times,
    ),
    Row(
        "restart",
        paper.restart,
        orders=[({"intervals": ()}, 2)],
        # Intervals need a grid point below their top: test_runge_kutta.py.
        variants=[{}, {"intervals": ()}, {"s_noise": 1.003, "rho": 5.0}],
        times=heun_times,
        times_options={"intervals": ()},
    ),
]
