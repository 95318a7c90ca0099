"""Pictures of a page that open at full size: embedded while they are few, else as files beside the page.

A page has no scripts. An embedded image is shown over the page by `:target`, so a link to it opens it and a link away
from it closes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from .page import SHOWN_WIDTH, Figure, figure, readable
from .sheets import Whole, wholes_of

EMBEDDED = 8 << 20  # bytes of full-size images in a page, which stays small enough for e-mail
WHOLE = (0.0, 0.0, 1.0, 1.0)
UNBOUNDED = 1 << 15  # pixels


@dataclass(frozen=True)
class Wanted:
    """A picture of a run folder that a page shows. section: where it stands, the id to return to."""

    path: Path
    title: str
    section: str
    widest: int = SHOWN_WIDTH


@dataclass(frozen=True)
class Spot:
    """A part of a picture that opens an image: where the link leads, what is said of it, and its place in CSS."""

    href: str
    label: str
    style: str


@dataclass(frozen=True)
class Shown:
    """A picture as it is embedded, with its spots; `columns` of images, 0 if they do not open one by one."""

    figure: Figure
    spots: list[Spot]
    columns: int


@dataclass(frozen=True)
class Opened:
    """An embedded full-size image, hidden until the page's address names its `id`."""

    id: str
    section: str
    figure: Figure


@dataclass(frozen=True)
class Gallery:
    """All pictures of a page, in the order asked for. beside: whether full-size images are files beside the page."""

    shown: list[Shown]
    opened: list[Opened]
    beside: bool


def gallery(run_dir: Path, wanted: Sequence[Wanted]) -> Gallery:
    """Embed pictures of a run folder, and link what they show smaller than it is.

    Raises:
        UserError: a file is not a readable picture.
    """
    found = [(one, figure(one.path, one.title, one.widest)) for one in wanted]
    wholes = [_wholes(one, shown) for one, shown in found]
    beside = sum(whole.path.stat().st_size for each in wholes for whole in each) > EMBEDDED
    shown, opened, numbers = [], list[Opened](), count(1)
    for (one, small), each in zip(found, wholes, strict=True):
        spots = []
        for whole in each:
            label = f"{one.title}, {whole.name}" if whole.box != WHOLE else one.title
            href = whole.path.relative_to(run_dir).as_posix()
            if not beside:
                opened.append(Opened(f"full-{next(numbers)}", one.section, figure(whole.path, label, UNBOUNDED)))
                href = f"#{opened[-1].id}"
            spots.append(Spot(href, f"{label}, full size", _style(whole.box)))
        columns = round(1 / each[0].box[2]) if each and each[0].box != WHOLE else 0
        shown.append(Shown(small, spots, columns))
    return Gallery(shown, opened, beside)


def _wholes(one: Wanted, shown: Figure) -> list[Whole]:
    """What opens from a picture: its images; if they are whole in it, the picture itself where it is reduced."""
    with readable(one.path) as picture:
        size = picture.size
    if found := wholes_of(one.path, size):
        return found
    return [Whole(one.path, "", WHOLE)] if size[0] > shown.width else []


def _style(box: tuple[float, float, float, float]) -> str:
    sides = zip(("left", "top", "width", "height"), box, strict=True)
    return ";".join(f"{side}:{share:.3%}" for side, share in sides)
