"""What a run's checkpoint holds, and how a worker goes on from one.

Shapes: n rows of a worker. A checkpoint knows no number of workers (`cluster.checkpoints`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ...cluster.checkpoints import pieces, reader
from ...cluster.checkpoints.layout import DamagedCheckpoint, parse
from ...cluster.latents import LatentTable
from ...config.run import Config, redacted_config
from ...datasets.index import Index
from ...errors import UserError
from ...storage.base import Store

Count = Annotated[int, Field(ge=0, lt=2**62)]
NETWORKS = {
    "generator": ("weights", "ema", "exp_avg", "exp_avg_sq"),
    "mapping": ("weights", "exp_avg", "exp_avg_sq"),
}


@dataclass
class Position:
    """Where a run stands: the next thing to do is `step` of `epoch` of `stage`.

    `serial` counts the steps of stage 1 and the epochs of stage 2; it names checkpoints and never goes back.
    """

    stage: Literal["glo", "imle", "done"] = "glo"
    epoch: Count = 0
    step: Count = 0
    serial: Count = 0


@dataclass
class Saved:
    """What is trained, as it is saved: states of `Engine` (while it trains, `Engine.live`) and `MappingTrainer`.

    None where there is none yet.
    """

    position: Position
    generator: dict[str, Any] | None = None
    mapping: dict[str, Any] | None = None

    def files(self) -> dict[str, dict[str, Tensor | pieces.Live]]:
        """Groups of tensors by file name."""
        return {
            file_name(network, key): state[key]
            for network, state in (("generator", self.generator), ("mapping", self.mapping))
            if state is not None
            for key in NETWORKS[network]
            if key in state
        }

    def state(self, index: Index, rows: int, config: Config) -> dict[str, Any]:
        """Counters and what they belong to; the configuration in it outlives a damaged config.yaml."""
        return {
            "position": asdict(self.position),
            "updates": {
                "generator": self.generator and self.generator["updates"],
                "mapping": self.mapping and self.mapping["updates"],
            },
            "rows": rows,
            "fingerprint": index.fingerprint,
            "config": redacted_config(config).model_dump(mode="json"),
        }


def load(store: Store, serial: int, index: Index, rows: int) -> Saved:
    """The networks and counters of a checkpoint.

    Raises:
        UserError: the checkpoint was made with other data. DamagedCheckpoint: it is not what was written.
    """
    state = checked_state(reader.load_state(store, serial), f"{store.url}: the state of step {serial}")
    if (state["rows"], state["fingerprint"]) != (rows, index.fingerprint):
        raise UserError(
            f"{store.url} was trained on other data ({state['rows']} rows, fingerprint "
            f"{str(state['fingerprint'])[:12]}) than data.url holds ({rows} rows, {index.fingerprint[:12]}); "
            "start a new run with name=..."
        )
    present = reader.names(store, serial)

    def network(name: str) -> dict[str, Any] | None:
        if state["updates"][name] is None:
            return None
        if name not in present:
            raise DamagedCheckpoint(f"{store.url}: step {serial} counts updates of the {name} and does not hold it")
        groups = [key for key in NETWORKS[name] if file_name(name, key) in present]
        tensors = {key: reader.load_tensors(store, serial, file_name(name, key)) for key in groups}
        return {"updates": state["updates"][name]} | tensors

    return Saved(Position(**state["position"]), network("generator"), network("mapping"))


class _State(BaseModel):
    """What `Saved.state` wrote."""

    model_config = ConfigDict(strict=True)
    position: Position
    updates: dict[Literal["generator", "mapping"], Annotated[float, Field(ge=0, lt=2**62)] | None] = Field(min_length=2)
    rows: Count
    fingerprint: str
    config: dict[str, Any] | None = None  # earlier versions did not save it


def checked_state(state: dict[str, Any], where: str) -> dict[str, Any]:
    """The counters of a checkpoint, if they are of the form that is written. Raises DamagedCheckpoint."""
    parse(_State, json.dumps(state).encode(), where)
    return state


def restore_rows(store: Store, serial: int, latents: LatentTable, rows: range, position: Position) -> None:
    """Fill a worker's latent table with its rows of a checkpoint, whatever workers wrote them."""
    done = (position.epoch, position.step - 1)  # the last update that the rows have seen
    latents.restore(reader.load_rows(store, serial, rows), done)


def final_weights(generator: dict[str, Any]) -> dict[str, Tensor]:
    """What images are made with: the moving average where there is one, buffers as they are."""
    return generator["weights"] | generator.get("ema", {})


def file_name(network: str, key: str) -> str:
    return network if key == "weights" else f"{network}_{key}"
