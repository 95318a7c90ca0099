"""The table of metrics: an entry has one description wherever it is shown, and a result is read back by its key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from glann.config.run import load
from glann.config.samplers import SAMPLERS
from glann.config.sections import EvaluationConfig
from glann.errors import UserError
from glann.metrics.features.extractor import EXTRACTORS
from glann.metrics.result import (
    BASELINE,
    FLOOR,
    HELD_OUT,
    OWN,
    RECONSTRUCTION,
    SAMPLER_LABELS,
    Result,
    by_key,
    canonical_keys,
    from_key,
    known_results,
    to_key,
)
from glann.metrics.spec import GROUPS, METRICS, frechet_metric, measured_with
from glann.reports.card import write_card
from glann.reports.figures import metric_rows
from glann.reports.limits import BOUNDS
from glann.reports.run import write_report

OTHERS = [BASELINE, "imle", "flow"]  # one that this version does not know, too
OF_SAMPLES = [name for name, metric in METRICS.items() if metric.of_samples]
NOT_FID = "Not FID"


def test_there_is_a_metric_for_every_extractor_and_only_inceptions_is_the_fid():
    distances = ["fd_squeezenet", "fd_vgg16", "fd_lite0", "fid", "fd_lite0-96"]
    assert list(METRICS)[:7] == ["l1", "psnr", *distances]
    assert {name: frechet_metric(name).name for name in EXTRACTORS} == {
        "squeezenet": "fd_squeezenet",
        "vgg16": "fd_vgg16",
        "lite0": "fd_lite0",
        "inception": "fid",
        "lite0-96": "fd_lite0-96",
    }
    with pytest.raises(UserError, match="no feature extractor 'resnet'; there are inception, lite0"):
        frechet_metric("resnet")


def test_a_configuration_can_name_every_extractor_and_no_other():
    assert set(get_args(EvaluationConfig.model_fields["extractor"].annotation)) == set(EXTRACTORS)


def test_a_run_is_measured_by_all_but_the_metrics_of_other_extractors():
    always = ["l1", "psnr", "fd_lite0", "precision_lite0", "recall_lite0", "copying_lite0"]
    assert [metric.name for metric in measured_with("lite0")] == always
    assert [metric.name for metric in measured_with("lite0", ["kid"])] == [*always, "kid_lite0"]
    of_codes = ["precision_codes", "recall_codes", "density_codes", "coverage_codes", "copying_codes"]
    assert [metric.name for metric in measured_with("lite0", ["codes"])] == [*always, *of_codes]
    everything = {metric.name for metric in METRICS.values() if metric.extractor in (None, "lite0")}
    assert {metric.name for metric in measured_with("lite0", ["all"])} == everything


def test_a_configuration_can_name_every_group_of_metrics_and_no_other():
    (choices, _) = get_args(EvaluationConfig.model_fields["metrics"].annotation)
    assert sorted(get_args(choices)) == sorted(GROUPS)


def test_metrics_that_share_a_tally_and_a_comparison_are_computed_once():
    """Four numbers of one manifold, two of one curve: what is shared is the same object in the table."""
    for names in (("precision", "recall", "density", "coverage"), ("f8", "f1_8"), ("copying", "copying_z")):
        needs = [METRICS[f"{name}_lite0"].needs for name in names]
        assert len({(need.tally, need.compare, need.extractor) for need in needs}) == 1


@pytest.mark.parametrize("name", METRICS)
def test_an_entry_is_whole(name: str):
    metric = METRICS[name]
    assert metric.name == name
    assert metric.title
    assert metric.meaning
    assert f"{metric.better} is better" in metric.explained()
    assert metric.format.format(12.3456) != metric.format.format(23.4567)


# Its description -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", OTHERS)
@pytest.mark.parametrize("name", OF_SAMPLES)
def test_the_row_of_a_baseline_says_the_same_of_its_kind_as_the_row_of_the_model(name: str, sampler: str):
    [(title, value, meaning)] = metric_rows({to_key(name, OWN): 8.625})
    [(other_title, other_value, other_meaning)] = metric_rows({to_key(name, sampler): 8.625})
    assert other_title.startswith(f"{title}, ")
    assert other_value == value
    both = "; against training images"
    assert meaning.endswith(both)
    assert other_meaning.startswith(f"{meaning.removesuffix(both)}; samples drawn ")
    assert other_meaning.endswith(both)
    assert other_meaning.count(NOT_FID) == meaning.count(NOT_FID) == (name.startswith("fd_"))
    [(held_out_title, _, held_out_meaning)] = metric_rows({to_key(name, sampler, HELD_OUT): 8.625})
    assert held_out_title == f"{other_title}, held-out images"
    assert held_out_meaning == f"{other_meaning.removesuffix(both)}; against held-out images"


@pytest.mark.parametrize("write", [write_report, write_card])
@pytest.mark.parametrize("baseline", ["fid_glo", "gaussian/fid"])
def test_fid_and_its_baseline_are_called_fid_in_report_and_card(tmp_path: Path, write, baseline: str):
    (tmp_path / "config.yaml").write_text(load("digits").to_yaml())
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": {"fid": 8.6, baseline: 40.0}}))
    text = write(tmp_path).read_text()
    assert NOT_FID not in text
    assert "8.60" in text
    assert "40.00" in text
    assert "FID, Gaussian (GLO baseline)" in text


def test_the_words_that_people_know_are_kept():
    seen = "; against training images"
    assert metric_rows({"l1": 0.0401, "psnr": 19.1, "fid": 8.6, "fd_lite0": 57.951}) == [
        (
            "L1 reconstruction error",
            "0.0401",
            f"mean absolute difference of pixels, range 0 to 1; lower is better{seen}",
        ),
        ("PSNR of reconstructions", "19.10 dB", "peak signal-to-noise ratio in dB; higher is better" + seen),
        ("FID", "8.60", "Fréchet Inception Distance; lower is better" + seen),
        (
            "Fréchet distance (lite0)",
            "57.95",
            "Fréchet distance of lite0 features; lower is better. Not FID: compare it only with itself" + seen,
        ),
    ]


# Under which key it is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [None, HELD_OUT])
@pytest.mark.parametrize("sampler", [OWN, *SAMPLER_LABELS, "imle", "rs-imle"])
@pytest.mark.parametrize("name", OF_SAMPLES)
def test_a_key_is_read_back_as_what_it_was_made_of(name: str, sampler: str, reference: str | None):
    key = to_key(name, sampler, reference)
    assert from_key(key) == (name, sampler, reference)
    assert re.fullmatch(r"[\w.\- :/]+", key), "the names that MLflow takes"


@pytest.mark.parametrize("name", [name for name in METRICS if name not in OF_SAMPLES])
def test_a_metric_without_samples_is_of_no_sampler(name: str):
    assert to_key(name, None) == name
    assert from_key(name) == (name, None, None)
    assert from_key(f"{name}_glo") == (f"{name}_glo", None, None)
    assert from_key(f"gaussian/{name}") == (f"gaussian/{name}", None, None)


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_a_key_with_the_suffix_of_old_means_the_gaussian(name: str):
    assert from_key(f"{name}_glo") == (name, "gaussian", None)
    assert canonical_keys({name: 1.0, f"{name}_glo": 2.0}) == {name: 1.0, f"gaussian/{name}": 2.0}


@pytest.mark.parametrize(
    "key",
    ["", "/", "_glo", "a/b", "/fid", "../fid", "<b>/fid", "gaussian/", "gaussian/x", "x_glo", "fid:", ":x", "fid:../x"],
)
def test_what_is_no_key_of_a_metric_stays_as_it_is(key: str):
    assert from_key(key) == (key, None, None)
    assert canonical_keys({key: 1.0}) == {key: 1.0}


def test_results_of_the_runs_own_sampler_and_of_none_have_bare_keys():
    results = [Result("l1", 1.0), Result("fid", 2.0, OWN), Result("fid", 3.0, "gaussian")]
    assert by_key(results) == {"l1": 1.0, "fid": 2.0, "gaussian/fid": 3.0}
    held_out = [Result("fid", 2.0, OWN, HELD_OUT), Result("fid", 3.0, "gaussian", HELD_OUT)]
    assert by_key(held_out) == {"fid:held-out": 2.0, "gaussian/fid:held-out": 3.0}


def test_every_result_of_today_is_known_and_every_sampler_has_words():
    """Also of every kind of sampler there is, and against held-out images: what a study may be about."""
    assert {BASELINE, RECONSTRUCTION, FLOOR} == set(SAMPLER_LABELS)
    assert known_results()[: len(METRICS)] == list(METRICS)
    both = (None, HELD_OUT)
    assert {from_key(key) for key in known_results()} == {
        *((name, sampler, to) for name in OF_SAMPLES for sampler in (OWN, *SAMPLERS) for to in both),
        *((name, bound, to) for name in OF_SAMPLES if METRICS[name].bounded for bound in BOUNDS for to in both),
        *((name, None, None) for name in METRICS if name not in OF_SAMPLES),
    }
    assert len(set(known_results())) == len(known_results())
    for kind in SAMPLERS:
        assert f"{kind}/fd_lite0:held-out" in known_results()
