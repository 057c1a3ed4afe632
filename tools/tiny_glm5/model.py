"""The architecture for fast training: transformers' names and arithmetic, whole sequences only.

Differences to transformers' `glm_moe_dsa` are in speed, not in what is computed: all experts run as
one wide MLP whose columns are weighted by the router (0 for those not chosen), and attention goes
through scaled_dot_product_attention. The parameters carry transformers' names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .config import Shape


@dataclass(frozen=True)
class Run:
    """What a forward pass is asked for.

    Attributes:
        sparse: attend to the indexer's selection instead of all earlier tokens.
        kl_rows: sequences, from the first on, whose indexer loss is computed; 0 for none.
    """

    sparse: bool = False
    kl_rows: int = 0


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


class Linear(nn.Linear):
    """Without bias; weights are used in the input's dtype."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved RoPE; x [B, S, H, 64], cos and sin [B or 1, S, 1, 32].

    As in transformers' apply_rotary_pos_emb_interleave: pairs (2i, 2i + 1) go in, halves come out.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Indexer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wq_b = Linear(shape.q_lora_rank, shape.index_n_heads * shape.index_head_dim)
        self.wk = Linear(shape.hidden_size, shape.index_head_dim)
        self.k_norm = nn.LayerNorm(shape.index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(shape.hidden_size, shape.index_n_heads, bias=False)

    def project(
        self, hidden: torch.Tensor, q_resid: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, S, H, D], keys [B, S, D], weights of the heads [B, S, H] float32."""
        shape = self.shape
        split = [shape.qk_rope_head_dim, shape.index_head_dim - shape.qk_rope_head_dim]
        q = self.wq_b(q_resid).unflatten(-1, (shape.index_n_heads, shape.index_head_dim))
        norm = self.k_norm
        k = F.layer_norm(
            self.wk(hidden), norm.normalized_shape, norm.weight.to(hidden.dtype),
            norm.bias.to(hidden.dtype), norm.eps,
        ).unsqueeze(2)  # fmt: skip
        q_rope, q_rest = q.split(split, -1)
        k_rope, k_rest = k.split(split, -1)
        q = torch.cat([rotate(q_rope, cos, sin), q_rest], -1)
        k = torch.cat([rotate(k_rope, cos, sin), k_rest], -1).squeeze(2)
        weights = F.linear(hidden.float(), self.weights_proj.weight.float())
        return q, k, weights * shape.index_n_heads**-0.5

    def scores(
        self, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """[B, S, T] float32, -inf where not visible."""
        dots = (
            torch.einsum("bshd,btd->bhst", q.float(), k.float()) * self.shape.index_head_dim**-0.5
        )
        total = (F.relu(dots) * weights.transpose(1, 2).unsqueeze(-1)).sum(1)
        return total.masked_fill(~visible, float("-inf"))


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        heads, hidden = shape.num_attention_heads, shape.hidden_size
        self.q_a_proj = Linear(hidden, shape.q_lora_rank)
        self.q_a_layernorm = RMSNorm(shape.q_lora_rank, 1e-6)
        self.q_b_proj = Linear(shape.q_lora_rank, heads * shape.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(shape.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(
            shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        )
        self.o_proj = Linear(heads * shape.v_head_dim, hidden)
        self.indexer = Indexer(shape)

    def project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys [B, H, S, 96], values [B, H, S, v], and the query's low-rank form."""
        shape = self.shape
        heads, nope = shape.num_attention_heads, shape.qk_nope_head_dim
        q_resid = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_resid).unflatten(-1, (heads, shape.qk_head_dim))
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [shape.kv_lora_rank, shape.qk_rope_head_dim], -1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, heads, -1)
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], -1)
        k = torch.cat([kv[..., :nope], k_rope], -1)
        return q.transpose(1, 2), k.transpose(1, 2), kv[..., nope:].transpose(1, 2), q_resid

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        visible: torch.Tensor,
        run: Run,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's attention, and the indexer's loss where it was asked for."""
        q, k, v, q_resid = self.project(x, cos, sin)
        kept = visible
        if run.sparse:
            with torch.no_grad():
                chosen = self.select(x, q_resid, cos, sin, visible)
                kept = torch.zeros(
                    *chosen.shape[:-1], visible.shape[-1], dtype=torch.bool, device=x.device
                ).scatter_(-1, chosen, True)
                kept &= visible
        loss = None
        if run.kl_rows:
            rows = slice(0, run.kl_rows)
            some = kept[rows] if kept.shape[0] > 1 else kept
            loss = self.indexer_loss(
                x[rows].detach(), q_resid[rows].detach(), cos, sin, q[rows].detach(),
                k[rows].detach(), some,
            )  # fmt: skip
        # Values as wide as keys, so that a fused kernel takes them.
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        scale = self.shape.qk_head_dim**-0.5
        if run.sparse:
            mask = torch.zeros(kept.shape, dtype=q.dtype, device=q.device)
            mask.masked_fill_(~kept, float("-inf"))
            out = F.scaled_dot_product_attention(q, k, wide, mask.unsqueeze(1), scale=scale)
        else:
            out = F.scaled_dot_product_attention(q, k, wide, is_causal=True, scale=scale)
        out = out[..., : v.shape[-1]].transpose(1, 2).flatten(2)
        return self.o_proj(out), loss

    def select(
        self,
        x: torch.Tensor,
        q_resid: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """The chosen positions, [B, S, topk]."""
        scores = self.indexer.scores(*self.indexer.project(x, q_resid, cos, sin), visible)
        return scores.topk(min(self.shape.index_topk, scores.shape[-1]), dim=-1).indices

    def indexer_loss(
        self,
        x: torch.Tensor,
        q_resid: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """KL from attention's weights, summed over heads, to the softmax of the scores."""
        with torch.no_grad():
            logits = (q @ k.mT).float() * self.shape.qk_head_dim**-0.5
            weights = logits.masked_fill(~kept.unsqueeze(1), float("-inf")).softmax(-1).mean(1)
        scores = self.indexer.scores(*self.indexer.project(x, q_resid, cos, sin), kept)
        guess = scores.log_softmax(-1).masked_fill(~kept, 0.0)
        entropy = torch.special.xlogy(weights, weights)
        return (entropy - weights * guess).sum(-1).mean()


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(shape.n_routed_experts, shape.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [..., experts] float32, 0 for those not chosen; and the experts' load."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores + self.e_score_correction_bias
        chosen = choice.topk(self.shape.num_experts_per_tok, -1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        weights = scores * mask
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.shape.routed_scaling_factor, mask.flatten(0, -2).mean(0)


class Experts(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        count, inner, width = shape.n_routed_experts, shape.moe_intermediate_size, shape.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        count, width, inner = self.down_proj.shape
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1).to(x.dtype)).unflatten(
            -1, (count, 2, inner)
        ).unbind(-2)  # fmt: skip
        hidden = F.silu(gate) * up * weights.unsqueeze(-1).to(x.dtype)
        down = self.down_proj.permute(1, 0, 2).reshape(width, count * inner)
        return F.linear(hidden.flatten(-2), down.to(x.dtype))


class MoE(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = Router(shape)
        self.experts = Experts(shape)
        self.shared_experts = MLP(
            shape.hidden_size, shape.moe_intermediate_size * shape.n_shared_experts
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, load = self.gate(x)
        return self.experts(x, weights) + self.shared_experts(x), load


class Layer(nn.Module):
    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__()
        self.dense = shape.is_dense(number)
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size) if self.dense else MoE(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, visible: torch.Tensor, run: Run
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        attended, loss = self.self_attn(self.input_layernorm(x), cos, sin, visible, run)
        x = x + attended
        inner = self.post_attention_layernorm(x)
        if self.dense:
            return x + self.mlp(inner), loss, None
        mixed, load = self.mlp(inner)
        return x + mixed, loss, load


class Trunk(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class TinyGlm5(nn.Module):
    """GlmMoeDsaForCausalLM for training; `dtype` is that of the activations."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.model = Trunk(shape)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size)

    def initialise(self, seed: int) -> None:
        """Normal weights; projections back into the residual stream are smaller by its depth."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.shape.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            std = 0.02 if "embed" in name else weight.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                std *= depth
            if "lm_head" in name:
                std = 0.02
            drawn = torch.randn(weight.shape, generator=generator) * std
            weight.data.copy_(drawn)

    def round_weights(self) -> None:
        """To bf16, in place, as a checkpoint has them."""
        for weight in self.parameters():
            weight.data = weight.data.to(torch.bfloat16)

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [B or 1, S, 1, 32] at positions [B or 1, S]."""
        width = self.shape.qk_rope_head_dim
        steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
        # In transformers' order: an ulp of a frequency is 1e-4 of an angle 1000 tokens on.
        frequency = 1.0 / self.shape.rope_theta ** (steps / width)
        angle = positions.float().unsqueeze(-1) * frequency
        return angle.cos().to(self.dtype).unsqueeze(2), angle.sin().to(self.dtype).unsqueeze(2)

    def forward(self, tokens: torch.Tensor, run: Run) -> tuple[torch.Tensor, list, list]:
        """Final hidden states [B, S, hidden], the layers' indexer losses, the experts' loads."""
        length = tokens.shape[1]
        places = torch.arange(length, device=tokens.device)
        visible = (places[None, :] <= places[:, None]).unsqueeze(0)
        cos, sin = self.rope(places.unsqueeze(0))
        x = self.model.embed_tokens(tokens).to(self.dtype)
        losses, loads = [], []
        for layer in self.model.layers:
            x, loss, load = layer(x, cos, sin, visible, run)
            if loss is not None:
                losses.append(loss)
            if load is not None:
                loads.append(load)
        return self.model.norm(x), losses, loads

    def logits(self, tokens: torch.Tensor, run: Run | None = None) -> torch.Tensor:
        return self.lm_head(self(tokens, run or Run())[0])
