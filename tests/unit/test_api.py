"""The public names of the package are there, are found by tools, and cost nothing until they are used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import glann
import pytest


def test_the_public_names_are_there_and_documented():
    assert set(glann.__all__) == {"Config", "__version__", "load_model", "train"}
    assert set(glann.__all__) <= set(dir(glann))
    for name in ("Config", "load_model", "train"):
        assert inspect.getdoc(getattr(glann, name)), name
    assert (Path(glann.__file__).parent / "py.typed").is_file()


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        glann.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, glann; print(sorted({'torch', 'ray', 'mlflow', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_overrides_are_sections_and_keys(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("glann.trainers.run.driver.train", lambda config, console: seen.append(config) or "done")
    run_dir = glann.train("digits", name="mine", glo={"epochs": 3, "schedule": {"floor": 0.5}}, sampler={"epochs": 4})
    (config,) = seen
    assert run_dir == Path("runs/mine")
    assert (config.name, config.glo.epochs, config.sampler.epochs) == ("mine", 3, 4)
    assert (config.glo.schedule.kind, config.glo.schedule.floor) == ("cosine", 0.5)  # the rest is the recipe's
    assert isinstance(config, glann.Config)


def test_a_wrong_override_is_refused_as_on_the_command_line():
    from glann.errors import UserError

    with pytest.raises(UserError, match=r"unknown key glo.epoch \(did you mean glo.epochs\?\)"):
        glann.train("digits", glo={"epoch": 3})
