"""Put the paged sparse attention into a model, and take it out again.

transformers' own extension points carry it: an attention function and its mask are registered by
name, caches are made of our layers, and a forward pre-hook of the decoder sees to the cache. Two
methods are replaced, on the model's own modules: attention's `expand_kv`, and what tells
`generate()` to compile the model around a static cache.
"""

from __future__ import annotations

import warnings
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32Attention,
    DeepseekV32Model,
)
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import (
    GlmMoeDsaAttention,
    GlmMoeDsaModel,
)

from ... import arch, dispatch
from ...kv_layout import KVLayout, get_layout
from ...ops.checks import MAX_HEADS
from .attention import attend as own_attend
from .attention import attention_forward, latents_as_they_are
from .cache import PagedCache, adopt
from .settings import ATTRIBUTE, Attend, Settings

# The oldest and the newest version that the tests were run with.
OLDEST, NEWEST = "5.17", "5.23"

NAME = "sparse_mla"

# Layouts of a latent with a RoPE part beside it, whose scales are all stored with the token.
LAYOUTS = ("v32_fp8", "bf16")

_DECODERS = {GlmMoeDsaModel: GlmMoeDsaAttention, DeepseekV32Model: DeepseekV32Attention}
_UNDO = "_sparse_mla_undo"
# What generate() asks before it makes caches paged: a static one of transformers' would say yes.
_COMPILES = "_valid_auto_compile_criteria"


def apply(
    model: nn.Module,
    layout: str | KVLayout = "v32_fp8",
    page_size: int = 64,
    *,
    attend: Attend | None = None,
) -> nn.Module:
    """Let a GLM-5 or DeepSeek-V3.2 model attend through this library, over a paged latent cache.

    Everything that runs the model afterwards, `generate()` included, caches latents in `layout` and
    attends to them in absorbed form. Adapters keep working: weights are read at every call.

    Args:
        model: the model that generates, or something that contains it (a PeftModel). Its decoder
            alone will do for everything but `generate()` with a static cache on a GPU.
        layout: the cache's layout, "v32_fp8" or "bf16".
        page_size: tokens per page.
        attend: the attention itself, to try another kernel: takes q [b, s_q, h, 576] bf16, the
            KVCache, indices [b, s_q, topk] int32 and the scale, returns [b, s_q, h, 512] bf16.
            Default this library's.

    Returns:
        The model.

    Raises:
        ValueError: the architecture is not supported, a dimension does not fit the layout, layers
            are missing, or the model is patched already. The model is then as it was.
        NotImplementedError: no backend attends over that layout on the model's device.
    """
    _check_version()
    name = layout.name if isinstance(layout, KVLayout) else layout
    if name not in LAYOUTS:
        raise ValueError(f"layout is {name!r}, allowed: {', '.join(LAYOUTS)}")
    layout = get_layout(layout)
    if type(page_size) is not int or page_size < 1:
        raise ValueError(f"page_size is {page_size!r}, must be an integer >= 1")
    if attend is not None and not callable(attend):
        raise ValueError(f"attend is {attend!r}, must be callable")
    decoder = decoder_of(model)
    if ATTRIBUTE in decoder.__dict__:
        raise ValueError("the model is patched already: restore(model) first")
    modules = _attention_modules(decoder, layout)
    _check_backend(decoder, layout)
    settings = Settings(layout, page_size, own_attend if attend is None else attend)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = decoder.config._attn_implementation
    hook = decoder.register_forward_pre_hook(_see_to_the_cache, with_kwargs=True)
    setattr(decoder, ATTRIBUTE, settings)
    setattr(decoder, _UNDO, (hook, before))
    for module in modules:
        setattr(module, ATTRIBUTE, settings)
        module.expand_kv = latents_as_they_are
    for module in model.modules():
        if hasattr(module, _COMPILES):
            setattr(module, _COMPILES, _never)
    try:
        decoder.set_attn_implementation(NAME)
    except BaseException:
        restore(model)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `apply`: the model is as it was, and caches made meanwhile refuse further tokens.

    The attention function stays registered with transformers, under a name that nothing uses.

    Raises:
        ValueError: the model is not patched.
    """
    decoder = decoder_of(model)
    settings = decoder.__dict__.get(ATTRIBUTE)
    if not isinstance(settings, Settings):
        raise ValueError("the model is not patched: there is nothing to restore")
    hook, before = decoder.__dict__.pop(_UNDO)
    hook.remove()
    for module in [decoder, *model.modules()]:
        module.__dict__.pop(ATTRIBUTE, None)
        for name, ours in (("expand_kv", latents_as_they_are), (_COMPILES, _never)):
            if module.__dict__.get(name) is ours:
                del module.__dict__[name]
    settings.active = False
    decoder.set_attn_implementation(before)
    return model


def decoder_of(model: nn.Module) -> Any:
    """The one supported decoder in a model; ValueError if there is none, or more than one."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}, must be a torch.nn.Module")
    found = [module for module in model.modules() if isinstance(module, tuple(_DECODERS))]
    if len(found) != 1:
        names = ", ".join(decoder.__name__ for decoder in _DECODERS)
        raise ValueError(
            f"model is {type(model).__name__} and contains {len(found)} supported decoders, must "
            f"contain one of: {names}"
        )
    return found[0]


