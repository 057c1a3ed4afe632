"""Any importable module with FlashMLA's function names, and what its packagings share."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from ...arch import Arch
from ..case import Implementation, Inputs, NotOffered, Output, WriteInputs
from .base import bf16_rows


class ModuleProvider:
    """Any importable module with FlashMLA's function names and signatures.

    What the module lacks, or refuses with NotImplementedError, is not offered. Its caches, shapes
    and lse convention (+inf for a row with nothing valid) are FlashMLA's. A shape that it refuses
    otherwise is padded as FlashMLA's callers do (`pad`), and the answer says so.
    """

    def __init__(self, module_name: str) -> None:
        """Import the module; ImportError says what is missing."""
        self.name = module_name
        self.module: ModuleType = importlib.import_module(module_name)
        if not any(hasattr(self.module, name) for name in FLASH_MLA_NAMES):
            raise ImportError(f"module {module_name} has none of {', '.join(FLASH_MLA_NAMES)}")

    def _function(self, name: str) -> Any:
        function = getattr(self.module, name, None)
        if function is None:
            raise NotOffered(f"{self.name} has no {name}")
        return function

    def new_state(self) -> Any:
        """Scheduling metadata of one caller, made on first use as FlashMLA's callers do."""
        make = getattr(self.module, "get_mla_metadata", None)
        if make is None:
            return _State(None, None)
        # A refused call may leave its shape in the metadata, so padded calls have their own.
        return _State(make()[0], make()[0])

    def run(self, inputs: Inputs, state: Any) -> Output:
        try:
            return self._attend(inputs, state.plain)
        except (NotOffered, NotImplementedError):
            raise
        except Exception as refusal:
            padded, what = pad(inputs)
            if not what:
                raise
            try:
                output = self._attend(padded, state.padded)
            except (NotOffered, NotImplementedError):
                raise
            except Exception:
                raise refusal from None
            reason = " ".join(f"{type(refusal).__name__}: {refusal}".split())[:120]
            note = f"{' and '.join(what)} padded, refused as given ({reason})"
            heads = inputs.q.shape[-2]
            top = output.max_logits
            return replace(
                output,
                out=output.out[..., :heads, :],
                lse=None if output.lse is None else output.lse[..., :heads],
                max_logits=None if top is None else top[..., :heads],
                padded=what,
                note=note,
            )

    def _attend(self, inputs: Inputs, metadata: Any) -> Output:
        attend = {"decode": self._decode, "dense_decode": self._dense}.get(inputs.op)
        return self._prefill(inputs) if attend is None else attend(inputs, metadata)

    def _decode(self, inputs: Inputs, state: Any) -> Output:
        decode = self._function("flash_mla_with_kvcache")
        quantised = inputs.cache.layout.quantised
        dtype = torch.float8_e4m3fn if quantised else torch.bfloat16
        extra = inputs.extra_cache
        names = self._format_names(inputs, decode)
        try:
            out, lse = decode(
                inputs.q,
                inputs.cache.tensor().view(dtype),
                None,
                None,
                inputs.cache.layout.d_v,
                state,
                None,
                inputs.scale,
                False,
                quantised,
                inputs.indices,
                inputs.attn_sink,
                None if extra is None else extra.tensor().view(dtype),
                inputs.extra_indices,
                inputs.topk_length,
                inputs.extra_topk_length,
                **names,
            )
        except AssertionError as error:
            # FlashMLA states with an assert that sparse decode takes FP8 caches only.
            if not quantised and "is_fp8_kvcache" in str(error):
                raise NotOffered(f"sparse decode over {inputs.cache.layout.name}") from error
            raise
        return Output(out, lse.transpose(1, 2), None, float("inf"))

    def _format_names(self, inputs: Inputs, decode: Any) -> dict[str, Any]:
        """What tells layouts apart that FlashMLA's rule by width does not: our shim's arguments."""
        caches = {"kv": inputs.cache, "extra_kv": inputs.extra_cache}
        given = {name: cache for name, cache in caches.items() if cache is not None}
        if all(cache.layout.name in BY_WIDTH for cache in given.values()):
            return {}
        layouts = {name: cache.layout.name for name, cache in given.items()}
        if "kv_format" not in inspect.signature(decode).parameters:
            raise NotOffered(f"sparse decode over {' and '.join(layouts.values())}")
        if not all(cache.layout.quantised for cache in given.values()):
            raise NotOffered("a bf16 cache beside a quantised one")
        names: dict[str, Any] = {f"{name}_format": layout for name, layout in layouts.items()}
        names.update({f"{name}_scale": cache.tensor_scale for name, cache in given.items()})
        return names

    def _dense(self, inputs: Inputs, state: Any) -> Output:
        """Dense decode, which FlashMLA has for bf16 and pages of 64 tokens."""
        decode = self._function("flash_mla_with_kvcache")
        cache = inputs.cache
        ours = "kv_format" in inspect.signature(decode).parameters
        if not ours and (cache.layout.name != "bf16" or cache.page_size != DENSE_PAGE):
            raise NotOffered(f"dense decode over {cache.layout.name}, pages of {cache.page_size}")
        quantised = cache.layout.quantised
        names = {"kv_format": cache.layout.name, "kv_scale": cache.tensor_scale} if ours else {}
        out, lse = decode(
            inputs.q,
            cache.tensor().view(torch.float8_e4m3fn if quantised else torch.bfloat16),
            inputs.block_table,
            inputs.cache_seqlens,
            cache.layout.d_v,
            state,
            None,
            inputs.scale,
            inputs.causal,
            quantised,
            **names,
        )
        return Output(out, lse.transpose(1, 2), None, float("inf"))

    def _prefill(self, inputs: Inputs) -> Output:
        prefill = self._function("flash_mla_sparse_fwd")
        kv = bf16_rows(inputs)
        if kv is None:
            raise NotOffered(f"sparse prefill over a {inputs.cache.layout.name} cache")
        out, max_logits, lse = prefill(
            inputs.q,
            kv,
            inputs.indices.unsqueeze(1),
            inputs.scale,
            inputs.cache.layout.d_v,
            inputs.attn_sink,
            inputs.topk_length,
        )
        return Output(out, lse, max_logits, float("inf"))

    def write(self, inputs: WriteInputs) -> None:
        raise NotOffered("FlashMLA's interface has no cache writer")


