"""Reading cache tokens as float32 rows on CPU: gather the words, decode them, apply the scales.

torch's own e4m3 cast is not vectorised and would take most of the time. e4m3 bits shifted into a
float16 are the same number times 2^-8 (bias 7 against 15), subnormals included; e2m1 bits likewise
times 2^-14 (bias 1). So values are decoded by integer operations on 16-bit lanes, and the power of
two goes into the scale. The two or four values of a lane land in separate planes, which permutes
the latent dims: a query is permuted to match, and the output is permuted back.
"""

from __future__ import annotations

import math
import threading

import torch

from ...kv_cache import KVCache
from ...kv_layout import Field

# Sign and the seven or three bits of exponent and mantissa, where float16 has them.
_E4M3_BITS = -0x4080  # 0xbf80
_E2M1_BITS = -0x7200  # 0x8e00
# Values in a 16-bit lane, and the power of two that the planes lack.
_LANES = {"e4m3": (2, 2.0**8), "e2m1": (4, 2.0**14)}

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised buffer that this thread keeps; the next call by the same name reuses it."""
    buffers: dict[str, torch.Tensor] = _kept.__dict__
    size = math.prod(shape)
    if name not in buffers or buffers[name].numel() < size:
        # A tensor made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            buffers[name] = torch.empty(size, dtype=dtype)
    return buffers[name][:size].view(shape)


class RowReader:
    """Reads tokens of a cache as float32 rows; a quantised latent has its planes one by one."""

    def __init__(self, cache: KVCache) -> None:
        self.layout = layout = cache.layout
        self.tensor_scale = cache.tensor_scale
        self.rows = _Table(cache, cache.rows_view(), "raw")
        self.footers = _Table(cache, cache.footers_view(), "footers") if layout.planar else None
        self.planes, self.power = _LANES.get(layout.latent.dtype, (1, 1.0))
        # Values are the first d_v dims, so planes must not mix these with later ones.
        width = layout.latent.count
        self.parts = [(0, min(width, layout.d_v))]
        if width > layout.d_v:
            self.parts.append((layout.d_v, width))

    def permute_query(self, q: torch.Tensor) -> torch.Tensor:
        """Dims of q [..., d_qk] in the order of the rows."""
        if self.planes == 1:
            return q
        return torch.cat([self._permuted(q), q[..., self.layout.latent.count :]], dim=-1)

    def unpermute_output(self, out: torch.Tensor) -> torch.Tensor:
        """Dims of out [..., d_v] back in the layout's order."""
        if self.planes == 1:
            return out
        end = self.parts[0][1]
        latent = out[..., :end].unflatten(-1, (self.planes, -1)).transpose(-1, -2).flatten(-2)
        return latent if end == out.shape[-1] else torch.cat([latent, out[..., end:]], dim=-1)

    def __call__(self, indices: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Rows [m, t, d_qk] float32 of indices [m, t]; entries not valid read as zero rows."""
        m, t = indices.shape
        slots = indices.reshape(-1)
        ok = None if valid is None else valid.reshape(-1, 1)
        if ok is not None:
            slots = slots.masked_fill(~ok[:, 0], 0)
        raw = self.rows.fetch(slots, ok)
        footers = raw if self.footers is None else self.footers.fetch(slots, ok)
        return self._decode(raw, footers).view(m, t, -1)

    def _permuted(self, x: torch.Tensor) -> torch.Tensor:
        """The latent dims of x [..., >= latent.count], plane after plane within each part."""
        parts = [
            x[..., first:end].unflatten(-1, (-1, self.planes)).transpose(-1, -2).flatten(-2)
            for first, end in self.parts
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _decode(self, raw: torch.Tensor, footers: torch.Tensor) -> torch.Tensor:
        """Rows [n, d_qk] from words int32 of rows and footers; zero words give zero rows."""
        layout, planes = self.layout, self.planes
        count = raw.shape[0]
        rows = scratch("rows", (count, layout.d_qk), torch.float32)
        codes = raw.view(torch.uint8)[:, layout.latent.offset :][:, : layout.latent.nbytes]
        if not layout.quantised:
            rows[:, : layout.latent.count] = codes.view(torch.bfloat16)
        else:
            split = _e4m3_planes if layout.latent.dtype == "e4m3" else _e2m1_planes
            halves = split(codes.view(torch.int16))
            for first, end in self.parts:
                width = (end - first) // planes
                part = rows[:, first:end].view(count, planes, width)
                part.copy_(halves[:, :, first // planes :][:, :, :width])
            self._scale(rows, raw, footers)
            if layout.latent.dtype == "e4m3" and _has_nan(codes):
                nan = self._permuted((codes & 0x7F) == 0x7F)
                rows[:, : layout.latent.count][nan] = float("nan")
        if layout.rope is not None:
            first, rope = layout.rope.offset // 2, layout.rope.count
            rows[:, layout.latent.count :] = raw.view(torch.bfloat16)[:, first : first + rope]
        return rows

    def _scale(self, rows: torch.Tensor, raw: torch.Tensor, footers: torch.Tensor) -> None:
        """Multiply the latent part of rows by all scales and by the planes' power of two."""
        layout = self.layout
        count = rows.shape[0]
        factors = []
        if layout.scales is not None:
            factors.append(_numbers(layout.scales, footers if layout.planar else raw))
        if layout.outer is not None:
            factors.append(_numbers(layout.outer, raw))
        if self.tensor_scale is not None:
            factors.append(self.tensor_scale.view(1, 1))
        product = factors[0]
        for factor in factors[1:]:
            product = product * factor
        latent = rows[:, : layout.latent.count]
        scaled = product * self.power
        if not float(scaled.abs().amax()) < math.inf:
            # Some scale is too large for the power, its values need not be. Powers of two are
            # exact, so every row has the same bits either way.
            latent.mul_(self.power)
            scaled = product
        tiles = scaled.shape[1]
        if tiles == 1:
            latent.mul_(scaled)
        else:
            shape = (count, self.planes, tiles, layout.tile // self.planes)
            latent.view(shape).mul_(scaled[:, None, :, None])


class _Table:
    """Items of equal size, one per slot, as int32 words."""

    def __init__(self, cache: KVCache, items: torch.Tensor, name: str) -> None:
        """`items` is [num_pages, page_size, bytes] uint8, strided."""
        self.items, self.name = items, name
        self.page_size = cache.page_size
        self.page_stride, self.stride = items.stride(0), items.stride(1)
        self.unit = math.gcd(self.page_stride, self.stride)
        self.words = self._word_view()

    def _word_view(self) -> torch.Tensor | None:
        """The items as overlapping int32 rows, one every gcd of the strides; None if misaligned."""
        items = self.items
        aligned = items.untyped_storage().data_ptr() % 4 == 0
        if self.unit % 4 or items.storage_offset() % 4 or not aligned or items.numel() == 0:
            return None
        pages, size, width = items.shape
        last = (pages - 1) * self.page_stride + (size - 1) * self.stride
        span = items.as_strided((last + width,), (1,)).view(torch.int32)
        return span.as_strided((last // self.unit + 1, width // 4), (self.unit // 4, 1))

    def fetch(self, slots: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Words [n, bytes / 4] of slots [n], zeros where not valid [n, 1]."""
        if self.words is None:
            slots = slots.long()
            items = self.items[slots // self.page_size, slots % self.page_size]
            raw = items.contiguous().view(torch.int32)
        else:
            raw = scratch(self.name, (slots.shape[0], self.words.shape[1]), torch.int32)
            torch.index_select(self.words, 0, self._row_numbers(slots), out=raw)
        if valid is not None:
            raw.masked_fill_(~valid, 0)
        return raw

    def _row_numbers(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the slots' items are in `words`."""
        if self.page_stride == self.page_size * self.stride == self.page_size * self.unit:
            return slots
        slots = slots.long()
        page = slots // self.page_size
        offset = slots - page * self.page_size
        return (page * self.page_stride + offset * self.stride) // self.unit


def _numbers(field: Field, words: torch.Tensor) -> torch.Tensor:
    """A field of scales, float32 [n, count], from words int32 [n, bytes / 4]."""
    if field.dtype == "fp32":
        first = field.offset // 4
        return words.view(torch.float32)[:, first : first + field.count]
    return field.read(words.view(torch.uint8)).to(torch.float32)


def _e4m3_planes(packed: torch.Tensor) -> torch.Tensor:
    """e4m3 pairs [n, w] int16 as float16 [n, 2, w], each value times 2^-8.

    Plane 0 holds the low bytes, plane 1 the high ones. A byte in the top half of a 16-bit lane,
    shifted right by one with its sign kept, has sign, exponent and mantissa where float16 has
    them, but for the sign's copy. The NaN code comes out as 480 * 2^-8.
    """
    planes = scratch("planes", (packed.shape[0], 2, packed.shape[1]), torch.int16)
    torch.bitwise_left_shift(packed, 8, out=planes[:, 0])
    planes[:, 0].bitwise_right_shift_(1)
    torch.bitwise_right_shift(packed, 1, out=planes[:, 1])
    return planes.bitwise_and_(_E4M3_BITS).view(torch.float16)


def _e2m1_planes(packed: torch.Tensor) -> torch.Tensor:
    """e2m1 quadruples [n, w] int16 as float16 [n, 4, w], each value times 2^-14.

    As with e4m3: a nibble in the top quarter of the lane, shifted right by three.
    """
    planes = scratch("planes", (packed.shape[0], 4, packed.shape[1]), torch.int16)
    for nibble in range(3):
        torch.bitwise_left_shift(packed, 12 - 4 * nibble, out=planes[:, nibble])
    planes[:, :3].bitwise_right_shift_(3)
    torch.bitwise_right_shift(packed, 3, out=planes[:, 3])
    return planes.bitwise_and_(_E2M1_BITS).view(torch.float16)


def _has_nan(codes: torch.Tensor) -> bool:
    """Whether e4m3 codes, uint8 [n, w], hold a NaN: the largest int8 0x7f or uint8 0xff."""
    # Rows first: torch reduces a strided matrix to one number five times slower.
    largest_signed = int(codes.view(torch.int8).amax(1).amax())
    return largest_signed == 0x7F or int(codes.amax(1).amax()) == 0xFF
