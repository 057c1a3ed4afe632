"""`install()`: our module in sys.modules under the names that FlashMLA's users import.

Nothing is patched when this package is imported. What is installed are modules of their own with
the functions of `sparse_mla.compat.flash_mla` in them, so that a name's presence in sys.modules is
all that changes, and `uninstall()` puts back what was there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

SOURCE = "sparse_mla.compat.flash_mla"

# FlashMLA's version whose interface this is.
VERSION = "1.0.0+sparse.mla"

FLASH_MLA = ("flash_mla", "flash_mla.flash_mla_interface")
SGLANG = ("sgl_kernel.flash_mla",)
# The interface file that vLLM vendors, the package around it, and its own checks before both.
VLLM = (
    "vllm.third_party.flashmla",
    "vllm.third_party.flashmla.flash_mla_interface",
    "vllm.v1.attention.ops.flashmla",
)
NAMES = (*FLASH_MLA, *SGLANG, *VLLM)
_PACKAGES = ("flash_mla", "vllm.third_party.flashmla")

_MISSING = object()


@dataclass(frozen=True)
class _Before:
    """What a name stood for before it was installed: the module, and its parent's attribute."""

    installed: ModuleType
    module: object
    attribute: object


_before: dict[str, _Before] = {}


def install(names: str | Iterable[str] = NAMES, *, force: bool = False) -> None:
    """Make imports of `names` find FlashMLA's functions on our kernels.

        import sparse_mla.compat.flash_mla
        sparse_mla.compat.flash_mla.install()
        import flash_mla                     # ours
        from sgl_kernel.flash_mla import flash_mla_with_kvcache   # ours too

    Parent packages are neither imported nor made up: the names below `sgl_kernel` and `vllm` are
    found by `from ... import` with or without them, by `import sgl_kernel.flash_mla` only where
    sgl_kernel is installed. Code that imported a function from the real module before keeps it.
    Names that are installed already are left as they are.

    Args:
        names: out of `install.NAMES`; one of them may be given as it is.
        force: replace modules that are already imported, until `uninstall()`.

    Raises:
        ValueError: an unknown name; or a real module of one of the names is already imported, and
            `force` is False. Nothing is installed then.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in NAMES:
            raise ValueError(f"name is {name!r}, allowed: {', '.join(NAMES)}")
    wanted = [name for name in names if name not in _before]
    taken = [name for name in wanted if name in sys.modules]
    if taken and not force:
        raise ValueError(
            f"{', '.join(taken)} is already imported: install() before that, or with force=True"
        )
    for name in wanted:
        module = _make(name)
        parent, attribute = _parent(name)
        had = getattr(parent, attribute, _MISSING) if parent is not None else _MISSING
        _before[name] = _Before(module, sys.modules.get(name, _MISSING), had)
        sys.modules[name] = module
        if parent is not None:
            setattr(parent, attribute, module)


def uninstall() -> None:
    """Put back what `install()` replaced; what others have since put in its place stays."""
    for name in reversed(tuple(_before)):
        before = _before.pop(name)
        if sys.modules.get(name) is before.installed:
            if before.module is _MISSING:
                del sys.modules[name]
            else:
                sys.modules[name] = before.module  # type: ignore[assignment]
        parent, attribute = _parent(name)
        if parent is None or getattr(parent, attribute, None) is not before.installed:
            continue
        if before.attribute is _MISSING:
            delattr(parent, attribute)
        else:
            setattr(parent, attribute, before.attribute)


def _parent(name: str) -> tuple[ModuleType | None, str]:
    parent, _, attribute = name.rpartition(".")
    return sys.modules.get(parent) if parent else None, attribute


def _make(name: str) -> ModuleType:
    source = importlib.import_module(SOURCE)
    package = name in _PACKAGES
    module: Any = ModuleType(name, source.__doc__)
    module.__spec__ = ModuleSpec(name, None, origin=SOURCE, is_package=package)
    module.__package__ = name if package else name.rpartition(".")[0]
    module.__version__ = VERSION
    if package:
        module.__path__ = []
    contents = {n: getattr(source, n) for n in source.__all__ if n not in ("install", "uninstall")}
    if name == SGLANG[0]:
        contents["flash_mla_with_kvcache"] = _of_2025(source.flash_mla_with_kvcache)
        contents["get_mla_metadata"] = _metadata_of_2025
    if name == VLLM[-1]:
        contents.update(_vllm_checks())
    vars(module).update(contents)
    module.__all__ = sorted(contents)
    return module


def _metadata_of_2025(
    cache_seqlens: torch.Tensor | None = None, *args: object, **kwargs: object
) -> tuple[object, torch.Tensor | None]:
    """Metadata as SGLang's copy of FlashMLA's interface of 2025 has it: two int32 tensors.

    SGLang copies them into tensors of its own for CUDA graphs, [parts, 8] and [b + 1]. They are
    zeros, and never read. Without arguments, as upstream's later interface is called, what that
    returns.
    """
    if cache_seqlens is None:
        return importlib.import_module(SOURCE).get_mla_metadata()
    sequences = cache_seqlens.shape[0]
    return (
        torch.zeros(1, 8, dtype=torch.int32, device=cache_seqlens.device),
        torch.zeros(sequences + 1, dtype=torch.int32, device=cache_seqlens.device),
    )


def _of_2025(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Decode with the arguments of SGLang's copy of FlashMLA's interface of 2025, in their order.

    That one has a tensor for num_splits, which is no more read than the metadata beside it, and
    descale_q and descale_k before is_fp8_kvcache, which only its FP8 queries use.
    """

    def flash_mla_with_kvcache(
        q: Any,
        k_cache: Any,
        block_table: Any,
        cache_seqlens: Any,
        head_dim_v: int,
        tile_scheduler_metadata: object,
        num_splits: object = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        descale_q: object = None,
        descale_k: object = None,
        is_fp8_kvcache: bool = False,
        indices: Any = None,
        **more: Any,
    ) -> Any:
        if descale_q is not None or descale_k is not None:
            raise NotImplementedError("descale_q and descale_k: FP8 queries are not offered")
        return decode(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            tile_scheduler_metadata,
            softmax_scale=softmax_scale,
            causal=causal,
            is_fp8_kvcache=is_fp8_kvcache,
            indices=indices,
            **more,
        )

    flash_mla_with_kvcache.__doc__ = decode.__doc__
    return flash_mla_with_kvcache


def _vllm_checks() -> dict[str, Callable[..., Any]]:
    """What vLLM's own module has beside FlashMLA's names."""

    def is_flashmla_sparse_supported() -> tuple[bool, str | None]:
        return True, None

    def is_flashmla_dense_supported() -> tuple[bool, str | None]:
        return True, None

    def get_mla_metadata_dense_fp8(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("get_mla_metadata_dense_fp8: FP8 queries are not offered")

    def flash_mla_with_kvcache_fp8(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("flash_mla_with_kvcache_fp8: FP8 queries are not offered")

    functions = (
        is_flashmla_sparse_supported,
        is_flashmla_dense_supported,
        get_mla_metadata_dense_fp8,
        flash_mla_with_kvcache_fp8,
    )
    return {function.__name__: function for function in functions}
