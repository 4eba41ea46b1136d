"""A pytest plugin, `-p interpreter_faults`: two faults of Triton's interpreter, mended.

Before 3.8 it takes the int of an array of one element to use a tensor as an index, which NumPy refuses since 2.4. The
truth of a comparison has the type of what was compared; where it is one for all lanes, such as `buffer >= 0`, it
becomes a mask of int32, which 3.9 refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_patch, _binary_op = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.binary_op


def _patch_with_index(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _binary_op_with_truths(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    found = _binary_op(self, lhs, rhs, op)
    if found.data.dtype == np.bool_:
        found.dtype = tl.int1
    return found


if _VERSION < (3, 8):
    interpreter._patch_lang_tensor = _patch_with_index
if _VERSION >= (3, 9):
    interpreter.InterpreterBuilder.binary_op = _binary_op_with_truths