@dataclass(frozen=True)
class _State:
    plain: Any
    padded: Any


# What FlashMLA's kernels take, and its callers pad to.
PADDED_HEADS = (64, 128)
PADDED_TOPK = 128
DENSE_PAGE = 64


def pad(inputs: Inputs) -> tuple[Inputs, tuple[str, ...]]:
    """The call with heads padded by zeros and index lists by -1, and which of them that changed."""
    what: list[str] = []
    q, sink, indices = inputs.q, inputs.attn_sink, inputs.indices
    heads, topk = q.shape[-2], indices.shape[-1]
    target = next((n for n in PADDED_HEADS if n >= heads), heads)
    if target != heads:
        what.append("heads")
        q = torch.nn.functional.pad(q, (0, 0, 0, target - heads))
        if sink is not None:
            sink = torch.nn.functional.pad(sink, (0, target - heads))
    more = -topk % PADDED_TOPK if inputs.block_table is None else 0
    if more:
        what.append("topk")
        indices = torch.nn.functional.pad(indices, (0, more), value=-1)
    return replace(inputs, q=q, attn_sink=sink, indices=indices), tuple(what)


# Layouts that q's width and the cache's dtype tell apart.
BY_WIDTH = ("v32_fp8", "v4_fp8", "bf16", "bf16_nope")

FLASH_MLA_NAMES = ("flash_mla_with_kvcache", "flash_mla_sparse_fwd")


TITLE = "any module with FlashMLA's function names"
PACKAGE = ""
DISTRIBUTIONS: tuple[str, ...] = ()
ARCHITECTURES: tuple[str, ...] = ()


def load(name: str) -> Implementation:
    return ModuleProvider(name)


def supports(
    provider: ModuleProvider | None, op: str, layout: str, machine: Arch
) -> tuple[bool, str]:
    """What the module's functions can be asked; the cases say whether it answers."""
    if op == "kv_write":
        return False, "FlashMLA's interface has no cache writer"
    if op == "decode" and layout in ("bf16", "bf16_nope"):
        return False, "its sparse decode takes FP8 caches only"
    if op == "decode" and layout not in BY_WIDTH:
        return False, "its sparse decode tells layouts by q's width: v32_fp8 and v4_fp8"
    if op == "dense_decode" and layout != "bf16":
        return False, "its dense decode takes bf16 caches"
    if op == "prefill" and layout not in ("bf16", "bf16_nope"):
        return False, "its sparse prefill takes bf16 rows only"
    function = FLASH_MLA_NAMES[op == "prefill"]
    if provider is not None and not hasattr(provider.module, function):
        return False, f"has no {function}"
    return True, function
