"""The registry: a version says what it is, no worse one becomes champion unasked, and there is a way back."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from glann.cli import main as cli
from glann.config.run import load
from glann.errors import UserError
from glann.metrics import judge, reference
from glann.metrics.features import extractor
from glann.metrics.features.extractor import EXTRACTORS, ExtractorSpec
from glann.metrics.spec import METRICS
from glann.reports.run_folder import TRACKING
from glann.tracking import outbox
from glann.tracking.registry import catalogue, lineage
from glann.tracking.registry import history as promotion
from glann.tracking.registry.catalogue import ModelEntry, Version
from glann.tracking.registry.history import HISTORY, ChampionChange, previous
from glann.tracking.registry.registration import register_run
from glann.tracking.runs import DataInput
from glann.tracking.source import load_model
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image
from registered_runs import ROWS, make_config, make_run, measured, track
from torch import nn

SECRET = "hunter2"


class Pixels(nn.Module):
    """An extractor without weights: the image, small."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())

    def forward(self, img_B3HW):
        return self.layers(img_B3HW)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a store, data of 28 and 32 px, and tracked runs from good to bad."""
    folder, before = tmp_path_factory.mktemp("registry"), Path.cwd()
    os.chdir(folder)
    try:
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        shares = {"good": 0.0, "fair": 0.3, "bad": 1.0}
        ids = {}
        for name, share in shares.items():
            config = make_config(name)
            make_run(config, share, {"fd_squeezenet": 2.5 + share})
            ids[name] = track(config, uri)
        large = make_config("large", resolution=32)
        make_run(large)
        ids["large"] = track(large, uri)
        yield SimpleNamespace(folder=folder, uri=uri, ids=ids, client=MlflowClient(uri))
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", home.uri)
    monkeypatch.setattr(outbox, "POLL_S", 0.05)
    monkeypatch.setitem(EXTRACTORS, "squeezenet", ExtractorSpec("none", 48, lambda *_: Pixels(), lambda img: img / 255))
    monkeypatch.setattr(extractor, "load_weights", lambda name: ({}, ""))


@pytest.fixture
def name(request):
    """A name of the registry for this test alone."""
    return request.node.name.replace("[", "-").replace("]", "")[:100]


def run(capsys, *words):
    """(status, stdout, stderr) of a command line."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def everything(client, name):
    """All that the registry holds of a name, as another program sees it."""
    model = client.get_registered_model(name)
    versions = client.search_model_versions(f"name='{name}'")
    return (
        dict(model.tags),
        dict(model.aliases),
        {int(v.version): (dict(v.tags), v.description, v.source, v.run_id) for v in versions},
    )


def tags(client, name, version):
    return client.get_model_version(name, str(version)).tags


def champion(client, name):
    return int(client.get_registered_model(name).aliases["champion"])


def test_all_files_can_be_read_by_a_server_of_another_user(home):
    """Data, runs, packaged and logged models have the modes of the user's umask: no private temporary file is left."""
    mask = os.umask(0)
    os.umask(mask)
    assert list(home.folder.rglob("model/*.safetensors"))
    assert list(home.folder.rglob("artifacts/**/generator.safetensors")), "those that MLflow has copied"
    for path in home.folder.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        if path.suffix != ".db" and path.name != ".lock":
            assert path.stat().st_mode & 0o777 == wanted, path.relative_to(home.folder)


# --- what a version says of itself


def test_a_version_says_what_it_is_and_where_it_comes_from(home, name, capsys):
    assert run(capsys, "registry", "register", "runs/fair", "--as", name) == (
        0,
        f"runs/fair is version 1 of {name}, its challenger\n",
        "",
    )
    found = home.client.get_model_version_by_alias(name, "challenger")
    index = json.loads(Path("data-28/index.json").read_text())
    assert found.run_id == home.ids["fair"]
    expected = {
        "glann.fingerprint": index["fingerprint"],
        "glann.rows": str(ROWS),
        "glann.resolution": "28",
        "glann.channels": "1",
        "glann.data": "data-28",
        "glann.run": home.ids["fair"],
        "glann.run_name": "fair",
        "glann.config.generator.kind": "infogan",
        "glann.config.glo.epochs": "3",
        "glann.config.sampler.noise_dim": "5",
        "glann.metric.fd_squeezenet": "2.8",
        "glann.metric.gaussian/fd_squeezenet": "3.5",
        "glann.metric.l1": "0.0625",
        "glann.metric.psnr": "21.5",
    }
    assert expected.items() <= found.tags.items()
    assert "glann.study" not in found.tags
    card = Path("runs/fair/MODEL_CARD.md").read_text()
    assert found.description.splitlines() == card.splitlines()  # there are no pictures in these runs
    assert f"| MLflow run | `{home.ids['fair']}` |" in card


