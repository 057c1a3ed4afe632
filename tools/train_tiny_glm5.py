"""Trains the small model of GLM-5's architecture on generated word problems: docs/tiny-model.md.

Minutes on one H200. `--smallest` is the same path in seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_glm5.config import SMALLEST, TINY
from tiny_glm5.data import Batches, Text
from tiny_glm5.export import export
from tiny_glm5.train import Plan, Trainer


def main() -> None:
    plan, text = Plan(), Text()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and log")
    parser.add_argument("--resume", type=Path, help="a checkpoint.pt of an earlier run")
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--dense", type=int, default=plan.dense, help="dense steps")
    parser.add_argument("--warm-up", type=int, default=plan.warm_up, help="indexer steps")
    parser.add_argument("--sparse", type=int, default=plan.sparse, help="sparse steps")
    parser.add_argument("--batch", type=int, default=text.batch, help="sequences of a step")
    parser.add_argument("--rate", type=float, default=plan.rate)
    parser.add_argument("--seconds", type=float, help="stop training after this time")
    parser.add_argument("--processes", type=int, default=0, help="that draw problems")
    parser.add_argument("--problems", type=int, default=1319, help="held-out problems at the end")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--smallest", action="store_true", help="a model for tests")
    parser.add_argument("--templates", nargs="*", help="only these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()

    plan = replace(
        plan, seed=given.seed, dense=given.dense, warm_up=given.warm_up, sparse=given.sparse,
        rate=given.rate,
    )  # fmt: skip
    text = replace(
        text, batch=given.batch, templates=tuple(given.templates) if given.templates else None
    )
    given.out.mkdir(parents=True, exist_ok=True)
    first = torch.load(given.resume, weights_only=True)["step"] if given.resume else 0
    batches = Batches(text, plan.seed, first, plan.steps, given.processes)
    if given.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    begun = time.monotonic()
    trainer = Trainer(SMALLEST if given.smallest else TINY, plan, text, torch.device(given.device))
    if given.resume:
        trainer.load(given.resume)
    if given.compile:
        trainer.compile()
    try:
        trainer.run(batches, given.seconds, checkpoint=given.out / "checkpoint.pt")
    finally:
        batches.close()
    trainer.save(given.out / "checkpoint.pt")
    export(trainer.model, given.out / "model")
    shares = {
        "dense": trainer.evaluate(min(given.problems, 256), sparse=False),
        "sparse": trainer.evaluate(given.problems),
    }
    about = {
        "seed": plan.seed, "steps": trainer.step, "accuracy": shares,
        "seconds": time.monotonic() - begun, "torch": torch.__version__, "rows": trainer.rows,
    }  # fmt: skip
    (given.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
