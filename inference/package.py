"""The packaged model: the folder `model/` of a run, all that is needed to draw images from it.

    model.json               what the networks are, and size and SHA-256 of each file below
    generator.safetensors    G: latent code -> image
    mapping.safetensors      T: noise -> latent code (absent before stage 2)
    latents.safetensors      mean and a square root of the covariance of the training codes

Nothing in it can run code: JSON and safetensors only, every file checked against its size and
SHA-256, every tensor against the shape that the configuration implies before memory is taken for it.

Legend: B batch, N images, D latent dimension, E noise dimension, H and W pixels, C channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from ..config.run import Config
from ..config.sections import GeneratorConfig, ImleConfig, S3Config, Section
from ..errors import UserError, one_line
from ..models.generators import build_generator
from ..models.mapping import build_mapping
from ..models.sphere import Constraint
from ..samplers.gaussian import gaussian
from ..storage.base import MissingObject
from ..storage.files import os_fault
from ..storage.open import open_store
from .model import SamplingModel

FORMAT = 1
MANIFEST = "model.json"
GENERATOR, MAPPING, LATENTS = "generator.safetensors", "mapping.safetensors", "latents.safetensors"
MAX_MANIFEST_BYTES = 1 << 20
DTYPES = (torch.float32, torch.int64)  # weights, and the counters of BatchNorm


class FileEntry(Section):
    """Size and SHA-256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Section):
    """model.json."""

    format: Literal[1]
    name: str
    resolution: Literal[28, 32, 64, 128, 256, 512, 1024]
    channels: Literal[1, 3]
    generator: GeneratorConfig
    imle: ImleConfig
    constraint: Constraint
    rows: int = Field(ge=1, description="training images, that is codes behind latents.safetensors")
    fingerprint: str = Field(description="fingerprint of the training data")
    files: dict[Literal["generator.safetensors", "mapping.safetensors", "latents.safetensors"], FileEntry]


