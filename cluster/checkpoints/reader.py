"""Reading of checkpoints, independent of the number of workers that wrote them; files are verified before parsing.

A file that differs from what was saved raises DamagedCheckpoint, so that the caller can fall back to an older one.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from torch import Tensor

from ...storage.base import Store
from .layout import (
    GROUP,
    ROWS,
    DamagedCheckpoint,
    check_cover,
    checked_safetensors,
    file_key,
    folder_name,
    group_files,
    load_manifest,
    read_verified,
    row_blocks,
)

Arrays = dict[str, np.ndarray]

_ROW_TYPES = ("float32", "int32")


def names(store: Store, step: int) -> list[str]:
    """Names of the groups of tensors in a checkpoint."""
    files = load_manifest(store, step).files
    return sorted({match[1] for name in files if (match := GROUP.match(name)) and not ROWS.match(name)})


def load_state(store: Store, step: int) -> dict[str, Any]:
    """The saved counters and seeds. Raises DamagedCheckpoint if they differ from what was saved."""
    data = read_verified(store, load_manifest(store, step), "state.json")
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{store.url}/{folder_name(step)}/state.json is not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{store.url}/{folder_name(step)}/state.json does not hold an object")
    return state


def load_tensors(store: Store, step: int, group: str) -> dict[str, Tensor]:
    """A group of tensors by name, on the CPU. Raises DamagedCheckpoint if it differs from what was saved."""
    manifest = load_manifest(store, step)
    tensors: dict[str, Tensor] = {}
    for name in group_files(store, manifest, group):
        data = read_verified(store, manifest, name)
        with checked_safetensors(f"{store.url}/{file_key(manifest, name)}", data):
            tensors |= safetensors.torch.load(data)
    return tensors


def load_rows(store: Store, step: int, rows: range, only: Collection[str] | None = None) -> Arrays:
    """The latent table of any range of rows, for `LatentTable.restore`. One of its files is in memory besides them.

    Args:
        only: names of the arrays; None is all of them.
    Raises:
        UserError: a row is missing. DamagedCheckpoint: a block differs from what was saved.
    """
    manifest = load_manifest(store, step)
    where = f"{store.url}/{folder_name(step)}"
    blocks = [block for block in row_blocks(manifest.files) if block.start < rows.stop and rows.start < block.stop]
    check_cover(blocks, rows, where)
    arrays: Arrays = {}
    for block in blocks:
        name = f"latents-{block.start}-{block.stop}.safetensors"
        data = read_verified(store, manifest, name)
        with checked_safetensors(f"{where}/{name}", data):
            held = safetensors.numpy.load(data)
        held = {key: array for key, array in held.items() if only is None or key in only}
        _check_block(held, block, arrays, f"{where}/{name}")
        first, last = max(block.start, rows.start), min(block.stop, rows.stop)
        for key, array in held.items():
            target = arrays.setdefault(key, np.empty((len(rows), *array.shape[1:]), array.dtype))
            target[first - rows.start : last - rows.start] = array[first - block.start : last - block.start]
    return arrays


def _check_block(held: Arrays, block: range, before: Arrays, where: str) -> None:
    for name, array in held.items():
        if array.ndim < 1 or len(array) != len(block) or array.dtype.name not in _ROW_TYPES:
            raise DamagedCheckpoint(
                f"{where}: {name} is {array.dtype}{list(array.shape)}, which cannot be {len(block)} rows"
            )
        if before and (name not in before or before[name].shape[1:] != array.shape[1:]):
            raise DamagedCheckpoint(f"{where}: {name} does not match the blocks before it")
    if before and set(before) != set(held):
        raise DamagedCheckpoint(f"{where} contains {sorted(held)} where the blocks before it contain {sorted(before)}")
