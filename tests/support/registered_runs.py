"""Finished runs without a training: random networks, all that a run folder holds, and data that one of them drew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from glann.config.run import Config
from glann.datasets.index import Index
from glann.datasets.pack import pack
from glann.inference.package import export_model, load_model
from glann.metrics.evaluate import evaluate
from glann.metrics.result import by_key
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.samplers.gaussian import gaussian
from glann.storage.journal import Journal
from glann.tracking.registry.lineage import FINGERPRINT
from glann.tracking.runs import DataInput, TrackedRun
from glann.tracking.source import is_registered, open_model, run_config
from torch import Tensor

ROWS, DIM, NOISE = 300, 6, 5


def make_config(name: str, resolution: int = 28, **sections: dict) -> Config:
    tree = {
        "name": name,
        "data": {"url": f"data-{resolution}", "resolution": resolution, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
        "glo": {"epochs": 3},
        "imle": {"noise_dim": NOISE, "hidden_dim": 8, "epochs": 2},
        "evaluation": {"extractor": "squeezenet", "samples": 200},
        "tracking": {"enabled": False},
    }
    return Config.model_validate(tree | sections)


def networks(config: Config, share: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States of G and T that lie `share` of the way from one pair of random networks to another."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        generator = build_generator(config.generator, config.data.resolution, config.data.channels)
        mapping = build_mapping(config.sampler, DIM)
        for _ in range(40):  # BatchNorm statistics that are not the initial ones
            generator(mapping(torch.randn(16, NOISE) + 0.5).detach())
        with torch.no_grad():  # fresh networks paint nearly uniform grey
            [p for p in generator.parameters() if p.ndim == 4][-1].mul_(20)
        states.append((generator.state_dict(), mapping.state_dict()))
    return tuple(
        {
            name: torch.lerp(one[name], other[name], share) if one[name].is_floating_point() else one[name]
            for name in one
        }
        for one, other in zip(*states, strict=True)
    )  # type: ignore[return-value]


def make_run(config: Config, share: float = 0.0, metrics: dict[str, float] | None = None) -> Path:
    """A finished run folder whose model was trained on the data at `config.data.url`, packed first if need be.

    The data are what the networks of share 0 draw, so a model is the worse the larger its share.
    """
    if not Path(config.data.url).exists():
        _pack(config)
    index = Index.load(config.data.url, config.s3)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    torch.manual_seed(2)
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, DIM), dim=1)
    export_model(
        config.run_dir / "model", config, *networks(config, share), gaussian(z_ND), len(z_ND), index.fingerprint
    )
    found = {"l1": 0.0625, "psnr": 21.5, "fd_squeezenet": 2.5, "gaussian/fd_squeezenet": 3.5} | (metrics or {})
    journal = Journal(config.run_dir / "metrics.jsonl")
    for epoch in range(1, 4):
        journal.append({"stage": "glo", "epoch": epoch, "step": epoch, "loss": 1 / epoch})
    journal.append({"stage": "evaluation", "step": 5} | found)
    journal.close()
    summary = {"metrics": found, "timings": {"train_s": 1.0}, "rows": ROWS, "fingerprint": index.fingerprint}
    (config.run_dir / "summary.json").write_text(json.dumps(summary))
    return config.run_dir


def track(
    config: Config,
    uri: str,
    tags: dict[str, str] | None = None,
    register_as: str | None = None,
    data: DataInput | None = None,
) -> str:
    """Give the run to MLflow as `glann train` does at its end; its MLflow id."""
    from glann.reports.card import write_card

    tracking = config.tracking.model_copy(update={"enabled": True, "uri": uri, "register_as": register_as})
    config = config.model_copy(update={"tracking": tracking})
    fingerprint = Index.load(config.data.url, config.s3).fingerprint
    run = TrackedRun.open(config, config.run_dir, {FINGERPRINT: fingerprint} | (tags or {}), data=data)
    card = write_card(config.run_dir, run.tracked_as)
    run.log_artifact(card)
    run.describe(card)
    run.log_model(config.run_dir / "model")
    run.finish()
    assert run.run_id is not None
    assert run.model is not None
    return run.run_id


def measured(source: str, extractor: str, samples: int, seed: int = 0) -> dict[str, float]:
    """What `glann evaluate` measures of a run folder or a registered model."""
    config = run_config(source)
    chosen = config.evaluation.model_copy(update={"extractor": extractor, "samples": samples})
    config = config.model_copy(update={"evaluation": chosen})
    manifest, model = open_model(source, s3=config.s3)
    return by_key(evaluate(config, manifest, model, seed=seed, with_codes=not is_registered(source)))


def _pack(config: Config) -> None:
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, DIM), dim=1)
    model = load_model(export_model(Path("artist"), config, *networks(config), gaussian(z_ND), len(z_ND), "none"))
    np.savez("drawn.npz", images=model.sample(ROWS, seed=99))
    pack("drawn.npz", config.data.url, resolution=config.data.resolution, channels=1)
