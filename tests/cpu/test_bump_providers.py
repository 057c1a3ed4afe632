"""`sparse-mla providers` and the adapters, with stand-ins for packages that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from story_repository import EXACT, git, kernel
from typer.testing import CliRunner

from sparse_mla.accuracy import providers
from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.check import make_provider
from sparse_mla.accuracy.gate import FAILED, NOT_OFFERED, PASSED, run_case
from sparse_mla.accuracy.providers.base import Description, origin
from sparse_mla.cli import app
from sparse_mla.isolate.host import IsolatedProvider

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}

SGLANG_OLD = '''
"""FlashMLA's interface of 2025, as sgl_kernel had it."""
import math, torch, toy_mla

def get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q=None,
                     is_fp8_kvcache=False, topk=None):
    assert is_fp8_kvcache and num_heads_k == 1 and topk is not None
    return "meta", "splits"

def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v,
                           tile_scheduler_metadata, num_splits, softmax_scale=None, causal=False,
                           descale_q=None, descale_k=None, is_fp8_kvcache=False, indices=None):
    assert (tile_scheduler_metadata, num_splits) == ("meta", "splits")
    return toy_mla.flash_mla_with_kvcache(q, k_cache, None, None, head_dim_v, None, None,
                                          softmax_scale, causal, is_fp8_kvcache, indices)

def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512):
    """lse: [s_q, h_q], float, 2-based log-sum-exp"""
    out, top, lse = toy_mla.flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v)
    return out, top / math.log(2), lse / math.log(2)
'''

FLASHINFER = '''
import torch

class BatchMLAPagedAttentionWrapper:
    """The selected rows of each request, softmax, lse to base 2."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len, heads, d_ckv, d_kpe, page_size,
             causal, sm_scale, q_type, kv_type):
        assert (d_ckv, d_kpe, page_size, causal) == (512, 64, 1, False)
        assert kv_indptr.tolist()[1:] == kv_len.cumsum(0).tolist()
        self.starts, self.pages, self.scale = kv_indptr.tolist(), kv_indices.long(), sm_scale

    def run(self, q_nope, q_pe, ckv, kpe, return_lse=False):
        q, out, lse = torch.cat([q_nope, q_pe], -1).float(), [], []
        for n, (a, b) in enumerate(zip(self.starts, self.starts[1:])):
            at = self.pages[a:b]
            k = torch.cat([ckv[at, 0], kpe[at, 0]], -1).float()
            logits = q[n] @ k.T * self.scale
            lse.append(torch.logsumexp(logits, -1) / torch.log(torch.tensor(2.0)))
            out.append(torch.softmax(logits, -1) @ k[:, :512])
        if not out:
            return q_nope.clone(), q_nope[..., 0].float()
        return torch.stack(out).bfloat16(), torch.stack(lse)
'''

TILELANG = """
import torch, toy_mla

def tilelang_sparse_fwd(q, kv, indices, sm_scale, d_v=512):
    assert indices.shape[-1] == 2048 and indices.is_contiguous()
    return toy_mla.flash_mla_sparse_fwd(q, kv, indices, sm_scale)[0][None]
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        for parent in reversed(path.relative_to(folder).parents[:-1]):
            (folder / parent).mkdir(exist_ok=True)
            (folder / parent / "__init__.py").touch()
        path.write_text(text)
    return folder


def start(spec: str) -> IsolatedProvider:
    made = make_provider(spec, CPU)
    assert isinstance(made, IsolatedProvider)
    return made


def test_sglang_with_the_interface_of_2025(tmp_path: Path) -> None:
    write(tmp_path, toy_mla=kernel(EXACT), sgl_kernel__flash_mla=SGLANG_OLD)
    with start(f"sglang@{tmp_path}") as provider:
        for name in ("decode/gaussian", "decode/s_q/2", "prefill/gaussian", "decode/holes/large"):
            result = run_case(provider, BY_NAME[name])
            assert result.status == PASSED, result.detail
        for name in ("decode/sink/finite", "decode/lengths/short", "kv_write/skip"):
            assert run_case(provider, BY_NAME[name]).status == NOT_OFFERED


def test_sglang_with_upstreams_interface(tmp_path: Path) -> None:
    write(tmp_path, sgl_kernel__flash_mla=kernel(EXACT))
    with start(f"sglang@{tmp_path}") as provider:
        for name in ("decode/gaussian", "decode/lengths/short", "prefill/sink/finite"):
            assert run_case(provider, BY_NAME[name]).status == PASSED


def test_vllm(tmp_path: Path) -> None:
    write(tmp_path, vllm__third_party__flashmla__flash_mla_interface=kernel(EXACT))
    with start(f"vllm@{tmp_path}") as provider:
        assert run_case(provider, BY_NAME["decode/gaussian"]).status == PASSED
    empty = write(tmp_path / "other" if (tmp_path / "other").mkdir() is None else tmp_path, vllm="")
    with pytest.raises(ValueError, match=r"vllm\.third_party\.flashmla.*vllm\.v1\.attention"):
        start(f"vllm@{empty}")


def test_flashinfer_over_bf16_pages(tmp_path: Path) -> None:
    write(tmp_path, flashinfer__mla=FLASHINFER)
    with start(f"flashinfer@{tmp_path}") as provider:
        for name in ("decode/gaussian/bf16", "prefill/gaussian", "decode/page_size/61/bf16",
                     "decode/s_q/2/bf16", "prefill/lengths/short"):  # fmt: skip
            result = run_case(provider, BY_NAME[name])
            assert result.status == PASSED, (name, result.detail)
        for name in ("decode/gaussian", "prefill/sink/finite", "decode/page_stride/bf16"):
            assert run_case(provider, BY_NAME[name]).status == NOT_OFFERED


