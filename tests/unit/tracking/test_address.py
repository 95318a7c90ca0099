"""Tracking addresses that cannot work: refused at once, each with the remedy that helps."""

from __future__ import annotations

import os
import shlex
import sqlite3
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from glann.config.run import load
from glann.errors import UserError
from glann.tracking.address import FOR_REGISTRY, FOR_RUNS, address_fault, check_address
from glann.tracking.connection import experiment_id, reach
from glann.tracking.doctor import tracking
from glann.tracking.registry.client import locate, opened
from mlflow import MlflowClient
from mlflow.cli import cli as mlflow_cli

OLDER = "acf3f17fdcc7"  # a revision of MLflow 2


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with MLflow's tables; making them takes seconds."""
    path = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path.read_bytes()


def of_schema(path: Path, tables: bytes, schema: str) -> str:
    path.write_bytes(tables)
    with sqlite3.connect(path) as base:
        base.execute("UPDATE alembic_version SET version_num = ?", (schema,))
    base.close()
    return f"sqlite:///{path}"


def doctor_of(uri: str) -> tuple[bool, str]:
    [check] = tracking(load("digits", changes={"tracking.uri": uri}))
    return check.ok, f"{check.found}; {check.remedy}"


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("localhost:5000", "write http://localhost:5000"),
        ("10.0.0.5:5000/mlflow", "write http://10.0.0.5:5000/mlflow"),
        ("[::1]:5000", "write http://[::1]:5000"),
        ("http:/mlflow:5000", "did you mean http://mlflow:5000?"),
        ("http://[::1", "write http://HOST:PORT"),
        ("http://mlflow:port", "write http://HOST:PORT"),
        ("sqlite:mlflow.db", "did you mean sqlite:///mlflow.db?"),
        ("sqlite://mlflow.db", "did you mean sqlite:///mlflow.db?"),
        ("postgresql:/db/mlflow", "did you mean postgresql://db/mlflow?"),
        ("./mlruns", "use sqlite:///mlflow.db"),
        ("sqlite:///missing folder/mlflow.db", "missing folder'"),
    ],
)
@pytest.mark.parametrize("setting", [FOR_RUNS, FOR_REGISTRY])
def test_an_address_that_cannot_work_is_one_line_with_the_one_that_does(uri: str, remedy: str, setting: str):
    with pytest.raises(UserError) as caught:
        check_address(uri, setting)
    message = str(caught.value)
    assert remedy in message
    assert message.endswith(setting)
    assert "start it" not in message
    assert "\n" not in message
    ok, said = doctor_of(uri)
    assert not ok
    assert remedy in said


@pytest.mark.parametrize(
    "uri",
    ["http://h", "https://me:pw@h:1/x", "postgresql+psycopg2://h/db", "mysql://h/db", "databricks", "azureml://x"],
)
def test_addresses_that_may_work_are_left_to_mlflow(uri: str):
    assert address_fault(uri) == ("", "")


