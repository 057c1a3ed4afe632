"""`install()`: imports of FlashMLA's names find ours, and `uninstall()` undoes it exactly."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drawn import decode_call
from sparse_mla.compat import flash_mla
from sparse_mla.compat import install as installer

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No real module of these names, whatever is installed; nothing of ours stays."""
    for name in (*installer.NAMES, "sgl_kernel", "vllm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    flash_mla.uninstall()
    for name in (*installer.NAMES, "sgl_kernel", "vllm"):
        sys.modules.pop(name, None)


def names_there() -> set[str]:
    return {name for name in installer.NAMES if name in sys.modules}


def test_importing_us_patches_nothing() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "import sparse_mla.compat.flash_mla\n"
        "print(*[n for n in sys.modules if n.split('.')[0] in ('flash_mla', 'sgl_kernel', 'vllm')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_imports_find_ours() -> None:
    flash_mla.install()
    import flash_mla as installed

    assert installed.flash_mla_with_kvcache is flash_mla.flash_mla_with_kvcache
    assert installed.__version__.startswith("1.0.0+")
    assert importlib.util.find_spec("flash_mla").origin == "sparse_mla.compat.flash_mla"  # type: ignore[union-attr]
    inner = importlib.import_module("flash_mla.flash_mla_interface")
    assert installed.flash_mla_interface is inner
    assert inner.FlashMLASchedMeta is flash_mla.FlashMLASchedMeta
    for module in (installed, inner):
        assert not hasattr(module, "install")
        assert set(module.__all__) == set(flash_mla.__all__) - {"install", "uninstall"}
    with pytest.raises(ImportError):
        importlib.import_module("flash_mla.cuda")


def test_engines_names_find_ours_without_their_packages() -> None:
    flash_mla.install()
    from sgl_kernel.flash_mla import (  # type: ignore[import-not-found]
        flash_mla_sparse_fwd,
        flash_mla_with_kvcache,
    )
    from vllm.third_party.flashmla.flash_mla_interface import (  # type: ignore[import-not-found]
        get_mla_metadata,
    )
    from vllm.v1.attention.ops.flashmla import (  # type: ignore[import-not-found]
        flash_mla_with_kvcache_fp8,
        get_mla_metadata_dense_fp8,
        is_flashmla_dense_supported,
        is_flashmla_sparse_supported,
    )

    assert flash_mla_sparse_fwd is flash_mla.flash_mla_sparse_fwd
    assert get_mla_metadata is flash_mla.get_mla_metadata
    assert is_flashmla_sparse_supported() == (True, None)
    assert is_flashmla_dense_supported() == (True, None)
    for function in (flash_mla_with_kvcache_fp8, get_mla_metadata_dense_fp8):
        with pytest.raises(NotImplementedError, match=function.__name__):
            function()
    call = decode_call(heads=2)
    shaped = call.cache.rows_view()[:, :, None]
    arguments = (call.q, shaped, None, None, 512, get_mla_metadata()[0], None)
    options = {"is_fp8_kvcache": True, "indices": call.indices}
    old = flash_mla_with_kvcache(*arguments, descale_q=None, descale_k=None, **options)
    new = flash_mla.flash_mla_with_kvcache(*arguments, **options)
    assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])
    with pytest.raises(NotImplementedError, match="FP8 queries"):
        flash_mla_with_kvcache(*arguments, descale_q=torch.ones(1), **options)
    # SGLang copies both tensors to its own, and has two arguments before is_fp8_kvcache.
    from sgl_kernel.flash_mla import get_mla_metadata as metadata_of_2025

    lengths = torch.ones(call.q.shape[0], dtype=torch.int32)
    kept, splits_kept = metadata_of_2025(torch.ones(8, dtype=torch.int32), 2, 1)
    meta, splits_now = metadata_of_2025(lengths, 2, 1, num_heads_q=2, is_fp8_kvcache=True, topk=9)
    kept.copy_(meta)
    splits_kept[: len(lengths) + 1].copy_(splits_now)
    splits = (*arguments[:-2], kept, splits_kept[: len(lengths) + 1])
    by_position = flash_mla_with_kvcache(*splits, None, False, None, None, True, call.indices)
    assert torch.equal(by_position[0], new[0]) and torch.equal(by_position[1], new[1])
    assert "sgl_kernel" not in sys.modules and "vllm" not in sys.modules


def test_some_names_only_and_twice() -> None:
    flash_mla.install(installer.FLASH_MLA)
    assert names_there() == set(installer.FLASH_MLA)
    flash_mla.install("sgl_kernel.flash_mla")
    assert names_there() == {*installer.FLASH_MLA, "sgl_kernel.flash_mla"}
    first = sys.modules["flash_mla"]
    flash_mla.install()
    assert sys.modules["flash_mla"] is first
    assert names_there() == set(installer.NAMES)
    flash_mla.uninstall()
    assert not names_there()
    flash_mla.uninstall()


def test_unknown_names_install_nothing() -> None:
    with pytest.raises(ValueError, match="name is 'flashmla', allowed: flash_mla, "):
        flash_mla.install(["flash_mla", "flashmla"])
    assert not names_there()


def test_a_real_module_is_replaced_only_by_force() -> None:
    real, package = ModuleType("sgl_kernel.flash_mla"), ModuleType("sgl_kernel")
    package.flash_mla = real  # type: ignore[attr-defined]
    sys.modules["sgl_kernel"], sys.modules["sgl_kernel.flash_mla"] = package, real
    with pytest.raises(ValueError, match=r"sgl_kernel\.flash_mla is already imported"):
        flash_mla.install()
    assert names_there() == {"sgl_kernel.flash_mla"}
    flash_mla.install(force=True)
    ours = sys.modules["sgl_kernel.flash_mla"]
    assert ours is not real and package.flash_mla is ours  # type: ignore[attr-defined]
    flash_mla.uninstall()
    assert sys.modules["sgl_kernel.flash_mla"] is real
    assert package.flash_mla is real  # type: ignore[attr-defined]
    assert names_there() == {"sgl_kernel.flash_mla"}


def test_a_parent_without_the_module_gets_and_loses_it() -> None:
    package = ModuleType("sgl_kernel")
    sys.modules["sgl_kernel"] = package
    flash_mla.install(installer.SGLANG)
    assert package.flash_mla is sys.modules["sgl_kernel.flash_mla"]  # type: ignore[attr-defined]
    flash_mla.uninstall()
    assert not hasattr(package, "flash_mla")


def test_what_others_put_there_since_stays() -> None:
    flash_mla.install(installer.FLASH_MLA)
    other = ModuleType("flash_mla")
    sys.modules["flash_mla"] = other
    flash_mla.uninstall()
    assert names_there() == {"flash_mla"} and sys.modules["flash_mla"] is other


@pytest.mark.parametrize("name", ["func", "qkvpacked_func", "kvpacked_func"])
def test_dense_attention_of_flash_mla_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"flash_attn_varlen_{name} is FlashMLA's dense"):
        getattr(flash_mla, f"flash_attn_varlen_{name}")(torch.zeros(1), causal=True)
