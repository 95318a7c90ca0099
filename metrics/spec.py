"""The table of metrics: name, meaning, direction and computation of each.

Everything that shows, compares or measures a metric reads `METRICS`. To add a metric, add an entry:

    METRICS["worst"] = Metric("worst", "Worst pixel", "largest difference of a pixel, range 0 to 1", "lower", "{:.3f}",
                              Reconstructions(lambda fake, real: difference(fake, real).abs().flatten(1).amax(1)))

A function of `METRICS_OF_FEATURES` adds a metric for every extractor.

Legend: B batch, D latent dimension, F feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, cast

from torch import Tensor

from ..config.parse import shown, suggest
from ..errors import UserError
from .classes import ClassShares, inception_score
from .copying import Copying, copying_of_codes
from .features.extractor import EXTRACTORS, classifier_head, extractor_spec
from .frechet import FeatureMoments, frechet_distance
from .kernel import kernel_distance
from .manifold import compare_manifolds
from .modes import count_modes
from .perceptual import perceptual_distance
from .prd import compare_distributions
from .reconstruction import l1, psnr
from .tally import KeptFeatures, Tally

ALL = "all"  # of the groups in `evaluation.metrics`
CODES = "codes"  # the group of metrics in the space of codes
NOT_FID = "Not FID: compare it only with itself"

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Reconstructions:
    """The metric is a mean over training images and their reconstructions; it needs the latent codes.

    per_image: uint8 `fake_BCHW`, `real_BCHW` -> float64 `value_B`.
    extractor: if given, `per_image` takes the `Extractor` of that name as a third argument.
    """

    per_image: Callable[..., Tensor]
    extractor: str | None = None


@dataclass(frozen=True)
class Samples:
    """The metric compares samples with the images of a reference set.

    Metrics with the same extractor and tally share one tally, and those with the same `compare` one comparison.

    tally: makes an empty tally, to be updated with uint8 images [B, C, H, W] or their features [B, F].
    compare: (tally of the reference set, tally of the samples) -> comparison.
    extractor: the extractor of the features; None: the images themselves.
    value: the value of a comparison. deviation: its standard deviation, of the metrics that know it.
    held_out: the metric needs a reference set of held-out images; `compare` takes the tally of the training images
        in front of the two others.
    codes: the tally sees latent codes [B, D] in place of images, and the reference set is the training codes.
    """

    tally: Callable[[], Tally]
    compare: Callable[..., Any]
    extractor: str | None = None
    value: Callable[[Any], float] = float
    deviation: Callable[[Any], float] | None = None
    held_out: bool = False
    codes: bool = False


@dataclass(frozen=True)
class Metric:
    """One metric.

    name: key of stored values. title, meaning: text for display. format: format of a displayed value.
    note: a caution that is shown with every value.
    decibels: whether it is logarithmic, so that values are compared by difference and not by ratio.
    group: it is measured where `evaluation.metrics` names this group; None: always.
    bounded: it is also measured of reconstructions, which show how good samples of this stage 1 can be, and of real
        images, which show how good any can be.
    """

    name: str
    title: str
    meaning: str
    better: Better
    format: str
    needs: Reconstructions | Samples
    note: str = ""
    decibels: bool = False
    group: str | None = None
    bounded: bool = False

    @property
    def of_samples(self) -> bool:
        """Whether its value depends on the sampler."""
        return isinstance(self.needs, Samples)

    @property
    def held_out(self) -> bool:
        """Whether it needs held-out images beside the training images."""
        return isinstance(self.needs, Samples) and self.needs.held_out

    @property
    def extractor(self) -> str | None:
        """The feature extractor of the metric, if any."""
        return self.needs.extractor

    def explained(self) -> str:
        """The meaning of a value, for display."""
        return f"{self.meaning}; {self.better} is better" + (f". {self.note}" if self.note else "")


def frechet_name(extractor: str) -> str:
    """The name of the Fréchet distance on an extractor's features; `fid` for Inception's."""
    return "fid" if extractor == "inception" else f"fd_{extractor}"


def frechet_metric(extractor: str) -> Metric:
    """The Fréchet distance on an extractor's features.

    Raises:
        UserError: no such extractor.
    """
    extractor_spec(extractor)
    return METRICS[frechet_name(extractor)]


def measured_with(extractor: str, groups: Collection[str] = ()) -> list[Metric]:
    """The metrics measured with `evaluation.extractor` and `evaluation.metrics`: none of other extractors."""
    return [
        metric
        for metric in METRICS.values()
        if metric.extractor in (None, extractor) and (metric.group is None or ALL in groups or metric.group in groups)
    ]


def best_metric(extractor: str, name: str | None) -> Metric:
    """The metric of samples by which checkpoints are compared, from `evaluation.extractor` and `evaluation.best`.

    Raises:
        UserError: no such metric, or not one that can be measured while a run trains.
    """
    if name is None:
        return frechet_metric(extractor)
    possible = {
        metric.name: metric
        for metric in METRICS.values()
        if isinstance(metric.needs, Samples) and not (metric.held_out or metric.needs.codes)
    }
    if name not in possible:
        raise UserError(
            f"evaluation.best={shown(name)} is no metric of samples against the training images"
            f"{suggest(name, possible)}; of evaluation.extractor={extractor} there are "
            + ", ".join(metric.name for metric in possible.values() if metric.extractor in (None, extractor))
        )
    if possible[name].extractor not in (None, extractor):
        raise UserError(
            f"evaluation.best={name} is of another extractor than evaluation.extractor={extractor}; change one of them"
        )
    return possible[name]


def metric_families() -> dict[str, list[Metric]]:
    """All metrics by name, those that differ in nothing but the extractor together under `NAME_EXTRACTOR`."""
    families: dict[str, list[Metric]] = {}
    for metric in METRICS.values():
        name = metric.name
        if metric.extractor is not None:
            name = name.removesuffix(metric.extractor) + "EXTRACTOR" if name.endswith(metric.extractor) else name
        families.setdefault(name, []).append(metric)
    return families


def _frechet(extractor: str) -> Iterator[Metric]:
    needs = Samples(lambda: FeatureMoments.empty(extractor_spec(extractor).dim), frechet_distance, extractor)
    name, title, format, note = frechet_name(extractor), f"Fréchet distance ({extractor})", "{:.4g}", NOT_FID
    meaning = f"Fréchet distance of {extractor} features"
    if name == "fid":
        title, meaning, format, note = "FID", "Fréchet Inception Distance", "{:.2f}", ""
    yield Metric(name, title, meaning, "lower", format, needs, note, bounded=True)


def _manifold(extractor: str | None) -> Iterator[Metric]:
    """Of an extractor's features, or of codes."""
    space, images = (extractor, "images") if extractor else ("codes", "codes")
    for name, meaning, group in (
        ("precision", f"share of samples that lie among the real {images}: how good samples are", None),
        ("recall", f"share of real {images} that lie among the samples: how much of the data is there", None),
        ("density", f"how densely real {images} lie around a sample, 1 as around one of them", "coverage"),
        ("coverage", f"share of real {images} with a sample nearer than their 5th neighbour", "coverage"),
    ):
        needs = Samples(KeptFeatures, compare_manifolds, extractor, attrgetter(name), codes=extractor is None)
        title, group = f"{name.capitalize()} ({space})", group if extractor else CODES
        yield Metric(f"{name}_{space}", title, meaning, "higher", "{:.3f}", needs, group=group)


