"""Samplers as data, and the loop that runs them.

Importing the family modules fills the registry; a new family is one more name in the line below.
"""

from fewstep.solvers import (
    adams,
    cfgpp,
    deis,
    er_sde,
    exponential,
    first_order,
    gradient_estimation,
    res,
    runge_kutta,
    sa,
    singlestep,
    unipc,
)

__all__ = [
    "adams",
    "cfgpp",
    "deis",
    "er_sde",
    "exponential",
    "first_order",
    "gradient_estimation",
    "res",
    "runge_kutta",
    "sa",
    "singlestep",
    "unipc",
]
