import itertools

from oracles import multistep as paper

from table import Row

UNIPC = [
    {"order": p, "variant": v, "corrector": c}
    for p, v, c in itertools.product((1, 2, 3), ("bh1", "bh2", "vary_coeff"), (True, False))
] + [{"order": 4, "corrector": False}]
# UniC-p after a predictor of order q has order min(p, q) + 1.
UNIC_AFTER = [
    ({"order": 1, "predictor": "ddim"}, 2),
    ({"order": 3, "predictor": "ddim"}, 2),
    ({"order": 2, "predictor": "dpmpp_2m"}, 3),
    ({"order": 3, "predictor": "dpmpp_3m"}, 4),
    ({"order": 2, "predictor": "dpm_solver_2m"}, 3),
    ({"order": 3, "predictor": "dpm_solver_3m"}, 4),
]
ENDS = [{"final_order": rule} for rule in (1, "unipc", "diffusers", "dpm_solver", "sa_solver")]
TAU = [{"tau": 0.0}, {"tau": 0.6}, {"tau": (1.0, 0.05, 2.0)}, {"tau": lambda t: t.sigma}]
NOISE_SCALES = [{"noise_scale": n} for n in ("ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5")]

ROWS = [
    Row(
        "dpmpp_2m",
        paper.dpmpp_2m,
        orders=[({}, 2), ({"variant": "heun"}, 2)],
        variants=[{}, {"variant": "heun"}, *ENDS],
    ),
    Row(
        "dpmpp_2m_sde",
        paper.dpmpp_2m_sde,
        orders=[({"eta": 0.0}, 2)],
        weak=[({}, 2), ({"variant": "heun"}, 2), ({"eta": 0.5}, 2)],
        variants=[{}, {"variant": "heun"}, {"eta": 0.5}, {"eta": 0.0}, {"s_noise": 0.9}],
    ),
    # The field's halved D2 is second order; dpm-solver, diffusers and k-diffusion all have it.
    Row(
        "dpmpp_3m",
        paper.dpmpp_3m,
        orders=[({}, 3), ({"variant": "midpoint"}, 3), ({"halve_d2": True}, 2)],
        variants=[{}, {"variant": "midpoint"}, {"halve_d2": True}, *ENDS],
        graded=True,
    ),
    Row(
        "dpmpp_3m_sde",
        paper.dpmpp_3m_sde,
        orders=[({"eta": 0.0}, 3), ({"eta": 0.0, "halve_d2": True}, 2)],
        weak=[({}, 2), ({"eta": 0.5}, 2), ({"halve_d2": True}, 2)],
        variants=[{}, {"halve_d2": True}, {"eta": 0.5}, {"eta": 0.0}, {"s_noise": 0.9}],
        graded=True,
    ),
    Row(
        "dpm_solver_2m",
        paper.dpm_solver_2m,
        orders=[({}, 2), ({"variant": "heun"}, 2)],
        variants=[{}, {"variant": "heun"}, *ENDS],
    ),
    Row(
        "dpm_solver_3m",
        paper.dpm_solver_3m,
        orders=[({}, 3), ({"halve_d2": True}, 2)],
        variants=[{}, {"variant": "midpoint"}, {"halve_d2": True}, *ENDS],
        graded=True,
    ),
    # UniC-p after UniP-p has order p + 1 (Zhao et al. 2023, theorem 3.1).
    Row(
        "unipc",
        paper.unipc,
        orders=[(o, o["order"] + o["corrector"]) for o in UNIPC] + UNIC_AFTER,
        variants=[
            *UNIPC,
            *(o for o, _ in UNIC_AFTER),
            *({"order": 3, **o} for o in ENDS),
            {"order": 4},
            {"order": 2, "predictor": "deis"},
            {"order": 4, "predictor": "deis"},
            {"order": 3, "corrector": {0}},
            {"order": 2, "corrector": (0,), "predictor": "dpmpp_3m"},
            {"order": 3, "corrector": False, "predictor": "deis"},
        ],
        graded=True,
    ),
    Row(
        "deis",
        paper.deis,
        # The fourth order shows late in t and rho; see test_multistep.py.
        orders=[({"order": p, "variable": v}, p) for p, v in itertools.product((1, 2, 3), ("t", "rho", "log_rho"))]
        + [({"order": 4, "variable": "log_rho"}, 4)],
        variants=[{"order": p, "variable": v} for p, v in itertools.product((1, 2, 3, 4), ("t", "rho", "log_rho"))]
        + ENDS,
        graded=True,
    ),
    Row(
        "res_multistep",
        paper.res_multistep,
        orders=[({}, 2)],
        weak=[({"eta": 1.0}, 2), ({"eta": 0.5}, 2)],
        variants=[{}, {"eta": 1.0}, {"eta": 0.5}, {"eta": 1.0, "s_noise": 0.9}],
    ),
    Row("res_2m", paper.res_2m, orders=[({}, 2)], variants=[{}, *ENDS]),
    Row(
        "res_3m",
        paper.res_3m,
        orders=[({}, 3), ({"released": True}, 2)],
        variants=[{}, {"released": True}, *ENDS],
        graded=True,
    ),
    Row(
        "sa_solver",
        paper.sa_solver,
        orders=[
            ({"tau": 0.0, "predictor_order": p, "corrector_order": c}, min(p + 1, c) if c else p)
            for p, c in [(1, 0), (2, 0), (3, 0), (1, 2), (2, 3), (3, 4), (3, 1)]
        ]
        + [({"tau": 0.0, "predictor_order": 2, "corrector_order": 3, "pc_mode": "PECE"}, 3)]
        + [({"tau": 0.0, "predictor_order": 2, "corrector_order": 2, "simple_order_2": True}, 2)],
        weak=[
            ({}, 2),
            ({"predictor_order": 1, "corrector_order": 0}, 1),
            ({"predictor_order": 2, "corrector_order": 0, "tau": 0.5}, 2),
            ({"predictor_order": 2, "corrector_order": 2, "simple_order_2": True}, 2),
            ({"pc_mode": "PECE"}, 2),
        ],
        variants=[
            *({"predictor_order": p, "corrector_order": c} for p, c in itertools.product((1, 2, 3, 4), (0, 1, 2, 4))),
            *TAU,
            *({"pc_mode": "PECE", **o} for o in TAU),
            {"simple_order_2": True, "predictor_order": 2, "corrector_order": 2},
            {"final_order": "sa_solver", "early": True},
            {"final_order": "sa_solver", "early": True, "pc_mode": "PECE"},
            {"s_noise": 0.9},
            *ENDS,
        ],
        graded=True,
    ),
    Row(
        "er_sde",
        paper.er_sde,
        orders=[
            ({"order": 1, "noise_scale": "ode"}, 1),
            ({"order": 2, "noise_scale": "ode"}, 2),
            ({"order": 3, "noise_scale": "ode"}, 2),
            ({"order": 3, "noise_scale": "ode", "interpolate": True}, 3),
        ],
        weak=[({"order": 1}, 1), ({"order": 2}, 2), ({}, 2), ({"noise_scale": "sde"}, 2)],
        variants=[
            {"order": 1},
            {"order": 2},
            {},
            {"interpolate": True},
            {"points": 200},
            {"s_noise": 0.9},
            *NOISE_SCALES,
            *ENDS,
        ],
        graded=True,
    ),
    Row(
        "gradient_estimation",
        paper.gradient_estimation,
        orders=[({}, 1)],
        variants=[{}, {"gamma": 1.0}, {"gamma": 1.5, "frame": "sigma"}, {"to_zero": True}, {"frame": "flow"}],
    ),
]
