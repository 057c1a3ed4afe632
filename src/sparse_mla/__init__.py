"""Sparse MLA attention: accurate by proof, fast on Hopper, running on any GPU and on CPU."""

from . import dispatch, reference
from .kv_cache import KVCache
from .kv_layout import LAYOUTS, KVLayout
from .ops.dense_decode.interface import dense_decode
from .ops.sparse_decode.interface import decode
from .ops.sparse_prefill.interface import prefill

__version__ = "0.1.0"

__all__ = [
    "LAYOUTS",
    "KVCache",
    "KVLayout",
    "decode",
    "dense_decode",
    "dispatch",
    "prefill",
    "reference",
]
