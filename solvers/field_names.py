"""What other libraries and papers call solvers, spacings and distillation methods: hints for unknown names.

A table reads from the name here to the names elsewhere. Letters' case, spaces and punctuation do not count, nor do a
leading `sample_` or `k_` and a trailing `Scheduler`, `Discrete`, `Multistep` or `_gpu`; "++" is "pp". A solver's name
may end in a spacing's: "DPM++ 2M Karras".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

# Of `sample_adaptive`, which has no plan.
PAIRS: Mapping[str, str] = {
    "dpm_solver_23": "dpm_adaptive, adaptive, dpm_solver_adaptive",
    "dormand_prince": "dopri5, rk45, ode45, dopri",
}

# A key that is no plain name is the whole hint.
SOLVERS: Mapping[str, str] = {
    "ddpm": "DDPMParallel, ancestral, ancestral sampling",
    "ddim": "DDIMParallel, implicit",
    "ddim_inverse": "DDIM inversion",
    "solver 'ddim' with eta=1.0": "ddim ancestral, stochastic ddim",
    "euler": "EDMEuler, explicit Euler, forward Euler, Euler EDM",
    "solver 'euler' on fewstep.Flow()": "FlowMatchEulerDiscrete, flow match Euler, flow euler, rectified flow",
    "solver 'heun' on fewstep.Flow()": "FlowMatchHeunDiscrete, flow match Heun",
    "euler_ancestral": "Euler a",
    "heun": "heun2, EDM Heun, edm_sampler, improved Euler",
    "edm": "stochastic Heun, churn",
    "epd": "EPDSolver, EPD-Solver, ensemble parallel direction, parallel direction",
    "euler_cfg_pp": "DDIM CFG++, CFG++",
    "dpm2": "dpm_2",
    "dpm2_ancestral": "dpm_2_ancestral, DPM2 a, dpm_2_a",
    "dpmpp_2m": "DPMSolverMultistep, dpmsolver++, DPM-Solver++, dpmpp, DPM-Solver++ 2M, dpm solver pp 2m, dpm++",
    "dpmpp_2m_sde": "sde-dpmsolver++, SDE-DPM-Solver++, SDE-DPM-Solver++ 2M",
    "solver 'dpmpp_2m_sde' with variant='heun'": "dpmpp_2m_sde_heun",
    "dpmpp_3m": "DPM-Solver++ 3M",
    "dpmpp_sde": "DPMSolverSDE",
    "dpmpp_2s": "DPMSolverSinglestep, DPM-Solver++ 2S",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_3s": "DPM-Solver++ 3S",
    "dpm_solver_2m": "dpmsolver, dpm_solver, dpm",
    "dpm_solver_fast": "dpm_fast",
    "unipc": "uni_pc_bh2, UniPCMultistep, unip, unic",
    "solver 'unipc' with variant='bh1'": "uni_pc, uni_pc_bh1",
    "deis": "DEISMultistep, tab_deis, deis_3m",
    "solver 'sa_solver' with pc_mode='PECE'": "sa_solver_pece",
    "solver 'pndm' with skip_prk=True": "PLMS",
    "lms": "LMSDiscrete, k_lms, linear multistep",
    "lcm": "latent consistency, lcm-lora",
    "solver 'lcm' on fewstep.Flow()": "FlowMatchLCM",
    "consistency": "CMStochasticIterative, consistency models, multistep consistency",
    "tcd": "trajectory consistency",
    "restart": "restart sampling",
    "rk4": "runge kutta 4, rk",
    "solver 'runge_kutta' with tableau='midpoint'": "midpoint",
    **{f"fewstep.sample_adaptive with solver={pair!r}": elsewhere for pair, elsewhere in PAIRS.items()},
}

SPACINGS: Mapping[str, str] = {
    "karras": "use_karras_sigmas, get_sigmas_karras, edm, rho",
    "exponential": "use_exponential_sigmas, get_sigmas_exponential",
    "polyexponential": "get_sigmas_polyexponential",
    "beta": "use_beta_sigmas",
    "logsnr": "use_lu_lambdas, lu, lambda, log snr, half log snr",
    "vp": "get_sigmas_vp",
    "linspace": "time_uniform, uniform, linear",
    "quadratic": "time_quadratic, quad",
    "ays": "align your steps, AlignYourSteps",
    "sgm_uniform": "sgm",
    "spacing 'trailing' on fewstep.Flow(shift)": "flow shift, shift, shifted, flow match, turbo",
}  # fmt: skip

METHODS: Mapping[str, str] = {
    "progressive": "progressive distillation, PD",
    "guided": "guidance distillation, guided distillation, CFG distillation",
    "consistency": "consistency distillation, consistency training, consistency models, CM, CD, CT",
    "improved_consistency": "improved consistency training, iCT",
    "continuous_consistency": "sCM, sCD, sCT, TrigFlow",
    "latent_consistency": "LCM, LCD, LCM-LoRA, latent consistency models",
    "rectified": "rectified flow, reflow, InstaFlow",
    "distribution_matching": "DMD, DMD2, distribution matching distillation",
    "adversarial": "ADD, SDXL-Turbo, turbo, GAN",
    "latent_adversarial": "LADD, SD3-Turbo",
    "mean_flow": "MeanFlow, improved MeanFlow, iMF",
    "shortcut": "shortcut models",
    "flow_maps": "Align Your Flow, AYF, flow map matching",
    "moment_matching": "inductive moment matching, IMM",
    "score_identity": "score identity distillation, SiD",
    "f_distill": "f-divergence",
    "regularised": "rCM, regularized, score-regularised consistency",
    "trajectory_matching": "trajectory distribution matching, TDM",
}

# What may be left out of a name, the longest rest first.
_AFFIXES = (r"(scheduler|gpu)$", r"^(sample|k)", r"(multistep|discrete)$")


def solver_hint(name: object, solvers: Sequence[str], spacings: Sequence[str]) -> str | None:
    """What to write for a solver's name elsewhere, a spacing's, or both in one; None if it is in no table.

    solvers, spacings  the names here, which may be spelt in another way, too
    """
    plain = _plain(name)
    known, grids = _lookup("solver", tuple(solvers)), _lookup("spacing", tuple(spacings))
    whole = _find(plain, known) or _find(plain, grids)
    if whole is not None:
        return whole
    for ending in sorted(grids, key=len, reverse=True):
        base = _find(plain.removesuffix(ending), known) if plain.endswith(ending) else None
        if base is not None:
            return f"{base} with {grids[ending]}"
    return None


def spacing_hint(name: object, spacings: Sequence[str]) -> str | None:
    """`solver_hint` for what was given as a spacing."""
    return _find(_plain(name), _lookup("spacing", tuple(spacings))) or solver_hint(name, tuple(SOLVERS), spacings)


def pair_name(name: object) -> str | None:
    """The adaptive solver here of a name elsewhere; None if it is in no table."""
    return _here(PAIRS, name)


def method_name(name: object) -> str | None:
    """The distillation method here of a name elsewhere; None if it is in no table."""
    return _here(METHODS, name)


def _here(table: Mapping[str, str], name: object) -> str | None:
    plain = _plain(name)
    names = ((here, (here, *elsewhere.split(","))) for here, elsewhere in table.items())
    return next((here for here, known in names if plain in map(_plain, known)), None)


@cache
def _lookup(kind: str, own: tuple[str, ...]) -> dict[str, str]:
    """Plain name -> hint: of the names elsewhere, then of the names here."""
    found: dict[str, str] = {}
    for here, elsewhere in {"solver": SOLVERS, "spacing": SPACINGS}[kind].items():
        hint = f"{kind} {here!r}" if here.isidentifier() else here
        found |= {_plain(name): hint for name in elsewhere.split(",")}
    return {**found, **{_plain(name): f"{kind} {name!r}" for name in own if name.isidentifier()}}


def _find(plain: str, table: Mapping[str, str]) -> str | None:
    for affix in ("", *_AFFIXES):
        plain = re.sub(affix, "", plain) if affix else plain
        if plain in table:
            return table[plain]
    return None


def _plain(name: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower().replace("+", "p"))
