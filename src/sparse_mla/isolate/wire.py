"""What crosses between the tool and a provider's process: JSON frames and shared bytes.

A frame is four bytes of length and that many bytes of JSON, over a pipe. Tensors never travel in
frames: their storages are copied through one mapped file that both sides share, in pieces as large
as that file, and a frame says which bytes are where. Nothing is pickled, so neither side can make
the other execute anything.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch

from ..accuracy.case import Inputs, WriteInputs
from ..kv_cache import KVCache
from ..kv_layout import get_layout

BUFFER_BYTES = 64 * 2**20
CHUNK = 2**20
"""Pieces of a storage that are all zero are not sent: caches past 2^32 bytes are mostly that."""

LONGEST_FRAME = 64 * 2**20

Call = Inputs | WriteInputs


def write_frame(stream: IO[bytes], message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, None at the end of the stream."""
    head = stream.read(4)
    if head is None or len(head) < 4:
        return None
    return parse_frame(stream.read(frame_length(head)))


def frame_length(head: bytes) -> int:
    (length,) = struct.unpack("<I", head)
    if length > LONGEST_FRAME:
        raise ValueError(f"frame of {length} bytes, allowed: {LONGEST_FRAME}")
    return int(length)


def parse_frame(data: bytes) -> dict[str, Any]:
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError(f"frame holds {type(message).__name__}, expected an object")
    return message


def map_buffer(path: str) -> torch.Tensor:
    """The shared file as bytes."""
    return torch.from_file(path, shared=True, size=BUFFER_BYTES, dtype=torch.uint8)


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage under a tensor, uint8, a view."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def pieces(storage: torch.Tensor, zeros: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
    """Offset and bytes of the pieces of a storage, those that are all zero only with `zeros`."""
    for start in range(0, storage.numel(), CHUNK):
        piece = storage[start : start + CHUNK]
        aligned = piece.storage_offset() % 8 == 0 and piece.numel() % 8 == 0
        # Eight bytes at a time where they lie so: a large cache is looked through in a second.
        if zeros or bool((piece.view(torch.int64) if aligned else piece).any()):
            yield start, piece


@dataclass(frozen=True)
class View:
    """A tensor as a view of a numbered storage."""

    storage: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: int) -> View:
        return cls(
            storage,
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
        )

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> View:
        shape, stride = tuple(data["shape"]), tuple(data["stride"])
        return cls(data["storage"], data["dtype"], shape, stride, data["offset"])

    def make(self, storages: dict[int, torch.Tensor]) -> torch.Tensor:
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}")
        storage = storages[self.storage]
        empty = torch.empty(0, dtype=dtype, device=storage.device)
        return empty.set_(storage.untyped_storage(), self.offset, self.shape, self.stride)


_PLAIN = ("op", "scale", "causal", "scale_rounding")
_TENSORS = (
    (
        "q",
        "indices",
        "topk_length",
        "attn_sink",
        "extra_indices",
        "extra_topk_length",
        "block_table",
        "cache_seqlens",
    ),
    ("latent", "rope", "slots"),
)
_CACHES = ("cache", "extra_cache")


def call_tensors(call: Call) -> dict[str, torch.Tensor]:
    """Every tensor of a call, by the name under which `describe_call` sends it."""
    found = {}
    for name in _TENSORS[isinstance(call, WriteInputs)]:
        value = getattr(call, name)
        if value is not None:
            found[name] = value
    for name in _CACHES:
        cache = getattr(call, name, None)
        if cache is not None:
            found[name] = cache.pages
            if cache.tensor_scale is not None:
                found[f"{name}.tensor_scale"] = cache.tensor_scale
    return found


def describe_call(call: Call, views: dict[str, View]) -> dict[str, Any]:
    """A call in JSON, its tensors as views."""
    message: dict[str, Any] = {"writes": isinstance(call, WriteInputs)}
    message["plain"] = {name: getattr(call, name) for name in _PLAIN if hasattr(call, name)}
    message["views"] = {name: view.as_json() for name, view in views.items()}
    message["caches"] = {
        name: {
            "page_size": cache.page_size,
            "layout": cache.layout.name,
            "token_stride": cache.token_stride,
        }
        for name in _CACHES
        if (cache := getattr(call, name, None)) is not None
    }
    return message


def rebuild_call(message: dict[str, Any], storages: dict[int, torch.Tensor]) -> Call:
    """The call that `describe_call` described."""
    fields: dict[str, Any] = dict(message["plain"])
    for name, data in message["views"].items():
        fields[name] = View.from_json(data).make(storages)
    for name, data in message["caches"].items():
        layout = get_layout(data["layout"])
        scale = fields.pop(f"{name}.tensor_scale", None)
        fields[name] = KVCache(fields[name], data["page_size"], layout, data["token_stride"], scale)
    if message["writes"]:
        fields.setdefault("rope", None)
        return WriteInputs(**fields)
    return Inputs(**fields)
