"""The content of the model registry: models, their versions, and champion and challenger of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UserError, redact
from ...metrics.result import canonical_keys
from .client import CHALLENGER, CHAMPION, FIRST
from .lineage import FINGERPRINT, METRIC
from .models import checked

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Version:
    """A version of a registered model; `created` is in seconds since 1970."""

    name: str
    number: int
    run_id: str | None
    created: float
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def metrics(self) -> dict[str, str]:
        """Metrics by key, as text."""
        return canonical_keys(
            {key.removeprefix(METRIC): tag for key, tag in self.tags.items() if key.startswith(METRIC)}
        )

    @property
    def fingerprint(self) -> str:
        return self.tags.get(FINGERPRINT, "")


@dataclass(frozen=True)
class ModelEntry:
    """A registered model with its versions, the newest first; `tags` are those of the model."""

    name: str
    aliases: dict[str, int]
    tags: dict[str, str]
    versions: list[Version]

    def version(self, number: int) -> Version:
        """The version of that number. Raises UserError if there is none."""
        for version in self.versions:
            if version.number == number:
                return version
        there = ", ".join(str(version.number) for version in self.versions[:10]) or "none"
        raise UserError(f"{self.name} has no version {number}; there is {there}")

    def aliases_of(self, number: int) -> list[str]:
        return sorted(alias for alias, aliased in self.aliases.items() if aliased == number)

    @property
    def champion(self) -> Version | None:
        return self.version(self.aliases[CHAMPION]) if CHAMPION in self.aliases else None

    def candidate(self, number: int | None = None) -> Version:
        """The version of that number, or the challenger.

        Raises:
            UserError: there is none.
        """
        if number is not None:
            return self.version(number)
        if CHALLENGER not in self.aliases:
            raise UserError(
                f"{self.name} has no challenger; name a version: glann registry promote {self.name} --version V"
            )
        return self.version(self.aliases[CHALLENGER])


def names(client: MlflowClient) -> list[str]:
    """The names of all registered models."""
    return sorted(model.name for model in _all(client.search_registered_models))


def read(client: MlflowClient, name: str) -> ModelEntry:
    """Read a registered model and its versions.

    Raises:
        UserError: no such model.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(checked(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        there = ", ".join(names(client)[:10])
        hint = f"there is {there}" if there else FIRST
        raise UserError(f"no model {name} at {redact(client.tracking_uri)}; {hint}") from error
    versions = [
        Version(name, int(found.version), found.run_id, found.creation_timestamp / 1000, dict(found.tags))
        for found in _all(client.search_model_versions, filter_string=f"name='{name}'")
    ]
    return ModelEntry(
        name,
        {alias: int(number) for alias, number in model.aliases.items()},
        dict(model.tags),
        sorted(versions, key=lambda version: -version.number),
    )


def _all(search: Any, **how: Any) -> Iterator[Any]:
    """The items of all pages of a search."""
    token = None
    while True:
        page = search(page_token=token, **how)
        yield from page
        token = page.token
        if not token:
            return
