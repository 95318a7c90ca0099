"""Partition of a checkpoint into files and ranks (pure functions), and streaming writes with bounded memory.

Groups of named tensors are cut into files of about `limit` bytes, which are distributed over the ranks, so that every
rank copies and sends its share. The files do not depend on the number of ranks. A file is sent straight from memory,
tensor after tensor, and hashed at the same time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...storage.base import Store
from ..snapshot import Snapshot
from .layout import File, Files

BLOCK_BYTES = 256 << 20  # approximate size of a file of tensors or of latent rows
_HASH_BYTES = 4 << 20
_GROUP = re.compile(r"^[a-z][a-z0-9_-]{0,63}$")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is gathered from all ranks on demand.

    nbytes: of the whole tensor. whole: collective; its result may share memory with the training's own tensor.
    """

    nbytes: int
    whole: Callable[[], Tensor]


Groups = Mapping[str, Mapping[str, Tensor | LazyTensor]]


@dataclass(frozen=True)
class Piece:
    """One file: some tensors of a group."""

    file: str
    group: str
    names: tuple[str, ...]
    nbytes: int


def cut(sizes: Mapping[str, Mapping[str, int]], limit: int) -> list[Piece]:
    """Files of about `limit` bytes: tensors stay whole and in the order of their names.

    A group that fits one file is `<group>.safetensors`, else `<group>-00001-of-00004.safetensors` and so on.

    Args:
        sizes: bytes by group and name.
    """
    pieces = []
    for group, tensors in sizes.items():
        if not _GROUP.match(group) or group.startswith("latents"):
            raise ValueError(f"{group!r} cannot be the name of a group of tensors")
        shares: list[list[str]] = [[]]
        filled = 0
        for name in sorted(tensors):
            if shares[-1] and filled + tensors[name] > limit:
                shares.append([])
                filled = 0
            shares[-1].append(name)
            filled += tensors[name]
        for number, names in enumerate(shares, 1):
            suffix = "" if len(shares) == 1 else f"-{number:05d}-of-{len(shares):05d}"
            nbytes = sum(tensors[name] for name in names)
            pieces.append(Piece(f"{group}{suffix}.safetensors", group, tuple(names), nbytes))
    return pieces


def deal(pieces: list[Piece], world: int) -> list[int]:
    """The rank that writes each piece: largest piece first, each to the rank with the fewest bytes so far."""
    owners, load = [0] * len(pieces), [0] * world
    for at in sorted(range(len(pieces)), key=lambda at: (-pieces[at].nbytes, at)):
        owners[at] = min(range(world), key=lambda rank: (load[rank], rank))
        load[owners[at]] += pieces[at].nbytes
    return owners


def copy_share(groups: Groups, rank: int, world: int, limit: int) -> dict[str, dict[str, Tensor]]:
    """Copy this rank's files to CPU memory. All ranks pass the same groups; collective for `LazyTensor`."""
    sizes = {group: {name: tensor.nbytes for name, tensor in tensors.items()} for group, tensors in groups.items()}
    pieces = cut(sizes, limit)
    share: dict[str, dict[str, Tensor]] = {}
    for piece, owner in zip(pieces, deal(pieces, world), strict=True):
        for name in piece.names:
            tensor = groups[piece.group][name]
            whole = tensor.whole() if isinstance(tensor, LazyTensor) else tensor
            if owner == rank:
                share.setdefault(piece.file, {})[name] = torch.empty_like(
                    whole, device="cpu", memory_format=torch.contiguous_format
                ).copy_(whole.detach())
        if owner == rank:
            share.setdefault(piece.file, {})  # a group may be empty
    return share


def serialized(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Yield contiguous CPU tensors in the safetensors format, without copying them."""
    # The widest first, so that each tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    stops = list(accumulate((tensors[name].nbytes for name in names), initial=0))
    header = {
        name: {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": stops[at : at + 2],
        }
        for at, name in enumerate(names)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def put(store: Store, key: str, data: Iterator[memoryview]) -> File:
    """Store a stream; return its size and hash."""
    digest, size = hashlib.sha256(), 0

    def hashed() -> Iterator[memoryview]:
        nonlocal size
        for piece in data:
            for at in range(0, len(piece), _HASH_BYTES):
                digest.update(piece[at : at + _HASH_BYTES])
                yield piece[at : at + _HASH_BYTES]
            size += len(piece)

    store.write(key, hashed())
    return File(size=size, sha256=digest.hexdigest())


def write_rows(store: Store, folder: str, first_row: int, rows: Snapshot, block_bytes: int) -> Files:
    """Write rows of the latent table in blocks below `folder`; a block is in memory while it is sent."""
    count, step = len(rows), max(1, block_bytes // max(1, rows.row_bytes))
    files: Files = {}
    for at in range(0, count, step):
        stop = min(at + step, count)
        name = f"latents-{first_row + at}-{first_row + stop}.safetensors"
        files[name] = put(store, f"{folder}/{name}", serialized(rows.read(at, stop)))
    return files
