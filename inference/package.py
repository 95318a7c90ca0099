"""The packaged model: the folder `model/` of a run, with all that is needed to draw images.

    model.json                     the configuration of the networks; size and SHA-256 of each file below
    generator.safetensors          G: latent code -> image
    sampler-<kind>.safetensors     normal noise -> latent code; the run's own kind (absent before stage 2), and the
                                   Gaussian of the training codes

Format 1, of glann 0.1, has mapping.safetensors and latents.safetensors for the kinds imle and gaussian; it is still
read.

Loading cannot run code: the files are JSON and safetensors only.  Every file is checked against its size and
SHA-256, and every tensor against the shape that the configuration implies before memory is allocated.

Legend: B batch, N images, D latent dimension, E noise dimension, H and W pixels, C channels.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from ..config.parse import reason, shown
from ..config.run import Config
from ..config.samplers import AnySampler, GaussianConfig, ImleConfig
from ..config.section import Section
from ..config.sections import GeneratorConfig, S3Config
from ..errors import UserError, one_line
from ..models.generators import build_generator
from ..models.sphere import Constraint
from ..samplers.base import build_network
from ..storage.base import MissingObject
from ..storage.files import os_fault, read_document, replacing_folder, write_whole
from ..storage.open import local_folder, open_store
from .model import SamplingModel, usable_device

FORMAT = 2
MANIFEST, GENERATOR = "model.json", "generator.safetensors"
MAX_MANIFEST_BYTES = 1 << 20
FOLDER = "model"  # folder of the packaged model in a run folder
REMEDY = "copy the model again, or package it again with the same `glann train`"
DTYPES = (torch.float32, torch.int64)  # weights, and the counters of BatchNorm
GAUSSIAN = GaussianConfig()

ModelFileName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,99}\.safetensors$")]


class FileEntry(Section):
    """Size and SHA-256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SamplerEntry(Section):
    """One sampler of a model."""

    config: AnySampler
    file: ModelFileName


class ModelManifest(Section):
    """The content of model.json."""

    format: Literal[2]
    name: str
    resolution: Literal[28, 32, 64, 128, 256, 512, 1024]
    channels: Literal[1, 3]
    generator: GeneratorConfig
    constraint: Constraint
    own: str = Field(description="kind of the run's configured sampler")
    samplers: dict[str, SamplerEntry] = Field(description="by kind")
    rows: int = Field(ge=1, description="training images")
    fingerprint: str = Field(description="fingerprint of the training data")
    files: dict[ModelFileName, FileEntry]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for kind, entry in self.samplers.items():
            if entry.config.kind != kind:
                raise ValueError(f"sampler {kind[:100]} is of kind {entry.config.kind}")
        for file in (GENERATOR, *(entry.file for entry in self.samplers.values())):
            if file not in self.files:
                raise ValueError(f"the model is incomplete: files does not name {file}")
        return self


class ModelManifestV1(Section):
    """The content of model.json of glann 0.1."""

    format: Literal[1]
    name: str
    resolution: Literal[28, 32, 64, 128, 256, 512, 1024]
    channels: Literal[1, 3]
    generator: GeneratorConfig
    imle: ImleConfig
    constraint: Constraint
    rows: int = Field(ge=1)
    fingerprint: str
    files: dict[Literal["generator.safetensors", "mapping.safetensors", "latents.safetensors"], FileEntry]

    def as_today(self) -> ModelManifest:
        """The same model in the current format."""
        samplers: dict[str, Any] = {"gaussian": {"config": GAUSSIAN, "file": "latents.safetensors"}}
        if "mapping.safetensors" in self.files:
            samplers["imle"] = {"config": self.imle, "file": "mapping.safetensors"}
        kept = self.model_dump(exclude={"format", "imle"})
        return ModelManifest.model_validate({"format": FORMAT, "own": "imle", "samplers": samplers} | kept)


