"""All 256 e4m3 codes through both decoders: the one of sm_89 and newer, and the one before it."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from sparse_mla.ops.sparse_decode.triton_kernel import load_e4m3  # noqa: E402

pytestmark = pytest.mark.gpu


@triton.jit
def decode_all(bytes_ptr, out_ptr, HARDWARE_FP8: tl.constexpr):
    at = tl.arange(0, 256)
    value = load_e4m3(bytes_ptr + at, at >= 0, HARDWARE_FP8)
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
