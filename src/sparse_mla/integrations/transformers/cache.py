"""A paged latent cache behind transformers' Cache interface.

A layer keeps its tokens in a KVCache pool. Sequences of a batch grow together, padding included,
so pages are allocated a column at a time: page j of sequence b is page j * batch + b of the pool,
and growing appends pages without moving one. Where each position lies is a table that all layers
of a cache share. The indexer's keys stay as transformers has them, in buffers that grow as the
pages do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    StaticIndexedLayer,
    StaticLayer,
)

from ...kv_cache import KVCache
from .settings import Settings, settings_of


class SlotTable:
    """Slots of every position, [batch, pages * page_size] int32: computed once for all layers."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._made: tuple[int, int, torch.Tensor] | None = None

    def get(self, batch: int, pages: int, device: torch.device) -> torch.Tensor:
        """The table for `pages` pages per sequence."""
        if self._made is not None:
            made_batch, made_pages, table = self._made
            if (made_batch, made_pages, table.device) == (batch, pages, device):
                return table
        position = torch.arange(pages * self.page_size, device=device)
        page = position // self.page_size * batch + torch.arange(batch, device=device)[:, None]
        table = (page * self.page_size + position % self.page_size).to(torch.int32)
        self._made = batch, pages, table
        return table


class PagedLayer(CacheLayerMixin):
    """One layer's latents in pages, and its indexer keys.

    Attributes:
        pool: the pages, None before the first update.
        length: tokens per sequence.
        max_length: the most tokens per sequence, allocated at once at fixed addresses; None grows
            on demand.
        position: `length` on the device where `max_length` is given, for CUDA graphs.
    """

    is_sliding = False
    is_croppable = True
    # generate() would compile the model around a compileable cache; graphs are DecodeGraph's.
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        settings: Settings,
        max_length: int | None = None,
        table: SlotTable | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.max_length = max_length
        self.table = SlotTable(settings.page_size) if table is None else table
        self.pool: KVCache | None = None
        self.indexer_keys: torch.Tensor | None = None
        self.batch_size = 0
        self.pages = 0
        self.length = 0
        self.indexer_length = 0
        self.position: torch.Tensor | None = None

    def __repr__(self) -> str:
        layout = self.settings.layout.name
        return f"PagedLayer({layout}, {self.length} tokens of {self.batch_size} sequences)"

    # What attention needs

    def slots(self, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Slots of selected positions [b, s, topk]; -1 where `visible` [b, 1, s, t] is False."""
        batch, length, topk = positions.shape
        wide = positions.long()
        table = self._slot_table()
        slots = table.gather(1, wide.view(batch, length * topk)).view(batch, length, topk)
        seen = visible[:, 0].expand(batch, length, -1).gather(2, wide)
        return torch.where(seen, slots, -1)

    # transformers' cache layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        if self.max_length is not None:
            self.position = torch.zeros((), dtype=torch.int64, device=self.device)
            self._allocate(-(-self.max_length // self.settings.page_size))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PagedLayer, PagedLayer]:
        """Quantise and write latents [b, 1, s, rank] and rotated keys [b, 1, s, rope]."""
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, added, _ = key_states.shape
        self._reserve(self.length + added)
        if self.pool is None:
            raise RuntimeError("no pages were allocated")
        if self.position is None:
            slots = self._slot_table()[:, self.length : self.length + added]
        else:
            columns = torch.arange(added, device=self.device) + self.position
            slots = self._slot_table().index_select(1, columns)
            self.position.add_(added)
        flat = slots.reshape(batch * added)
        layout, size = self.settings.layout, self.settings.page_size
        latent = key_states.reshape(batch * added, layout.latent.count)
        rope = value_states.reshape(batch * added, -1)
        # KVCache.append without its check of the slots, which are right by construction: the check
        # waits for the device.
        rows, footers = layout.pack(latent.detach(), rope.detach())
        page, offset = flat // size, flat % size
        self.pool.rows_view()[page, offset] = rows
        if layout.planar:
            self.pool.footers_view()[page, offset] = footers
        self.length += added
        return self, self

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Keep the indexer's keys [b, s, width]; returns all of them, [b, t, width]."""
        batch, added, width = indexer_key_states.shape
        capacity = self.pages * self.settings.page_size
        end = self.indexer_length + added
        if end > capacity:
            raise ValueError(
                f"the indexer has {end} keys, the layer has pages for {capacity} tokens: update "
                "comes before update_indexer"
            )
        kept = self.indexer_keys
        if kept is None or kept.shape[1] < capacity:
            # Zeros, not empty: positions beyond the length are scored, then masked.
            made = indexer_key_states.new_zeros(batch, capacity, width)
            if kept is not None:
                made[:, : self.indexer_length] = kept[:, : self.indexer_length]
            self.indexer_keys = kept = made
        if self.position is None:
            kept[:, self.indexer_length : end] = indexer_key_states
        else:
            # `update` has moved the position past these tokens already.
            columns = torch.arange(added, device=kept.device) + (self.position - added)
            kept.index_copy_(1, columns, indexer_key_states)
        self.indexer_length = end
        return kept[:, :end] if self.max_length is None else kept[:, : self.max_length]

    def get_seq_length(self) -> int | torch.Tensor:
        return self.length if self.position is None else self.position

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_length or self.length + query_length), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. Zero or negative, as transformers counts them."""
        # Assisted generation counts on the device.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}, must be from -{self.length} to 0"
            )
        self._set_length(self.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; pages of a fixed length stay where they are."""
        if self.max_length is None:
            self.pool = self.indexer_keys = None
            self.pages = 0
            self.is_initialized = False
        self._set_length(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch_size).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Sequence i becomes what sequence indices[i] was; pages are copied, so they diverge."""
        if self.pool is None:
            return
        rows = indices.to(self.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        used = -(-self.length // self.settings.page_size)
        old = self.pool.pages.unflatten(0, (self.pages, self.batch_size))[:used]
        chosen = old.index_select(1, rows)
        if rows.shape[0] != self.batch_size:
            if self.max_length is not None:
                raise ValueError(
                    f"indices selects {rows.shape[0]} of {self.batch_size} sequences, a cache of "
                    "fixed length keeps its batch size"
                )
            self.batch_size = rows.shape[0]
            self.pool = self._new_pool(self.pages)
        self.pool.pages.unflatten(0, (self.pages, self.batch_size))[:used] = chosen
        if self.indexer_keys is not None:
            keys = self.indexer_keys.index_select(0, rows)
            if keys.shape == self.indexer_keys.shape:
                self.indexer_keys.copy_(keys)
            else:
                self.indexer_keys = keys

    def offload(self) -> None:
        raise ValueError("a paged cache cannot be offloaded")

    def prefetch(self) -> None:
        raise ValueError("a paged cache cannot be offloaded")

    # Pages

    def _check(self, latent: torch.Tensor, rope: torch.Tensor) -> None:
        """Everything that can be wrong with an update, before anything is written."""
        if not self.settings.active:
            raise ValueError("this cache belongs to a model that was restored: make a new one")
        layout = self.settings.layout
        widths = layout.latent.count, layout.rope.count if layout.rope else 0
        given = latent.shape[-1], rope.shape[-1]
        if latent.shape[1] != 1 or given != widths:
            raise ValueError(
                f"the layer's states are {tuple(latent.shape)} and {tuple(rope.shape)}, must be "
                f"latents [b, 1, s, {widths[0]}] and rotated keys [b, 1, s, {widths[1]}] for "
                f"{layout.name}: is the model patched?"
            )
        if self.is_initialized and latent.shape[0] != self.batch_size:
            raise ValueError(
                f"the batch is {latent.shape[0]}, the cache holds {self.batch_size} sequences"
            )
        end = self.length + latent.shape[2]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(
                f"the context would be {end} tokens, the cache holds {self.max_length}"
            )

    def _slot_table(self) -> torch.Tensor:
        return self.table.get(self.batch_size, self.pages, self.device)

    def _new_pool(self, pages: int) -> KVCache:
        settings = self.settings
        total = pages * self.batch_size
        return KVCache.empty(total, settings.page_size, settings.layout, device=self.device)

    def _allocate(self, pages: int) -> None:
        pool = self._new_pool(pages)
        if self.pool is not None:
            pool.pages[: self.pool.num_pages] = self.pool.pages
        self.pool, self.pages = pool, pages

    def _reserve(self, tokens: int) -> None:
        """Pages for that many tokens per sequence; a quarter more, so that copies stay rare."""
        needed = -(-tokens // self.settings.page_size)
        if needed > self.pages:
            self._allocate(max(needed, self.pages + self.pages // 4))

    def _set_length(self, length: int) -> None:
        if self.position is not None:
            self.position.fill_(length)
        # Layers that share another's selection have no indexer keys.
        self.indexer_length = length if self.indexer_keys is not None else 0
        self.length = length


class PagedCache(Cache):
    """A paged latent cache for a patched model, one PagedLayer per decoder layer.

    `apply` makes one wherever transformers would make a DynamicCache or a StaticCache; make one
    yourself to fix its length, for a CUDA graph say, or to keep it between calls.

    Args:
        model: what `apply` was called with, or its decoder.
        max_length: the most tokens per sequence, allocated at the first update at fixed addresses;
            None grows on demand.
    """

    def __init__(self, model: nn.Module, max_length: int | None = None) -> None:
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise ValueError(f"max_length is {max_length!r}, must be None or an integer >= 1")
        from .apply import decoder_of

        decoder = decoder_of(model)
        settings = settings_of(decoder)
        table = SlotTable(settings.page_size)
        count = decoder.config.num_hidden_layers
        super().__init__(layers=[PagedLayer(settings, max_length, table) for _ in range(count)])

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of the allocated pages of all layers, without the indexer's keys."""
        pools = [layer.pool for layer in self.layers if layer.pool is not None]
        return sum(pool.num_pages * pool.pages.stride(0) for pool in pools)


