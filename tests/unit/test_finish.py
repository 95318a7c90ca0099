"""What a finished run tells: whole lines that can be copied, however narrow the terminal is."""

from __future__ import annotations

import io
import json

from glann.config import load
from glann.trainers.finish import SUMMARY, told
from rich.console import Console


def test_what_is_told_can_be_copied_from_a_narrow_terminal(tmp_path):
    config = load("digits", ["name=mine", f"runs_dir={tmp_path}", "tracking.enabled=false"])
    config.run_dir.mkdir(parents=True)
    summary = {
        "rows": 5000,
        "metrics": {"fd_squeezenet": 0.3797, "fd_squeezenet_glo": 0.4683},
        "timings": {"train_s": 90},
    }
    (config.run_dir / SUMMARY).write_text(json.dumps(summary))
    out = io.StringIO()
    Console(file=out, width=40).print(told(config), soft_wrap=True)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[0] == "mine: done"
    assert "5,000 images of 28 px" in lines[1]
    assert any(line.split() == ["Fréchet", "distance", "(squeezenet)", "0.3797"] for line in lines)
    assert f"{config.run_dir}/report.html" in lines
    assert any(line.endswith(f"glann sample {config.run_dir} --n 100 --seed 1 --out more.png") for line in lines)
    assert not any("mlflow" in line for line in lines)