def _never(*args: Any, **kwargs: Any) -> bool:
    """Lengths are counted on the host, so a compiled model would be compiled again each step."""
    return False


def _check_version() -> None:
    version = Version(transformers.__version__)
    if version < Version(OLDEST):
        raise ValueError(f"transformers is {version}, must be {OLDEST} or newer")
    if version >= Version(f"{NEWEST}.999"):
        warnings.warn(
            f"transformers {version} is newer than {NEWEST}, the newest that was tested",
            stacklevel=3,
        )


def _attention_modules(decoder: Any, layout: KVLayout) -> list[Any]:
    """The decoder's attention modules, checked against the layout; nothing is changed."""
    config = decoder.config
    rope = layout.d_qk - layout.latent.count
    for name, width in (("kv_lora_rank", layout.latent.count), ("qk_rope_head_dim", rope)):
        if getattr(config, name) != width:
            raise ValueError(f"{name} is {getattr(config, name)}, layout {layout.name} has {width}")
    if config.num_attention_heads > MAX_HEADS:
        raise ValueError(
            f"num_attention_heads is {config.num_attention_heads}, must be 1..{MAX_HEADS}"
        )
    if len(decoder.layers) != config.num_hidden_layers:
        raise ValueError(
            f"the decoder has {len(decoder.layers)} layers, its config says num_hidden_layers is "
            f"{config.num_hidden_layers}"
        )
    kind = next(value for key, value in _DECODERS.items() if isinstance(decoder, key))
    modules = []
    for i, layer in enumerate(decoder.layers):
        module = getattr(layer, "self_attn", None)
        if not isinstance(module, kind):
            raise ValueError(
                f"layers[{i}].self_attn is {type(module).__name__}, must be {kind.__name__}"
            )
        if not callable(getattr(module, "expand_kv", None)):
            raise ValueError(f"layers[{i}].self_attn has no expand_kv")
        modules.append(module)
    return modules


def _check_backend(decoder: Any, layout: KVLayout) -> None:
    device = next(decoder.parameters()).device
    if device.type == "meta":
        raise ValueError("the model is on the meta device, load its weights first")
    request = dispatch.Request(
        op="decode", layout=layout.name, heads=decoder.config.num_attention_heads
    )
    dispatch.choose(request, arch.of(device))


def _see_to_the_cache(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before each forward: a cache that the decoder would make, or was given empty, is paged."""
    given = list(args)
    # forward(input_ids, attention_mask, position_ids, past_key_values, ...)
    past = given[3] if len(given) > 3 else kwargs.get("past_key_values")
    if past is not None:
        adopt(past, decoder)
        return args, kwargs
    use_cache = kwargs.get("use_cache")
    if decoder.config.use_cache if use_cache is None else use_cache:
        made: Cache = PagedCache(decoder)
        if len(given) > 3:
            given[3] = made
        else:
            kwargs = {**kwargs, "past_key_values": made}
    return tuple(given), kwargs
