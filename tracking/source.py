"""Models and configurations by source: a run folder, an s3:// address or a model of the registry."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ..config.run import Config
from ..config.sections import S3Config
from ..errors import UserError
from ..inference import package
from ..inference.model import SamplingModel, usable_device
from ..inference.package import MANIFEST, ModelManifest
from ..reports.run_folder import read_config
from .registry.client import download
from .registry.lineage import origin


def load_model(source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu") -> SamplingModel:
    """Load the model of a run folder, a model folder, `models:/name@alias`, `models:/name/3` or an s3:// address.

    Args:
        s3: how to reach S3; the default is the environment's configuration.
        device: device to compute on, such as "cuda".
    Raises:
        UserError: no model there, or it is damaged, of an unknown format, or not a packaged model.
        EnvironmentFault: the registry or the store does not respond.
    """
    return open_model(source, s3=s3, device=device)[1]


def open_model(
    source: str | Path, *, s3: S3Config | None = None, device: torch.device | str = "cpu"
) -> tuple[ModelManifest, SamplingModel]:
    """Load a model as `load_model` does, together with its model.json."""
    if not is_registered(source):
        return package.open_model(source, s3=s3, device=device)
    device = usable_device(device)
    with tempfile.TemporaryDirectory(prefix="glann-model-") as scratch:
        found = sorted(download(str(source), Path(scratch)).rglob(MANIFEST))
        if len(found) != 1:
            raise UserError(f"{source} is not a glann model: it holds {len(found)} files named {MANIFEST}")
        return package.open_folder(found[0].parent, str(source), device)


def run_config(source: str | Path) -> Config:
    """The configuration that a run folder or a registered model was made with.

    Raises:
        UserError: no such run or model.
    """
    return origin(str(source)) if is_registered(source) else read_config(source)


def is_registered(source: str | Path) -> bool:
    """Whether a source is a model of the registry."""
    return str(source).startswith("models:/")
