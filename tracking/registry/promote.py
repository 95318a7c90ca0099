"""`glann registry promote`: compare challenger and champion under the same conditions, and keep the better one.

Both draw the same number of images from the same noise, and are compared with the same images by the same
extractor. A challenger that is not worse becomes champion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...config.run import Config
from ...errors import UserError, redact
from ...inference.model import SamplingModel
from ...inference.package import ModelManifest
from ...metrics.judge import Judge, build_judge
from ...metrics.reference import moved, open_images, require_same
from ...metrics.spec import METRICS, frechet_metric
from ...metrics.team import Team, counting
from ..source import open_model
from . import catalogue
from . import history as promotion
from .catalogue import Version
from .client import opened
from .history import Measured
from .lineage import run_config

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A version with its loaded model."""

    version: Version
    manifest: ModelManifest
    model: SamplingModel


@dataclass(frozen=True)
class Conditions:
    """How the contenders are measured; None takes the configuration of the challenger's run.

    on_images: called with the images that were worked on, and their number in all.
    """

    data: str | None = None
    extractor: str | None = None
    samples: int | None = None
    seed: int = 0
    device: str = "auto"
    on_images: Callable[[int, int], None] = lambda done, total: None


def promote(
    name: str, number: int | None, conditions: Conditions, *, why: str = "", force: bool = False, say: Say = print
) -> Version:
    """Make version `number` of a model, or its challenger, the champion, unless it is worse.

    Args:
        force: promote it also if it is worse, or cannot be compared with the champion.
        say: called with each line of output.
    Raises:
        UserError: no such version, or it is rejected; nothing has changed then.
    """
    why = promotion.checked_why(why)
    with opened(f"no model {name}") as client:
        entry = catalogue.read(client, name)
        version, champion = entry.candidate(number), entry.champion
        if version == champion:
            say(f"version {version.number} of {name} is the champion already; nothing was changed")
            return version
        if version.run_id is None:
            raise UserError(f"{version.uri} has no MLflow run, so its training data is unknown")
        config = moved(run_config(client, version.run_id), conditions.data)
        challenger = _open(version, conditions.device)
        holder = _open(champion, conditions.device) if champion else None
        objection = _incomparable(challenger, holder) if holder else None
        _refuse(objection, force)
        measured = _measure(challenger, holder, config, conditions, say)
        objection = objection or _worse(challenger, holder, measured)
        _refuse(objection, force)
        if objection:
            say(f"forced: {objection}")
        promotion.promote(client, entry, version, measured, why, forced=objection is not None)
    say(f"version {version.number} of {name} is the champion" + (f", instead of {champion.number}" if champion else ""))
    return version


def _open(version: Version, device: str) -> Contender:
    manifest, model = open_model(version.uri, device=device)
    return Contender(version, manifest, model)


def _measure(
    challenger: Contender, holder: Contender | None, config: Config, conditions: Conditions, say: Say
) -> Measured:
    """Measure both against all rows that either was trained on, or all images of another address."""
    contenders = [challenger, *([holder] if holder else [])]
    rows = None if conditions.data else max(contender.manifest.rows for contender in contenders)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_rows": rows})})
    images = open_images(config)
    require_same(images, challenger.manifest, config, conditions.data)
    extractor = conditions.extractor or config.evaluation.extractor
    samples = conditions.samples or config.evaluation.samples
    metric = frechet_metric(extractor)
    team = Team(on_images=counting(conditions.on_images, len(images) + len(contenders) * samples))
    judge = build_judge(config, images, [metric], samples, conditions.seed, challenger.model.device, team=team)
    values = [_value(judge, contender, say) for contender in contenders]
    return Measured(
        metric=metric.name,
        extractor=extractor,
        samples=samples,
        seed=conditions.seed,
        data=redact(config.data.url),
        data_fingerprint=images.index.fingerprint,
        rows=len(images),
        value=values[0],
        champion_value=values[1] if holder else None,
    )


def _value(judge: Judge, contender: Contender, say: Say) -> float:
    [result] = judge.measure(contender.model)
    say(
        f"version {contender.version.number}: {result.metric} {result.value:.6g} "
        f"({judge.samples} samples of seed {judge.seed}, {judge.real.whole.count} images)"
    )
    return result.value


def _incomparable(challenger: Contender, holder: Contender) -> str | None:
    """The reason why the two cannot be compared, or None."""
    ours, theirs = challenger.manifest, holder.manifest
    for what, mine, other in (
        ("at", f"{ours.resolution} px", f"{theirs.resolution} px"),
        ("on data", ours.fingerprint[:12], theirs.fingerprint[:12]),
    ):
        if mine != other:
            return (
                f"version {challenger.version.number} of {challenger.version.name} was trained {what} {mine}, "
                f"the champion, version {holder.version.number}, {what} {other}"
            )
    return None


def _worse(challenger: Contender, holder: Contender | None, measured: Measured) -> str | None:
    """The message that the challenger is worse, with the values, or None."""
    if holder is None or measured.champion_value is None:
        return None
    lower, higher = measured.value, measured.champion_value
    if METRICS[measured.metric].better == "higher":
        lower, higher = higher, lower
    if lower <= higher:
        return None
    return (
        f"version {challenger.version.number} of {challenger.version.name} is worse than the champion, version "
        f"{holder.version.number}: {measured.metric} {measured.value:.6g} against {measured.champion_value:.6g}"
    )


def _refuse(objection: str | None, force: bool) -> None:
    if objection and not force:
        raise UserError(f"{objection}; nothing was changed; --force promotes it anyway")
