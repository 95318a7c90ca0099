"""Contents of a run's checkpoint, and restoring a worker from one.

Shapes: n rows of a worker. A checkpoint does not depend on the number of workers (`cluster.checkpoints`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ...cluster.checkpoints import reader
from ...cluster.checkpoints.layout import DamagedCheckpoint, parse
from ...cluster.checkpoints.pieces import LazyTensor
from ...cluster.latents import LatentTable
from ...config.run import Config, redacted_config
from ...datasets.index import Index
from ...errors import UserError
from ...models.comm import broadcast, rank, world_size
from ...storage.base import Store
from ..stage import State

Count = Annotated[int, Field(ge=0, lt=2**62)]
# Name of a stage or a network; in file names `_` separates it from a group.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]


@dataclass
class Position:
    """Position of a run: the next step is `step` of `epoch` of `stage`.

    `serial` numbers the positions at which a checkpoint is possible; it names checkpoints and never decreases.
    """

    stage: Name
    epoch: Count = 0
    step: Count = 0
    serial: Count = 0


@dataclass
class Saved:
    """Contents of a checkpoint: states of networks by name (with lazy tensors during training)."""

    position: Position
    networks: dict[str, State] = field(default_factory=dict)

    def files(self) -> dict[str, dict[str, Tensor | LazyTensor]]:
        """Groups of tensors by file name."""
        return {
            file_name(network, group): tensors
            for network, state in self.networks.items()
            for group, tensors in state.items()
            if isinstance(tensors, dict)
        }

    def state(self, index: Index, rows: int, config: Config, weights: str | None = None) -> dict[str, Any]:
        """Counters, and what they belong to; the configuration in it survives a damaged config.yaml.

        Args:
            weights: SHA-256 of the weights of the loss network; None if nothing is trained with it.
        """
        return {
            "position": asdict(self.position),
            "updates": {network: state["updates"] for network, state in self.networks.items()},
            "rows": rows,
            "fingerprint": index.fingerprint,
            "loss_weights": weights,
            "config": redacted_config(config).model_dump(mode="json"),
        }


def load(
    store: Store, serial: int, index: Index, rows: int, weights: str | None = None, counters_only: bool = False
) -> Saved:
    """The networks and counters of a checkpoint.

    Args:
        weights: SHA-256 of the weights of the loss network, to resume with; None if nothing is trained with it.
        counters_only: leave out the networks, which another worker reads and broadcasts (`share_networks`).
    Raises:
        UserError: the checkpoint was made with other data or other weights. DamagedCheckpoint: its contents are not
            what was written.
    """
    state, saved = load_any(store, serial, counters_only)
    if (state["rows"], state["fingerprint"]) != (rows, index.fingerprint):
        raise UserError(
            f"{store.url} was trained on other data ({state['rows']} rows, fingerprint "
            f"{str(state['fingerprint'])[:12]}) than data.url holds ({rows} rows, {index.fingerprint[:12]}); "
            "start a new run with name=..."
        )
    before = state.get("loss_weights")
    if weights is not None and before is not None and weights != before:
        raise UserError(
            f"{store.url} was trained with other weights of the loss network (SHA-256 {before[:12]}) than loss.weights "
            f"holds now ({weights[:12]}); put the former file back, or start a new run with name=..."
        )
    return saved


def load_any(store: Store, serial: int, counters_only: bool = False) -> tuple[dict[str, Any], Saved]:
    """The counters of a checkpoint (`Saved.state`), and its networks, of whatever data. Raises DamagedCheckpoint."""
    state = checked_state(reader.load_state(store, serial), f"{store.url}: the state of step {serial}")
    if counters_only:
        return state, Saved(Position(**state["position"]))
    present = reader.names(store, serial)
    networks = {}
    for name, updates in state["updates"].items():
        if updates is None:  # a network of a later stage, as older checkpoints count them
            continue
        if name not in present:
            raise DamagedCheckpoint(f"{store.url}: step {serial} counts updates of the {name} but does not contain it")
        files = [file for file in present if file == name or file.startswith(f"{name}_")]
        groups = {group_name(name, file): reader.load_tensors(store, serial, file) for file in files}
        networks[name] = {"updates": updates} | groups
    return state, Saved(Position(**state["position"]), networks)


def share_networks(networks: dict[str, State], device: torch.device) -> dict[str, State]:
    """Rank 0's networks, on the CPU of every worker; the arguments of other ranks are ignored. Collective.

    Args:
        device: on which collectives run.
    """
    if world_size() == 1:
        return networks
    text = json.dumps(_outline(networks)).encode() if rank() == 0 else b""
    length = int(broadcast(torch.tensor(len(text), device=device)))
    data = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8).to(device)
    outline = json.loads(bytes(broadcast(data).tolist()))
    shared: dict[str, State] = {}
    for network, (updates, groups) in outline.items():
        shared[network] = {"updates": updates}
        for group, tensors in groups.items():
            shared[network][group] = {}
            for name, (dtype, shape) in tensors.items():
                own = networks[network][group][name] if rank() == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
                shared[network][group][name] = broadcast(own.contiguous().to(device)).cpu()
    return shared


def _outline(networks: dict[str, State]) -> dict[str, Any]:
    """By network: its updates, and type and shape of its tensors by group and name."""
    return {
        network: (
            state["updates"],
            {
                group: {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
                for group, tensors in state.items()
                if isinstance(tensors, dict)
            },
        )
        for network, state in networks.items()
    }


class _State(BaseModel):
    """Schema of `Saved.state`."""

    model_config = ConfigDict(strict=True)
    position: Position
    updates: dict[Name, Annotated[float, Field(ge=0, lt=2**62)] | None] = Field(min_length=1)
    rows: Count
    fingerprint: str
    config: dict[str, Any] | None = None  # earlier versions did not save it, nor the next
    loss_weights: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


def checked_state(state: dict[str, Any], where: str) -> dict[str, Any]:
    """Validate the counters of a checkpoint. Raises DamagedCheckpoint."""
    parse(_State, json.dumps(state).encode(), where)
    return state


def restore_rows(store: Store, serial: int, latents: LatentTable, position: Position) -> None:
    """Load a worker's rows of a checkpoint into its latent table, independent of the workers that wrote them."""
    if not latents.rows:  # of a method without codes
        return
    done = (position.epoch, position.step - 1)  # the last update of these rows
    latents.restore(reader.load_rows(store, serial, latents.rows), done)


def file_name(network: str, group: str) -> str:
    """The file of a group of a network's tensors: `generator`, `generator_exp_avg`."""
    return network if group == "weights" else f"{network}_{group}"


def group_name(network: str, file: str) -> str:
    """The group of tensors in a file of a network."""
    return file.removeprefix(f"{network}_") if file != network else "weights"
