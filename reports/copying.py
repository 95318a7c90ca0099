"""Whether samples are copies of training images, in words."""

from __future__ import annotations

from collections.abc import Mapping

from ..metrics.features.extractor import EXTRACTORS
from ..metrics.result import HELD_OUT, OWN, from_key, to_key

SHARES = frozenset(f"copying_{extractor}" for extractor in EXTRACTORS)  # the copying share, of any extractor
COPIES = 0.65  # share of samples that are nearer to a training image than to any held-out one
CODES_COPIED = 0.9  # how often a code lies nearer to a training code than these lie to one another


def copies(share: float | None, codes: float | None) -> list[str]:
    """What is wrong with samples that are copies, a phrase each; none if they are not, or if it was not measured.

    Args:
        share: the copying share, of images. codes: the copying of codes.
    """
    words = []
    if share is not None and share > COPIES:
        words.append(
            f"{share:.0%} of its samples are nearer to a training image than to any of equally many held-out ones; "
            "half would be no preference"
        )
    if codes is not None and codes > CODES_COPIED:
        words.append(
            "nearly all of its codes lie at training codes, so its samples are reconstructions of training images"
        )
    return words


def warning(metrics: Mapping[str, float]) -> str:
    """One sentence if the samples of a run's own sampler are copies, else nothing."""
    share = next((value for key, value in metrics.items() if _is_share(key)), None)
    codes = metrics.get(to_key("copying_codes", OWN))
    if not (words := copies(_known(share), _known(codes))):
        return ""
    return f"The sampler copies: {', and '.join(words)}. Its other figures say little about new images."


def _is_share(key: str) -> bool:
    name, sampler, reference = from_key(key)
    return name in SHARES and (sampler, reference) == (OWN, HELD_OUT)


def _known(value: object) -> float | None:
    return value if isinstance(value, float) else None
