"""What bounds the figures of a run, and which stage holds it back, in words.

Samples cannot be nearer to the real images than real images are to one another (the floor), and hardly nearer than the
reconstructions, which show what the generator of stage 1 makes of the codes that it was trained with. A distance of few
images is too large, by as much as the floor stands above the reconstructions: no smaller difference says anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..metrics.result import FLOOR, OWN, RECONSTRUCTION, from_key, to_key
from ..metrics.spec import METRICS

MOST = 2 / 3  # of what a stage adds, above which it is named alone
BOUNDS = (RECONSTRUCTION, FLOOR)  # what stands beside a figure
NEAR = 1.1  # times the bound, up to which a figure counts as at it


@dataclass(frozen=True)
class Limits:
    """A figure of samples with its bounds, all of one metric and one reference set; lower is better.

    floor: of real images. reconstructions: of the training codes.
    """

    key: str
    samples: float
    reconstructions: float
    floor: float

    @property
    def title(self) -> str:
        name, _, reference = from_key(self.key)
        return METRICS[name].title + (f", {reference} images" if reference else "")

    def text(self, value: float) -> str:
        return METRICS[from_key(self.key).metric].format.format(value)

    def beside(self) -> str:
        """The bounds, to be shown beside the figure."""
        return f"reconstructions {self.text(self.reconstructions)} · real images {self.text(self.floor)}"

    def verdict(self) -> str:
        """One sentence on which stage holds the samples back."""
        floor, reconstructions, samples = self.floor, self.reconstructions, self.samples
        figures = f"({self.text(samples)} for samples, {self.text(reconstructions)} for reconstructions"
        figures += f", {self.text(floor)} between real images)"
        if floor > NEAR * reconstructions and samples - floor <= floor - reconstructions:
            return (
                "These images are too few to judge the samples: real images are farther from one another than the "
                f"reconstructions from real ones {figures}, which only a small number of images makes so; measure "
                "with more (evaluation.samples, or more training or held-out images)."
            )
        if samples <= NEAR * floor:
            return f"Nothing holds the samples back: they are as near to real images as these to one another {figures}."
        first, second = max(0.0, reconstructions - floor), max(0.0, samples - max(reconstructions, floor))
        share = second / (first + second)
        if share > MOST:
            return (
                "Stage 2 holds the samples back: from its own codes the generator makes much better images than from "
                f"the codes that the sampler draws {figures}; try another sampler, or a larger one (sampler.*)."
            )
        if share < 1 - MOST:
            return (
                "Stage 1 holds the samples back: even the reconstructions of the training images are about as far "
                f"away {figures}; train the generator longer, or make it larger (generator.*)."
            )
        return (
            f"Both stages hold the samples back: stage 1 adds {1 - share:.0%} of the distance, in its reconstructions, "
            f"and the sampler of stage 2 the other {share:.0%} {figures}."
        )


def limits(metrics: Mapping[str, float]) -> list[Limits]:
    """The figures of the run's own sampler that have both bounds, in the order of the metrics."""
    found = []
    for key in metrics:
        name, sampler, reference = from_key(key)
        if sampler != OWN or name not in METRICS or not METRICS[name].bounded:
            continue
        bounds = [metrics.get(to_key(name, other, reference)) for other in BOUNDS]
        numbers = [value for value in (metrics[key], *bounds) if isinstance(value, int | float) and value == value]
        if len(numbers) == 3:
            found.append(Limits(key, *numbers))
    return found


def verdict(metrics: Mapping[str, float]) -> str:
    """Which stage holds the run back, by its first figure, of held-out images where there is one; empty if unknown."""
    known = limits(metrics)
    held_out = [one for one in known if from_key(one.key).reference]
    return (held_out or known)[0].verdict() if known else ""
