"""One decode step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .apply import decoder_of
from .cache import PagedCache


@dataclass(frozen=True)
class DecodeStep:
    """What a replay wrote. The next replay writes to the same memory: copy what must last.

    Attributes:
        logits: [b, s_q, vocabulary].
        hidden_states: [b, s_q, hidden] of each chosen layer, by its number; 0 is the embedding.
    """

    logits: torch.Tensor
    hidden_states: dict[int, torch.Tensor]


class DecodeGraph:
    """A decode step of a patched model, captured once and replayed over a growing context.

    Nothing but the new tokens crosses to the device: positions, slots and masks follow from the
    cache's own position there. A replay computes what `model(...)` does with the same cache, to
    the bit.

    Args:
        model: the patched model, with a language-model head.
        cache: a PagedCache with a max_length, prefilled.
        attention_mask: [b, tokens so far] of the prefill, 0 where a sequence is padded on the left;
            None for no padding.
        tokens: new tokens per sequence and step.
        hidden_layers: layers whose hidden states the step keeps.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: PagedCache,
        attention_mask: torch.Tensor | None = None,
        *,
        tokens: int = 1,
        hidden_layers: Sequence[int] = (),
    ) -> None:
        if not isinstance(cache, PagedCache):
            raise ValueError(f"cache is {type(cache).__name__}, must be a PagedCache")
        layers = cache.layers
        max_length = layers[0].max_length
        if max_length is None or cache.length == 0:
            raise ValueError("cache must have a max_length, and tokens in it")
        if layers[0].device.type != "cuda":
            raise ValueError(f"the cache is on {layers[0].device}, CUDA graphs need a GPU")
        count = decoder_of(model).config.num_hidden_layers
        wrong = [i for i in hidden_layers if not 0 <= i <= count]
        if wrong:
            raise ValueError(f"hidden_layers has {wrong[0]}, allowed: 0..{count}")
        self.model, self.cache, self.max_length = model, cache, max_length
        self.hidden_layers = tuple(hidden_layers)
        batch, device = layers[0].batch_size, layers[0].device
        self.input_ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        self.mask = torch.ones(batch, max_length, dtype=torch.int64, device=device)
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (batch, cache.length):
                raise ValueError(
                    f"attention_mask is {tuple(attention_mask.shape)}, must be "
                    f"{(batch, cache.length)}"
                )
            self.mask[:, : cache.length] = attention_mask
        self.padding = (self.mask == 0).sum(1, keepdim=True)
        self._check_room()
        lengths = cache.length
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            # Kernels are compiled and libraries set up outside the capture. What these runs write
            # lies beyond the length, where the first replay writes.
            for _ in range(2):
                self._forward()
                self._rewind(lengths)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.no_grad(), torch.cuda.graph(self.graph):
                self.output = self._forward()
        finally:
            # The capture only recorded: no token was written.
            self._rewind(lengths)

    def step(self, input_ids: torch.Tensor) -> DecodeStep:
        """Append the tokens [b, tokens] and return their logits.

        Raises:
            ValueError: the tokens' shape is not the captured one, or the cache is full.
        """
        if input_ids.shape != self.input_ids.shape:
            raise ValueError(
                f"input_ids is {tuple(input_ids.shape)}, the graph was captured with "
                f"{tuple(self.input_ids.shape)}"
            )
        self._check_room()
        self.input_ids.copy_(input_ids)
        self.graph.replay()
        added = self.input_ids.shape[1]
        for layer in self.cache.layers:
            layer.length += added
            layer.indexer_length += added if layer.indexer_keys is not None else 0
        return self.output

    def _check_room(self) -> None:
        end = self.cache.length + self.input_ids.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"the context would be {end} tokens, the cache holds {self.max_length}"
            )

    def _rewind(self, length: int) -> None:
        for layer in self.cache.layers:
            layer._set_length(length)

    def _forward(self) -> DecodeStep:
        tokens = self.input_ids.shape[1]
        start = self.cache.layers[0].position
        positions = torch.arange(tokens, device=self.input_ids.device) + start - self.padding
        out = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(self.hidden_layers),
        )
        hidden = {i: out.hidden_states[i] for i in self.hidden_layers}
        return DecodeStep(out.logits, hidden)
