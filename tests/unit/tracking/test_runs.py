"""A tracked run: its journal survives crashes, its MLflow run is found again, a dead server never stops it."""

import errno
import json
import logging
import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import mlflow
import numpy as np
import pytest
import torch
from glann.config.parse import flatten
from glann.config.run import Config
from glann.errors import UserError, redact
from glann.inference.package import export_model
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.reports.run_folder import TRACKING
from glann.samplers.gaussian import gaussian
from glann.storage import journal
from glann.storage.files import os_fault
from glann.storage.journal import Journal, entries
from glann.tracking import connection, outbox
from glann.tracking.runs import RUN_TAG, DataInput, TrackedRun
from glann.tracking.source import load_model
from mlflow import MlflowClient
from PIL import Image


def make_config(uri, **tracking):
    return Config.model_validate(
        {
            "name": "tiny",
            "data": {"url": "s3://reader:hunter2@bucket/digits", "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": 6, "width": 4},
            "glo": {"epochs": 1},
            "imle": {"noise_dim": 5, "hidden_dim": 8},
            "tracking": {"uri": uri, **tracking},
        }
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An SQLite tracking store; making its tables takes seconds, so the module shares it."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    client.create_experiment("glann", artifact_location=(folder / "artifacts").as_uri())
    return uri


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(outbox, "POLL_S", 0.05)
    monkeypatch.setattr(outbox, "PATIENCE_S", 1.0)


def wait_until(condition, limit_s=20):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def history(uri, run_id, key):
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, key)]


# --- the journal


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with_tear = b'{"stage":"glo","step":1}\n{"stage":"glo","step":2}\n{"stage":"glo","st'
    path.write_bytes(with_tear)
    assert [entry["step"] for entry in entries(path)] == [1, 2]
    Journal(path).append({"stage": "glo", "step": 3})
    assert [entry["step"] for entry in entries(path)] == [1, 2, 3]


def test_a_tear_longer_than_a_block_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n' + b"x" * 200_000)
    Journal(path).close()
    assert path.read_bytes() == b'{"step":1}\n'
    path.write_bytes(b"x" * 200_000)
    Journal(path).close()
    assert path.read_bytes() == b""


def test_steps_repeated_after_a_resume_supersede(tmp_path):
    log = Journal(tmp_path / "metrics.jsonl")
    for step, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0)]:
        log.append({"stage": "glo", "step": step, "loss": loss})
    log.append({"stage": "imle", "step": 2, "loss": 1.0})
    assert [(e["stage"], e["step"], e["loss"]) for e in entries(log.path)] == [
        ("glo", 1, 9.0),
        ("glo", 2, 5.0),
        ("glo", 3, 4.0),
        ("imle", 2, 1.0),
    ]


def test_numbers_that_are_not_finite_are_null_and_every_line_is_json(tmp_path):
    log = Journal(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": float("nan"), "nested": {"lr": float("inf")}})
    (entry,) = [json.loads(line, parse_constant=pytest.fail) for line in log.path.read_text().splitlines()]
    assert entry["loss"] is None
    assert entry["nested"] == {"lr": None}
    assert entry["time"] == pytest.approx(time.time(), abs=60)


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\nnonsense\n')
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged before byte 20"):
        entries(path)
    with pytest.raises(UserError, match="is not valid JSON data"):
        Journal(tmp_path / "other.jsonl").append({"step": np.zeros(2)})


# --- the run


def test_a_run_reaches_mlflow_with_configuration_metrics_and_files(tmp_path, server):
    run = TrackedRun.open(make_config(server), tmp_path, {"glann.data_fingerprint": "f00d"})
    for step in range(1, 6):
        run.log_metrics({"stage": "glo", "epoch": 1, "loss": 1 / step, "note": "text", "bad": float("nan")}, step)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"png")
    run.log_image(tmp_path / "images" / "a.png")
    run.finish()
    client = MlflowClient(server)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "tiny"
    assert stored.data.params["generator.width"] == "4"
    assert stored.data.tags["glann.data_fingerprint"] == "f00d"
    assert history(server, run.run_id, "glo/loss") == [(step, 1 / step) for step in range(1, 6)]
    assert set(stored.data.metrics) == {"glo/loss", "glo/epoch"}
    assert [file.path for file in client.list_artifacts(run.run_id, "images")] == ["images/a.png"]