def test_tilelang_answers_without_lse(tmp_path: Path) -> None:
    write(
        tmp_path,
        toy_mla=kernel(EXACT),
        tilelang="",
        sglang__srt__layers__attention__nsa__tilelang_kernel=TILELANG,
    )
    with start(f"tilelang@{tmp_path}") as provider:
        result = run_case(provider, BY_NAME["prefill/gaussian"])
        assert result.status == PASSED and "topk padded to 2048" in result.detail
        assert result.metrics is not None and result.metrics.as_json()["lse_err"] is None
        assert run_case(provider, BY_NAME["decode/gaussian"]).status == NOT_OFFERED
        assert run_case(provider, BY_NAME["prefill/topk/65"]).status == NOT_OFFERED


def test_flash_mla_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, flash_mla=kernel(EXACT).replace("* scale", "* scale * 1.02"))
    with start(f"flash_mla@{tmp_path}") as provider:
        assert run_case(provider, BY_NAME["decode/gaussian"]).status == FAILED
        found = Description.from_json(provider.describe())
    assert found.origin.location == str(tmp_path / "flash_mla.py")
    answers = {(o.op, o.layout): (o.ok, o.reason) for o in found.offers}
    assert answers["decode", "bf16"] == (False, "its sparse decode takes FP8 caches only")
    if not torch.cuda.is_available():
        ok, reason = answers["decode", "v32_fp8"]
        assert not ok and reason == "built for sm_90, sm_100; this machine has no GPU"


def test_no_adapter_is_imported_until_asked_for() -> None:
    code = """
import sys
import sparse_mla.accuracy.providers as p
import sparse_mla.accuracy.check
loaded = [n for n in sys.modules if n.startswith(p.__name__ + ".")]
print(loaded, [n for n in ("flash_mla", "vllm", "flashinfer", "tilelang") if n in sys.modules])
p.adapter("flashinfer")
print(sorted(n.rpartition(".")[2] for n in sys.modules if n.startswith(p.__name__ + ".")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "['sparse_mla.accuracy.providers.base'] []",
        "['base', 'flashinfer']",
    ]


def test_the_list_of_providers(tmp_path: Path) -> None:
    saved = tmp_path / "p.json"
    result = CliRunner().invoke(app, ["providers", "--json", str(saved)])
    assert result.exit_code == 0, result.output
    found = {one["name"]: one for one in json.loads(saved.read_text())["providers"]}
    assert set(providers.ADAPTERS) - {"sparse_mla"} <= set(found)
    ours = found["cpu"]
    assert ours["installed"] and ours["origin"]["version"] and ours["reason"] == "runs here"
    offers = {(o["op"], o["layout"]): o for o in ours["offers"]}
    assert offers["kv_write", "bf16"]["ok"]
    assert offers["decode", "v32_fp8"]["ok"] != torch.cuda.is_available()
    other = {(o["op"], o["layout"]): o for o in found["triton"]["offers"]}["decode", "v32_fp8"]
    assert other["ok"] == torch.cuda.is_available() and other["reason"]
    assert ours["architectures"] == ["cpu"] and "sm_90" in found["triton"]["architectures"]
    if not found["flash_mla"]["installed"]:
        assert found["flash_mla"]["reason"] == "flash_mla is not installed"
        assert found["flash_mla"]["architectures"] == ["sm_90", "sm_100"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import ctypes; ctypes.string_at(0)",
            "crashed: its process was killed by signal 11 SIGSEGV",
        ),
        ("import time; time.sleep(600)", "hung: no answer within 10 s, stopped"),
        ("raise OSError('libcuda.so.1: cannot open')", "not importable: OSError: libcuda.so.1"),
        ("", "not importable: ImportError: module flash_mla has none of"),
    ],
)
def test_packages_that_cannot_be_imported_have_a_word(
    tmp_path: Path, text: str, message: str
) -> None:
    write(tmp_path, flash_mla=text)
    saved = tmp_path / "p.json"
    spec = f"flash_mla@{tmp_path}"
    result = CliRunner().invoke(app, ["providers", spec, "--time-limit", "1", "--json", str(saved)])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(saved.read_text())["providers"]
    assert found["reason"].startswith(message)


def test_where_code_comes_from(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    inside = tmp_path / ".venv" / "flash_mla.py"
    tracked = tmp_path / "toy.py"
    inside.parent.mkdir()
    for path in (inside, tracked):
        path.write_text("x = 1\n")
    git(tmp_path, "add", "toy.py")
    git(tmp_path, "commit", "-qm", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert origin(("none",), str(tracked)).commit == head
    assert not origin(("none",), str(tracked)).dirty
    assert origin(("none",), str(inside)).commit == ""
    tracked.write_text("x = 2\n")
    assert origin(("none",), str(tracked)).dirty


def installed_as(folder: Path, version: str, direct_url: str | None = None) -> Path:
    info = folder / f"flash_mla-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_mla\nVersion: {version}\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url)
    return write(folder, flash_mla=kernel(EXACT))


@pytest.mark.parametrize(
    ("version", "direct_url", "commit"),
    [
        ("1.0.0+9241ae3", None, "9241ae3"),
        ("1.0.0+cu130", None, ""),
        (
            "1.0.0",
            json.dumps({"url": "https://x/y", "vcs_info": {"commit_id": "a" * 40}}),
            "a" * 40,
        ),
        ("1.0.0", "{ broken", ""),
    ],
)
def test_commits_that_packages_say(
    tmp_path: Path, version: str, direct_url: str | None, commit: str
) -> None:
    installed_as(tmp_path, version, direct_url)
    with start(f"flash_mla@{tmp_path}") as provider:
        found = Description.from_json(provider.describe()).origin
    assert (found.version, found.commit) == (version, commit)
