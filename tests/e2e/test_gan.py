"""`glann train` of a generator against a critic, from a recipe to images: two workers, cut short and resumed."""

from __future__ import annotations

import json

import numpy as np

SMALL = (
    "data.max_rows=300",
    "generator.width=8",
    "generator.latent_dim=8",
    "networks.critic.width=8",
    "networks.epochs=3",
    "networks.batch_size=40",
    "evaluation.extractor=squeezenet",
    "evaluation.samples=60",
    "checkpoint.every_epochs=1",
    "checkpoint.keep=9",
    "preview.every_epochs=3",
    "preview.images=16",
    "tracking.enabled=false",
)


def test_a_gan_is_trained_reported_sampled_and_resumed_to_the_same_bits(glann):
    done = glann("train", "gan-digits", *SMALL)
    assert done.returncode == 0, done.stderr
    run = glann.folder / "runs" / "gan-digits"
    measured = json.loads((run / "summary.json").read_text())["metrics"]
    assert "fd_squeezenet" in measured
    assert not any("reconstruction" in name or name.startswith(("gaussian", "l1", "psnr")) for name in measured)
    facts = [entry for entry in glann.entries("gan-digits") if entry.get("stage") == "networks" and "epoch" in entry]
    assert {"generator_loss", "real_score", "fake_score", "loss"} <= facts[-1].keys()
    assert "GAN for 3 epochs" in (run / "report.html").read_text()
    drawn = glann("sample", "runs/gan-digits", "--n", "6", "--out", "a.npz")
    assert drawn.returncode == 0, drawn.stderr
    images = np.load(glann.folder / "a.npz")["images"]
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6
    between = glann("interpolate", "runs/gan-digits", "--out", "between.png")
    assert between.returncode == 0, between.stderr
    assert (glann.folder / "between.png").stat().st_size

    model = (run / "model" / "generator.safetensors").read_bytes()
    for name in ("summary.json", "report.html", "model/generator.safetensors"):
        (run / name).unlink()
    for folder in sorted((run / "checkpoints").glob("step-*"))[-2:]:  # as if it had been killed in its last epoch
        (folder / "manifest.json").unlink()
    again = glann("train", "gan-digits", *SMALL)
    assert again.returncode == 0, again.stderr
    assert "resuming from the checkpoint" in again.stdout
    assert (run / "model" / "generator.safetensors").read_bytes() == model
