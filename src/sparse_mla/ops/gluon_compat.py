"""What Triton's minor versions call differently in Gluon, under one name: 3.6 to 3.9.

Gluon kernels import these names and use nothing else that differs:

| here          | 3.6                                      | other versions                    |
|---------------|------------------------------------------|-----------------------------------|
| `barrier`     | `gl.thread_barrier`                      | 3.7 and newer: `gl.barrier`       |
| `async_load`  | `async_copy.async_copy_global_to_shared` | 3.9: `async_copy.async_load`      |
| `reinterpret` | `buffer._reinterpret`                    | 3.8: not of a part of the buffer; |
|               |                                          | 3.9: `buffer.reinterpret`         |

Besides: `mbarrier.expect` takes its bytes by position (3.7 renamed the keyword), `gl.load` and
`gl.store` take what follows the mask by keyword (3.9).
"""

from __future__ import annotations

import math
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)

_PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
# This version alone wants a view to be as large as the buffer.
_WHOLE_BUFFER = gl.constexpr(triton.__version__.startswith("3.8."))


@gluon.constexpr_function
def _whole(shape: Any, dtype: Any, view: Any, view_dtype: Any, layout: Any) -> Any:
    """The view's shape, with as many of them along a leading dim as fill the buffer."""
    have = math.prod(shape) * dtype.primitive_bitwidth
    part = math.prod(view) * view_dtype.primitive_bitwidth
    rank = layout.rank if hasattr(layout, "rank") else len(layout.order)
    if have == part:
        return list(view)
    if rank < len(view):  # the first dim counts buffers already: a few more do no harm
        return [view[0] * have // part, *view[1:]]
    return [have // part, *view]


@gluon.jit
def reinterpret(
    buffer: gl.shared_memory_descriptor,
    dtype: gl.constexpr,
    shape: gl.constexpr,
    layout: gl.constexpr,
) -> gl.shared_memory_descriptor:
    """The first bytes of a buffer in shared memory as another dtype, shape and layout."""
    if _PUBLIC_REINTERPRET:
        return buffer.reinterpret(dtype, shape, layout)
    elif _WHOLE_BUFFER:  # noqa: RET505  # Triton compiles what follows a return
        whole: gl.constexpr = _whole(buffer.shape, buffer.dtype, shape, dtype, layout)
        made = buffer._reinterpret(dtype, whole, layout)
        return made.index(0) if len(whole) > len(shape) else made
    else:
        return buffer._reinterpret(dtype, shape, layout)
