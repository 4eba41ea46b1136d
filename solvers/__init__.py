"""Samplers as data, and the loop that runs them.

Importing the family modules fills the registry; a new family is one more name in the line below.
"""

from fewstep.solvers import adams, cfgpp, exponential, first_order, runge_kutta, singlestep

__all__ = ["adams", "cfgpp", "exponential", "first_order", "runge_kutta", "singlestep"]
