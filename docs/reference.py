"""Writes the API reference from the docstrings into docs/site/ (git ignores it): `make docs`.

Fails on anything that pdoc warns of, and on a public name without a docstring.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path

import glann
import pdoc
import pdoc.doc
import pdoc.extract
import pdoc.render

SITE = Path(__file__).with_name("site")
CHAPTERS = {
    "Train and sample": ("", ".errors", ".inference.model", ".tracking.source"),
    "Recipes": (
        ".config.run",
        ".config.sections",
        ".config.networks",
        ".config.autoencoder",
        ".config.pixels",
        ".config.samplers",
        ".config.section",
    ),
    "Add a metric or a feature extractor": (
        ".metrics.spec",
        ".metrics.tally",
        ".metrics.result",
        ".metrics.frechet",
        ".metrics.features.extractor",
    ),
    "Add a sampler": (
        ".samplers.base",
        ".samplers.adam",
        ".samplers.gathering",
        ".samplers.likelihood",
        ".models.mapping",
        ".models.noise",
        ".models.sphere",
        ".models.comm",
        ".samplers.ot",
    ),
    "Add a stage": (
        ".config.methods",
        ".trainers.stage",
        ".trainers.engine.step",
        ".trainers.engine.build",
    ),
    "Add an asset": (".datasets.assets.catalogue", ".datasets.assets.converters"),
    "The method": (
        ".trainers.glo",
        ".samplers.imle",
        ".models.generators",
        ".models.losses",
        ".models.perceptual",
        ".cluster.latents",
        ".cluster.neighbours",
    ),
}
MODULES = [f"glann{name}" for names in CHAPTERS.values() for name in names]


def build(site: Path) -> None:
    """Write the pages of all modules, an index and a search index below `site`."""
    for name in glann.__all__:
        setattr(glann, name, getattr(glann, name))  # pdoc does not see names that are imported when they are asked for
    pdoc.render.configure(
        docformat="google",
        footer_text=f"glann {glann.__version__}",
        template_directory=Path(__file__).with_name("templates"),
    )
    pdoc.render.env.globals["chapters"] = {
        title: [(f"glann{name}", summary(f"glann{name}")) for name in names] for title, names in CHAPTERS.items()
    }
    pdoc.pdoc(*MODULES, output_directory=site)


def main(site: Path) -> int:
    """Build the reference; the status of the command: 1 if anything is wrong, with a line for each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(site)
    faults = [str(each.message) for each in caught if "pdoc" in each.filename]
    faults += [f"{name} has no docstring" for name in undocumented()]
    print(*faults, sep="\n", file=sys.stderr, end="\n" if faults else "")
    print(site / "index.html")
    return 1 if faults else 0


def summary(module: str) -> str:
    """The first line of a module's docstring."""
    return pdoc.doc.Module.from_name(module).docstring.partition("\n")[0]


def undocumented() -> Iterator[str]:
    """The public modules, classes, functions, methods and properties that have no docstring."""
    for module in map(import_module, MODULES):
        if not module.__doc__:
            yield module.__name__
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and (inspect.isclass(thing) or is_def(thing)):
                if not inspect.getdoc(thing):
                    yield f"{module.__name__}.{name}"
                if inspect.isclass(thing):
                    yield from (f"{module.__name__}.{name}.{method}" for method in undocumented_methods(thing))


def undocumented_methods(cls: type) -> Iterator[str]:
    """Its public methods and properties that have no docstring, nor inherit one."""
    for name, member in vars(cls).items():
        code = isinstance(member, (property, cached_property, classmethod, staticmethod)) or is_def(member)
        if code and not name.startswith("_"):
            inherited = (vars(base)[name] for base in cls.__mro__ if name in vars(base))
            if not any(inspect.getdoc(each) for each in inherited):
                yield name


def is_def(thing: object) -> bool:
    """Whether it is a function with a name, not a value that happens to be one."""
    return inspect.isfunction(thing) and thing.__name__ != "<lambda>"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else SITE))
