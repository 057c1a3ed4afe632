"""Hugging Face transformers: GLM-5 and DeepSeek-V3.2 over a paged latent cache.

Reading path: apply.py puts the pieces into a model and takes them out again; cache.py keeps the
latents; attention.py is what a layer calls; projections.py holds the absorbed form; graph.py
captures a decode step. docs/transformers.md says how to use it.
"""

from .apply import apply, restore
from .cache import PagedCache
from .graph import DecodeGraph, DecodeStep

__all__ = ["DecodeGraph", "DecodeStep", "PagedCache", "apply", "restore"]
