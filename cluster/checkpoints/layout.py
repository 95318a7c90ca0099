"""On-disk layout of a checkpoint, and its validation.

Input is untrusted: sizes and hashes are checked before a byte is parsed, and only safetensors and JSON are parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from ...config.parse import reason
from ...errors import UserError
from ...storage.base import MissingObject, Store

FOLDER = re.compile(r"^step-(\d{6,15})/")
ROWS = re.compile(r"^latents-(\d{1,15})-(\d{1,15})\.safetensors$")
GROUP = re.compile(r"^([a-z][a-z0-9_-]*?)(?:-(\d{5})-of-(\d{5}))?\.safetensors$")
MANIFEST, DAMAGED = "manifest.json", "damaged.json"
_MAX_JSON = 64 << 20
_MAX_HEADER = 64 << 20


Model = TypeVar("Model", bound=BaseModel)


class DamagedCheckpoint(UserError):
    """A checkpoint differs from what was saved; an older one may be usable."""


class Json(BaseModel):
    """Base class of the JSON files of checkpoints: exactly these keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(Json):
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


FileName = Annotated[str, Field(pattern=r"^[a-z][A-Za-z0-9_-]{0,99}\.(safetensors|json)$")]
Files = dict[FileName, File]
Attempt = Annotated[str, Field(pattern=r"^[a-z0-9]{1,32}$")]  # one start of the workers; names their folder


class Part(Json):
    """Files that one rank has written."""

    attempt: Attempt
    world: int
    files: Files


class Manifest(Json):
    """Contents of a checkpoint; a folder without a manifest is not one."""

    step: int = Field(ge=0)
    attempt: Attempt
    rows: int = Field(ge=0, description="rows of the latent table, over all blocks")
    score: None = Field(None, exclude=True, description="only in files of earlier versions, where it is null")
    files: Files


def folder_name(step: int) -> str:
    """`step-000123`: sorts by step."""
    return f"step-{step:06d}"


def file_key(manifest: Manifest, name: str) -> str:
    """Key of a file: in a folder of its attempt, so that two writers never write to the same object."""
    return f"{folder_name(manifest.step)}/{manifest.attempt}/{name}"


@dataclass(frozen=True)
class Survey:
    """The checkpoints of a store by step, oldest first: complete ones, and the fault of each damaged one."""

    good: dict[int, Manifest]
    damaged: dict[int, str]


def survey(store: Store, only: int | None = None) -> Survey:
    """Find complete checkpoints: with a manifest, every file of the right size, and not marked as damaged."""
    sizes = store.sizes("step-" if only is None else f"{folder_name(only)}/")
    found = Survey({}, {})
    for step in committed_steps(sizes):
        try:
            if f"{folder_name(step)}/{DAMAGED}" in sizes:
                raise DamagedCheckpoint(_damage_reason(store, step))
            manifest = load_manifest(store, step)
            check_sizes(store, manifest, sizes)
            found.good[step] = manifest
        except MissingObject:  # removed since it was listed
            continue
        except UserError as error:
            found.damaged[step] = str(error)
    return found


