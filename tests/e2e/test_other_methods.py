"""Methods that GLANN is compared with, from the command line: a run that was interrupted ends as one that was not."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

SMALL = (
    "data.max_rows=400",
    "generator.width=8",
    "generator.latent_dim=16",
    "evaluation.extractor=squeezenet",
    "evaluation.samples=60",
    "preview.every_epochs=100",
    "checkpoint.every_epochs=1",
)
METHODS = [
    pytest.param("gan-digits", "networks", ("networks.critic.width=8",), id="gan"),
    pytest.param("vae-digits", "autoencoder", (), id="vae"),
    pytest.param("imle-pixels-digits", "pixels", (), id="imle-pixels"),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("recipe", "section", "keys"), METHODS)
def test_an_interrupted_run_ends_with_the_model_of_an_undisturbed_one(glann, recipe, section, keys):
    words = ("train", recipe, *SMALL, *keys, f"{section}.epochs=6")
    whole, cut = f"{recipe}-whole", f"{recipe}-cut"
    done = glann(*words, f"name={whole}")
    assert done.returncode == 0, done.stdout + done.stderr

    process = glann.start(*words, f"name={cut}")
    glann.wait_for_epoch(process, cut, section, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    again = glann(*words, f"name={cut}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from the checkpoint" in again.stdout

    models = [glann.folder / "runs" / run / "model" for run in (whole, cut)]
    weights = [load_file(model / "generator.safetensors") for model in models]
    assert weights[0].keys() == weights[1].keys()
    assert not [name for name in weights[0] if not np.array_equal(weights[0][name], weights[1][name])]
    summary = json.loads((glann.folder / "runs" / cut / "summary.json").read_text())
    assert summary["metrics"]["fd_squeezenet"] > 0
    sampled = glann("sample", f"runs/{cut}", "--n", "4", "--out", f"{cut}.npz")
    assert sampled.returncode == 0, sampled.stderr
    assert np.load(glann.folder / f"{cut}.npz")["images"].shape == (4, 28, 28, 1)
