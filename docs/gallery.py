"""Writes a gallery of finished runs, docs/gallery/README.md and its pictures, each with the command that makes it:

python docs/gallery.py runs/digits runs/faces-64
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import glann
from glann.config.parse import flatten
from glann.config.run import Config, bundled_recipes, load
from glann.errors import GlannError, UserError
from glann.reports import pictures
from glann.reports.facts import RunFacts
from PIL import Image

GALLERY = Path(__file__).with_name("gallery")
SAMPLES, COLUMNS = 24, 8
WIDEST = 1000  # pixels of a picture; the run folders have them at full size
WHERE = {"name", "runs_dir", "data.url"}  # keys that say where a run lies
INTRODUCTION = """\
<!-- Written by docs/gallery.py from runs. -->
# Gallery

The first samples of seed 0 of each run, not chosen, and the last reconstructions beside their images.
"""


def main(runs: list[str], gallery: Path) -> int:
    """Write the page and its pictures; the status of the command."""
    try:
        gallery.mkdir(exist_ok=True)
        sections = [section(RunFacts.read(Path(run)), gallery) for run in runs]
    except GlannError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_status)
    page = gallery / "README.md"
    page.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")
    print(page)
    return 0


def section(facts: RunFacts, gallery: Path) -> str:
    """The part of the page about a run; writes its pictures into `gallery`."""
    name = facts.config.name
    if not facts.finished:
        raise UserError(f"{facts.run_dir} has not finished; the same `glann train` resumes it")
    drawn = glann.load_model(facts.run_dir).sample(SAMPLES, seed=0)
    save(pictures.grid(drawn, COLUMNS), gallery / f"{name}-samples.webp")
    lines = [
        f"## {name}\n",
        f"{int(facts.summary['rows']):,} images of {facts.config.data.resolution} px: {command(facts.config)}\n",
        f"![samples]({name}-samples.webp)\n",
        f"`glann sample runs/{name} --n {SAMPLES} --seed 0`\n",
    ]
    kept = [preview for preview in facts.previews if preview.kind == "reconstructions"]
    if kept:
        with Image.open(kept[-1].path) as picture:
            save(picture.convert("RGB"), gallery / f"{name}-reconstructions.webp")
        lines += [f"![reconstructions]({name}-reconstructions.webp)\n", f"`runs/{name}/images/{kept[-1].path.name}`\n"]
    return "\n".join(lines)


def command(config: Config) -> str:
    """The command that trains a run: a recipe that ships with glann, and what is not as in it."""
    keys = flat(config)
    different = {path.stem: dict(changes(flat(load(path)), keys)) for path in bundled_recipes()}
    recipe = min(different, key=lambda name: (len(different[name]), name != config.name))
    overrides = [f"{key}={value}" for key, value in different[recipe].items()]
    return f"`{shlex.join(['glann', 'train', recipe, *overrides])}`"


def flat(config: Config) -> dict[str, Any]:
    return flatten(config.model_dump(mode="json"))


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys that have another value, but for those that say where a run lies."""
    return ((key, value) for key, value in after.items() if key not in WHERE and before.get(key) != value)


def save(picture: Image.Image, path: Path) -> None:
    picture.thumbnail((WIDEST, WIDEST * 4))
    picture.save(path, quality=90)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("error: name finished runs, such as runs/digits")
    sys.exit(main(sys.argv[1:], GALLERY))
