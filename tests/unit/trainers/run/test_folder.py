"""Protects "the same command continues": a file of the run folder that was damaged is written anew from what is known
elsewhere, or refused in one line that says what to do, and a run is never taken for one of another configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.latents import LatentTable
from glann.config.run import Config, load
from glann.errors import GlannError, UserError
from glann.inference.package import FOLDER, export_model, read_manifest
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.reports.run_folder import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    REPORT,
    SUMMARY,
    TRACKED_CONFIG,
    TRACKING,
    read_config,
    read_summary,
    write_config,
    write_summary,
)
from glann.samplers.gaussian import gaussian
from glann.storage.open import open_store
from glann.tracking.outbox import OutboxState
from glann.trainers.run.folder import (
    differences,
    is_finished,
    refuse_other_configuration,
    require_checkpoint,
    require_summary,
    take_back_tracking,
)
from glann.trainers.run.mirror import RunMirror, take_back
from glann.trainers.run.state import Position, Saved

# What a disk, an editor or a careless copy makes of a file.
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: data.rfind(b":", 0, len(data) // 2) or len(data) // 2],  # behind a key: never valid
    "cut at the start": lambda data: data[:3],
    "a list": lambda data: b"[]\n",
    "null": lambda data: b"null\n",
    "a number": lambda data: b"3\n",
    "text": lambda data: b'"word"\n',
    "binary": lambda data: bytes(range(256)) * 4,
    "zeros": lambda data: bytes(len(data)),
    "too large": lambda data: b"# " + b"x" * (5 << 20) + b"\n" + data,
    "huge number": lambda data: b'{"metrics": {"l1": 1e999}, "rows": ' + b"9" * 5000 + b"}\n",
    "nested": lambda data: b"[" * 100_000,
    "wrong keys": lambda data: b'{"a": 1}\n',
}
CLASSES = ("Config", "State", "Manifest", "Section", "NoneType", "Position", "BaseModel", "pydantic", "Traceback")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(
        "digits",
        ["name=night", f"runs_dir={tmp_path / 'runs'}", "tracking.enabled=false", "seed=7", "sampler.kind=imle"],
    )


def save(config: Config, step: int, old: bool = False) -> None:
    """A checkpoint as a worker of this run writes it; `old`: as versions did that kept no configuration."""
    rows, index = range(4), SimpleNamespace(fingerprint="f" * 64)
    writer = CheckpointWriter(open_store(config.checkpoint_url, config.s3), 0, 1, 9, 20.0, f"attempt{step}")
    saved = Saved(Position("glo", 1, 0, step), {"generator": {"updates": 1.0}})
    state: dict[str, Any] = saved.state(index, len(rows), config.with_absolute_paths())  # type: ignore[arg-type]
    if old:
        del state["config"]
    writer.save(step, saved.files(), LatentTable.in_process(rows, 4, 0), state)
    writer.wait()


def finish(config: Config) -> None:
    """What a finished run leaves behind."""
    generator = build_generator(config.generator, config.data.resolution, config.data.channels)
    mapping = build_mapping(config.sampler, config.generator.latent_dim, config.glo.constraint)
    z_ND = torch.nn.functional.normalize(torch.randn(8, config.generator.latent_dim), dim=1)
    folder = config.run_dir / MODEL
    export_model(folder, config, generator.state_dict(), mapping.state_dict(), gaussian(z_ND), len(z_ND), "f" * 64)
    write_summary(config.run_dir, {"metrics": {"l1": 0.1}, "timings": {"train_s": 9.0}, "rows": 8, "fingerprint": "f"})
    OutboxState(key="k", uri="sqlite:///x").save(config.run_dir)
    (config.run_dir / REPORT).touch()


def begin(config: Config, *, old: bool = False) -> None:
    config.run_dir.mkdir(parents=True)
    write_config(config.run_dir, config)
    save(config, 3, old)


def changed(config: Config, *overrides: str) -> Config:
    given = [
        "name=night",
        f"runs_dir={config.runs_dir}",
        "tracking.enabled=false",
        "seed=7",
        "sampler.kind=imle",
        *overrides,
    ]
    return load("digits", given)


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGE[how](path.read_bytes()))


def one_line(error: GlannError) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 1500
    assert not [name for name in CLASSES if name in text.replace(CONFIG, "")]
    return text


# config.yaml -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_configuration_is_written_anew_where_the_checkpoint_agrees(config, how, caplog):
    begin(config)
    before = (config.run_dir / CONFIG).read_bytes()
    damage(config.run_dir / CONFIG, how)
    with caplog.at_level(logging.WARNING):
        refuse_other_configuration(config)
    assert (config.run_dir / CONFIG).read_bytes() == before
    assert read_config(config.run_dir) == config
    assert "is written anew" in caplog.text
    refuse_other_configuration(config)  # and from now on it is as it was


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("key", ["seed=8", "glo.epochs=99", "sampler.lr=0.5"])
def test_it_is_not_taken_over_by_another_configuration(config, how, key):
    begin(config)
    damage(config.run_dir / CONFIG, how)
    left = (config.run_dir / CONFIG).read_bytes()
    with pytest.raises(UserError, match="holds a run of another configuration") as error:
        refuse_other_configuration(changed(config, key))
    assert key.split("=")[0] in one_line(error.value)
    assert (config.run_dir / CONFIG).read_bytes() == left


def test_a_missing_configuration_is_known_by_the_checkpoint(config):
    begin(config)
    (config.run_dir / CONFIG).unlink()
    with pytest.raises(UserError, match=r"another configuration: seed is 7 there and 8 here; start a new one"):
        refuse_other_configuration(changed(config, "seed=8"))
    refuse_other_configuration(changed(config, "cluster.workers=1", "checkpoint.keep=9"))  # how it runs may change
    assert read_config(config.run_dir).seed == 7


@pytest.mark.parametrize("how", DAMAGE)
def test_beside_older_checkpoints_it_is_refused_with_what_to_do(config, how):
    begin(config, old=True)
    damage(config.run_dir / CONFIG, how)
    with pytest.raises(UserError) as error:
        refuse_other_configuration(config)
    message = one_line(error.value)
    assert str(config.run_dir / CONFIG) in message
    assert message.endswith(f"restore {CONFIG}, or remove it if this command's configuration is the run's own")
    (config.run_dir / CONFIG).unlink()  # as it says
    refuse_other_configuration(config)


def test_beside_older_checkpoints_a_copy_decides(config, tmp_path):
    begin(config, old=True)
    original = (config.run_dir / CONFIG).read_bytes()
    (config.run_dir / TRACKED_CONFIG).write_bytes(original)
    (config.run_dir / CONFIG).write_bytes(b"")
    with pytest.raises(UserError, match="seed is 7 there and 8 here"):
        refuse_other_configuration(changed(config, "seed=8"))
    refuse_other_configuration(config)
    assert (config.run_dir / CONFIG).read_bytes() == original


@pytest.mark.parametrize("how", [*DAMAGE, "missing"])
def test_a_copy_beside_checkpoints_elsewhere_may_be_damaged_as_well(config, tmp_path, how):
    config = changed(config, f"checkpoint.url={tmp_path / 'store'}")
    begin(config)
    RunMirror(config).close(pytest.fail)
    (config.run_dir / "metrics.jsonl").write_text('{"stage":"glo","step":1}\n')
    RunMirror(config).close(pytest.fail)
    copy = tmp_path / "store" / "night" / CONFIG
    copy.unlink() if how == "missing" else damage(copy, how)
    elsewhere = changed(config, f"checkpoint.url={tmp_path / 'store'}", f"runs_dir={tmp_path / 'second'}")
    assert take_back(elsewhere)
    assert (elsewhere.run_dir / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="seed is 7 there and 8 here"):
        refuse_other_configuration(elsewhere.model_copy(update={"seed": 8}))
    refuse_other_configuration(elsewhere)
    assert read_config(elsewhere.run_dir).seed == 7


def test_the_copy_decides_where_the_older_checkpoints_do_not(config, tmp_path):
    config = changed(config, f"checkpoint.url={tmp_path / 'store'}")
    begin(config, old=True)
    RunMirror(config).close(pytest.fail)
    (config.run_dir / CONFIG).write_bytes(b"")
    with pytest.raises(UserError, match="seed is 7 there and 8 here"):
        refuse_other_configuration(config.model_copy(update={"seed": 8}))
    refuse_other_configuration(config)
    assert read_config(config.run_dir).seed == 7


@pytest.mark.parametrize("how", DAMAGE)
def test_where_nothing_was_trained_nothing_is_lost(config, how):
    """A disk that was full when the run began."""
    config.run_dir.mkdir(parents=True)
    write_config(config.run_dir, config)
    damage(config.run_dir / CONFIG, how)
    refuse_other_configuration(config)


def test_a_configuration_cut_where_it_is_still_valid_is_known_by_the_checkpoint(config):
    """Cut behind `generator` and `glo` it reads as one with the defaults of what is missing."""
    begin(config)
    whole = (config.run_dir / CONFIG).read_text()
    for end in range(whole.index("\nsampler:") + 1, len(whole), 40):
        (config.run_dir / CONFIG).write_text(whole[:end])
        refuse_other_configuration(config)
        assert not differences(read_config(config.run_dir), config)


def test_the_newest_checkpoint_that_can_be_read_decides(config):
    begin(config)
    save(changed(config, "sampler.lr=0.5"), 4)
    save(changed(config, "sampler.lr=0.25"), 5)
    (config.run_dir / CONFIG).unlink()
    (state,) = (config.run_dir / CHECKPOINTS / "step-000005").rglob("state.json")
    state.write_bytes(state.read_bytes().replace(b"0.25", b"0.26"))
    with pytest.raises(UserError, match=r"sampler\.lr is 0\.5 there"):
        refuse_other_configuration(config)
    refuse_other_configuration(changed(config, "sampler.lr=0.5"))


def test_no_password_gets_into_a_checkpoint(config):
    secret = changed(config, "data.url=s3://user:secret@bucket/x")
    saved = Saved(Position("glo"), {"generator": {"updates": 1.0}}).state(SimpleNamespace(fingerprint="f"), 4, secret)  # type: ignore[arg-type]
    assert "secret" not in json.dumps(saved)


# What is left of a finished run ----------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_summary_is_finished_anew_from_the_checkpoint(config, how, caplog):
    begin(config)
    finish(config)
    assert is_finished(config)
    assert require_summary(config)["metrics"] == {"l1": 0.1}
    damage(config.run_dir / SUMMARY, how)
    with caplog.at_level(logging.WARNING):
        assert not is_finished(config)
    assert "the run is finished anew" in caplog.text
    require_checkpoint(config)
    with pytest.raises(UserError) as error:
        require_summary(config)
    one_line(error.value)
    if how != "wrong keys":  # which a report can do without
        with pytest.raises(UserError, match="which finishes the run anew") as error:
            read_summary(config.run_dir)
        one_line(error.value)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_model_is_packaged_anew_from_the_checkpoint(config, how, caplog):
    begin(config)
    finish(config)
    damage(config.run_dir / MODEL / "model.json", how)
    with caplog.at_level(logging.WARNING):
        assert not is_finished(config)
    assert "the run is finished anew" in caplog.text
    require_checkpoint(config)
    with pytest.raises(UserError) as error:
        read_manifest(config.run_dir / MODEL)
    assert str(config.run_dir / MODEL) in one_line(error.value)


def test_a_model_file_that_is_cut_is_noticed_and_one_that_was_removed_is_not_missed(config):
    begin(config)
    finish(config)
    path = config.run_dir / MODEL / "generator.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert not is_finished(config)
    path.unlink()
    assert not is_finished(config)
    path.write_bytes(whole)
    assert is_finished(config)
    for left in (config.run_dir / MODEL).iterdir():
        left.unlink()
    (config.run_dir / MODEL).rmdir()
    assert is_finished(config)


def test_a_finished_run_without_checkpoints_is_not_trained_a_second_time(config):
    config.run_dir.mkdir(parents=True)
    write_config(config.run_dir, config)
    finish(config)
    damage(config.run_dir / SUMMARY, "empty")
    assert not is_finished(config)
    with pytest.raises(UserError, match=r"restore them, or remove .*report\.html to train it again") as error:
        require_checkpoint(config)
    one_line(error.value)
    (config.run_dir / REPORT).unlink()
    require_checkpoint(config)


def test_a_number_that_is_not_finite_does_not_damage_the_summary(config):
    config.run_dir.mkdir(parents=True)
    held = {"metrics": {"psnr": float("inf"), "l1": float("nan")}, "timings": {"train_s": 1.0}, "rows": 8}
    write_summary(config.run_dir, held)
    json.loads((config.run_dir / SUMMARY).read_text(), parse_constant=pytest.fail)
    assert [str(value) for value in require_summary(config)["metrics"].values()] == ["nan", "nan"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_place_in_mlflow_is_named_and_taken_back_from_its_copy(config, how, tmp_path):
    begin(config)
    OutboxState(key="mine", uri="sqlite:///x").save(config.run_dir)
    whole = (config.run_dir / TRACKING).read_bytes()
    damage(config.run_dir / TRACKING, how)
    with pytest.raises(UserError, match="is damaged; remove it") as error:
        take_back_tracking(config)
    one_line(error.value)
    (config.run_dir / TRACKING).write_bytes(whole)
    mirrored = changed(config, f"checkpoint.url={tmp_path / 'store'}")
    RunMirror(mirrored).close(pytest.fail)
    damage(config.run_dir / TRACKING, how)
    take_back_tracking(mirrored)
    assert (config.run_dir / TRACKING).read_bytes() == whole
    damage(config.run_dir / TRACKING, how)
    damage(tmp_path / "store" / "night" / TRACKING, how)
    with pytest.raises(UserError, match="is damaged; remove it"):
        take_back_tracking(mirrored)


def test_names_that_rooms_below_the_reports_have_to_know_are_the_same(config):
    assert FOLDER == MODEL
    assert Path(config.checkpoint_url) == (config.run_dir / CHECKPOINTS).absolute()
