"""Typed, validated and frozen configuration: a YAML recipe plus dotted overrides.

`load(recipe, overrides)` is the only entry point.  Unknown keys and invalid values are rejected
before anything starts, with the key, the given value, the allowed values and the closest key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_serializer, model_validator

from ..errors import UserError, redact
from .address import LocalPath
from .autoencoder import AutoencoderConfig
from .methods import METHODS, Trainer, batched_stages, has_codes, refines, trainer_of, unused_sections, with_unused
from .networks import NetworksConfig
from .parse import explain, kind_of, plain_data, read_value, shown, suggest
from .paths import absolute
from .pixels import PixelsConfig
from .samplers import TAGS, AnySampler, ImleConfig
from .section import Section, Trait
from .sections import (
    UNION_TAGS,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    GeneratorConfig,
    GloConfig,
    LossConfig,
    PreviewConfig,
    S3Config,
)
from .shorthands import SHORT_STAGE_ONE, SHORTHANDS, canonical, with_shorthands
from .tracking import TrackingConfig

COMPARISONS = "compare-"  # prefix of the files of comparisons, beside the recipes
MAX_FAULTS = 20  # reported at once
RECIPES = Path(__file__).parent.parent / "configs"


class Config(Section):
    """One run."""

    name: Annotated[str, Trait.NOT_SEARCHABLE] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="run name; its folder is runs_dir/name"
    )
    seed: Annotated[int, Trait.IN_REGISTRY] = Field(
        0, ge=0, lt=2**32, description="seed of all random numbers of the run"
    )
    runs_dir: Annotated[LocalPath, Trait.RESUMABLE, Trait.NOT_SEARCHABLE] = Field(
        "runs", description="folder of the run folders"
    )
    method: str = Field("glann", description="the stages of the run: " + ", ".join(METHODS))
    stage_one: Annotated[str | None, Trait.NOT_SEARCHABLE] = Field(
        None, description="folder of a run whose codes and generator this one takes over, to train its sampler only"
    )
    data: DataConfig
    s3: S3Config = S3Config()
    generator: GeneratorConfig
    loss: LossConfig = LossConfig()
    glo: GloConfig
    networks: NetworksConfig = NetworksConfig(epochs=1)
    autoencoder: AutoencoderConfig = AutoencoderConfig(epochs=1)
    pixels: PixelsConfig = PixelsConfig(epochs=1)
    sampler: AnySampler = ImleConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    preview: PreviewConfig = PreviewConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_shorthands(cls, tree: Any) -> Any:
        return with_unused(with_shorthands(tree)) if isinstance(tree, dict) else tree

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: Any) -> dict[str, Any]:
        tree: dict[str, Any] = serialize(self)
        return {name: value for name, value in tree.items() if name not in unused_sections(self.method)}

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"no such method{suggest(method, METHODS)}; there are {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _possible(self) -> Self:
        loss, precision = self.loss, self.engine.precision
        if fault := self._fault_of_method() or loss.fault(self.data.resolution, precision) or self.glo.fault():
            raise ValueError(fault)
        if self.generator.kind == "infogan" and self.data.resolution > 64:
            raise ValueError(
                f"generator.kind=infogan makes images up to 64 px, data.resolution is {self.data.resolution}; "
                "use generator.kind=resnet"
            )
        if self.generator.kind == "resnet" and self.data.resolution < 64:
            raise ValueError(
                f"generator.kind=resnet makes images from 64 px, data.resolution is {self.data.resolution}; "
                "use generator.kind=infogan"
            )
        least, most = self.cluster.min_workers, self.cluster.max_workers
        if least > most:
            raise ValueError(f"cluster.workers has min={least} and max={most}; min must not be larger")
        for stage in batched_stages(self.method):
            if (batch := getattr(self, stage).batch_size) < most * self.engine.accumulation:
                raise ValueError(
                    f"{stage}.batch_size={batch} leaves no row for some of {most} workers x engine.accumulation="
                    f"{self.engine.accumulation} micro-batches; use at least {most * self.engine.accumulation}"
                )
        if self.engine.kind == "torch" and (most > 1 or self.engine.zero):
            raise ValueError("engine.kind=torch is one process without ZeRO; set cluster.workers=1 and engine.zero=0")
        if self.checkpoint.use == "best" and self.evaluation.every_epochs is None:
            raise ValueError(
                "checkpoint.use=best takes what was measured while the run trained; set evaluation.every_epochs"
            )
        return self

    def _fault_of_method(self) -> str | None:
        """What is wrong with the method and its sections together, and what to do."""
        if self.trainer != "networks" and self.generator.reference:
            return "generator.reference is for method=gan; leave it out"
        if self.trainer != "glo" and self.loss.cache_features:
            return f"loss.cache_features is not read by method={self.method}; leave it out"
        resolution, accumulation = self.data.resolution, self.engine.accumulation
        if self.trainer == "autoencoder":
            fault = self.autoencoder.fault(self.sampler, resolution, accumulation)
            if fault or not refines(self.method):
                return fault
        elif self.trainer == "pixels":
            return self.pixels.fault(self.sampler.kind)
        elif self.trainer == "glo":
            return None
        elif self.sampler.kind != "prior":
            return f"method={self.method} draws its codes from a fixed distribution; set sampler.kind=prior"
        elif self.stage_one is not None:
            return f"method={self.method} has no stage 1 to take over; leave out from"
        fault = self.networks.fault(resolution, accumulation) or self.networks.fault_of_refinement(refines(self.method))
        return fault or self.networks.fault_of_codes(self.sampler, self.generator)

    @property
    def has_codes(self) -> bool:
        """Whether every image has a code, so that there are reconstructions."""
        return has_codes(self.method)

    @property
    def trainer(self) -> Trainer:
        """The stage that trains the generator, and the section of its keys."""
        return trainer_of(self.method)

    @property
    def constraint(self) -> Literal["sphere", "ball", "none"]:
        """Where codes lie: GLO projects them, all others are free."""
        return self.glo.constraint if self.trainer == "glo" else "none"

    @property
    def batch_size(self) -> int:
        """Global batch of the stage that trains the generator."""
        return int(getattr(self, self.trainer).batch_size)

    @property
    def run_dir(self) -> Path:
        """The run folder: `runs_dir/name`."""
        return Path(self.runs_dir) / self.name

    @property
    def checkpoint_url(self) -> str:
        """Folder or s3:// prefix of this run's checkpoints."""
        if self.checkpoint.url is None:
            return str((self.run_dir / "checkpoints").absolute())
        return f"{self.checkpoint.url.rstrip('/')}/{self.name}/checkpoints"

    @property
    def places(self) -> tuple[str, ...]:
        """All that the run reads images from, and where its checkpoints are."""
        named = self.data.url, self.data.source, self.evaluation.data, self.checkpoint_url
        return tuple(place for place in named if place)

    def with_absolute_paths(self) -> Self:
        """The same configuration with absolute local paths, for processes with another working folder (workers)."""
        data = {"url": absolute(self.data.url), "cache_dir": self.data.cache_dir and absolute(self.data.cache_dir)}
        checkpoint = {"url": self.checkpoint.url and absolute(self.checkpoint.url)}
        evaluation = {"data": self.evaluation.data and absolute(self.evaluation.data)}
        return self.model_copy(
            update={
                "runs_dir": absolute(self.runs_dir),
                "data": self.data.model_copy(update=data),
                "checkpoint": self.checkpoint.model_copy(update=checkpoint),
                "evaluation": self.evaluation.model_copy(update=evaluation),
            }
        )

    def to_yaml(self) -> str:
        """The whole configuration as YAML, which `load` takes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(
    recipe: str | Path, overrides: list[str] | tuple[str, ...] = (), changes: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """Load the configuration of `recipe`, a YAML file or the name of a recipe that ships with glann.

    Args:
        overrides: `dotted.key=value` strings; the value is as typed where the key takes text, and YAML elsewhere.
        changes: overrides as plain data, by dotted key.
    Raises:
        UserError: one line per error.
    """
    path = find_recipe(recipe)
    tree, given = load_tree(path), [*map(read_override, overrides), *changes.items()]
    for key, value in given:
        set_key(tree, key, value)
    read = _read(tree)
    if not isinstance(read, Config):
        alone = _read(load_tree(path))  # only a fault that the file has by itself names the file
        raise _refusal(read, str(path) if not isinstance(alone, Config) and read[0] in alone else "")
    config = read
    require_trainable(config)
    return config


def require_trainable(config: Config) -> None:
    """Refuse combinations that would train something else than configured; runs that earlier versions trained with one
    can still be read.

    Raises:
        UserError: naming the keys, and what to do.
    """
    if config.sampler.untrainable:
        raise UserError(config.sampler.untrainable)
    if not config.generator.normalises:
        return
    if config.engine.accumulation > 1:
        raise UserError(
            f"engine.accumulation={config.engine.accumulation} with generator.batch_norm=true would normalise each "
            "micro-batch by its own statistics and so train something else; set engine.accumulation=1, and to save "
            "memory lower glo.batch_size, use more workers or set generator.batch_norm=false"
        )
    if config.has_codes and config.batch_size == 1:
        raise UserError(
            f"{config.trainer}.batch_size=1 with generator.batch_norm=true would train no code: an image that is "
            "normalised by its own statistics has no gradient; use at least 2, or set generator.batch_norm=false"
        )


def load_tree(path: Path) -> dict[str, Any]:
    """Read the file of a recipe as plain data.

    Raises:
        UserError: not valid YAML, or not sections; in one line.
    """
    try:
        tree = plain_data(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as `data:` and `glo:`, not {kind_of(tree)}")
    try:
        return with_shorthands(tree)
    except ValueError as error:
        raise UserError(f"{error}; in {path}") from error


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe, given by path or by the name of a bundled recipe. Raises UserError if there is none."""
    path = Path(recipe)
    if path.is_file():
        return path
    bundled = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent.as_posix() in (".", "configs") and bundled.is_file():
        return bundled
    names = [file.stem for file in bundled_recipes()]
    close = difflib.get_close_matches(path.stem, names, 1)
    hint = f"did you mean {close[0]}?" if close else "recipes: " + ", ".join(names)
    raise UserError(f"no such recipe: {recipe} ({hint})")