def test_a_folder_of_runs_is_migrated_by_a_command_that_mlflow_has(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    (elsewhere / "my runs").mkdir()
    remedy = address_fault("my runs")[1]
    words = shlex.split(remedy.split("`")[1])
    assert words == ["mlflow", "migrate-filestore", "--source", "my runs", "--target", "sqlite:///mlflow.db"]
    command = mlflow_cli.commands[words[1]]
    assert {"--source", "--target"} <= {option for each in command.params for option in each.opts}
    (elsewhere / "mlflow.db").touch()  # the command would overwrite it
    assert "--target 'sqlite:///my runs.db'" in address_fault("my runs")[1]
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert address_fault("my runs") == ("", "")


def test_a_database_of_an_older_mlflow_names_the_whole_upgrade_at_once(elsewhere: Path, tables: bytes):
    uri = of_schema(elsewhere / "my lflow.db", tables, OLDER)
    for attempt in (lambda: reach(uri, lambda client: client.search_experiments()), lambda: _listed(uri)):
        with pytest.raises(UserError, match="made by an older MLflow") as caught:
            attempt()
        words = shlex.split(str(caught.value).split("`")[1])
        assert words == ["mlflow", "db", "upgrade", uri]
        assert "start it" not in str(caught.value)
    assert words[2] in mlflow_cli.commands["db"].commands
    ok, said = doctor_of(uri)
    assert not ok
    assert "mlflow db upgrade" in said


def _listed(uri: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        with opened("no model"):
            pass


def test_a_database_of_a_newer_mlflow_is_not_advised_to_be_upgraded(elsewhere: Path, tables: bytes):
    uri = of_schema(elsewhere / "mlflow.db", tables, "ffffffffffff")
    with pytest.raises(UserError, match=r"newer MLflow than .*upgrade MLflow here") as caught:
        reach(uri, lambda client: client.search_experiments())
    assert "db upgrade" not in str(caught.value)
    assert not doctor_of(uri)[0]


def test_the_doctor_only_reads_a_database(elsewhere: Path, tables: bytes):
    (elsewhere / "mlflow.db").write_bytes(tables)
    assert doctor_of("sqlite:///mlflow.db")[0]
    assert (elsewhere / "mlflow.db").read_bytes() == tables
    assert doctor_of("sqlite:///new.db")[0]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["mlflow.db"]


def test_a_deleted_experiment_names_the_command_that_restores_it(elsewhere: Path, tables: bytes):
    (elsewhere / "mlflow.db").write_bytes(tables)
    client = MlflowClient("sqlite:///mlflow.db")
    made = client.create_experiment("faces")
    client.delete_experiment(made)
    with pytest.raises(UserError) as caught:
        experiment_id(client, "faces")
    assert f"`MLFLOW_TRACKING_URI=sqlite:///mlflow.db mlflow experiments restore --experiment-id {made}`" in str(
        caught.value
    )
    assert "restore" in mlflow_cli.commands["experiments"].commands


def test_a_missing_alias_and_a_missing_version_name_what_there_is(elsewhere: Path, tables: bytes):
    (elsewhere / "mlflow.db").write_bytes(tables)
    client = MlflowClient("sqlite:///mlflow.db")
    client.create_registered_model("faces")
    with pytest.raises(UserError, match=r"faces has no alias champion .*it has none.*glann registry promote faces"):
        locate(client, "models:/faces@champion")
    version = client.create_model_version("faces", str(elsewhere))
    client.set_registered_model_alias("faces", "challenger", version.version)
    with pytest.raises(UserError, match=r"no alias best .*its aliases: challenger.*glann registry show faces"):
        locate(client, "models:/faces@best")
    with pytest.raises(UserError, match=r"faces has no version 7 .*glann registry show faces"):
        locate(client, "models:/faces/7")
    for missing in ("models:/face@champion", "models:/face/1"):
        with pytest.raises(UserError, match=r"no model face at .*there is faces"):
            locate(client, missing)


def test_a_dead_proxy_before_a_server_that_answers_is_named(monkeypatch: pytest.MonkeyPatch):
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HTTP_PROXY", "http://me:hunter2@127.0.0.1:9")
        monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the proxies of its first request
        with pytest.raises(UserError) as caught:
            reach(uri, lambda client: client.search_experiments())
        _, said = doctor_of(uri)
        server.shutdown()
    for message in (str(caught.value), said):
        assert "the proxy http://***@127.0.0.1:9 of the variable HTTP_PROXY" in message
        assert "export NO_PROXY=127.0.0.1" in message
        assert "hunter2" not in message


def test_a_read_only_database_can_be_read_and_not_trained_into(
    elsewhere: Path, tables: bytes, monkeypatch: pytest.MonkeyPatch
):
    (elsewhere / "mlflow.db").write_bytes(tables)
    monkeypatch.setattr(os, "access", lambda path, mode: "mlflow.db" not in str(path))
    with pytest.raises(UserError, match=r"mlflow.db is read-only, .*; chmod u\+w mlflow.db; or correct tracking.uri"):
        check_address("sqlite:///mlflow.db", FOR_RUNS)
    check_address("sqlite:///mlflow.db", FOR_REGISTRY)
    assert not doctor_of("sqlite:///mlflow.db")[0]


def test_a_read_only_folder_is_named_for_a_new_database(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{elsewhere} is read-only" in address_fault("sqlite:///mlflow.db")[0]
