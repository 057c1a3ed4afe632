"""The tensors of a workload of the cache's writer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kv_cache import KVCache
from ..kv_layout import get_layout
from .timing import Call
from .workloads import Workload

PAGE_SIZE = 64
# Tokens whose error is measured.
SAMPLE = 256


@dataclass(frozen=True)
class WriteData:
    """bf16 tokens and where they go."""

    workload: Workload
    cache: KVCache
    latent: torch.Tensor
    rope: torch.Tensor | None
    slots: torch.Tensor

    def call(self, backend: str) -> Call:
        return lambda: self.cache.append(
            self.latent, self.rope, self.slots, check_slots=False, backend=backend
        )

    def check(self, backend: str) -> int:
        """How many of all the cache's bytes differ from those that torch writes."""
        pages = self.cache.pages
        self.call("torch")()
        want = pages.clone()
        pages.fill_(0)
        self.call(backend)()
        rows, footers = self._bytes(want)
        return sum(
            int((mine != theirs).sum())
            for mine, theirs in zip(self._bytes(pages), (rows, footers), strict=True)
        )

    def _bytes(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache = KVCache(
            pages,
            self.cache.page_size,
            self.cache.layout,
            self.cache.token_stride,
            self.cache.tensor_scale,
        )
        page, offset = self.slots // cache.page_size, self.slots % cache.page_size
        return cache.rows_view()[page, offset], cache.footers_view()[page, offset]

    def error(self) -> tuple[float, float, float]:
        """rel_l2 and gain of what the cache holds now, and rel_l2 of the layout's own rounding."""
        want = self.latent[:SAMPLE].double()
        if self.rope is not None:
            want = torch.cat([want, self.rope[:SAMPLE].double()], dim=1)
        got = self.cache.read(self.slots[:SAMPLE])
        layout, rope = self.cache.layout, None if self.rope is None else self.rope[:SAMPLE]
        packed = layout.pack(self.latent[:SAMPLE], rope, "amax", self.cache.tensor_scale)
        best = layout.unpack(*packed, tensor_scale=self.cache.tensor_scale)
        norm = want.norm()
        gain = float((got * want).sum() / want.square().sum()) - 1
        # bf16 rows hold the tokens exactly: no error, and one of one ideal.
        ideal = float((best - want).norm() / norm) or 1e-300
        return float((got - want).norm() / norm) or 1e-300, gain, ideal

    def copy(self) -> Call:
        """torch's copy_ of as many bytes, half of them read and half written."""
        half = self.workload.bytes // 2 // 16 * 16
        source = torch.empty(half, dtype=torch.uint8, device=self.cache.device)
        source.random_(0, 256)
        target = torch.empty_like(source)
        return lambda: target.view(torch.float32).copy_(source.view(torch.float32))


def make_writes(workload: Workload, device: torch.device) -> WriteData:
    """Gaussian tokens for whole random pages; the cache is larger than what is written."""
    generator = torch.Generator(device=device).manual_seed(0)
    layout = get_layout(workload.layout)
    scale = torch.full((1,), 0.01, device=device) if layout.tensor_scale else None
    pages = -(-workload.s_kv // PAGE_SIZE)
    cache = KVCache.empty(pages, PAGE_SIZE, layout, device=device, tensor_scale=scale)
    cache.pages.fill_(0)

    def draw(width: int) -> torch.Tensor:
        shape = workload.b, width
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    page = torch.randperm(pages, generator=generator, device=device)
    slots = (page[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)).flatten()
    rope = None if layout.rope is None else draw(layout.rope.count)
    return WriteData(
        workload, cache, draw(layout.latent.count), rope, slots[: workload.b].contiguous()
    )