_EMPTY = {
    DynamicLayer: False,
    DynamicIndexedLayer: False,
    StaticLayer: True,
    StaticIndexedLayer: True,
}


def adopt(cache: Any, decoder: Any) -> None:
    """Give an empty cache of transformers' own paged layers, in place: its owner keeps the object.

    Raises:
        ValueError: the cache is not empty, is offloaded, or is of a kind that has no paged layers.
    """
    settings = settings_of(decoder)
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise ValueError(f"past_key_values is {type(cache).__name__}, must be a transformers Cache")
    if layers and all(isinstance(layer, PagedLayer) for layer in layers):
        made_for = layers[0].settings
        if made_for.layout != settings.layout or made_for.page_size != settings.page_size:
            raise ValueError(
                f"past_key_values has {made_for.layout.name} in pages of {made_for.page_size} "
                f"tokens, the model {settings.layout.name} in pages of {settings.page_size}"
            )
        return
    if cache.offloading:
        raise ValueError("past_key_values is offloaded, paged layers cannot be")
    unknown = [layer for layer in layers if type(layer) not in _EMPTY]
    if unknown:
        raise ValueError(
            f"past_key_values has layers of {type(unknown[0]).__name__}, allowed: empty dynamic or "
            "static layers, or a PagedCache"
        )
    if any(layer.is_initialized and int(layer.get_seq_length()) for layer in layers):
        raise ValueError(
            "past_key_values holds tokens that the unpatched model cached: start with an empty "
            "cache"
        )
    count = decoder.config.num_hidden_layers
    max_length = layers[0].max_cache_len if layers and _EMPTY[type(layers[0])] else None
    table = SlotTable(settings.page_size)
    cache.layer_class_to_replicate = None
    cache.layers[:] = [PagedLayer(settings, max_length, table) for _ in range(count)]
