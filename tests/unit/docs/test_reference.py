"""The API reference is built from the docstrings: nothing public lacks one, and what extensions use is in it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import glann
import pytest

ROOT = Path(glann.__file__).parent
SCRIPT = ROOT / "docs" / "reference.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` writes. The script fails on a warning of pdoc, and on a public name without a docstring."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=300, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_first_page_leads_to_every_module(site: Path):
    links = re.findall(r'href="(glann[\w/]*\.html)"', (site / "index.html").read_text())
    assert len(links) > 30
    assert {link for link in links if not (site / link).is_file()} == set()
    assert {page.relative_to(site).as_posix() for page in site.rglob("*.html")} == {"index.html", *links}


def test_the_stable_names_are_on_their_page(site: Path):
    page = (site / "glann.html").read_text()
    assert all(f'id="{name}"' in page for name in glann.__all__)


def test_what_an_extension_edits_or_imports_is_in_the_reference(site: Path):
    named = set(re.findall(r"\b((?:\w+/)+\w+)\.py\b", (ROOT / "docs" / "extending.md").read_text()))
    inner = ("tests/", "trainers/run/")
    there = {name for name in named if (ROOT / f"{name}.py").is_file() and not name.startswith(inner)}
    assert len(there) > 10
    assert {name for name in there if not (site / "glann" / f"{name}.html").is_file()} == set()


def test_a_public_name_without_a_docstring_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    bare = ModuleType("bare", "A module.")
    code = '''
class Base:
    """A class."""
    def told(self): "Documented here, and so below."
class Child(Base):
    """Another."""
    def told(self): ...
    def untold(self): ...
    @property
    def size(self): ...
    def _private(self): ...
constant = lambda: 0
def bare(): ...
'''
    exec(code, vars(bare))
    monkeypatch.setitem(sys.modules, "bare", bare)
    monkeypatch.setattr(reference, "MODULES", ["bare"])
    assert list(reference.undocumented()) == ["bare.Child.untold", "bare.Child.size", "bare.bare"]
