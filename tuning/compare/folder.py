"""The folder of a comparison, studies/NAME: which comparison it holds."""

from __future__ import annotations

from pathlib import Path

from ...config.parse import shown
from ...errors import UserError
from ...reports.run_folder import reason_in_words
from ...storage.files import read_document
from .comparison import FILE, Comparison, parse_comparison


def is_comparison(folder: Path) -> bool:
    return (folder / FILE).is_file()


def saved_comparison(folder: Path) -> Comparison:
    """The comparison in a folder, also if that was moved. Raises UserError: it cannot be read."""
    try:
        saved = parse_comparison(read_document(folder / FILE))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{folder / FILE} is damaged: {reason_in_words(error)}; the same command writes it anew"
        ) from error
    return saved.model_copy(update={"studies_dir": str(folder.absolute().parent)})


def refuse_other_comparison(comparison: Comparison) -> None:
    """A folder belongs to one comparison; methods and seeds may be added to it, and the budget changed.

    Raises:
        UserError: naming the first key that differs.
    """
    if not is_comparison(comparison.folder):
        return
    there, here = (each.model_dump(mode="json") for each in (saved_comparison(comparison.folder), comparison))
    pairs = {key: (there[key], here[key]) for key in ("recipe", "overrides", "evaluation")}
    pairs |= {f"methods.{name}": (keys, here["methods"].get(name, keys)) for name, keys in there["methods"].items()}
    for key, (before, now) in pairs.items():
        if before != now:
            raise UserError(
                f"{comparison.folder} holds another comparison: {key} is {shown(before)} there and {shown(now)} "
                "here; give this one another name"
            )
