"""A small kernel's history, made for a test: two faults of a real story as commits.

The kernel `toy_mla.py` has FlashMLA's function names and, like it, bf16 softmax weights. One commit
rounds the cache's scales down to powers of two, a later one to bf16, the last one reads them as
stored; a commit between does not build.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KERNEL = '''"""Sparse MLA attention over FlashMLA's caches, plain torch."""

import torch


def get_mla_metadata(*args, **kwargs):
    return None, None


def read_scales(raw):
    scales = raw[..., 512:528].contiguous().view(torch.float32)
    return SCALES


def attend(q, keys, valid, scale, sink):
    """q [n, h, d], keys [n, t, d], valid [n, t]."""
    keys = torch.where(valid[..., None], keys, 0.0)
    logits = torch.einsum("nhd,ntd->nht", q.float(), keys) * scale
    logits = torch.where(valid[:, None], logits, float("-inf"))
    floor = logits.new_full((*logits.shape[:2], 1), float("-inf"))
    top = torch.cat([logits, floor], dim=-1).amax(-1, keepdim=True)
    p = torch.exp(logits - torch.where(top.isinf(), 0.0, top))
    total = p.sum(-1)
    lse = torch.log(total) + top[..., 0]
    out = torch.einsum("nht,ntd->nhd", p.bfloat16().float(), keys[..., :512])
    out = out / torch.where(total > 0, total, 1.0)[..., None]
    if sink is not None:
        out = out * torch.where(total > 0, torch.sigmoid(lse - sink), 0.0)[..., None]
    return out.bfloat16(), torch.where(total > 0, lse, float("inf")), top[..., 0]


def select(indices, slots, length):
    valid = (indices >= 0) & (indices < slots)
    if length is not None:
        valid &= torch.arange(indices.shape[1], device=indices.device) < length[:, None]
    return torch.where(valid, indices, 0).long(), valid


def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, meta,
                           num_splits=None, softmax_scale=None, causal=False,
                           is_fp8_kvcache=False, indices=None, attn_sink=None,
                           extra_k_cache=None, extra_indices=None,
                           topk_length=None, extra_topk_length=None):
    if not is_fp8_kvcache or extra_k_cache is not None or q.shape[-1] != 576:
        raise NotImplementedError("one FP8 cache of V3.2")
    b, s_q, h, d = q.shape
    pages, size = k_cache.shape[:2]
    length = None if topk_length is None else topk_length.repeat_interleave(s_q)
    at, valid = select(indices.flatten(0, 1), pages * size, length)
    if pages * size == 0 or at.numel() == 0:
        keys = torch.zeros(*at.shape, d, device=q.device)
    else:
        raw = k_cache.view(torch.uint8)[at // size, at % size, 0]
        latent = raw[..., :512].view(torch.float8_e4m3fn).float().view(*at.shape, 4, 128)
        latent = latent * read_scales(raw)[..., None]
        rope = raw[..., 528:].contiguous().view(torch.bfloat16).float()
        keys = torch.cat([latent.flatten(-2), rope], dim=-1)
    out, lse, _ = attend(q.flatten(0, 1), keys, valid, softmax_scale, attn_sink)
    return out.view(b, s_q, h, 512), lse.view(b, s_q, h).transpose(1, 2)


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    at, valid = select(indices[:, 0], kv.shape[0], topk_length)
    rows = kv[:, 0] if kv.shape[0] else kv.new_zeros(1, kv.shape[-1])
    out, lse, top = attend(q, rows[at].float(), valid, sm_scale, attn_sink)
    return out, top, lse
'''

EXACT = "scales"
POWER_OF_TWO = "torch.where(scales > 0, torch.exp2(torch.floor(torch.log2(scales))), scales)"
BF16 = "scales.bfloat16().float()"
BUILD = "echo building >&2\npwd\n"


@dataclass(frozen=True)
class Story:
    """The repository and its commits, oldest first."""

    path: Path
    commits: tuple[str, ...]

    @property
    def exact(self) -> str:
        return self.commits[2]

    @property
    def breaks(self) -> str:
        return self.commits[3]

    @property
    def unbuildable(self) -> str:
        return self.commits[5]

    @property
    def repairs(self) -> str:
        return self.commits[7]

    @property
    def last(self) -> str:
        return self.commits[-1]


def git(path: Path, *arguments: str, date: str = "") -> str:
    dated = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(path), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **dated} if date else None,
    )
    return done.stdout.strip()


def make_story(path: Path) -> Story:
    """Ten commits: three exact, powers of two, README, no build, build, bf16, README, exact."""
    path.mkdir()
    git(path, "init", "-q", "-b", "main")
    history = (
        ("Sparse decode and prefill in torch", {"toy_mla.py": kernel(EXACT), "build.sh": BUILD}),
        ("README", {"README.md": "A kernel.\n"}),
        ("README: which caches", {"README.md": "A kernel for FP8 caches.\n"}),
        ("Decode: scales by exponent, one instruction", {"toy_mla.py": kernel(POWER_OF_TWO)}),
        ("README: timing", {"README.md": "A fast kernel for FP8 caches.\n"}),
        ("Build in two steps", {"build.sh": "echo no compiler >&2\nexit 3\n"}),
        ("Repair the build", {"build.sh": BUILD}),
        ("Fix accuracy of decode: scales as bf16", {"toy_mla.py": kernel(BF16)}),
        ("README: accuracy", {"README.md": "An accurate kernel for FP8 caches.\n"}),
        ("Decode: multiply by the scales as stored", {"toy_mla.py": kernel(EXACT)}),
    )
    commits = []
    for subject, files in history:
        for name, text in files.items():
            (path / name).write_text(text)
        git(path, "add", ".")
        # Dates of its own for each commit: the hashes are the same everywhere.
        date = f"2026-01-{len(commits) + 1:02}T00:00:00Z"
        git(path, "commit", "-q", "-m", subject, date=date)
        commits.append(git(path, "rev-parse", "HEAD"))
    return Story(path, tuple(commits))


def kernel(scales: str) -> str:
    return KERNEL.replace("SCALES", scales)


if __name__ == "__main__":
    made = make_story(Path(sys.argv[1]).resolve() / "repository")
    for name in ("breaks", "repairs"):
        place = made.path.parent / name
        git(made.path, "worktree", "add", "-q", "--detach", str(place), getattr(made, name))
