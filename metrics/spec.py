"""The table of metrics: name, meaning, direction and computation of each.

Everything that shows, compares or measures a metric reads `METRICS`. To add a metric, add an entry:

    METRICS["worst"] = Metric("worst", "Worst pixel", "largest difference of a pixel, range 0 to 1", "lower", "{:.3f}",
                              Reconstructions(lambda fake, real: difference(fake, real).abs().flatten(1).amax(1)))

Legend: B batch, F feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .features.extractor import EXTRACTORS, extractor_spec
from .frechet import FeatureMoments, frechet_distance
from .reconstruction import l1, psnr
from .tally import Tally


@dataclass(frozen=True)
class Reconstructions:
    """The metric is a mean over training images and their reconstructions; it needs the latent codes.

    per_image: uint8 `fake_BCHW`, `real_BCHW` -> float64 `value_B`.
    """

    per_image: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """The metric compares samples with the training images.

    tally: makes an empty tally, to be updated with uint8 images [B, C, H, W] or their features [B, F].
    compare: (tally of the training images, tally of the samples) -> value.
    extractor: the extractor of the features; None: the images themselves.
    """

    tally: Callable[[], Tally]
    compare: Callable[[Any, Any], float]
    extractor: str | None = None


@dataclass(frozen=True)
class Metric:
    """One metric.

    name: key of stored values. title, meaning: text for display. format: format of a displayed value.
    note: a caution that is shown with every value.
    decibels: whether it is logarithmic, so that values are compared by difference and not by ratio.
    """

    name: str
    title: str
    meaning: str
    better: Literal["lower", "higher"]
    format: str
    needs: Reconstructions | Samples
    note: str = ""
    decibels: bool = False

    @property
    def of_samples(self) -> bool:
        """Whether its value depends on the sampler."""
        return isinstance(self.needs, Samples)

    @property
    def extractor(self) -> str | None:
        """The feature extractor of the metric, if any."""
        return self.needs.extractor if isinstance(self.needs, Samples) else None

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


def measured_with(extractor: str) -> list[Metric]:
    """The metrics measured with this `evaluation.extractor`: all except those of other extractors."""
    return [metric for metric in METRICS.values() if metric.extractor in (None, extractor)]


def _frechet(extractor: str) -> Metric:
    needs = Samples(lambda: FeatureMoments.empty(extractor_spec(extractor).dim), frechet_distance, extractor)
    name = frechet_name(extractor)
    if name == "fid":
        return Metric(name, "FID", "Fréchet Inception Distance", "lower", "{:.2f}", needs)
    title, meaning = f"Fréchet distance ({extractor})", f"Fréchet distance of {extractor} features"
    return Metric(name, title, meaning, "lower", "{:.4g}", needs, "Not FID: compare it only with itself")


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
        *(_frechet(extractor) for extractor in EXTRACTORS),
    )
}
