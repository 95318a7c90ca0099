"""The gallery names the command that makes a picture again, and says so where a run cannot be shown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from glann.config.run import load
from glann.reports.run_folder import write_config

SCRIPT = Path(__file__).parents[3] / "docs" / "gallery.py"


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("recipe", "overrides", "command"),
    [
        ("digits", [], "`glann train digits`"),
        ("digits", ["name=mine", "glo.epochs=7"], "`glann train digits glo.epochs=7`"),
        ("faces-64", ["data.url=elsewhere", "generator.width=8"], "`glann train faces-64 generator.width=8`"),
    ],
)
def test_the_command_has_what_is_not_as_in_the_recipe(gallery, recipe, overrides, command):
    assert gallery.command(load(recipe, overrides)) == command


def test_an_unfinished_run_is_refused_in_one_line(gallery, tmp_path, capsys):
    run = tmp_path / "runs" / "digits"
    run.mkdir(parents=True)
    write_config(run, load("digits"))
    assert gallery.main([str(run)], tmp_path / "gallery") == 2
    assert capsys.readouterr().err == f"error: {run} has not finished; the same `glann train` resumes it\n"
