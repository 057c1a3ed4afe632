"""The backends of sparse prefill, best first. They run where decode's do: the maths is shared."""

from __future__ import annotations

from ...dispatch import Backend
from ..sparse_decode.backends import cpu_supports, sm90_supports, triton_supports

BACKENDS = (
    Backend("cpu", cpu_supports, "sparse_mla.ops.sparse_prefill.cpu", "run"),
    Backend("sm90", sm90_supports, "sparse_mla.ops.sparse_prefill.sm90", "run"),
    Backend("triton", triton_supports, "sparse_mla.ops.sparse_prefill.triton", "run"),
)
