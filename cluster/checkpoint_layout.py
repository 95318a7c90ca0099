"""What a checkpoint is on disk, and the refusal of whatever is not one.

Nothing that is read is trusted: sizes and hashes are checked before a byte is parsed, and only
safetensors and JSON are parsed at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from ..datasets.storage import Store
from ..errors import UserError

log = logging.getLogger(__name__)

FOLDER = re.compile(r"^step-(\d{6,15})/")
ROWS = re.compile(r"^latents-(\d{1,15})-(\d{1,15})\.safetensors$")
_MAX_JSON = 64 << 20
_MAX_HEADER = 64 << 20


Model = TypeVar("Model", bound=BaseModel)


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(_Json):
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


FileName = Annotated[str, Field(pattern=r"^[a-z][A-Za-z0-9_-]{0,99}\.(safetensors|json)$")]
Files = dict[FileName, File]


class Part(_Json):
    """What one rank has written."""

    attempt: str
    world: int
    files: Files


class Manifest(_Json):
    """What makes a folder a checkpoint."""

    step: int = Field(ge=0)
    attempt: str
    rows: int = Field(ge=0, description="rows of the latent table, over all blocks")
    score: float | None = Field(allow_inf_nan=False, description="lower is better")
    files: Files


def folder_name(step: int) -> str:
    """`step-000123`: sorts by step."""
    return f"step-{step:06d}"


def complete(store: Store, only: int | None = None) -> dict[int, Manifest]:
    """The checkpoints that can be used, oldest first: there is a manifest, and every file has its size.

    A damaged one is passed over with a warning.
    """
    sizes = store.sizes("step-" if only is None else f"{folder_name(only)}/")
    found = {}
    for step in committed_steps(sizes):
        try:
            manifest = load_manifest(store, step)
        except UserError as error:
            log.warning("checkpoint %s is passed over: %s", folder_name(step), error)
            continue
        bad = [name for name, file in manifest.files.items() if sizes.get(f"{folder_name(step)}/{name}") != file.size]
        if bad:
            log.warning("checkpoint %s is passed over: %s is missing or cut short", folder_name(step), bad[0])
        else:
            found[step] = manifest
    return found


def load_manifest(store: Store, step: int) -> Manifest:
    """The manifest of a checkpoint. Raises UserError if there is none or it is not one of ours."""
    key = f"{folder_name(step)}/manifest.json"
    if store.size(key) > _MAX_JSON:
        raise UserError(f"{store.url}/{key} is too large to be a manifest")
    manifest = parse(Manifest, store.read(key), f"{store.url}/{key}")
    if manifest.step != step:
        raise UserError(f"{store.url}/{key} is of step {manifest.step}; the folder was renamed or mixed up")
    return manifest


def read_verified(store: Store, manifest: Manifest, name: str) -> bytes:
    """A file of a checkpoint, whose size and hash are those of its manifest."""
    where = f"{store.url}/{folder_name(manifest.step)}/{name}"
    file = manifest.files.get(name)
    if file is None:
        raise UserError(f"{where} is not part of the checkpoint")
    data = store.read(f"{folder_name(manifest.step)}/{name}")
    if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(
            f"{where} is not what was saved (size or SHA-256 differ); remove this checkpoint to use an older one"
        )
    return data


def row_blocks(files: Files) -> list[range]:
    """The ranges of latent rows that the files hold, sorted."""
    matches = [match for name in files if (match := ROWS.match(name))]
    return sorted((range(int(match[1]), int(match[2])) for match in matches), key=lambda block: block.start)


def check_cover(blocks: list[range], rows: range, where: str) -> None:
    """Refuse sorted blocks that do not follow one another, or that leave out one of `rows`."""
    stops = [block.stop for block in blocks]
    for block, expected in zip(blocks, [None, *stops], strict=False):
        if not block or expected not in (None, block.start):
            raise UserError(f"{where}: the blocks of latent rows have a gap or an overlap at row {block.start}")
    if rows and (not blocks or blocks[0].start > rows.start or blocks[-1].stop < rows.stop):
        held = f"{blocks[0].start}..{blocks[-1].stop - 1}" if blocks else "none"
        raise UserError(
            f"{where}: latent rows {rows.start}..{rows.stop - 1} are needed and {held} are there; "
            "is this the run of another data set?"
        )


def parse(model: type[Model], data: bytes, where: str) -> Model:
    """JSON of exactly that form, or a UserError in one line."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        path = ".".join(map(str, fault["loc"]))
        raise UserError(f"{where} is damaged or not one of ours: {path} {fault['msg']}".replace("\n", " ")) from error


@contextlib.contextmanager
def checked_safetensors(where: str, data: bytes) -> Iterator[None]:
    """Refuse an absurd header before it is parsed, and explain what the parser refuses."""
    if len(data) < 8 or int.from_bytes(data[:8], "little") > min(_MAX_HEADER, len(data) - 8):
        raise UserError(f"{where} is not a safetensors file: its header does not fit")
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not a valid safetensors file: {error}") from error


def committed_steps(keys: Iterable[str]) -> list[int]:
    """The steps whose folder has a manifest, sorted."""
    matches = [(key, match) for key in keys if (match := FOLDER.match(key))]
    return sorted(int(match[1]) for key, match in matches if key == f"{folder_name(int(match[1]))}/manifest.json")
