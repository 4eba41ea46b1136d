"""Samplers as data, and the loop that runs them.

Importing the family modules fills the registry; a new family is one more name in the line below.
"""

from fewstep.solvers import exponential, first_order, runge_kutta

__all__ = ["exponential", "first_order", "runge_kutta"]