def _copying(extractor: str) -> Iterator[Metric]:
    for name, value, title, meaning, better, format, note, group in (
        (
            "copying",
            "share",
            "Copying",
            "share of samples that are nearer to a training image than to any of equally many held-out ones",
            "lower",
            "{:.2f}",
            "0.5 is no preference, 1 is copies",
            None,
        ),
        (
            "copying_z",
            "z",
            "Test of copying",
            "distance to the nearest training image, against that of held-out images, in standard deviations",
            "higher",
            "{:+.1f}",
            "0 is no preference, below -3 is copying",
            "copying",
        ),
    ):
        deviation = attrgetter("deviation") if value == "share" else lambda copying: 1.0  # z is in deviations
        needs = Samples(KeptFeatures, Copying, extractor, attrgetter(value), deviation, held_out=True)
        name, title = f"{name}_{extractor}", f"{title} ({extractor})"
        yield Metric(name, title, meaning, cast(Better, better), format, needs, note, group=group)


def _kernel(extractor: str) -> Iterator[Metric]:
    name, title = f"kid_{extractor}", "KID" if extractor == "inception" else f"Kernel distance ({extractor})"
    meaning = f"squared MMD of {extractor} features, without the bias of small sets"
    needs = Samples(KeptFeatures, kernel_distance, extractor)
    yield Metric(name, title, meaning, "lower", "{:.3g}", needs, group="kid", bounded=True)


