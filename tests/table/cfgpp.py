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
        variants=[{}, {"eta": 0.0}, {"eta": 0.6, "s_noise": 0.9}],
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
        variants=[{}, {"eta": 0.0}, {"eta": 0.5, "s_noise": 0.9}, {"frame": "sigma"}, {"frame": "flow"}],
        times=ancestral_times,
    ),
]