def test_a_model_has_its_metrics_parameters_data_and_picture(home, name):
    """On its own page in MLflow, on those of its version and its name, and in the run's description."""
    config = make_config(name, tracking={"enabled": True, "uri": home.uri, "register_as": name})
    make_run(config, metrics={"fd_squeezenet:held-out": 4.5})
    (config.run_dir / "images").mkdir()
    Image.new("RGB", (2084, 2084), (200, 20, 20)).save(config.run_dir / "images" / "samples.png")
    data = DataInput(config.data.url, "f00d" * 16, ROWS, 28, 1)
    run_id = track(config, home.uri, data=data, register_as=name)
    run = home.client.get_run(run_id)
    (output,) = run.outputs.model_outputs
    logged = home.client.get_logged_model(output.model_id)
    assert logged.params == run.data.params
    assert output.step == 5
    metrics = {metric.key: metric for metric in logged.metrics}
    own = {key: value for key, value in run.data.metrics.items() if key.startswith("evaluation/")}
    assert {key: metric.value for key, metric in metrics.items()} == own
    about = {key: (metric.dataset_name, metric.dataset_digest) for key, metric in metrics.items()}
    assert about["evaluation/psnr"] == (config.data.url, ("f00d" * 16)[:36])
    assert about["evaluation/fd_squeezenet:held-out"] == (None, None), "held-out images are no input of the run"
    assert len(home.client.get_metric_history(run_id, "evaluation/psnr")) == 1, "not once for the run and once for it"

    picture = f"![samples](get-artifact?path=images%2Fcard.webp&run_uuid={run_id})"
    version, model = home.client.get_model_version(name, "1"), home.client.get_registered_model(name)
    for text in (
        run.data.tags["mlflow.note.content"],
        logged.tags["mlflow.note.content"],
        version.description,
        model.description,
    ):
        assert picture in text
    assert model.description.endswith("(The card of version 1. A description that you write in its place stays.)")
    path = home.client.download_artifacts(run_id, "images/card.webp")
    with Image.open(path) as image:
        assert image.size == (640, 640)


def test_a_name_is_described_by_its_champion_unless_somebody_wrote_more(home, name):
    def text():
        return home.client.get_registered_model(name).description

    register_run("runs/fair", name)
    register_run("runs/good", name)
    assert text().startswith("# good\n"), "the newest, while there is no champion"
    promote(name, 1)
    assert text().startswith("# fair\n")
    register_run("runs/bad", name)
    assert text().startswith("# fair\n")
    home.client.update_registered_model(name, "Ours since 2024.")
    promote(name, 2, force=True)
    assert text() == "Ours since 2024."


def test_pictures_that_the_server_has_not_got_are_left_out_of_a_card():
    card = "# x\n\n![samples](images/card.webp)\n\ntext\n"
    assert lineage.on_server(card, "abc", ()) == "# x\n\ntext\n"
    shown = lineage.on_server(card, "abc", {"images/card.webp"})
    assert "![samples](get-artifact?path=images%2Fcard.webp&run_uuid=abc)\n\ntext" in shown


def test_a_run_of_a_study_names_study_trial_and_parent_in_tags_and_card(home, name):
    parent = home.client.create_run(home.client.get_experiment_by_name("glann").experiment_id).info.run_id
    config = make_config("trial-7")
    make_run(config)
    known = {"glann.study": "depth", "glann.trial": "7", "mlflow.parentRunId": parent}
    track(config, home.uri, known, register_as=name)
    found = home.client.get_model_version(name, "1")
    assert known.items() <= found.tags.items()
    assert "| study | depth, trial 7 |" in found.description