def export_model(
    folder: Path,
    config: Config,
    generator_state: dict[str, Tensor],
    mapping_state: dict[str, Tensor] | None,
    z_ND: Tensor,
    fingerprint: str,
) -> Path:
    """Write the packaged model of a run, whole or not at all; an older one in `folder` is replaced.

    Args:
        mapping_state: T's state, or None after stage 1 (then only `method="glo"` can sample).
        z_ND: the codes of all training images, of which only mean and covariance are kept.
        fingerprint: of the data set.
    Raises:
        UserError: weights or codes that are not finite.
        EnvironmentFault: the disk is full or failing.
    """
    tensors = {GENERATOR: generator_state, LATENTS: gaussian(z_ND)}
    if mapping_state is not None:
        tensors[MAPPING] = mapping_state
    for file, state in tensors.items():
        _require_finite(state, f"{file} of {config.name}")
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for file, state in tensors.items():
            safetensors.torch.save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, staging / file
            )
        manifest = Manifest(
            format=FORMAT,
            name=config.name,
            resolution=config.data.resolution,
            channels=config.data.channels,
            generator=config.generator,
            imle=config.imle,
            constraint=config.glo.constraint,
            rows=len(z_ND),
            fingerprint=fingerprint,
            files={file: _entry(staging / file) for file in tensors},  # type: ignore[misc]
        )
        (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
    except OSError as error:
        raise os_fault(error, folder) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def load_model(source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu") -> SamplingModel:
    """The model of a run folder, a model folder, or an s3:// address of either.

    `glann.load_model` also takes models of the registry.

    Raises:
        UserError: nothing is there, or it is damaged, of another format, or not a packaged model.
    """
    return open_model(source, s3=s3, device=device)[1]


def open_model(
    source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu"
) -> tuple[Manifest, SamplingModel]:
    """The same with its model.json, which says what data it was trained on."""
    source = str(source)
    if "://" in source and not source.startswith("s3://"):
        raise UserError(f"{source} cannot be opened; give a run folder, models:/name@alias or an s3:// address")
    if not source.startswith("s3://"):
        return open_folder(find_folder(Path(source)), source, device)
    with tempfile.TemporaryDirectory(prefix="glann-model-") as scratch:
        return open_folder(_from_s3(source, s3 or S3Config(), Path(scratch)), source, device)


def read_manifest(folder: Path) -> Manifest:
    """model.json of a model folder, validated."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; this is not a packaged model")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and tree.get("format") != FORMAT:
            raise UserError(f"{path} has format {tree.get('format')!r}; this glann reads format {FORMAT}")
        return Manifest.model_validate(tree)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is this a packaged model?") from error
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path} is not a packaged model: {key}: {fault['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON; this is not a packaged model") from error


def find_folder(path: Path) -> Path:
    """The model folder that is at `path` or, as of a run, below it.

    Raises:
        UserError: there is none.
    """
    for folder in (path, path / "model"):
        if (folder / MANIFEST).is_file():
            return folder
    if not path.exists():
        raise UserError(f"no such run or model folder: {path}")
    raise UserError(f"{path} holds no packaged model (no {MANIFEST}, no model/{MANIFEST}); has the run finished?")


def _from_s3(url: str, s3: S3Config, scratch: Path) -> Path:
    """Only the files that model.json may name are fetched; what else lies there is left alone."""
    store = open_store(url, s3)
    prefix = next((prefix for prefix in ("", "model/") if store.exists(prefix + MANIFEST)), None)
    if prefix is None:
        raise UserError(f"{url} holds no packaged model (no {MANIFEST}, no model/{MANIFEST})")
    if store.size(prefix + MANIFEST) > MAX_MANIFEST_BYTES:
        raise UserError(f"{url}/{prefix}{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    (scratch / MANIFEST).write_bytes(store.read(prefix + MANIFEST))
    for file in read_manifest(scratch).files:
        try:
            (scratch / file).write_bytes(store.read(prefix + file))
        except MissingObject as error:
            raise UserError(f"{url} is incomplete: {file} is missing") from error
    return scratch


def open_folder(folder: Path, source: str, device: torch.device | str = "cpu") -> tuple[Manifest, SamplingModel]:
    """The model in a folder that holds model.json; `source` is what the user calls it, for messages."""
    manifest = read_manifest(folder)
    for required in (GENERATOR, LATENTS):
        if required not in manifest.files:
            raise UserError(f"the model of {source} is incomplete: {MANIFEST} does not name {required}")
    states: dict[str, dict[str, Tensor]] = {file: _read(folder / file, entry) for file, entry in manifest.files.items()}
    dim = manifest.generator.latent_dim
    expected = {"mean": (dim,), "root": (dim, dim)}
    codes = states[LATENTS]
    shapes = {name: tuple(tensor.shape) for name, tensor in codes.items()}
    if shapes != expected or any(tensor.dtype != torch.float32 for tensor in codes.values()):
        raise UserError(f"{LATENTS} of {source} does not hold the mean and root of {dim}-dimensional codes")
    try:
        with torch.device("meta"):  # no memory is taken until the shapes are known to agree
            generator = build_generator(manifest.generator, manifest.resolution, manifest.channels)
            mapping = build_mapping(manifest.imle, dim, manifest.constraint) if MAPPING in manifest.files else None
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{MANIFEST} of {source} describes networks that cannot be: {one_line(error)}") from error
    _assign(generator, states[GENERATOR], GENERATOR, source)
    if mapping is not None:
        _assign(mapping, states[MAPPING], MAPPING, source)
    model = SamplingModel(
        generator.to(device),
        None if mapping is None else mapping.to(device),
        mean_D=states[LATENTS]["mean"],
        root_DD=states[LATENTS]["root"],
        noise_dim=manifest.imle.noise_dim,
        constraint=manifest.constraint,
        source=source,
    )
    return manifest, model


def _read(path: Path, entry: FileEntry) -> dict[str, Tensor]:
    """The tensors of a file whose size and SHA-256 are as promised.  What is hashed is what is parsed."""
    try:
        if path.stat().st_size != entry.size:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {entry.size}; copy the model again"
            )
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; copy the model again") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(f"{path} does not have the SHA-256 in {MANIFEST}; the model is damaged, copy it again")
    try:
        state = safetensors.torch.load(content)
    except Exception as error:  # besides its own, the errors of torch for types and shapes it does not have
        raise UserError(f"{path} is not a safetensors file: {one_line(error, 300)}") from error
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{path}: {name[:100]} is of type {tensor.dtype}, which no packaged model holds")
    _require_finite(state, str(path))
    return state


def _assign(network: nn.Module, state: dict[str, Tensor], file: str, source: str) -> None:
    for name, needed in network.state_dict().items():
        if name in state and state[name].dtype != needed.dtype:
            raise UserError(
                f"{file} of {source} does not fit the networks in {MANIFEST}: {name} is {state[name].dtype}"
            )
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{file} of {source} does not fit the networks in {MANIFEST}: {one_line(error)}") from error


def _require_finite(state: dict[str, Tensor], where: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: {name} holds NaN or infinity; take an earlier checkpoint")


def _entry(path: Path) -> FileEntry:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(size=path.stat().st_size, sha256=digest)
