"""The report and the model card: complete, self-contained, safe, and possible for a run that is not finished."""

import json
import re

import numpy as np
import pytest
from glann.config.run import Config
from glann.errors import UserError
from glann.reports import pictures
from glann.reports.card import write_card
from glann.reports.charts import line_chart, running_mean
from glann.reports.facts import RunFacts
from glann.reports.page import duration, number
from glann.reports.run import MAX_PREVIEWS, write_report
from glann.storage.journal import Journal
from html_page import Page
from PIL import Image

CONFIG = {
    "name": "tiny",
    "data": {"url": "s3://me:hunter2@bucket/digits", "resolution": 28, "channels": 1},
    "generator": {"kind": "infogan"},
    "glo": {"epochs": 3},
}


def begin(run_dir):
    (run_dir / "images").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(Config.model_validate(CONFIG).to_yaml())
    return run_dir


def fill(run_dir):
    journal = Journal(run_dir / "metrics.jsonl")
    for step in range(1, 101):
        for stage in ("glo", "imle"):
            entry = {"stage": stage, "epoch": 1 + step // 40, "step": step, "loss": 10 / step, "time": 1000.0 + step}
            journal.append(entry | {"images_per_s": 500.0, "checkpoint_stall_s": 0.5 if step % 50 == 0 else None})
    image = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    names = [f"glo-epoch-{epoch:03d}-reconstructions" for epoch in range(1, 31)]
    for name in [*names, "imle-epoch-003-samples", "samples", "nearest", "interpolations"]:
        pictures.grid(image).save(run_dir / "images" / f"{name}.png")
    (run_dir / "images" / "unrelated.png").write_bytes(b"not read")
    summary = {
        "metrics": {"psnr": 21.5, "fd_squeezenet": 12.25, "<script>alert(1)</script>": 1.0},
        "timings": {"glo_s": 75.0, "glo_images_per_s": 812.0},
        "rows": 5000,
        "fingerprint": "f00d",
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


@pytest.fixture
def run_dir(tmp_path):
    return fill(begin(tmp_path / "tiny"))


def test_the_page_needs_no_network_runs_nothing_and_is_well_formed(run_dir):
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert all(link.startswith(("#", "https://", "http://")) for link in page.links)
    assert "script" not in page.elements
    assert "url(http" not in text
    assert "@import" not in text


def test_the_page_tells_what_was_trained_and_how_good_it_is(run_dir):
    text = write_report(run_dir).read_text()
    for part in (
        "5,000 grey images of 28 × 28 px",
        "21.50 dB",
        "Fréchet distance (squeezenet)",
        "12.25",
        "1 min 15 s",
        "glann sample",
        "f00d",
        "Nearest training images",
        "Interpolations",
    ):
        assert part in text, part
    assert text.count("<svg") == 4
    assert "has not finished" not in text


def test_nothing_secret_or_executable_gets_into_the_page(run_dir):
    text = write_report(run_dir).read_text()
    assert "hunter2" not in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "hunter2" not in write_card(run_dir).read_text()


def test_long_runs_show_first_last_and_some_between(run_dir):
    text = write_report(run_dir).read_text()
    epochs = [int(epoch) for epoch in re.findall(r"reconstructions while training, epoch (\d+)", text)]
    assert len(epochs) == MAX_PREVIEWS
    assert epochs[0] == 1
    assert epochs[-1] == 30
    assert epochs == sorted(set(epochs))


def test_a_run_that_has_only_begun_can_be_reported(tmp_path):
    run_dir = begin(tmp_path / "tiny")
    assert "has not finished" in write_report(run_dir).read_text()
    assert "Not evaluated" in write_card(run_dir).read_text()


def test_a_folder_that_is_no_run_or_is_damaged_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder: it has no config\.yaml"):
        write_report(tmp_path)
    run_dir = fill(begin(tmp_path / "tiny"))
    (run_dir / "images" / "samples.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"samples\.png is not a readable picture"):
        write_report(run_dir)
    (run_dir / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is damaged: it is not JSON"):
        write_report(run_dir)


def test_facts_leave_interruptions_out_of_the_time(tmp_path):
    run_dir = begin(tmp_path / "tiny")
    journal = Journal(run_dir / "metrics.jsonl")
    for step in range(1, 11):
        away = 90_000 if step > 5 else 0  # the night between two halves of the run
        journal.append({"stage": "glo", "epoch": 1, "step": step, "loss": 1.0, "time": 10.0 * step + away})
    (stage,) = RunFacts.read(run_dir).stages
    assert stage.seconds == 80
    assert (stage.steps, stage.epochs, stage.images_per_s) == (0, 1, None), "their number was not recorded"


def test_the_steps_of_a_stage_are_its_own_and_a_repeated_epoch_counts_once(tmp_path):
    """`step` counts over all stages, and a stage without resumable steps has one an epoch."""
    run_dir = begin(tmp_path / "tiny")
    journal = Journal(run_dir / "metrics.jsonl")
    for at, (stage, epoch, steps) in enumerate([("glo", 1, 40), ("glo", 1, 40), ("glo", 2, 50), ("imle", 1, 7)]):
        journal.append({"stage": stage, "epoch": epoch, "step": 100 + at, "steps": float(steps), "loss": 1.0})
    assert [stage.steps for stage in RunFacts.read(run_dir).stages] == [90, 7]
    assert "2 epochs, 90 steps |" in write_card(run_dir).read_text()


def test_the_card_is_a_table_of_what_matters(run_dir):
    text = write_card(run_dir).read_text()
    assert text.startswith("# tiny\n")
    assert text.endswith("\n")
    assert "| generator | infogan, width 64, 64-dimensional codes (sphere) |" in text
    assert "| PSNR of reconstructions | 21.50 dB |" in text
    assert "![samples](images/card.webp)" in text
    with Image.open(run_dir / "images" / "card.webp") as picture:
        assert picture.width <= 640
    assert "## Limits" in text


def test_work_of_others_is_credited_with_its_licence(run_dir):
    """The weights of the loss (CC BY 4.0 asks for it), the extractor once it was used, and images by the index."""
    summary = json.loads((run_dir / "summary.json").read_text()) | {"asset": "digits"}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    page, card = write_report(run_dir).read_text(), write_card(run_dir).read_text()
    for text in (page, card):
        for part in (
            "VGG-16, Simonyan &",
            "Zisserman, Visual Geometry Group, University of Oxford; converted to safetensors, values unchanged",
            "https://creativecommons.org/licenses/by/4.0/",
            "SqueezeNet 1.1",
            "the first 500 of each digit",
            "the 10,000 test images",
            "CC BY-SA 3.0",
        ):
            assert part in text, part
    assert "Simonyan & Zisserman" in card, "markdown is not HTML"


def test_a_run_without_others_work_credits_no_one_and_a_file_is_named(tmp_path):
    run_dir = begin(tmp_path / "own")
    tree = CONFIG | {"loss": {"kind": "laplacian"}}
    (run_dir / "config.yaml").write_text(Config.model_validate(tree).to_yaml())
    assert "Work of others" not in write_report(run_dir).read_text() + write_card(run_dir).read_text()
    tree = CONFIG | {"loss": {"weights": "/home/me/secret/vgg.safetensors"}}
    (run_dir / "config.yaml").write_text(Config.model_validate(tree).to_yaml())
    card = write_card(run_dir).read_text()
    assert "| frozen network of the loss | the file vgg.safetensors | not known to glann: ask its publisher |" in card


def test_charts_take_their_ink_from_the_page_and_bound_their_size():
    chart = line_chart(range(1, 200_001), [1 / step for step in range(1, 200_001)], title="a", label="b", log=True)
    assert chart.startswith("<svg")
    assert "currentColor" in chart
    assert "#010203" not in chart
    assert len(chart) < 400_000


def test_running_means_are_over_what_there_is():
    assert running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
    assert running_mean([], 5) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (75, "1 min 15 s"), (3600, "1 h 00 min"), (3599.7, "1 h 00 min")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(5000, "5,000"), (0.03125, "0.0312"), (12345.6, "12,346"), (2.0, "2")])
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_the_codes_movement_their_organisation_and_warnings_are_shown(run_dir):
    """The last measures, the first learning rate, and a warning of the training once, though it was resumed."""
    journal = Journal(run_dir / "metrics.jsonl")
    for step, (angle, rate) in enumerate([(9.0, 0.0427), (61.4, 0.02)], 200):
        measures = {"code_angle": angle, "code_dimension": 40.26, "code_agreement": 0.3, "latent_lr": rate}
        entry = {"stage": "glo", "epoch": step - 199, "step": step, "loss": 0.1, "time": 1100.0 + step}
        journal.append(entry | measures | {"code_agreement_by_chance": 0.005})
        journal.append({"stage": "run", "event": "warning", "of": "glo", "text": "codes have <hardly> moved"})
    page = write_report(run_dir).read_text()
    section = page[page.index('<section id="codes">') :].split("</section>")[0]
    for shown in ("61°", "40.3 of 64", "30.0%", "0.5% by chance", "0.0427"):
        assert shown in section
    assert section.count("codes have &lt;hardly&gt; moved") == 1
    assert "angle of the codes to their start" in page
    assert '<section id="codes">' not in write_report(fill(begin(run_dir.parent / "older"))).read_text()