def test_a_run_that_was_tracked_with_the_old_suffix_is_registered_and_listed_like_a_new_one(home, name, capsys):
    config = make_config("old")
    make_run(config, metrics={"gaussian/fd_squeezenet": None, "fd_squeezenet_glo": 4.5})
    track(config, home.uri, register_as=name)
    found = home.client.get_model_version(name, "1").tags
    assert found["glann.metric.gaussian/fd_squeezenet"] == "4.5"
    assert "glann.metric.fd_squeezenet_glo" not in found
    # as versions that were registered then have it
    home.client.set_model_version_tag(name, "1", "glann.metric.fd_squeezenet_glo", "4.25")
    home.client.delete_model_version_tag(name, "1", "glann.metric.gaussian/fd_squeezenet")
    version = catalogue.read(home.client, name).version(1)
    assert version.metrics["gaussian/fd_squeezenet"] == "4.25"
    rows = [line.split("\t") for line in run(capsys, "registry", "list")[1].splitlines()]
    assert [row[-1] for row in rows if row[0] == name] == ["fd_squeezenet 2.5, l1 0.0625, psnr 21.5"]


def test_training_and_registering_by_hand_write_the_same(home, name):
    config = make_config("twice")
    make_run(config)
    run_id = track(config, home.uri, register_as=name)
    by_hand = register_run(run_id, f"{name}-by-hand")
    assert (by_hand.version, by_hand.fresh) == ("1", True)
    one, other = home.client.get_model_version(name, "1"), home.client.get_model_version(f"{name}-by-hand", "1")
    assert one.tags == other.tags
    assert one.tags["glann.metric.fd_squeezenet"] == "2.5"
    assert one.description == other.description
    assert one.source == other.source
    assert len(home.client.get_run(run_id).outputs.model_outputs) == 1  # nothing was uploaded twice


def test_what_is_measured_just_before_the_model_is_sent_is_on_its_version(home, name, monkeypatch):
    config = make_config("late")
    make_run(config)
    send = outbox.Outbox._send_parcels

    def send_late(self):  # the journal has been looked at, and the model waits
        if any(parcel.kind == "model" for parcel in self._state.parcels):
            with open("runs/late/metrics.jsonl", "a") as journal:
                journal.write(json.dumps({"stage": "evaluation", "step": 9, "late": 1.5}) + "\n")
        send(self)

    monkeypatch.setattr(outbox.Outbox, "_send_parcels", send_late)
    track(config, home.uri, register_as=name)
    assert tags(home.client, name, 1)["glann.metric.late"] == "1.5"


def test_registering_a_run_again_changes_nothing(home, name, capsys):
    register_run("runs/good", name)
    register_run("runs/bad", name)
    before = everything(home.client, name)
    for same in ("runs/good", home.ids["good"]):
        status, out, _ = run(capsys, "registry", "register", same, "--as", name)
        assert (status, out) == (0, f"{same} is version 1 of {name} already; nothing was changed\n")
    assert everything(home.client, name) == before
    assert before[1] == {"challenger": 2}