def test_mlflow_shows_who_what_on_which_data_and_how_it_looks(tmp_path, server, caplog):
    """User, source, the data as an input, pictures by step, and the card as description; the password stays here."""
    url = "s3://reader:hunter2@bucket/digits"
    data = DataInput(url, "f" * 64, 5000, 28, 1)
    (tmp_path / "images").mkdir()
    for epoch in (1, 2):
        Image.fromarray(np.full((28, 28), epoch, np.uint8)).save(tmp_path / "images" / f"{epoch}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"png")
    (tmp_path / "MODEL_CARD.md").write_text("# tiny\n")
    for start in range(2):  # a resumed run has its data once
        run = TrackedRun.open(make_config(server), tmp_path, data=data)
        run.log_image(tmp_path / "images" / f"{start + 1}.png", "glo samples", 40 * start)
        run.log_image(tmp_path / "images" / "bad.png", "glo samples", 99)
        run.describe(tmp_path / "MODEL_CARD.md")
        run.finish()
    client = MlflowClient(server)
    stored = client.get_run(run.run_id)
    assert stored.data.tags["mlflow.user"]
    assert stored.data.tags["mlflow.source.name"] == "glann"
    assert stored.data.tags["mlflow.note.content"] == "# tiny\n"
    [used] = stored.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, json.loads(used.dataset.profile)) == (
        "digits",
        "f" * 36,
        {"num_rows": 5000},
    )
    assert "hunter2" not in used.dataset.source
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    names = [file.path for file in client.list_artifacts(run.run_id, "images")]
    shown = [name for name in names if "glo" in name and name.endswith(".png")]
    assert len(shown) == 2, "one a step; the damaged one is left out, and says so"
    assert [name.split("+")[:3] for name in sorted(shown)] == [
        ["images/glo samples", "step", step] for step in ("0", "40")
    ]
    assert "bad.png is not shown in MLflow" in caplog.text


def test_the_page_of_a_run_is_linked_where_there_is_a_server(tmp_path, server):
    run = TrackedRun.open(make_config(server), tmp_path)
    run.finish()
    assert run.link is None, "a file has no page"
    outbox_state = run._outbox.state.model_copy(update={"uri": "https://mlflow.example/", "experiment": "7"})
    run._outbox._state = outbox_state
    assert run.link == f"https://mlflow.example/#/experiments/7/runs/{run.run_id}?workflowType=machine_learning"


def test_after_a_restart_the_same_run_goes_on_and_nothing_is_sent_twice(tmp_path, server):
    first = TrackedRun.open(make_config(server), tmp_path)
    first.log_metrics({"stage": "glo", "loss": 1.0}, 1)
    wait_until(lambda: not first._outbox.waiting())  # then the process dies, without finish
    second = TrackedRun.open(make_config(server, register_as="changed"), tmp_path)
    second.log_metrics({"stage": "glo", "loss": 2.0}, 2)
    second.finish()
    assert second.run_id == first.run_id
    assert history(server, second.run_id, "glo/loss") == [(1, 1.0), (2, 2.0)]
    tags = MlflowClient(server).get_run(second.run_id).data.tags
    assert tags["glann.now.tracking.register_as"] == "changed"


def test_a_run_made_just_before_a_crash_is_found_by_its_tag(tmp_path, server):
    run = TrackedRun.open(make_config(server), tmp_path)
    run.finish()
    state = json.loads((tmp_path / TRACKING).read_text())
    state["run_id"] = None  # it died between making the run and writing down its id
    (tmp_path / TRACKING).write_text(json.dumps(state))
    again = TrackedRun.open(make_config(server), tmp_path)
    again.finish()
    assert again.run_id == run.run_id
    assert MlflowClient(server).get_run(run.run_id).data.tags[RUN_TAG] == state["key"]


def test_a_run_deleted_on_the_server_is_made_anew_with_everything(tmp_path, server, caplog):
    first = TrackedRun.open(make_config(server), tmp_path)
    first.log_metrics({"stage": "glo", "loss": 1.0}, 1)
    first.finish()
    MlflowClient(server).delete_run(first.run_id)
    with caplog.at_level(logging.WARNING, "glann.tracking"):
        second = TrackedRun.open(make_config(server), tmp_path)
    second.finish()
    assert "no longer exists" in caplog.text
    assert second.run_id != first.run_id
    assert history(server, second.run_id, "glo/loss") == [(1, 1.0)]