def check_sizes(store: Store, manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Raise DamagedCheckpoint if a file of the manifest is missing or has another size.

    `sizes`: bytes by key.
    """
    for name, file in manifest.files.items():
        key = file_key(manifest, name)
        if sizes.get(key) != file.size:
            fault = f"has {sizes[key]} of its {file.size} bytes" if key in sizes else "is missing"
            raise DamagedCheckpoint(f"{store.url}/{key} {fault}")


class _Damage(Json):
    reason: str


def mark_damaged(store: Store, step: int, reason: str) -> None:
    """Mark a checkpoint as unusable; `retain` removes it once there are enough newer ones."""
    store.write(f"{folder_name(step)}/{DAMAGED}", _Damage(reason=reason[:1000]).model_dump_json().encode())


def _damage_reason(store: Store, step: int) -> str:
    key = f"{folder_name(step)}/{DAMAGED}"
    if store.size(key) > _MAX_JSON:
        return f"{store.url}/{key} is too large"
    return " ".join(parse(_Damage, store.read(key), f"{store.url}/{key}").reason.split())[:1000]


def load_manifest(store: Store, step: int) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        UserError: there is none. DamagedCheckpoint: it is invalid.
    """
    key = f"{folder_name(step)}/{MANIFEST}"
    if store.size(key) > _MAX_JSON:
        raise DamagedCheckpoint(f"{store.url}/{key} is too large to be a manifest")
    manifest = parse(Manifest, store.read(key), f"{store.url}/{key}")
    if manifest.step != step:
        raise DamagedCheckpoint(f"{store.url}/{key} is of step {manifest.step}; the folder was renamed or mixed up")
    return manifest


def read_verified(store: Store, manifest: Manifest, name: str) -> bytes:
    """A file of a checkpoint with the size and hash of its manifest. Raises DamagedCheckpoint."""
    file, key = manifest.files.get(name), file_key(manifest, name)
    if file is None:
        raise DamagedCheckpoint(f"{store.url}/{key} is not part of the checkpoint")
    for _ in range(2):  # the stored file may be intact although the answer was not
        try:
            data = store.read(key)
        except MissingObject as error:
            raise DamagedCheckpoint(f"{store.url}/{key} is missing") from error
        if len(data) == file.size and hashlib.sha256(data).hexdigest() == file.sha256:
            return data
    raise DamagedCheckpoint(f"{store.url}/{key} is not what was saved (size or SHA-256 differs)")


def group_files(store: Store, manifest: Manifest, group: str) -> list[str]:
    """Names of the files of a group of tensors, in order. Raises DamagedCheckpoint if one is missing."""
    found = {name: match for name in manifest.files if (match := GROUP.match(name)) and match[1] == group}
    counts = {int(match[3] or 1) for match in found.values()}
    numbers = sorted(int(match[2] or 1) for match in found.values())
    if len(counts) != 1 or numbers != list(range(1, counts.pop() + 1)):
        where = f"{store.url}/{folder_name(manifest.step)}"
        raise DamagedCheckpoint(f"{where} does not contain {group} completely; its files: {sorted(found)}")
    return sorted(found)


def row_blocks(files: Files) -> list[range]:
    """Ranges of latent rows in the files, sorted."""
    matches = [match for name in files if (match := ROWS.match(name))]
    return sorted((range(int(match[1]), int(match[2])) for match in matches), key=lambda block: block.start)


def check_cover(blocks: list[range], rows: range, where: str) -> None:
    """Refuse sorted blocks that are not contiguous (DamagedCheckpoint), or that do not cover `rows` (UserError)."""
    stops = [block.stop for block in blocks]
    for block, expected in zip(blocks, [None, *stops], strict=False):
        if not block or expected not in (None, block.start):
            raise DamagedCheckpoint(f"{where}: the blocks of latent rows have a gap or an overlap at row {block.start}")
    if rows and (not blocks or blocks[0].start > rows.start or blocks[-1].stop < rows.stop):
        held = f"{blocks[0].start}..{blocks[-1].stop - 1}" if blocks else "none"
        raise UserError(
            f"{where}: latent rows {rows.start}..{rows.stop - 1} are needed and {held} are there; "
            "is this the run of another data set?"
        )


def parse(model: type[Model], data: bytes, where: str) -> Model:
    """Parse JSON of exactly that model. Raises DamagedCheckpoint with the first fault, in one line."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        path = ".".join(map(str, fault["loc"]))
        raise DamagedCheckpoint(
            f"{where} is damaged or not a file of glann: {path} {reason(fault)}".replace("\n", " ")
        ) from error


@contextlib.contextmanager
def checked_safetensors(where: str, data: bytes) -> Iterator[None]:
    """Refuse an oversized header before it is parsed; raise the parser's errors as DamagedCheckpoint."""
    if len(data) < 8 or int.from_bytes(data[:8], "little") > min(_MAX_HEADER, len(data) - 8):
        raise DamagedCheckpoint(f"{where} is not a safetensors file: its header does not fit")
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{where} is not a valid safetensors file: {error}") from error


def committed_steps(keys: Iterable[str]) -> list[int]:
    """Steps whose folder has a manifest, sorted."""
    matches = [(key, match) for key in keys if (match := FOLDER.match(key))]
    return sorted(int(match[1]) for key, match in matches if key == f"{folder_name(int(match[1]))}/{MANIFEST}")
