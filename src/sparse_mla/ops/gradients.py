"""Attention here is for inference: gradients are refused by name, not lost."""

from __future__ import annotations

from typing import Any


def refuse_backward(op: Any, name: str) -> None:
    """Make the backward pass of the custom op `op` raise NotImplementedError naming the function.

    The forward pass takes tensors that require a gradient, as a model outside of torch.no_grad()
    has them.
    """

    def backward(*_: object) -> None:
        raise NotImplementedError(
            f"{name} has no backward pass: call it under torch.no_grad() or torch.inference_mode()"
        )

    op.register_autograd(backward)
