"""The metrics: what each is called, what it means, which way is better, and how it is measured.

Everything that names, shows, compares or measures a metric reads `METRICS`. Another metric is one more entry:

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
    """The metric needs the codes of the training images: it is a mean over them, each beside its reconstruction.

    per_image: uint8 `fake_BCHW`, `real_BCHW` -> float64 `value_B`.
    """

    per_image: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """The metric needs samples: it compares what was drawn with the training images.

    tally: an empty one; it is updated with uint8 images [B, C, H, W], or with their features [B, F].
    compare: (tally of the training images, tally of the samples) -> value.
    extractor: whose features the tally takes; None: the images themselves.
    """

    tally: Callable[[], Tally]
    compare: Callable[[Any, Any], float]
    extractor: str | None = None


@dataclass(frozen=True)
class Metric:
    """One metric.

    name: its key wherever numbers are stored. title, meaning: for people. format: of its value, for people.
    note: a caution that belongs to every value of it.
    decibels: whether it is logarithmic, so that two values differ by an amount and not by a share.
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
        """The feature extractor that it is computed with, if any."""
        return self.needs.extractor if isinstance(self.needs, Samples) else None

    def explained(self) -> str:
        """What a value means, in a sentence."""
        return f"{self.meaning}; {self.better} is better" + (f". {self.note}" if self.note else "")


def frechet_name(extractor: str) -> str:
    """The name of the Fréchet distance on an extractor's features; on those of Inception alone it is `fid`."""
    return "fid" if extractor == "inception" else f"fd_{extractor}"


def frechet_metric(extractor: str) -> Metric:
    """The Fréchet distance on an extractor's features.

    Raises:
        UserError: no such extractor.
    """
    extractor_spec(extractor)
    return METRICS[frechet_name(extractor)]


def measured_with(extractor: str) -> list[Metric]:
    """What is measured of a run with this `evaluation.extractor`: all but the metrics of other extractors."""
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
