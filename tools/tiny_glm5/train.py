"""Training in DSA's three phases: dense, the indexer's warm-up, sparse (docs/tiny-model.md)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sparse_mla.evals.problems import held_out

from .config import Shape
from .data import Batches, Text
from .decode import accuracy
from .model import Run, TinyGlm5


@dataclass(frozen=True)
class Plan:
    """Steps and rates of a training.

    Attributes:
        dense: steps of attention to all earlier tokens; the indexer is not trained.
        warm_up: steps in which only the indexer is trained, towards attention's weights.
        sparse: steps of attention to the indexer's selection; both are trained, the indexer on
            its own loss alone.
        rate, indexer_rate: peak learning rates; the first 200 steps rise, the sparse steps fall.
        question: weight of a question's tokens in the loss, an answer's count 1.
        kl_rows: sequences of a batch on which the indexer's loss is computed.
        balance: how fast the experts' biases follow their load.
    """

    dense: int = 8000
    warm_up: int = 200
    sparse: int = 2600
    rate: float = 2e-3
    indexer_rate: float = 2e-3
    question: float = 0.1
    kl_rows: int = 8
    balance: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.dense + self.warm_up + self.sparse

    def phase(self, step: int) -> str:
        if step < self.dense:
            return "dense"
        return "warm_up" if step < self.dense + self.warm_up else "sparse"

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of the model and of the indexer."""
        rise = min(1.0, (step + 1) / 200)
        left = (self.steps - step) / max(self.sparse, 1)
        fall = min(1.0, max(left, 0.0))
        phase = self.phase(step)
        main = 0.0 if phase == "warm_up" else self.rate * rise * fall
        indexer = {"dense": 0.0, "warm_up": self.indexer_rate, "sparse": self.indexer_rate * fall}
        return main, indexer[phase]


class Trainer:
    """One training, resumable: the data of a step depend on the seed and the step alone."""

    def __init__(
        self,
        shape: Shape,
        plan: Plan,
        text: Text,
        device: torch.device,
        log: Callable[[str], None] = print,
    ) -> None:
        self.plan, self.text, self.device, self.log = plan, text, device, log
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = TinyGlm5(shape, dtype)
        self.model.initialise(plan.seed)
        self.model.to(device)
        indexer = [p for n, p in self.model.named_parameters() if "indexer" in n]
        decayed = [
            p for n, p in self.model.named_parameters() if "indexer" not in n and p.dim() > 1
        ]
        plain = [p for n, p in self.model.named_parameters() if "indexer" not in n and p.dim() == 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": plan.weight_decay},
                {"params": plain, "weight_decay": 0.0},
                {"params": indexer, "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.step = 0
        self.compiled = False
        self.rows: list[dict[str, float | str]] = []

    def save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "plan": asdict(self.plan),
            "shape": asdict(self.model.shape),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["shape"] != asdict(self.model.shape):
            raise ValueError(f"{path} holds a model of shape {state['shape']}")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def run(
        self,
        batches: Batches,
        seconds: float | None = None,
        every: int = 100,
        checkpoint: Path | None = None,
    ) -> None:
        """Train to the plan's end, or until the time is up; save to `checkpoint` every minute."""
        begun = last = saved = time.monotonic()
        stopped = self.step
        for tokens, marks in batches:
            phase = self.plan.phase(self.step)
            with self._as_compiled(phase):
                loss, kl = self._train_step(tokens, marks, phase)
            self.step += 1
            if self.step % every == 0 or self.step == self.plan.steps:
                now = time.monotonic()
                speed = (self.step - stopped) * tokens.size / (now - last)
                row = {
                    "step": self.step, "phase": phase, "loss": float(loss), "kl": float(kl),
                    "seconds": now - begun, "tokens_per_second": speed,
                }  # fmt: skip
                self.rows.append(row)
                self.log(
                    json.dumps({k: round(v, 4) if k != "phase" else v for k, v in row.items()})
                )
                last, stopped = now, self.step
            if checkpoint is not None and time.monotonic() - saved > 60:
                self.save(checkpoint)
                saved = time.monotonic()
            if seconds is not None and time.monotonic() - begun > seconds:
                self.log(f"time is up after step {self.step}")
                break

    def compile(self) -> None:
        """Let torch.compile have the layers; the two kinds in two phases make four graphs."""
        torch._dynamo.config.recompile_limit = 64
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        self.compiled = True

    def _as_compiled(self, phase: str) -> AbstractContextManager:
        # Compiling the short warm-up would take longer than it does.
        if self.compiled and phase == "warm_up":
            return torch.compiler.set_stance("force_eager")
        return nullcontext()

    def _train_step(
        self, tokens: np.ndarray, marks: np.ndarray, phase: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan, model = self.plan, self.model
        ids = self._sent(tokens.astype(np.int32)).long()
        weight = self._sent(marks[:, 1:].astype(np.float32))
        weight = weight + plan.question * (1 - weight)
        rates = plan.rates(self.step)
        for group, rate in zip(self.optimiser.param_groups, (rates[0], *rates), strict=True):
            group["lr"] = rate
        run = Run(phase == "sparse", {"dense": 0, "warm_up": plan.kl_rows}.get(phase, plan.kl_rows))
        if phase == "warm_up":
            ids, weight = ids[: plan.kl_rows], weight[: plan.kl_rows]
        hidden, losses, loads = model(ids[:, :-1], run)
        kl = torch.stack(losses).mean() if losses else hidden.new_zeros(())
        if phase == "warm_up":
            loss = kl.new_zeros(())
        else:
            logits = model.lm_head(hidden).float()
            each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (each * weight.flatten()).sum() / weight.sum()
        (loss + kl).backward()
        main = [p for g in self.optimiser.param_groups[:2] for p in g["params"]]
        if phase == "warm_up":
            for parameter in main:
                parameter.grad = None
        else:
            torch.nn.utils.clip_grad_norm_(main, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if phase != "warm_up":
            self._balance(loads)
        return loss.detach(), kl.detach()

    def _sent(self, array: np.ndarray) -> torch.Tensor:
        """On the device; pinned first, or the copy would wait for the step before."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    @torch.no_grad()
    def _balance(self, loads: list[torch.Tensor]) -> None:
        """Raise the bias of experts with less than their share of tokens, lower the others'."""
        for layer, load in zip(
            (x for x in self.model.model.layers if not x.dense), loads, strict=True
        ):
            bias = layer.mlp.gate.e_score_correction_bias
            bias += self.plan.balance * torch.sign(load.mean() - load)

    def evaluate(self, count: int, sparse: bool = True, rows: int = 256) -> float:
        """Accuracy on the first `count` held-out problems, with weights rounded to bf16."""
        rounded = TinyGlm5(self.model.shape, self.model.dtype).to(self.device)
        rounded.load_state_dict(self.model.state_dict())
        if self.device.type == "cuda":
            rounded.round_weights()
        begun = time.monotonic()
        asked = held_out(count, self.text.templates)
        share, wrong = accuracy(rounded, asked, sparse=sparse, rows=rows)
        kinds: dict[str, int] = {}
        for problem, _ in wrong:
            kinds[problem.template] = kinds.get(problem.template, 0) + 1
        worst = sorted(kinds.items(), key=lambda item: -item[1])[:6]
        self.log(
            f"accuracy {share:.4f} on {count} held-out problems, "
            f"{'sparse' if sparse else 'dense'}, {time.monotonic() - begun:.1f} s; most errors: "
            f"{worst}"
        )
        for problem, text in wrong[:3]:
            self.log(f"  {problem.question} -> {text!r}, right: {problem.target}")
        return share
