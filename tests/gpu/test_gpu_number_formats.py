"""Every code of the caches' number formats through the kernels' decoders.

e4m3 has two: the one of sm_89 and newer, and the one before it.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from sparse_mla import kv_quantise  # noqa: E402
from sparse_mla.ops.sparse_decode.triton_rows_kernel import (  # noqa: E402
    decode_e2m1,
    decode_e4m3,
    decode_ue8m0,
    times,
)

pytestmark = pytest.mark.gpu


@triton.jit
def decode_all(bytes_ptr, out_ptr, HARDWARE_FP8: tl.constexpr):
    at = tl.arange(0, 256)
    value = decode_e4m3(tl.load(bytes_ptr + at), HARDWARE_FP8)
    tl.store(out_ptr + at, value.to(tl.float32))


@pytest.mark.parametrize("hardware", (True, False))
def test_every_code(hardware: bool) -> None:
    if hardware and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 conversion needs compute capability 8.9")
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    out = torch.empty(256, device="cuda")
    decode_all[(1,)](codes, out, HARDWARE_FP8=hardware, num_warps=1)
    want = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@triton.jit
def decode_pairs(bytes_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    value = decode_e2m1(tl.load(bytes_ptr + at))
    out = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + out, value.to(tl.float32))


def test_every_pair_of_e2m1_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    out = torch.empty(16, 32, device="cuda")
    decode_pairs[(1,)](codes, out, num_warps=1)
    assert torch.equal(out, kv_quantise.decode_e2m1(codes.view(16, 16)))


@triton.jit
def scale_all(bytes_ptr, out_ptr, product_ptr):
    at = tl.arange(0, 256)
    scale = decode_ue8m0(tl.load(bytes_ptr + at))
    tl.store(out_ptr + at, scale)
    tl.store(product_ptr + at, times(tl.full([256], -1.125, tl.bfloat16), scale))


def test_every_ue8m0_code() -> None:
    """Alone and as a factor; -1.125 * 2^-127 is subnormal in bf16, and exact."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    out, product = torch.empty(2, 256, dtype=torch.bfloat16, device="cuda")
    scale_all[(1,)](codes, out, product, num_warps=1)
    want = kv_quantise.decode_ue8m0(codes).double()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(product.double(), -1.125 * want, rtol=0, atol=0, equal_nan=True)
