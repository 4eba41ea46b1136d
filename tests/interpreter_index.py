"""A pytest plugin, `-p interpreter_index`: Triton's interpreter before 3.8 with NumPy 2.4.

That interpreter takes the int of an array of one element to use a tensor as an index, which NumPy refuses since 2.4.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    interpreter._patch_lang_tensor = _patch_with_index
