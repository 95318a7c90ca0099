"""What a run says of its figures when it ends, wherever it says it."""

from __future__ import annotations

import io
import json

from glann.config.run import Config
from glann.reports.card import write_card
from glann.reports.run import write_report
from glann.trainers.run.finish import summary_of
from rich.console import Console


def texts_of(config: Config, metrics: dict[str, float]) -> tuple[str, str, str]:
    """The report, the model card and the end of the command of a run with these metrics."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    (config.run_dir / "summary.json").write_text(
        json.dumps({"metrics": metrics, "deviations": {}, "timings": {"train_s": 90}, "rows": 5000})
    )
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(summary_of(config), soft_wrap=True)
    return write_report(config.run_dir).read_text(), write_card(config.run_dir).read_text(), console.export_text()
