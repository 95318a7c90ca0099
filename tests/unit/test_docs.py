"""The documents say what the program does: pages are current, links lead somewhere, commands and keys exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import glann
import pytest
from glann.cli.main import app
from glann.config.run import COMPARISONS, RECIPES, bundled_recipes, known_keys, load
from glann.tuning.compare.comparison import load_comparison
from glann.tuning.load import STUDIES, load_study
from typer.main import get_command

ROOT = Path(glann.__file__).parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SHELL_TEXTS = [*PAGES, ROOT / "ray_cluster.yaml", ROOT / "Makefile", *sorted(RECIPES.glob("*.yaml"))]
PHASES = {"GLO", "checkpoint", "between the stages", "neighbour search", "IMLE updates"}
MADE_BY_THE_DEMO = {"docs/images/demo-samples.png"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_references_are_current():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "configuration.md").read_text() == module.page(), "run `make docs`"
    studies = (ROOT / "docs" / "studies.md").read_text()
    assert studies == module.studies_page(studies), "run `make docs`"
    comparisons = (ROOT / "docs" / "compare.md").read_text()
    assert comparisons == module.comparisons_page(comparisons), "run `make docs`"
    data = (ROOT / "docs" / "data.md").read_text()
    assert data == module.data_page(data), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if "://" not in link and link not in MADE_BY_THE_DEMO:
            assert (page.parent / link).exists(), f"{named(page)} links to {link}"


@pytest.mark.parametrize("page", SHELL_TEXTS, ids=named)
def test_commands_and_their_options_exist(page: Path):
    commands = known_commands()
    for line in re.findall(r"(?:^|[`'&|] ?|# |bin/)(glann [a-z][^`'#\n]*)", page.read_text(), re.MULTILINE):
        words = line.split()[1:]
        name = " ".join(words[:2]) if any(known.startswith(f"{words[0]} ") for known in commands) else words[0]
        assert name in commands, f"{named(page)} says `{line}`"
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - commands[name]
        assert not unknown, f"{named(page)}: `glann {name}` has no {unknown}"


@pytest.mark.parametrize("page", SHELL_TEXTS, ids=named)
def test_configuration_keys_exist(page: Path):
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    for key in re.findall(r"(?<![\w./-])([a-z_0-9]+(?:\.[a-z_]+)+)(?==)", page.read_text()):
        if key.split(".")[0] in sections:
            assert key in known_keys(), f"{named(page)} sets {key}"


@pytest.mark.parametrize("page", SHELL_TEXTS, ids=named)
def test_recipes_that_are_named_exist(page: Path):
    recipes = {path.stem for path in bundled_recipes()}
    for name in re.findall(r"glann (?:train|config|doctor) +(?:configs/)?([a-z0-9-]+)", page.read_text()):
        assert name in recipes or name.startswith("-"), f"{named(page)} uses the recipe {name}"


@pytest.mark.parametrize("page", SHELL_TEXTS, ids=named)
def test_studies_that_are_named_exist(page: Path):
    for name in re.findall(r"glann tune +([a-z0-9.-]+)", page.read_text()):
        assert name.endswith(".yaml") or (STUDIES / f"{name}.yaml").is_file(), f"{named(page)} uses the study {name}"


@pytest.mark.parametrize("page", SHELL_TEXTS, ids=named)
def test_comparisons_that_are_named_exist(page: Path):
    for name in re.findall(r"glann compare +([a-z0-9][A-Za-z0-9./-]*)", page.read_text()):
        bundled = RECIPES / f"{COMPARISONS}{name}.yaml"
        assert name.endswith(".yaml") or bundled.is_file(), f"{named(page)} uses the comparison {name}"


def test_the_comparison_that_is_shown_can_be_started(tmp_path: Path):
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL)
    path = tmp_path / "comparison.yaml"
    path.write_text(text)
    load_comparison(path)


@pytest.mark.parametrize(
    "text", re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
)
def test_the_studies_that_are_shown_can_be_started(tmp_path: Path, text: str):
    runs = tmp_path / "runs" / "digits"
    runs.mkdir(parents=True)
    (runs / "config.yaml").write_text(load("digits").to_yaml())
    path = tmp_path / "study.yaml"
    path.write_text(text.replace("runs/digits", str(runs)))
    load_study(path)


def test_the_demo_is_the_digits_recipe():
    assert "glann train configs/digits.yaml" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tests_that_are_named_exist(page: Path):
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("*/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in written, f"{named(page)} names {name}"


def test_the_fault_matrix_is_that_of_the_tests():
    matrix = (ROOT / "docs" / "reliability.md").read_text().split("## The matrix")[1].split("\n## ")[0]
    written = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "netns" / "test_faults.py").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(test_\w+)`", matrix)) == set(written)
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in matrix.splitlines() if row.count("|") == 5]
    for family in ("training worker|latent actor", "node|link", "driver|head", "S3"):
        struck = {phase for fault, phases in rows if re.match(family, fault) for phase in phases.split(", ")}
        assert struck >= PHASES, f"no fault of {family} strikes in {PHASES - struck}"


def known_commands() -> dict[str, set[str]]:
    """Options of every command, by its name ("train", "data pack")."""
    everywhere = {"--help", "--traceback"}
    found: dict[str, set[str]] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        subcommands = getattr(command, "commands", {})
        for full, each in {f"{name} {sub}": c for sub, c in subcommands.items()}.items() or [(name, command)]:
            found[full] = everywhere | {option for parameter in each.params for option in parameter.opts}
    return found
