"""Loading a model for evaluation: safetensors only, nothing missing, and the attention wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..accuracy.case import Inputs
from ..accuracy.faults import CleanKernel, get_fault
from ..accuracy.faults_kernel import EmulatedKernel
from ..kv_cache import KVCache

OWN = "transformers"
"""Instead of a layout: the model's own attention and cache, nothing of this library."""

CLEAN = "clean"
"""Instead of a fault: the kernel that the faults break, whole."""


def load(path: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        path: a folder as `save_pretrained` makes it, or a hub id.

    Raises:
        ValueError: not a model, weights that are missing, pickled or corrupt.
    """
    import transformers

    folder = Path(path)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists() or path.startswith((".", "/", "~")):
        raise ValueError(f"model is {path!r}, must be a folder with config.json and safetensors")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        # Mismatched sizes are told below, by name; transformers would tell them in a log.
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # a corrupt file raises errors of several libraries
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"model {path!r} cannot be loaded: {text}") from error
    model, info = loaded
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        raise ValueError(f"model {path!r} lacks {len(missing)} of its weights, first: {missing[0]}")
    wrong = sorted(map(tuple, info.get("mismatched_keys") or ()))
    if wrong:
        name, stored, wanted = wrong[0]
        raise ValueError(
            f"model {path!r} has {len(wrong)} weights of sizes that config.json does not name, "
            f"first: {name} is {list(stored)}, must be {list(wanted)}"
        )
    return model.to(device).eval(), tokenizer


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {str(folder)!r} has no config.json")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickled:
        raise ValueError(
            f"model folder {str(folder)!r} has no safetensors; {pickled[0]} is a pickle, which can "
            "run code when it is loaded: convert it first"
        )
    raise ValueError(f"model folder {str(folder)!r} has no safetensors")


BLOCK = 8
"""Query tokens that an emulated kernel attends for at a time on a CPU."""


class Emulated:
    """An `attend` for `integrations.transformers.apply`: a kernel of the fault library."""

    def __init__(self, kernel: EmulatedKernel) -> None:
        self.kernel = kernel
        self.state = kernel.new_state()

    def __call__(
        self, q: torch.Tensor, cache: KVCache, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        # Blocks whose decoded keys stay in a processor's cache: about half the time on a CPU.
        step = BLOCK if q.device.type == "cpu" else q.shape[0] * q.shape[1]
        q_rows = q.flatten(0, 1).unsqueeze(1).split(step)
        index_rows = indices.flatten(0, 1).unsqueeze(1).split(step)
        outs = [
            self.kernel.run(Inputs("decode", some, cache, chosen, scale), self.state).out
            for some, chosen in zip(q_rows, index_rows, strict=True)
        ]
        return torch.cat(outs).view(*q.shape[:-1], -1).to(torch.bfloat16)


def kernel_named(fault: str) -> EmulatedKernel:
    """The emulated kernel with that fault, or whole.

    Raises:
        ValueError: no such fault, or one of the cache's writer: only the reading side is replaced.
    """
    if fault == CLEAN:
        return CleanKernel()
    found = get_fault(fault)
    if found.op != "attention":
        raise ValueError(f"fault {fault!r} is the cache writer's, only attention's can be chosen")
    return found.kernel()


def attach(model: Any, layout: str, fault: str | None = None, page_size: int = 64) -> None:
    """Let the model attend over a paged cache, through our kernels or through a faulty one.

    Raises:
        ValueError: unknown layout or fault, a model that does not fit, a fault without a layout.
    """
    if layout == OWN:
        if fault is not None:
            raise ValueError(f"fault {fault!r} needs a layout of this library, not {OWN!r}")
        return
    from ..integrations.transformers import apply

    attend = None if fault is None else Emulated(kernel_named(fault))
    apply(model, layout=layout, page_size=page_size, attend=attend)


def detach(model: Any, layout: str) -> None:
    """Undo `attach`."""
    if layout != OWN:
        from ..integrations.transformers import restore

        restore(model)
