"""The history of a model's champions: versions, times, users and reasons.

Every promotion and rollback is stored as a tag of the model (`glann.history.000001`, ...), and described by
tags of the new champion's version. The alias is moved last: an event whose command was interrupted before that
has no effect, and `previous` and later events take this into account.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from ...config.section import Section
from ...errors import UserError, redact
from ...storage.author import user_at_host
from ...storage.journal import strict_json
from . import catalogue
from .catalogue import ModelEntry, Version
from .client import CHAMPION
from .lineage import describe_registered

if TYPE_CHECKING:
    from mlflow import MlflowClient

HISTORY, PROMOTION, ROLLBACK = "glann.history.", "glann.promotion.", "glann.rollback."
MAX_WHY = 1000  # an event must fit into a tag of 5000 characters
NONE = "none"


class ChampionChange(Section):
    """A change of champion."""

    action: Literal["promote", "rollback"]
    version: int = Field(description="the new champion")
    previous: int | None = Field(description="the former champion")
    at: str = Field(description="UTC, ISO 8601")
    by: str = Field(description="user@host")
    why: str = ""
    forced: bool = False


class Measured(Section):
    """The measurement that decided a promotion."""

    metric: str
    extractor: str
    samples: int
    seed: int
    data: str = Field(description="address of the reference images")
    data_fingerprint: str
    rows: int = Field(description="number of reference images")
    value: float
    champion_value: float | None = Field(description="value of the former champion, under the same conditions")


def history(entry: ModelEntry) -> list[ChampionChange]:
    """Every change of champion, in chronological order.

    Raises:
        UserError: a tag of the history is damaged.
    """
    events = []
    for key in sorted(key for key in entry.tags if key.startswith(HISTORY)):
        try:
            events.append(ChampionChange.model_validate(strict_json(entry.tags[key])))
        except (ValidationError, ValueError, RecursionError) as error:
            raise UserError(f"the tag {key} of {entry.name} is damaged; remove it from the registry") from error
    return events


def previous(entry: ModelEntry) -> int | None:
    """The champion before the present one, with rollbacks undone; None if there was none."""
    champions: list[int] = []
    for event in history(entry):
        if event.previous is not None:
            _back_to(champions, event.previous)
        if event.action == "rollback":
            _back_to(champions, event.version)
        else:
            champions.append(event.version)
    _back_to(champions, entry.aliases[CHAMPION])
    return champions[-2] if len(champions) > 1 else None


def _back_to(champions: list[int], version: int) -> None:
    """Drop the champions after `version`; one that is not in the history was set by hand, and is appended."""
    if version not in champions:
        champions.append(version)
    while champions[-1] != version:
        champions.pop()


def promote(
    client: MlflowClient, entry: ModelEntry, version: Version, measured: Measured, why: str = "", forced: bool = False
) -> None:
    """Make a version the champion and record the measurement that decided it.

    Raises:
        UserError: the champion was changed since `entry` was read.
    """
    event = _event("promote", entry, version.number, why, forced)
    facts = event.model_dump(mode="json", exclude={"action", "version"}) | measured.model_dump(mode="json")
    _change(client, entry, event, {PROMOTION + key: value for key, value in facts.items()})


def rollback(client: MlflowClient, name: str, why: str = "") -> ChampionChange:
    """Restore the previous champion.

    Raises:
        UserError: there is no champion, no previous one, or its version was deleted.
    """
    entry = catalogue.read(client, name)
    if entry.champion is None:
        raise UserError(f"{name} has no champion to roll back; glann registry promote {name} makes one")
    number = previous(entry)
    if number is None:
        raise UserError(f"{name} had no champion before version {entry.champion.number}; nothing was changed")
    entry.version(number)  # it may have been deleted since
    event = _event("rollback", entry, number, why, False)
    facts = event.model_dump(mode="json", include={"at", "by", "why"}) | {"from": event.previous}
    _change(client, entry, event, {ROLLBACK + key: value for key, value in facts.items()})
    return event


def checked_why(why: str) -> str:
    """Reduce a reason to one line without passwords.

    Raises:
        UserError: the reason is too long.
    """
    why = redact(" ".join(why.split()))
    if len(why) > MAX_WHY:
        raise UserError(f"--why has {len(why)} characters; at most {MAX_WHY} are kept")
    return why


def _event(
    action: Literal["promote", "rollback"], entry: ModelEntry, version: int, why: str, forced: bool
) -> ChampionChange:
    return ChampionChange(
        action=action,
        version=version,
        previous=entry.aliases.get(CHAMPION),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        by=user_at_host(),
        why=checked_why(why),
        forced=forced,
    )


def _change(client: MlflowClient, entry: ModelEntry, event: ChampionChange, tags: dict[str, Any]) -> None:
    """Write an event and its tags, then move the alias."""
    now = catalogue.read(client, entry.name)
    if now.aliases.get(CHAMPION) != event.previous:
        raise UserError(
            f"the champion of {entry.name} was changed by another command meanwhile; check it and try again"
        )
    numbers = [key.removeprefix(HISTORY) for key in now.tags if key.startswith(HISTORY)]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    client.set_registered_model_tag(entry.name, f"{HISTORY}{last + 1:06d}", event.model_dump_json())
    for key, value in tags.items():  # always all of them, so that none remains of an earlier promotion
        client.set_model_version_tag(entry.name, str(event.version), key, _tag(value))
    client.set_registered_model_alias(entry.name, CHAMPION, str(event.version))
    describe_registered(client, entry.name, client.get_model_version(entry.name, str(event.version)))


def _tag(value: Any) -> str:
    if value is None or value == "":
        return NONE
    return str(value).lower() if isinstance(value, bool) else redact(str(value))