def test_a_server_that_goes_away_delays_nothing_and_gets_everything_later(tmp_path, server, caplog, monkeypatch):
    run = TrackedRun.open(make_config(server), tmp_path)
    wait_until(lambda: not run._outbox.waiting())
    away, send = [True], run._outbox._client.log_batch

    def log_batch(*args, **kwargs):
        if away[0]:
            raise ConnectionError("https://me:secret@tracker refused")
        return send(*args, **kwargs)

    monkeypatch.setattr(run._outbox._client, "log_batch", log_batch)
    with caplog.at_level(logging.INFO, "glann.tracking"):
        for step in range(1, 2501):  # more than one request holds
            run.log_metrics({"stage": "glo", "loss": float(step)}, step)
        wait_until(lambda: "does not accept metrics" in caplog.text)
        time.sleep(0.3)
        away[0] = False
        run.finish()
    assert caplog.text.count("does not accept metrics") == 1
    assert "secret" not in caplog.text
    assert "again after" in caplog.text
    assert history(server, run.run_id, "glo/loss") == [(step, float(step)) for step in range(1, 2501)]


def test_what_was_not_sent_at_the_end_is_said_and_sent_by_the_next_run(tmp_path, server, caplog, monkeypatch):
    run = TrackedRun.open(make_config(server), tmp_path)
    wait_until(lambda: not run._outbox.waiting())
    monkeypatch.setattr(
        run._outbox._client, "log_batch", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("gone"))
    )
    with caplog.at_level(logging.WARNING, "glann.tracking"):
        run.log_metrics({"stage": "glo", "loss": 1.0}, 1)
        run.finish(timeout_s=10)
    assert "run the same command again" in caplog.text
    assert TrackedRun.waits(tmp_path)
    again = TrackedRun.open(make_config(server), tmp_path)
    again.finish()
    assert not TrackedRun.waits(tmp_path)
    assert history(server, again.run_id, "glo/loss") == [(1, 1.0)]


def test_a_server_that_hangs_is_left_behind_in_bounded_time(tmp_path, server, monkeypatch):
    run = TrackedRun.open(make_config(server), tmp_path)
    wait_until(lambda: not run._outbox.waiting())
    monkeypatch.setattr(run._outbox._client, "log_batch", lambda *a, **k: time.sleep(30))
    run.log_metrics({"stage": "glo", "loss": 1.0}, 1)
    started = time.monotonic()
    run.finish(timeout_s=0.5)
    assert time.monotonic() - started < 10


def test_a_proxy_on_the_way_is_named_when_metrics_cannot_be_sent(tmp_path, server, caplog, monkeypatch):
    run = TrackedRun.open(make_config(server), tmp_path)
    wait_until(lambda: not run._outbox.waiting())
    monkeypatch.setattr(outbox, "proxy_hint", lambda uri, **_: f"; {uri} is reached through a proxy")
    monkeypatch.setattr(
        run._outbox._client, "log_batch", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("gone"))
    )
    with caplog.at_level(logging.WARNING, "glann.tracking"):
        run.log_metrics({"stage": "glo", "loss": 1.0}, 1)
        wait_until(lambda: "is reached through a proxy" in caplog.text)
        run.finish(timeout_s=5)


def test_a_full_disk_is_not_laid_at_the_servers_door_nor_waited_for(tmp_path, server, caplog, monkeypatch):
    run = TrackedRun.open(make_config(server), tmp_path)
    wait_until(lambda: not run._outbox.waiting())
    monkeypatch.setattr(outbox, "PATIENCE_S", 60.0)
    save, full = outbox.OutboxState.save, OSError(errno.ENOSPC, "No space left on device")

    def refuse(self, run_dir):
        raise os_fault(full, run_dir / TRACKING)

    monkeypatch.setattr(outbox.OutboxState, "save", refuse)
    with caplog.at_level(logging.WARNING, "glann.tracking"):
        run.log_metrics({"stage": "glo", "loss": 1.0}, 1)
        wait_until(lambda: "cannot be recorded (disk full while writing" in caplog.text)
        started = time.monotonic()
        run.finish("FAILED")
    assert time.monotonic() - started < 20
    assert "does not accept metrics" not in caplog.text
    assert TrackedRun.waits(tmp_path)
    monkeypatch.setattr(outbox.OutboxState, "save", save)
    again = TrackedRun.open(make_config(server), tmp_path)
    again.finish()
    assert not TrackedRun.waits(tmp_path)
    assert history(server, again.run_id, "glo/loss") == [(1, 1.0)]


