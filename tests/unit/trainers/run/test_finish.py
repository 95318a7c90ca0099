"""Summary of a finished run: whole lines that can be copied, however narrow the terminal is."""

from __future__ import annotations

import io
import json
import shlex

import pytest
from glann.config.run import Config, load
from glann.reports.run_folder import SUMMARY
from glann.trainers.run.finish import summary_of
from glann.trainers.run.folder import require_summary
from rich.console import Console


def printed_lines(config: Config) -> list[str]:
    """Summary of a run of that configuration, in a terminal of 40 columns."""
    config.run_dir.mkdir(parents=True)
    metrics = {"fd_squeezenet": 0.3797, "fd_squeezenet_glo": 0.4683}
    summary = {"rows": 5000, "metrics": metrics, "timings": {"train_s": 90}}
    (config.run_dir / SUMMARY).write_text(json.dumps(summary))
    out = io.StringIO()
    Console(file=out, width=40).print(summary_of(config), soft_wrap=True)
    return [line.strip() for line in out.getvalue().splitlines()]


def test_a_summary_with_the_suffix_of_old_is_read_under_the_keys_of_today(tmp_path):
    config = load("digits", ["name=mine", f"runs_dir={tmp_path}", "tracking.enabled=false"])
    printed_lines(config)
    assert require_summary(config)["metrics"] == {"fd_squeezenet": 0.3797, "gaussian/fd_squeezenet": 0.4683}


def test_what_is_told_can_be_copied_from_a_narrow_terminal(tmp_path):
    config = load("digits", ["name=mine", f"runs_dir={tmp_path}", "tracking.enabled=false"])
    lines = printed_lines(config)
    assert lines[0] == "mine: done"
    assert "5,000 images of 28 px" in lines[1]
    assert lines[1].endswith("22 + 30 epochs, 2 workers, 1.5 min")
    assert "samples are compared with the training images; the report has all figures" in lines
    assert any(line.split() == ["Fréchet", "distance", "(squeezenet)", "0.3797"] for line in lines)
    assert f"{config.run_dir}/report.html" in lines
    assert any(line.endswith(f"glann sample {config.run_dir} --n 100 --seed 1 --out more.png") for line in lines)
    assert not any("mlflow" in line for line in lines)


def test_what_is_to_be_copied_is_quoted_for_a_shell(tmp_path):
    config = load("digits", ["name=mine", f"runs_dir={tmp_path}/my runs", f"tracking.uri=sqlite:///{tmp_path}/my.db x"])
    lines = printed_lines(config)
    words = [shlex.split(line) for line in lines[lines.index("try next") + 1 :]]
    assert [line[1:3] for line in words] == [
        ["sample", str(config.run_dir)],
        ["interpolate", str(config.run_dir)],
        ["ui", "--backend-store-uri"],
    ]
    assert words[2][3:] == [config.tracking.uri]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@10.0.0.1:5000", "http://"),
        ("sqlite:///mlflow.db", "mlflow ui --backend-store-uri sqlite:///"),
    ],
)
def test_a_tracking_server_is_looked_at_and_a_file_of_mlflow_is_served(tmp_path, uri, shown):
    lines = printed_lines(load("digits", ["name=mine", f"runs_dir={tmp_path}", f"tracking.uri={uri}"]))
    told_of = [line for line in lines if shown in line]
    assert told_of
    assert not any("secret" in line for line in lines)
    assert ("ui" in told_of[0].split()) == uri.startswith("sqlite")
