"""Writes what follows from the code into docs/: configuration.md, and tables in other pages: `make docs`.

A test checks that they are current.
"""

from __future__ import annotations

from pathlib import Path

from glann.config.reference import Key, describe_keys, summary
from glann.datasets.assets.catalogue import ASSETS, LICENCES
from glann.metrics.spec import metric_families
from glann.tuning.compare.comparison import Comparison
from glann.tuning.space import Dimension
from glann.tuning.study import StudyConfig

PAGE = Path(__file__).with_name("configuration.md")
STUDIES = Path(__file__).with_name("studies.md")
COMPARISONS = Path(__file__).with_name("compare.md")
DATA = Path(__file__).with_name("data.md")
BEGIN, END = "<!-- Written by docs/generate.py: {} -->\n", "<!-- to here -->\n"

INTRODUCTION = """\
<!-- Written by docs/generate.py from config/; change it there and run `make docs`. -->
# Configuration

A run is one YAML recipe plus overrides on the command line:

```sh
glann train configs/celebahq-1024.yaml glo.epochs=100 data.url=s3://bucket/celebahq-1024
glann config celebahq-1024 glo.epochs=100    # the same, resolved and printed, nothing started
glann config --keys                          # this page in the terminal
glann config --schema                        # JSON schema, for editors
```

An override is `section.key=value`: the text as typed where the key takes text (`name=2024-11-25`), and YAML
elsewhere: `loss.taps='[relu1_2, relu2_2]'`, `data.max_rows=null`.
Unknown keys and impossible values are refused before anything starts, with the closest known key.
Nothing here is ever a password: S3 keys come from the usual AWS chain (environment, `~/.aws`, instance role).

The resolved configuration is saved in the run folder as `config.yaml`. Running the same command again continues the
run; changing what is computed needs another `name`, changing where or how it runs (`cluster`, `engine`, `s3`,
`checkpoint`, ...) does not.
"""


def page() -> str:
    """The whole page."""
    keys = describe_keys()
    sections = [key.name.split(".")[0] for key in keys if "." in key.name]
    parts = [INTRODUCTION, "## Top level\n", table([key for key in keys if "." not in key.name])]
    for section in dict.fromkeys(sections):
        parts += [
            f"## {section}\n",
            f"{summary(section)}\n",
            table([k for k in keys if k.name.startswith(f"{section}.")]),
        ]
    return "\n".join(parts)


def studies_page(text: str) -> str:
    """docs/studies.md with its tables as the models have them."""
    keys = [key for key in describe_keys(StudyConfig) if not key.name.startswith("space.")]
    text = filled(text, "keys", table(keys))
    text = filled(text, "dimensions", table(describe_keys(Dimension)))
    return filled(text, "metrics", metrics())


def comparisons_page(text: str) -> str:
    """docs/compare.md with its table of keys as the model has it."""
    return filled(text, "keys", table(describe_keys(Comparison)))


def data_page(text: str) -> str:
    """docs/data.md with its table of assets as the catalogue has them."""
    return filled(text, "assets", assets())


def filled(text: str, name: str, written: str) -> str:
    """The text with the part of this name replaced."""
    begin = BEGIN.format(name)
    before, _, rest = text.partition(begin)
    return before + begin + written + END + rest.partition(END)[2]


def assets() -> str:
    """A Markdown table of the assets."""
    rows = ["| asset | what | whose | licence | fetched from |", "|---|---|---|---|---|"]
    for name, asset in ASSETS.items():
        licence = f"[{asset.licence}]({LICENCES[asset.licence]})"
        sources = ", then ".join(f"`{source}`" for source in asset.sources)
        rows.append(f"| `{name}` | {asset.kind} | [{asset.credit}]({asset.page}) | {licence} | {sources} |")
    return "\n".join(rows) + "\n"


def metrics() -> str:
    """A Markdown table of the metrics."""
    rows = ["| metric | meaning | samples | extractors | group |", "|---|---|---|---|---|"]
    for name, family in metric_families().items():
        one = family[0]
        meaning = one.explained()
        if one.extractor and len(family) > 1:
            meaning = meaning.replace(one.extractor, "the extractor's")
        extractors = ", ".join(m.extractor for m in family if m.extractor) or "-"
        samples = "yes" if one.of_samples else "-"
        group = (one.group or "always") + (", with held-out images" if one.held_out else "")
        rows.append(f"| `{name}` | {escape(meaning)} | {samples} | {extractors} | {group} |")
    return "\n".join(rows) + "\n"


def table(keys: list[Key]) -> str:
    """A Markdown table of keys."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{k.name}` | {escape(k.kind)} | {escape(k.default)} | {escape(k.meaning)} |" for k in keys]
    return "\n".join(rows) + "\n"


def escape(text: str) -> str:
    """Text that stands in a table cell as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    COMPARISONS.write_text(comparisons_page(COMPARISONS.read_text(encoding="utf-8")), encoding="utf-8")
    STUDIES.write_text(studies_page(STUDIES.read_text(encoding="utf-8")), encoding="utf-8")
    DATA.write_text(data_page(DATA.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE, STUDIES, COMPARISONS, DATA, sep="\n")
