"""CITATION.cff names this version, its licence and the paper: what GitHub and reference managers show."""

from __future__ import annotations

from pathlib import Path

import glann
import yaml

ROOT = Path(glann.__file__).parent
# Required by version 1.2.0 of the Citation File Format, of a file and of a reference.
OF_A_FILE = {"cff-version", "message", "title", "authors"}
OF_A_REFERENCE = {"type", "title", "authors"}


def test_the_citation_is_of_this_version_and_names_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(cited) >= OF_A_FILE
    assert cited["cff-version"] == "1.2.0"
    assert (cited["version"], cited["license"]) == (glann.__version__, "Apache-2.0")
    (paper,) = cited["references"]
    assert set(paper) >= OF_A_REFERENCE
    assert [author["family-names"] for author in paper["authors"]] == ["Hoshen", "Li", "Malik"]
    assert paper["year"] == 2019
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
