"""The best checkpoint of a run: the one whose samples measured best while the run trained.

`best.json`, beside the checkpoints, names it: its step, and by which value of which metric. It is written once the
checkpoint is committed, and `retention.retain` keeps that checkpoint whatever its age.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from ...errors import UserError
from ...storage.base import MissingObject, Store
from .layout import DamagedCheckpoint, Json, folder_name, parse, survey

BEST = "best.json"
LAST = "last"
_MAX_BYTES = 1 << 16
_STEP = re.compile(r"(?:step-)?0*(\d{1,15})")

Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class Best(Json):
    """A checkpoint and what its samples measured; the content of best.json."""

    step: int = Field(ge=0)
    metric: Word
    better: Literal["lower", "higher"]
    value: float = Field(allow_inf_nan=False)
    sampler: Word = Field(description="kind of the sampler that drew the samples")
    samples: int = Field(ge=1)
    stage: Word = Field(description="stage that was in training")
    epoch: int = Field(ge=1, description="its epochs so far")

    def beats(self, other: Best | None) -> bool:
        """Whether it takes the place of `other`: not worse, or not comparable, being of another metric or size."""
        if other is None or (self.metric, self.samples) != (other.metric, other.samples):
            return True
        return self.value <= other.value if self.better == "lower" else self.value >= other.value

    def __str__(self) -> str:
        return f"{folder_name(self.step)}, {self.metric} {self.value:.4g} after epoch {self.epoch} of {self.stage}"


def named_best(store: Store) -> Best | None:
    """What best.json says, whatever became of the checkpoint; None without one. Raises DamagedCheckpoint."""
    where = f"{store.url}/{BEST}"
    try:
        if store.size(BEST) > _MAX_BYTES:
            raise DamagedCheckpoint(f"{where} is too large")
        return parse(Best, store.read(BEST), where)
    except MissingObject:
        return None


def usable_best(store: Store) -> Best | None:
    """The best checkpoint; None if none was measured.

    Raises:
        DamagedCheckpoint: it is damaged or gone, or best.json is damaged. Another one never takes its place silently.
    """
    best = named_best(store)
    if best is None:
        return None
    found = survey(store, best.step)
    if best.step not in found.good:
        raise DamagedCheckpoint(f"the best checkpoint ({best}) is {found.damaged.get(best.step, 'gone')}")
    return best


def write_best(store: Store, best: Best) -> None:
    """Name the best checkpoint, in place of the one before."""
    store.write(BEST, (best.model_dump_json(indent=1) + "\n").encode())


def find_step(store: Store, which: str) -> int:
    """The step of a complete checkpoint.

    Args:
        which: `best`, `last`, or a step, such as 1200 or step-001200.
    Raises:
        UserError: there is none. DamagedCheckpoint: it is damaged; no other one takes its place.
    """
    if which == "best":
        best = usable_best(store)
        if best is None:
            raise UserError(
                f"no checkpoint of {store.url} was measured, so none is the best; train with evaluation.every_epochs=N,"
                " or take the last"
            )
        return best.step
    found = survey(store)
    if which == LAST:
        newest = max((*found.good, *found.damaged), default=None)
        if newest is None:
            raise UserError(f"{store.url} holds no checkpoint")
    elif match := _STEP.fullmatch(which):
        newest = int(match[1])
    else:
        raise UserError(f"{which[:100]!r} is no checkpoint: use best, last, or a step such as 1200")
    others = ", ".join(map(str, found.good)) or "none"
    if newest in found.damaged:
        raise DamagedCheckpoint(f"{found.damaged[newest]}; good ones: {others}")
    if newest not in found.good:
        raise UserError(f"{store.url} holds no checkpoint of step {newest}; there are: {others}")
    return newest
