"""What a user names as a source: a run folder, an s3:// address or a model of the registry, opened."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ..config.run import Config
from ..config.sections import S3Config
from ..errors import UserError
from ..inference import package
from ..inference.model import SamplingModel
from ..inference.package import MANIFEST, ModelManifest
from ..reports.run_folder import read_config
from .registry.client import download
from .registry.lineage import origin


def load_model(source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu") -> SamplingModel:
    """The model of a run folder, a model folder, `models:/name@alias`, `models:/name/3` or an s3:// address of either.

    Args:
        s3: how S3 is reached; the default is the environment's way.
        device: where to compute, such as "cuda".
    Raises:
        UserError: nothing is there, or it is damaged, of another format, or not a packaged model.
        EnvironmentFault: the registry or the store does not answer.
    """
    return open_model(source, s3=s3, device=device)[1]


def open_model(
    source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu"
) -> tuple[ModelManifest, SamplingModel]:
    """The same with its model.json, which says what data it was trained on."""
    if not is_registered(source):
        return package.open_model(source, s3=s3, device=device)
    with tempfile.TemporaryDirectory(prefix="glann-model-") as scratch:
        found = sorted(download(str(source), Path(scratch)).rglob(MANIFEST))
        if len(found) != 1:
            raise UserError(f"{source} is not a glann model: it holds {len(found)} files named {MANIFEST}")
        return package.open_folder(found[0].parent, str(source), device)


def run_config(source: str | Path) -> Config:
    """The configuration that a run folder or a registered model was made with.

    Raises:
        UserError: neither is there.
    """
    return origin(str(source)) if is_registered(source) else read_config(source)


def is_registered(source: str | Path) -> bool:
    """Whether it names a model of the registry."""
    return str(source).startswith("models:/")