def bundled_recipes() -> list[Path]:
    """The files of the recipes that ship with glann, by name."""
    return sorted(path for path in RECIPES.glob("*.yaml") if not path.name.startswith(COMPARISONS))


def validate(tree: dict[str, Any], where: str) -> Config:
    """Validate plain data, which is from `where`, as a configuration; raises UserError with one line per error."""
    read = _read(tree)
    if not isinstance(read, Config):
        raise _refusal(read, where)
    return read


def _read(tree: dict[str, Any]) -> Config | list[str]:
    """The configuration of plain data, or a line for each of its faults."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        lines = [explain(fault, known_keys(), (*UNION_TAGS, *TAGS)) for fault in faults[:MAX_FAULTS]]
        return lines + ([f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else [])


def _refusal(lines: list[str], where: str) -> UserError:
    return UserError("\n       ".join([f"{lines[0]}; in {where}" if where else lines[0], *lines[1:]]))


def read_override(override: str) -> tuple[str, Any]:
    """Parse `dotted.key=value` to key and value."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"cannot read override {shown(override)}: write section.key=value, e.g. glo.epochs=100")
    try:
        field = known_keys().get(canonical(key.strip()))
        return key.strip(), read_value(text, field and field.annotation)
    except ValueError as error:
        raise UserError(f"cannot read the value of override {shown(override)} as YAML") from error


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of the tree, in place; another `sampler.kind` drops the keys of the one before.

    Raises:
        UserError: the key is one of another kind, or below a value.
    """
    first = key.split(".")[0]
    if first == SHORT_STAGE_ONE:
        key = canonical(key)
    elif first in SHORTHANDS:
        section, discriminator = SHORTHANDS[first]
        node = tree.get(section)
        kind = node.get(discriminator, first) if isinstance(node, dict) else first
        if kind != first:
            raise UserError(f"{key} is a key of {section}.kind={first}, and {section}.kind is {shown(kind)}")
    *parents, leaf = canonical(key).split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {shown(key)}: {parent[:100]} is a value, not a section")
        node = child
    if leaf == "kind" and parents == ["sampler"] and node.get("kind", "imle") != value:
        node.clear()  # drop the keys of the other kind
    node[leaf] = value


def keys_with(trait: Trait) -> tuple[str, ...]:
    """The dotted keys, whole sections among them, that have a trait."""
    found = []
    for name, field in known_keys().items():
        models = [form for form in _forms(field.annotation) if isinstance(form, type) and issubclass(form, Section)]
        if trait in field.metadata or any(trait in model.traits for model in models):
            found.append(name)
    return tuple(found)


def has_trait(key: str, trait: Trait) -> bool:
    """Whether a dotted key, or a section that contains it, has a trait."""
    return any(key == marked or key.startswith(f"{marked}.") for marked in keys_with(trait))


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its field, sections included; of a union, the keys of every member."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        keys.setdefault(prefix + name, field)
        for form in _forms(field.annotation):
            if isinstance(form, type) and issubclass(form, BaseModel):
                for key, inner in known_keys(form, f"{prefix}{name}.").items():
                    keys.setdefault(key, inner)
    return keys


def _forms(annotation: Any) -> list[Any]:
    """An annotation and, of a union, its members."""
    return [annotation, *(get_args(part)[0] if get_args(part) else part for part in get_args(annotation))]


def redacted_config(config: Config) -> Config:
    """The configuration with credentials removed from its addresses."""
    return Config.model_validate(_redacted(config.model_dump(mode="json")))


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