def _distributions(extractor: str) -> Iterator[Metric]:
    for name, title, meaning in (
        ("f8", "F8", "how many of the data's modes samples have: recall, weighed 8 times as much as precision"),
        ("f1_8", "F1/8", "how many samples are of the data's modes: precision, weighed 8 times as much as recall"),
    ):
        needs = Samples(KeptFeatures, compare_distributions, extractor, attrgetter(name))
        title = f"{title} ({extractor})"
        yield Metric(f"{name}_{extractor}", title, meaning, "higher", "{:.3f}", needs, group="prd")


def _modes(extractor: str) -> Iterator[Metric]:
    needs = Samples(KeptFeatures, count_modes, extractor)
    meaning, note = "number of different images, by the birthday paradox", "Compare it only for equally many samples"
    yield Metric(f"modes_{extractor}", f"Modes ({extractor})", meaning, "higher", "{:,.0f}", needs, note, group="modes")


def _classes(extractor: str) -> Iterator[Metric]:
    if extractor_spec(extractor).head is None:
        return
    title, note = f"Class score ({extractor})", "Not an Inception Score: compare it only with itself"
    if extractor == "inception":
        title, note = "Inception Score", ""
    meaning = f"how sure and how various the classes by {extractor} features are, from 1 to their number"
    needs = Samples(lambda: ClassShares(classifier_head(extractor)), _of_samples(inception_score), extractor)
    yield Metric(f"is_{extractor}", title, meaning, "higher", "{:.3f}", needs, note, group="is")


def _perceptual(extractor: str) -> Iterator[Metric]:
    if extractor_spec(extractor).maps is None:
        return
    title = f"Perceptual distance of reconstructions ({extractor})"
    meaning = f"difference of {extractor} feature maps in unit length"
    needs = Reconstructions(perceptual_distance, extractor)
    yield Metric(f"perceptual_{extractor}", title, meaning, "lower", "{:.4f}", needs, group="perceptual")


def _codes() -> Iterator[Metric]:
    yield from _manifold(None)
    meaning = "how often a sampled code is nearer to a training code than these are to one another"
    needs, note = Samples(KeptFeatures, copying_of_codes, codes=True), "0.5 is no preference, 1 is copies"
    yield Metric("copying_codes", "Copying (codes)", meaning, "lower", "{:.2f}", needs, note, group=CODES)


def _of_samples(value: Callable[[Any], float]) -> Callable[[Any, Any], float]:
    """The comparison of a metric that does not look at the reference set."""
    return lambda real, drawn: value(drawn)


METRICS_OF_FEATURES: tuple[Callable[[str], Iterator[Metric]], ...] = (
    _frechet,
    _manifold,
    _copying,
    _kernel,
    _distributions,
    _modes,
    _classes,
    _perceptual,
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "l1",
            "L1 reconstruction error",
            "mean absolute difference of pixels, range 0 to 1",
            "lower",
            "{:.4f}",
            Reconstructions(l1),
        ),
        Metric(
            "psnr",
            "PSNR of reconstructions",
            "peak signal-to-noise ratio in dB",
            "higher",
            "{:.2f} dB",
            Reconstructions(psnr),
            decibels=True,
        ),
        *(metric for make in METRICS_OF_FEATURES for extractor in EXTRACTORS for metric in make(extractor)),
        *_codes(),
    )
}
GROUPS = (*dict.fromkeys(metric.group for metric in METRICS.values() if metric.group), ALL)