def test_secrets_reach_neither_server_nor_disk(tmp_path, server):
    run = TrackedRun.open(make_config(server), tmp_path)
    run.finish()
    stored = MlflowClient(server).get_run(run.run_id)
    assert stored.data.params["data.url"] == "s3://***@bucket/digits"
    assert "hunter2" not in str(stored.to_dictionary())
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    assert redact("to http://a:b@h/x and 'postgresql://u:p@w@h/y'") == "to http://***@h/x and 'postgresql://***@h/y'"


def test_without_tracking_there_is_a_journal_and_no_server(tmp_path):
    run = TrackedRun.open(make_config("http://127.0.0.1:9", enabled=False), tmp_path)
    run.log_metrics({"stage": "glo", "loss": 1.0}, 1)
    run.log_image(tmp_path / "none.png")
    run.finish()
    assert run.run_id is None
    assert entries(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0


# --- a server that is not there when the run starts


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(uri, tmp_path):
    with pytest.raises(UserError) as caught:
        TrackedRun.open(make_config(uri), tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    assert "tracking.enabled=false" in message
    return message


def test_an_unreachable_server_is_one_line_without_the_password(tmp_path):
    message = refusal(f"http://me:secret@127.0.0.1:{free_port()}", tmp_path)
    assert "refused" in message
    assert "secret" not in message


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "START_TIMEOUT_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        assert "no response in 1 s" in refusal(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)


def test_a_server_of_another_kind_is_one_line(tmp_path):
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    other = HTTPServer(("127.0.0.1", 0), NotFound)
    Thread(target=other.serve_forever, daemon=True).start()
    try:
        assert "404" in refusal(f"http://127.0.0.1:{other.server_port}", tmp_path)
    finally:
        other.shutdown()


@pytest.mark.parametrize("uri", ["ftp://somewhere", "sqlite:////nonexistent/folder/mlflow.db", "sqlite:///:memory:"])
def test_addresses_that_cannot_work_are_one_line(tmp_path, uri):
    refusal(uri, tmp_path)


def test_a_file_that_is_no_database_is_said_at_once(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"this is a text file, not a database")
    assert "is not an SQLite database" in refusal(f"sqlite:///{path}", tmp_path)


# --- the model


def test_the_model_is_logged_registered_and_loads_back(tmp_path, server, monkeypatch):
    config = make_config(server, register_as="digits")
    torch.manual_seed(1)
    generator, mapping = build_generator(config.generator, 28, 1), build_mapping(config.sampler, 6)
    folder = export_model(
        tmp_path / "model",
        config,
        generator.state_dict(),
        mapping.state_dict(),
        gaussian(torch.randn(20, 6)),
        20,
        "f00d",
    )
    run = TrackedRun.open(config, tmp_path)
    run.log_model(folder)
    run.finish()
    assert run.model.uri == "models:/digits@challenger"
    assert run.model.version == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    # A process that has spoken to another server before is not misled by it.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", f"sqlite:///{tmp_path / 'other.db'}")
    expected = load_model(folder).sample(3, seed=5)
    for uri in ("models:/digits@challenger", "models:/digits/1"):
        np.testing.assert_array_equal(load_model(uri).sample(3, seed=5), expected)
    with pytest.raises(UserError, match="names no version"):
        load_model("models:/digits/newest")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    served = mlflow.pyfunc.load_model("models:/digits@challenger").predict({"n": 3, "seed": 5, "truncation": 1.0})
    np.testing.assert_array_equal(served, expected)
    with pytest.raises(UserError, match=r"digits has no alias champion .*its aliases: challenger"):
        load_model("models:/digits@champion")
    outputs = MlflowClient(server).get_run(run.run_id).outputs.model_outputs
    assert len(outputs) == 1


def test_sections_become_dotted_keys():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1, 2]}) == {"a.b.c": 1, "a.d": None, "e": [1, 2]}


def test_a_journal_entry_becomes_metrics_of_its_stage():
    (metric,) = outbox.to_metrics({"stage": "glo", "step": 7, "time": 2.5, "loss %": 1, "flag": True, "none": None})
    assert (metric.key, metric.value, metric.step, metric.timestamp) == ("glo/loss _", 1.0, 7, 2500)
    assert journal.FILE == "metrics.jsonl"
