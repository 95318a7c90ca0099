"""The filter of names: which files of a folder, an archive or a bucket are the pictures that the user means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ...errors import UserError
from .. import left_out
from ..decoding.picture import SUFFIXES

# Thumbnails, deleted files and resource forks; names that begin with a dot are left out anyway.
SYSTEM_FOLDERS = {
    "__macosx",
    "@eadir",  # Synology
    "@recycle",  # QNAP
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
}
# Folders in which well-known data sets keep label images beside the photographs. Only names that mean nothing else:
# `masks` or `with_mask` can be what a data set is about.
MASK_FOLDERS = {
    "celebamask-hq-mask-anno",
    "celebamask-hq-mask",
    "celebamask-hq-mask-color",
    "celebamaskhq-mask",
    "celebamaskhq-mask-color",
    "segmentationclass",  # Pascal VOC
    "segmentationclassaug",
    "segmentationobject",
    "gtfine",  # Cityscapes
    "gtcoarse",
    "trimaps",  # Oxford-IIIT Pet
    "stuffthingmaps",  # COCO-Stuff
}
# Folders that often hold label images; they are taken, with a warning.
_DOUBTFUL = {"mask", "masks", "seg", "segmentation", "segmentations", "label", "labels", "annotation", "annotations"}
_EXTENSION = re.compile(r"\.[a-z0-9_+-]{1,12}")


@dataclass(frozen=True)
class Rules:
    """Which names are pictures: the rules of this file, and the user's patterns, which `*` matches across folders.

    include: take these whatever their name. exclude: leave these out, also if included.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def reason(self, name: str) -> tuple[str, str] | None:
        """Why a file is left out and the folder that decides it; None if it is a picture.

        name: a path below the source, with forward slashes.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return left_out.EXCLUDED, ""
        if any(fnmatchcase(name, pattern) for pattern in self.include):
            return None
        *folders, file_name = name.split("/")
        for depth, folder in enumerate(folders):
            if folder.startswith("."):
                return left_out.HIDDEN_FOLDER, "/".join(folders[: depth + 1]) + "/"
            if folder.lower() in SYSTEM_FOLDERS:
                return left_out.SYSTEM_FOLDER, "/".join(folders[: depth + 1]) + "/"
        if file_name.startswith("."):
            return left_out.HIDDEN_FILE, ""
        if not file_name.lower().endswith(SUFFIXES):
            return extension(file_name), ""
        for depth, folder in enumerate(folders):
            if folder.lower() in MASK_FOLDERS:
                return left_out.MASK, "/".join(folders[: depth + 1]) + "/"
        return None


def extension(file_name: str) -> str:
    """The extension as a reason to leave a file out."""
    _, dot, last = file_name.lower().rpartition(".")
    if not dot or not last:
        return left_out.NO_EXTENSION
    return dot + last if _EXTENSION.fullmatch(dot + last) and not last.isdecimal() else left_out.OTHER_EXTENSION


class Selection:
    """The names of one source, one after the other: each is taken, or counted with its reason."""

    def __init__(self, rules: Rules) -> None:
        self.taken = 0
        self._rules = rules
        self._tally = left_out.Tally()
        self._doubtful: dict[str, int] = {}  # folder -> pictures in it

    def takes(self, name: str, special: str = "") -> bool:
        """Whether the file is a picture of the source.

        special: what it is instead of a regular file.
        """
        found = self._rules.reason(name)
        if not found and special:
            found = left_out.SPECIAL, f"{name}: {special}"
        if found:
            self._tally.add(*found)
            return False
        self.taken += 1
        for folder in name.split("/")[:-1]:
            if folder.lower() in _DOUBTFUL:
                self._doubtful[folder] = self._doubtful.get(folder, 0) + 1
                break
        return True

    def left_out(self) -> tuple[left_out.LeftOut, ...]:
        return self._tally.groups()

    def doubts(self) -> tuple[str, ...]:
        """A warning for each folder of pictures, among others, that are perhaps labels."""
        some = {folder: count for folder, count in self._doubtful.items() if count < self.taken}
        return tuple(
            f"{count} of {self.taken} images lie in a folder {folder}/; if they are labels and no pictures, leave them "
            f"out with --exclude '*{folder}/*'"
            for folder, count in sorted(some.items())
        )


class NoImages(UserError):
    """A source of which nothing is taken."""

    def __init__(self, where: str, left_out_: tuple[left_out.LeftOut, ...]):
        self.left_out = left_out_
        seen = f"; left out: {left_out.in_words(left_out_)}" if left_out_ else ""
        super().__init__(
            f"{where} holds no images{seen} (readable: {' '.join(SUFFIXES)}; --include PATTERN takes other names)"
        )


def rules(include: Sequence[str], exclude: Sequence[str]) -> Rules:
    """The rules with the user's patterns. Raises UserError for an empty one, which matches nothing."""
    if not all((*include, *exclude)):
        raise UserError("an empty pattern matches nothing; give one such as 'masks/*' or '*.gif'")
    return Rules(tuple(include), tuple(exclude))
