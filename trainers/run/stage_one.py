"""Start of a run from the finished stage 1 of another run: `glann train RECIPE from=RUN`.

The new run's first checkpoint is made of the other's newest one: its codes, its generator and encoder, and the position
at the beginning of the second stage. From there on it is a run like any other.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...cluster.checkpoints import reader, retention
from ...cluster.checkpoints.layout import Files
from ...cluster.checkpoints.pieces import write_rows
from ...cluster.checkpoints.writer import CheckpointWriter
from ...cluster.snapshot import Snapshot
from ...config.run import Config
from ...datasets.index import Index
from ...datasets.reader import ImageRows
from ...errors import UserError
from ...reports.run_folder import read_config
from ...storage.base import Store
from ...storage.open import open_store
from ..glo import GENERATOR
from ..stage import ENCODER, stage_infos
from .folder import differences
from .state import Position, Saved, load

# The data are compared by their fingerprint.
OF_STAGE_TWO = ("name", "seed", "stage_one", "sampler", "data.url")
UNREFINED = {"ae-ot-gan": "autoencoder"}  # method with the same stage 1 whose generator nothing trains afterwards
KEPT = ("weights", "ema", "updates")  # of the networks, which stage 2 does not train


def require_same_stage_one(config: Config) -> None:
    """Refuse to start from a run whose stage 1 is of another configuration.

    Raises:
        UserError: naming the first keys that differ; or there is no such run.
    """
    there = read_config(Path(config.stage_one or ""))
    if there.method in UNREFINED:
        raise UserError(
            f"from={config.stage_one} is a run of method={there.method}, which trains the generator of its stage 1 "
            f"further; give one of method={UNREFINED[there.method]}"
        )
    differing = stage_one_differences(there, config)
    if differing:
        raise UserError(
            f"from={config.stage_one} has a stage 1 of another configuration: {', '.join(differing[:3])}; use its "
            "recipe and change only sampler.*"
        )


def stage_one_differences(there: Config, here: Config) -> list[str]:
    """`key is A there and B here` for every key by which two configurations train another stage 1.

    The generator of a refined run is no longer that of its stage 1, so none starts from there.
    """
    if method := UNREFINED.get(here.method):
        here = here.model_copy(update={"method": method})
    return [
        line
        for line in differences(there, here)
        if not any((key := line.split(" ")[0]) == own or key.startswith(f"{own}.") for own in OF_STAGE_TWO)
    ]


def start_from(config: Config, index: Index, store: Store, fence: Callable[[], None]) -> None:
    """Write the first checkpoint of a run into `store`, which holds none.

    Args:
        fence: raises if another command has taken over the run.
    Raises:
        UserError: the other run has not completed stage 1, or was trained on other data.
    """
    require_same_stage_one(config)
    rows = len(ImageRows(config.data.url, config.s3, max_rows=config.data.max_rows))
    there = read_config(Path(config.stage_one or ""))
    source = open_store(there.checkpoint_url, there.s3)
    step = retention.latest(source)
    saved = None if step is None else load(source, step, index, rows)
    if saved is None or step is None or saved.position.stage == next(iter(stage_infos(there))):
        raise UserError(
            f"from={config.stage_one} has not completed stage 1; resume it with its own `glann train` first"
        )
    codes = reader.load_rows(source, step, range(rows))
    networks = {
        name: {key: value for key, value in saved.networks[name].items() if key in KEPT}
        for name in (GENERATOR, ENCODER)
        if name in saved.networks
    }
    first = Saved(Position(list(stage_infos(config))[1]), networks)
    table = {name: torch.from_numpy(array) for name, array in codes.items()}
    writer = CheckpointWriter(
        store, rank=0, world=1, keep=config.checkpoint.keep, timeout=config.checkpoint.timeout_s, fence=fence
    )
    writer.save(0, tensors=first.files(), latents=LoadedRows(table), state=first.state(index, rows, config))
    writer.wait()


class LoadedRows:
    """Rows of a latent table in memory, for the writer of checkpoints; [N, ...] each."""

    def __init__(self, table: dict[str, Tensor]) -> None:
        self.table = table

    def start_saving(self, store: Store, folder: str, block_bytes: int) -> Callable[[], Files | None]:
        files = write_rows(store, folder, 0, Snapshot(self.table), block_bytes)
        return lambda: files
