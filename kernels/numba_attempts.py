"""The attempts of embedded pairs, compiled from the source in `attempts`."""

from __future__ import annotations

from numba.extending import register_jitable

from fewstep.kernels import attempts
from fewstep.kernels.numba_bits import jit

register_jitable(attempts.moment)

propose = jit()(attempts.propose)
control = jit()(attempts.control)
tables = jit()(attempts.tables)
