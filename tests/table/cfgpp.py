"""CFG++ forms. Without guidance they equal their base solvers; test_cfgpp.py tests them with guidance."""

from oracles import cfgpp as paper

from table import Row
from table.singlestep import ancestral_times

ROWS = [
    Row("euler_cfg_pp", paper.euler_cfg_pp, orders=[({}, 1)]),
    Row(
        "euler_ancestral_cfg_pp",
        paper.euler_ancestral_cfg_pp,
        orders=[({"eta": 0.0}, 1)],
        weak=[({}, 1)],
        variants=[{}, {"eta": 0.0}, {"eta": 0.6, "s_noise": 0.9}, {"eta": 0.6, "released": True}],
    ),
    Row(
        "dpmpp_2m_cfg_pp",
        paper.dpmpp_2m_cfg_pp,
        orders=[({}, 2), ({"difference": "guided"}, 2)],
        variants=[{}, {"difference": "guided"}],
    ),
    Row(
        "dpmpp_2s_ancestral_cfg_pp",
        paper.dpmpp_2s_ancestral_cfg_pp,
        orders=[({"eta": 0.0}, 2)],
        weak=[({}, 2)],
        variants=[
            {},
            {"eta": 0.0},
            {"eta": 0.5, "s_noise": 0.9},
            {"frame": "sigma"},
            {"frame": "flow"},
            *({"released": True, **o} for o in ({}, {"eta": 0.0}, {"frame": "flow"}, {"s_noise": 0.9})),
        ],
        times=ancestral_times,
    ),
    Row(
        "res_multistep_cfg_pp",
        paper.res_multistep_cfg_pp,
        orders=[({}, 2), ({"released": True}, 2)],
        weak=[({"eta": 1.0}, 2)],
        variants=[{}, {"eta": 0.6}, {"eta": 1.0, "s_noise": 0.9}, {"released": True}, {"released": True, "eta": 1.0}],
    ),
    Row(
        "gradient_estimation_cfg_pp",
        paper.gradient_estimation_cfg_pp,
        orders=[({}, 1)],
        variants=[{}, {"gamma": 1.5}, {"frame": "sigma"}, {"frame": "flow"}],
    ),
    Row(
        "cfgpp_ud10_ab",
        paper.cfgpp_ud10_ab,
        orders=[({"history": 0.0}, 1)],
        variants=[{}, {"history": 0.3}, {"frame": "sigma"}, {"frame": "flow"}],
    ),
]