def export_model(
    folder: Path,
    config: Config,
    generator_state: dict[str, Tensor],
    sampler_state: dict[str, Tensor] | None,
    gaussian_state: dict[str, Tensor] | None,
    rows: int,
    fingerprint: str,
) -> Path:
    """Write the packaged model of a run atomically; an older one in `folder` is replaced.

    Args:
        sampler_state: weights of the configured sampler, or None after stage 1 (then only the Gaussian can sample).
        gaussian_state: of the Gaussian over the codes of the `rows` training images; None where they have none.
        fingerprint: fingerprint of the data set.
    Raises:
        UserError: weights or codes are not finite.
        EnvironmentFault: the disk is full or failing.
    """
    configs = {"gaussian": GAUSSIAN, config.sampler.kind: config.sampler}
    given = {"gaussian": gaussian_state} | ({} if sampler_state is None else {config.sampler.kind: sampler_state})
    states = {kind: state for kind, state in given.items() if state is not None}
    samplers = {kind: SamplerEntry(config=configs[kind], file=f"sampler-{kind}.safetensors") for kind in states}
    tensors = {GENERATOR: generator_state} | {samplers[kind].file: state for kind, state in states.items()}
    for file, state in tensors.items():
        _require_finite(state, f"{file} of {config.name}")
    try:
        with replacing_folder(folder) as staging:
            for file, state in tensors.items():
                whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
                write_whole(staging / file, safetensors.torch.save(whole))
            manifest = ModelManifest(
                format=FORMAT,
                name=config.name,
                resolution=config.data.resolution,
                channels=config.data.channels,
                generator=config.generator,
                constraint=config.constraint,
                own=config.sampler.kind,
                samplers=samplers,
                rows=rows,
                fingerprint=fingerprint,
                files={file: _entry(staging / file) for file in tensors},
            )
            write_whole(staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise os_fault(error, folder) from error
    return folder


def load_model(source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu") -> SamplingModel:
    """Load the model of a run folder, a model folder, or an s3:// address of either.

    `glann.load_model` also takes models of the registry.

    Raises:
        UserError: no model there, or it is damaged, of an unknown format, or not a packaged model.
    """
    return open_model(source, s3=s3, device=device)[1]


def open_model(
    source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu"
) -> tuple[ModelManifest, SamplingModel]:
    """Load a model as `load_model` does, together with its model.json."""
    source, device = str(source), usable_device(device)
    folder = local_folder(source)
    if folder is not None:
        return open_folder(find_folder(folder), source, device)
    with tempfile.TemporaryDirectory(prefix="glann-model-") as scratch:
        return open_folder(_from_s3(source, s3 or S3Config(), Path(scratch)), source, device)


def read_manifest(folder: Path) -> ModelManifest:
    """Read and validate model.json of a model folder. Raises UserError if it is missing or invalid."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; this is not a packaged model")
        tree = json.loads(read_document(path))
        written = tree.get("format") if isinstance(tree, dict) else FORMAT
        if written == 1:
            return ModelManifestV1.model_validate(tree).as_today()
        if written != FORMAT:
            raise UserError(f"{path} has format {shown(written)}; this glann reads formats 1 and {FORMAT}")
        return ModelManifest.model_validate(tree)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is this a packaged model?") from error
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = "".join(f"{part}." for part in fault["loc"])[:-1]
        why = f"{key}: {reason(fault)}" if key else reason(fault)
        raise UserError(f"{path} is not a packaged model: {why}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON; this is not a packaged model; {REMEDY}") from error


def check_folder(folder: Path) -> None:
    """Raise UserError if model.json cannot be read, or a file it lists is missing or of another size."""
    for file, entry in read_manifest(folder).files.items():
        _size(folder / file, entry)


def find_folder(path: Path) -> Path:
    """The model folder at `path`: the folder itself, or that of a run folder.

    Raises:
        UserError: there is none.
    """
    for folder in (path, path / FOLDER):
        if (folder / MANIFEST).is_file():
            return folder
    if not path.exists():
        raise UserError(f"no such run or model folder: {path}")
    raise UserError(f"{path} holds no packaged model (no {MANIFEST}, no {FOLDER}/{MANIFEST}); has the run finished?")


def _from_s3(url: str, s3: S3Config, scratch: Path) -> Path:
    """Download model.json and the files it lists, and nothing else, into `scratch`."""
    store = open_store(url, s3)
    prefix = next((prefix for prefix in ("", f"{FOLDER}/") if store.exists(prefix + MANIFEST)), None)
    if prefix is None:
        raise UserError(f"{url} holds no packaged model (no {MANIFEST}, no {FOLDER}/{MANIFEST})")
    if store.size(prefix + MANIFEST) > MAX_MANIFEST_BYTES:
        raise UserError(f"{url}/{prefix}{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    store.download(prefix + MANIFEST, scratch / MANIFEST)
    for file in read_manifest(scratch).files:
        try:
            store.download(prefix + file, scratch / file)
        except MissingObject as error:
            raise UserError(f"{url} is incomplete: {file} is missing") from error
    return scratch


def open_folder(folder: Path, source: str, device: torch.device | str = "cpu") -> tuple[ModelManifest, SamplingModel]:
    """Load the model of a folder with model.json; `source` names it in messages."""
    manifest = read_manifest(folder)
    states: dict[str, dict[str, Tensor]] = {file: _read(folder / file, entry) for file, entry in manifest.files.items()}
    dim = manifest.generator.latent_dim
    try:
        with torch.device("meta"):  # no memory is allocated before the shapes are checked
            generator = build_generator(manifest.generator, manifest.resolution, manifest.channels)
            samplers = {
                kind: build_network(entry.config, dim, manifest.constraint) for kind, entry in manifest.samplers.items()
            }
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{MANIFEST} of {source} describes networks that cannot be built: {one_line(error)}") from error
    _assign(generator, states[GENERATOR], GENERATOR, source)
    for kind, network in samplers.items():
        file = manifest.samplers[kind].file
        _assign(network, states[file], file, source)
    return manifest, SamplingModel(generator.to(device), samplers, manifest.own, source)


def _read(path: Path, entry: FileEntry) -> dict[str, Tensor]:
    """The tensors of a file, checked against its size and SHA-256; the hashed bytes are the parsed bytes."""
    _size(path, entry)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {REMEDY}") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(f"{path} does not have the SHA-256 in {MANIFEST}; the model is damaged; {REMEDY}")
    try:
        state = safetensors.torch.load(content)
    except Exception as error:  # besides its own errors, those of torch for unsupported types and shapes
        raise UserError(f"{path} is not a safetensors file: {one_line(error, 300)}") from error
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{path}: {name[:100]} is of type {tensor.dtype}, which no packaged model holds")
    _require_finite(state, str(path))
    return state


def _size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {REMEDY}") from error
    if size != entry.size:
        raise UserError(f"{path} has {size} bytes, {MANIFEST} says {entry.size}; {REMEDY}")


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
