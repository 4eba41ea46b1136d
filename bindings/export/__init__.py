"""A sampling loop as a torch module, and as a program compiled ahead of time."""

from fewstep.solvers.options import needs

needs("fewstep.bindings.export", "torch", extra="torch")
