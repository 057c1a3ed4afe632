"""Greedy answers to many problems at once, for measuring accuracy while training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_mla.evals.problems import Problem, fewshot, prompt_of, read_answer
from sparse_mla.evals.problems.vocabulary import decode, encode, end_id

from .model import Layer, TinyGlm5


class Decoder:
    """Left-padded sequences with expanded keys and values cached, as transformers caches them."""

    def __init__(self, model: TinyGlm5, pad: torch.Tensor, length: int, sparse: bool) -> None:
        self.model, self.pad, self.sparse = model, pad, sparse
        shape, rows, device = model.shape, pad.shape[0], pad.device
        heads, layers = shape.num_attention_heads, shape.num_hidden_layers

        def store(*size: int) -> list[torch.Tensor]:
            return [torch.zeros(size, dtype=model.dtype, device=device) for _ in range(layers)]

        self.keys = store(rows, heads, length, shape.qk_head_dim)
        self.values = store(rows, heads, length, shape.v_head_dim)
        self.index_keys = store(rows, length, shape.index_head_dim)
        self.places = torch.arange(length, device=device)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits [B, vocabulary] after the last of the tokens [B, n], which begin at `start`."""
        model, end = self.model, start + tokens.shape[1]
        own = self.places[start:end]
        places = self.places[:end]
        cos, sin = model.rope((own[None] - self.pad[:, None]).clamp_min(0))
        real = (places[None] >= self.pad[:, None]).unsqueeze(1)
        # A padded query sees itself, so that no row is empty.
        visible = ((places[None] <= own[:, None]) & real) | (places[None] == own[:, None])
        x = model.model.embed_tokens(tokens).to(model.dtype)
        for number, layer in enumerate(model.model.layers):
            x = self._layer(number, layer, x, cos, sin, visible, start)
        return model.lm_head(model.model.norm(x[:, -1:]))[:, 0].float()

    def _layer(
        self,
        number: int,
        layer: Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        visible: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        end = start + x.shape[1]
        attention, shape = layer.self_attn, self.model.shape
        inner = layer.input_layernorm(x)
        q, k, v, q_resid = attention.project(inner, cos, sin)
        self.keys[number][:, :, start:end] = k
        self.values[number][:, :, start:end] = v
        kept = visible
        if self.sparse:
            index_q, index_k, weights = attention.indexer.project(inner, q_resid, cos, sin)
            self.index_keys[number][:, start:end] = index_k
            scores = attention.indexer.scores(
                index_q, self.index_keys[number][:, :end], weights, visible
            )
            chosen = scores.topk(min(shape.index_topk, end), dim=-1).indices
            kept = torch.zeros_like(visible).scatter_(-1, chosen, True) & visible
        out = F.scaled_dot_product_attention(
            q, self.keys[number][:, :, :end], self.values[number][:, :, :end],
            kept.unsqueeze(1), scale=shape.qk_head_dim**-0.5,
        )  # fmt: skip
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        inner = layer.post_attention_layernorm(x)
        return x + (layer.mlp(inner) if layer.dense else layer.mlp(inner)[0])


@torch.no_grad()
def answers(
    model: TinyGlm5,
    asked: list[Problem],
    shots: list[Problem],
    *,
    sparse: bool,
    rows: int = 256,
    longest: int = 110,
) -> list[str]:
    """What the model continues each prompt with."""
    device = model.lm_head.weight.device
    prompts = [encode(prompt_of(shots, problem.question)) for problem in asked]
    texts: list[str] = []
    for first in range(0, len(prompts), rows):
        some = prompts[first : first + rows]
        width = max(map(len, some))
        pad = torch.tensor([width - len(ids) for ids in some])
        tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in some])
        decoder = Decoder(model, pad.to(device), width + longest, sparse)
        logits = decoder.forward(tokens.to(device), 0)
        ended = torch.zeros(len(some), dtype=torch.bool, device=device)
        made = []
        for step in range(longest):
            following = logits.argmax(-1)
            made.append(following)
            ended |= following == end_id()
            if step % 8 == 7 and bool(ended.all()):
                break
            logits = decoder.forward(following[:, None], width + step)
        for ids in torch.stack(made, 1).tolist():
            stop = ids.index(end_id()) if end_id() in ids else len(ids)
            texts.append(decode(ids[:stop]))
    return texts


def accuracy(
    model: TinyGlm5, asked: list[Problem], *, sparse: bool, rows: int = 256
) -> tuple[float, list[tuple[Problem, str]]]:
    """The share of right final numbers, and the wrong answers."""
    texts = answers(model, asked, fewshot(), sparse=sparse, rows=rows)
    wrong = [
        (problem, text)
        for problem, text in zip(asked, texts, strict=True)
        if read_answer(text) != problem.target
    ]
    return 1 - len(wrong) / max(len(asked), 1), wrong