def test_a_run_that_mlflow_does_not_have_is_sent_there_and_registered(home, name):
    make_run(make_config(name))
    made = register_run(f"runs/{name}")
    assert made.name == name
    found = home.client.get_model_version(name, "1")
    stored = home.client.get_run(found.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["glo/loss"] == pytest.approx(1 / 3)
    assert found.tags["glann.metric.l1"] == "0.0625"
    assert found.description.startswith(f"# {name}\n")
    assert np.array_equal(load_model(f"models:/{name}@challenger").sample(3), load_model(f"runs/{name}").sample(3))
    assert not register_run(f"runs/{name}").fresh


def test_credentials_reach_neither_tags_nor_description(home, name, tmp_path):
    config = make_config("private", s3={"endpoint_url": f"http://me:{SECRET}@127.0.0.1:1"})
    make_run(config)
    url = f"s3://me:{SECRET}@bucket/{'deep/' * 10}data"
    private = config.model_copy(update={"data": config.data.model_copy(update={"url": url})})
    (config.run_dir / "config.yaml").write_text(private.to_yaml())
    register_run("runs/private", name)
    assert "***@bucket" in tags(home.client, name, 1)["glann.data"]
    home.client.set_tag(tags(home.client, name, 1)["glann.run"], "glann.study", f"http://me:{SECRET}@host")
    register_run(tags(home.client, name, 1)["glann.run"], f"{name}-2")
    with pytest.raises(UserError, match=r"the password of s3://\*\*\*@bucket/.* was not kept; .*--data URL"):
        measured(f"models:/{name}/1", "squeezenet", 50)
    for each in (name, f"{name}-2"):
        assert SECRET not in str(everything(home.client, each))
    assert tags(home.client, f"{name}-2", 1)["glann.study"] == "http://***@host"
    cli_why = f"see https://me:{SECRET}@wiki/x"
    promote(name, data="data-28", why=cli_why)
    assert SECRET not in str(everything(home.client, name))
    assert "https://***@wiki/x" in tags(home.client, name, 1)["glann.promotion.why"]


def test_a_description_is_cut_at_a_line_and_says_so():
    assert lineage.fitted("short\n", "note") == "short\n"
    text = lineage.fitted("".join(f"line {number}\n" for number in range(2000)), "\n\n(cut)")
    assert len(text) <= 5000
    last = text.removesuffix("\n\n(cut)").splitlines()[-1]
    assert last == f"line {len(text.splitlines()) - 3}"


def test_a_card_fits_into_a_description_and_speaks_of_people(home):
    for path in Path("runs").glob("*/MODEL_CARD.md"):
        text = path.read_text()
        assert len(text) < lineage.MAX_DESCRIPTION
        assert "## Pictures of people" in text
        assert "have agreed" in text
        assert "deceive" in text


# --- promotion


def promote(name, version=None, force=False, why="", **conditions):
    from glann.tracking.registry.promote import Conditions
    from glann.tracking.registry.promote import promote as run

    said = []
    run(name, version, Conditions(**conditions), why=why, force=force, say=said.append)
    return said


def test_the_first_is_measured_and_promoted_with_who_when_why_and_numbers(home, name, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "engine")
    register_run("runs/fair", name)
    said = promote(name, why="the  first\none", seed=3)
    assert said[-1] == f"version 1 of {name} is the champion"
    found = {key.removeprefix("glann.promotion."): value for key, value in tags(home.client, name, 1).items()}
    alone = measured(f"models:/{name}@champion", "squeezenet", 200, seed=3)
    assert float(found["value"]) == pytest.approx(alone["fd_squeezenet"], rel=1e-9)
    index = json.loads(Path("data-28/index.json").read_text())
    expected = {
        "by": "ada@engine",
        "why": "the first one",
        "forced": "false",
        "metric": "fd_squeezenet",
        "extractor": "squeezenet",
        "samples": "200",
        "seed": "3",
        "data": "data-28",
        "data_fingerprint": index["fingerprint"],
        "rows": str(ROWS),
        "champion_value": "none",
        "previous": "none",
    }
    assert expected.items() <= found.items()
    assert found["at"].endswith("+00:00")


def test_a_worse_challenger_is_refused_and_nothing_changes(home, name, capsys):
    register_run("runs/good", name)
    promote(name)
    register_run("runs/bad", name)
    before = everything(home.client, name)
    status, out, err = run(capsys, "registry", "promote", name)
    after = everything(home.client, name)
    assert status == 2
    assert after == before
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: version 2 of {name} is worse than the champion, version 1: fd_squeezenet ")
    values = {number: measured(f"models:/{name}/{number}", "squeezenet", 200)["fd_squeezenet"] for number in (1, 2)}
    assert values[2] > 2 * values[1]
    assert f"{values[2]:.6g} against {values[1]:.6g}; nothing was changed; --force" in err
    assert out.count("\n") == 2


def test_a_better_challenger_takes_over_with_the_numbers_of_both(home, name):
    register_run("runs/fair", name)
    promote(name)
    register_run("runs/good", name)
    promote(name, samples=100, seed=9)
    assert champion(home.client, name) == 2
    found = tags(home.client, name, 2)
    for number, key in ((2, "value"), (1, "champion_value")):
        alone = measured(f"models:/{name}/{number}", "squeezenet", 100, seed=9)
        assert float(found[f"glann.promotion.{key}"]) == pytest.approx(alone["fd_squeezenet"], rel=1e-9)
    assert found["glann.promotion.previous"] == "1"
    assert found["glann.promotion.samples"] == "100"


def test_which_of_two_is_worse_is_the_metrics_to_say(home, name, monkeypatch):
    monkeypatch.setitem(METRICS, "fd_squeezenet", replace(METRICS["fd_squeezenet"], better="higher"))
    register_run("runs/bad", name)
    promote(name)
    register_run("runs/good", name)
    with pytest.raises(UserError, match=r"version 2 of .* is worse than the champion, version 1"):
        promote(name)


def test_the_real_images_are_read_once_for_both(home, name, monkeypatch):
    register_run("runs/good", name)
    promote(name, 1)
    register_run("runs/fair", name)
    read, images = [], judge.training_images
    monkeypatch.setattr(
        judge, "training_images", lambda *args: (read.append(len(batch)) or batch for batch in images(*args))
    )
    promote(name, force=True)
    assert sum(read) == ROWS


def test_a_forced_one_is_written_as_forced(home, name, capsys):
    register_run("runs/good", name)
    promote(name, force=True)  # there is nothing to override
    assert tags(home.client, name, 1)["glann.promotion.forced"] == "false"
    register_run("runs/bad", name)
    status, out, _ = run(capsys, "registry", "promote", name, "--force", "--why", "a test")
    assert status == 0
    assert "forced: version 2" in out
    assert champion(home.client, name) == 2
    assert tags(home.client, name, 2)["glann.promotion.forced"] == "true"
    history = [json.loads(value) for key, value in everything(home.client, name)[0].items() if key.startswith(HISTORY)]
    assert [(event["version"], event["previous"], event["forced"]) for event in history] == [
        (1, None, False),
        (2, 1, True),
    ]
    assert "promote 2 instead of 1 (forced) by " in run(capsys, "registry", "show", name)[1]


def test_other_data_and_other_resolutions_are_refused_unless_forced(home, name, capsys):
    register_run("runs/good", name)
    promote(name)
    register_run("runs/large", name)
    shutil.copytree("runs/good", "runs/elsewhere", dirs_exist_ok=True)
    (Path("runs/elsewhere") / TRACKING).unlink()
    path = Path("runs/elsewhere/model/model.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "e" * 64}))
    register_run("runs/elsewhere", name)
    before = everything(home.client, name)
    for version, message in (
        (2, "was trained at 32 px, the champion, version 1, at 28 px"),
        (3, "was trained on data ee"),
    ):
        status, out, err = run(capsys, "registry", "promote", name, "--version", version)
        assert (status, out) == (2, "")  # refused before anything is computed
        assert message in err
        assert "--force" in err
        assert len(err.splitlines()) == 1
    assert everything(home.client, name) == before
    with pytest.raises(UserError, match=r"data-28 holds other images than good was trained on; .*--data URL"):
        promote(name, 3, force=True)
    assert everything(home.client, name) == before
    promote(name, 2, force=True)
    assert champion(home.client, name) == 2
    assert tags(home.client, name, 2)["glann.promotion.forced"] == "true"


def test_promoting_the_champion_changes_nothing(home, name, capsys):
    register_run("runs/good", name)
    promote(name)
    before = everything(home.client, name)
    status, out, _ = run(capsys, "registry", "promote", name)
    assert (status, out) == (0, f"version 1 of {name} is the champion already; nothing was changed\n")
    assert everything(home.client, name) == before


def test_a_champion_that_changed_while_it_was_measured_is_not_overwritten(home, name, monkeypatch):
    for each in ("good", "fair", "bad"):
        register_run(f"runs/{each}", name)
    promote(name, 2)
    opened = reference.open_images

    def meanwhile(config):
        home.client.set_registered_model_alias(name, "champion", "3")
        return opened(config)

    monkeypatch.setattr("glann.tracking.registry.promote.open_images", meanwhile)
    before = everything(home.client, name)[0]
    with pytest.raises(UserError, match="was changed by another command meanwhile"):
        promote(name, 1)
    assert champion(home.client, name) == 3
    assert everything(home.client, name)[0] == before


# --- the way back


def test_rolling_back_twice_goes_two_back_and_no_further(home, name, capsys):
    for each in ("bad", "fair", "good"):
        register_run(f"runs/{each}", name)
        promote(name)
    first = tags(home.client, name, 1)
    for to, instead in ((2, 3), (1, 2)):
        status, out, _ = run(capsys, "registry", "rollback", name, "--why", f"not {instead}")
        assert (status, out) == (0, f"version {to} of {name} is the champion again, instead of {instead}\n")
        found = tags(home.client, name, to)
        assert champion(home.client, name) == to
        assert found["glann.rollback.why"] == f"not {instead}"
        assert found["glann.rollback.from"] == str(instead)
        assert {"glann.rollback.at", "glann.rollback.by"} <= found.keys()
    assert first.items() <= tags(home.client, name, 1).items()  # its promotion is still recorded
    before = everything(home.client, name)
    status, _, err = run(capsys, "registry", "rollback", name)
    assert (status, err) == (2, f"error: {name} had no champion before version 1; nothing was changed\n")
    assert everything(home.client, name) == before
    shown = run(capsys, "registry", "show", name)[1]
    assert "rollback 1 instead of 2" in shown
    promote(name, 3)
    run(capsys, "registry", "rollback", name)
    assert champion(home.client, name) == 1


def test_a_deleted_predecessor_is_said(home, name):
    for each in ("fair", "good"):
        register_run(f"runs/{each}", name)
        promote(name)
    home.client.delete_model_version(name, "1")
    with pytest.raises(UserError, match=f"{name} has no version 1; there is 2"):
        with_client(lambda client: promotion.rollback(client, name))
    assert champion(home.client, name) == 2


def with_client(action):
    from glann.tracking.registry.client import opened

    with opened("nothing") as client:
        return action(client)


def event(action, version, before):
    return ChampionChange(action=action, version=version, previous=before, at="now", by="me@here")


@pytest.mark.parametrize(
    ("events", "now", "expected"),
    [
        ([("promote", 1, None)], 1, None),
        ([("promote", 1, None), ("promote", 2, 1), ("promote", 3, 2)], 3, 2),
        ([("promote", 1, None), ("promote", 2, 1), ("rollback", 1, 2), ("promote", 3, 1)], 3, 1),
        # once promoted again, a version has two predecessors; the way back still ends
        ([("promote", 1, None), ("promote", 2, 1), ("promote", 1, 2)], 1, 2),
        ([("promote", 1, None), ("promote", 2, 1), ("promote", 1, 2), ("rollback", 2, 1)], 2, 1),
        ([("promote", 1, None), ("promote", 2, 1), ("promote", 1, 2), ("rollback", 2, 1), ("rollback", 1, 2)], 1, None),
        # the alias was set by hand: before the first event, and after the last
        ([("promote", 2, 1)], 2, 1),
        ([("promote", 1, None)], 7, 1),
        ([("promote", 1, None), ("promote", 2, 7)], 2, 7),
        # a command died after its event and before the alias: it did not happen
        ([("promote", 1, None), ("promote", 2, 1)], 1, None),
        ([("promote", 1, None), ("promote", 2, 1), ("promote", 3, 1)], 3, 1),
    ],
)
def test_the_champion_before(events, now, expected):
    history = {f"{HISTORY}{n:06d}": event(*facts).model_dump_json() for n, facts in enumerate(events, 1)}
    assert previous(ModelEntry("x", {"champion": now}, history, [Version("x", now, None, 0.0, {})])) == expected


def test_a_damaged_history_is_named(home, name):
    register_run("runs/good", name)
    promote(name)
    home.client.set_registered_model_tag(name, f"{HISTORY}000001", "{")
    with pytest.raises(UserError, match=rf"the tag {HISTORY}000001 of .* is damaged"):
        with_client(lambda client: promotion.rollback(client, name))


# --- everything that takes a model takes a registered one


def test_registered_models_are_sampled_interpolated_and_evaluated(home, name, capsys, tmp_path):
    register_run("runs/good", name)
    promote(name)
    uri = f"models:/{name}@champion"
    for words in (("sample", "--n", 5), ("interpolate", "--pairs", 2, "--steps", 3)):
        for source, file in ((uri, "a.npz"), ("runs/good", "b.npz")):
            assert run(capsys, words[0], source, *words[1:], "--out", tmp_path / file)[0] == 0
        a, b = np.load(tmp_path / "a.npz")["images"], np.load(tmp_path / "b.npz")["images"]
        assert a.std() > 0
        np.testing.assert_array_equal(a, b)
    status, out, err = run(capsys, "evaluate", uri, "--samples", 50)
    assert status == 0
    names = ["fd_squeezenet", "precision_squeezenet", "recall_squeezenet"]
    assert [line.split()[0] for line in out.splitlines()] == [
        "real/fd_squeezenet",
        *names,
        *(f"gaussian/{name}" for name in names),
    ]
    assert err == "reconstruction is not measured: it needs a run folder with its codes, and their images\n"
    status, _, err = run(capsys, "evaluate", uri, "--data", "data-32")
    assert (status, "data.resolution is 28 but data-32 holds images of 32" in err) == (2, True)


def test_a_configuration_from_a_server_chooses_no_folder_here(home, name):
    config = make_config("cached", data={"url": "data-28", "resolution": 28, "channels": 1, "cache_dir": "/etc"})
    make_run(config)
    register_run("runs/cached", name)
    assert lineage.origin(f"models:/{name}/1").data.cache_dir is None


# --- bad input


def test_models_are_listed_and_shown(home, name, capsys):
    register_run("runs/fair", name)
    register_run("runs/good", name)
    promote(name, 1)
    rows = [line.split("\t") for line in run(capsys, "registry", "list")[1].splitlines()]
    assert rows[0] == ["NAME", "VERSIONS", "CHAMPION", "CHALLENGER", "METRICS"]
    assert [name, "2", "1", "2", "fd_squeezenet 2.8, l1 0.0625, psnr 21.5"] in rows
    shown = [line.split("\t") for line in run(capsys, "registry", "show", name)[1].splitlines()]
    assert [row[:2] for row in shown[1:3]] == [["2", "challenger"], ["1", "champion"]]
    assert shown[1][5:] == ["good", "-"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "nothing"], "no model nothing at sqlite:///"),
        (["show", "a/b"], "'a/b' is not a valid model name"),
        (["promote", "no' OR '1'='1"], "is not a valid model name"),
        (["promote", "nothing"], "no model nothing at "),
        (["rollback", "nothing"], "no model nothing at "),
        (["register", "runs/nothing"], "runs/nothing is neither a run folder, such as runs/digits, nor the id of"),
        (["register", "runs"], "runs is not a run folder: it has no config.yaml"),
        (["register", "runs/good", "--as", "a/b"], "'a/b' is not a valid model name"),
        (["register", "f" * 32], f"no MLflow run {'f' * 32} at sqlite:///"),
        (["promote", "known", "--version", "9"], "known has no version 9; there is 1"),
        (["promote", "known", "--why", "x" * 2000], "--why has 2000 characters; at most 1000 are kept"),
        (["promote", "known", "--extractor", "resnet"], "no feature extractor 'resnet'; there are "),
        (["promote", "known", "--data", "nowhere"], "no data set at nowhere"),
        (["rollback", "known"], "known has no champion to roll back"),
    ],
)
def test_bad_names_and_versions_are_one_line_and_change_nothing(home, capsys, words, message):
    register_run("runs/good", "known")
    before = everything(home.client, "known"), [model.name for model in home.client.search_registered_models()]
    status, out, err = run(capsys, "registry", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert (everything(home.client, "known"), [m.name for m in home.client.search_registered_models()]) == before


def test_a_run_that_is_not_finished_or_was_tracked_elsewhere_is_refused(home, name, monkeypatch):
    config = make_config("begun")
    make_run(config)
    (config.run_dir / "summary.json").unlink()
    with pytest.raises(UserError, match=r"runs/begun has not finished"):
        register_run("runs/begun", name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home.folder}/other.db")
    with pytest.raises(UserError, match=r"runs/good is tracked at sqlite:////.*mlflow.db, not at .*; set MLFLOW"):
        register_run("runs/good", name)
    with pytest.raises(MlflowException):
        home.client.get_registered_model(name)
    assert not Path("other.db").exists()


def test_an_empty_folder_stays_empty(home, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    for words in (["registry", "list"], ["registry", "promote", "x"], ["sample", "models:/x@champion"]):
        status, _, err = run(capsys, *words)
        assert status == 2
        assert "there is no MLflow database mlflow.db here" in err
        assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_cannot_be_registered_is_refused_before_the_training():
    with pytest.raises(UserError, match=r"tracking.register_as='a/b' is not possible"):
        load("digits", ["tracking.register_as=a/b"])


def test_every_name_is_found_however_many_there_are(monkeypatch):
    class Page(list):
        token = None

    def search(page_token=None):
        page = Page([SimpleNamespace(name=f"m{page_token or 0}")])
        page.token = {None: 1, 1: 2}.get(page_token)
        return page

    assert catalogue.names(SimpleNamespace(search_registered_models=search)) == ["m0", "m1", "m2"]


def test_listing_needs_no_torch():
    """Its import would take most of the two seconds in which the list is to be there."""
    code = (
        "import sys, glann.cli.registry as shown, glann.tracking.registry.catalogue as catalogue; "
        "tags = {'glann.metric.fd_lite0': '2.5', 'glann.metric.gaussian/fd_lite0': '3', 'glann.metric.l1': '0.04'}; "
        "print(shown._metrics(catalogue.Version('digits', 1, None, 0.0, tags))); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fd_lite0 2.5, l1 0.04\n"
