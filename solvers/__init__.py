"""Samplers as data, and what runs them. Rooms, lowest first; imports go down only:

schedule   processes, grids and their spacings, the Brownian tree
plans      stages and plans, their compiler, the registry, plan files
families   one module a family of solvers
run        the memory and the loop of a run, on each backend
tune       plans fitted to one denoiser
distill    one module a distillation method
"""

from fewstep.solvers import families as families
