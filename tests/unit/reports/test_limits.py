"""What bounds a figure stands beside it, and one sentence says which stage holds the samples back."""

from __future__ import annotations

import pytest
from finished_run import texts_of
from glann.config.run import load
from glann.reports.figures import figure_rows, main_rows
from glann.reports.limits import limits, verdict


def measured(samples: float, reconstructions: float, floor: float, reference: str = "") -> dict[str, float]:
    key = f"fd_lite0{reference}"
    return {f"real/{key}": floor, f"reconstruction/{key}": reconstructions, key: samples, f"gaussian/{key}": 200.0}


@pytest.mark.parametrize(
    ("figures", "begins"),
    [
        ((105.0, 55.0, 8.0), "Both stages hold the samples back: stage 1 adds 48% of the distance"),
        ((295.0, 82.0, 8.0), "Stage 2 holds the samples back"),
        ((59.0, 55.0, 8.0), "Stage 1 holds the samples back"),
        ((50.0, 55.0, 8.0), "Stage 1 holds the samples back"),  # a copying sampler, or chance
        ((8.5, 8.2, 8.0), "Nothing holds the samples back"),
        ((7.0, 9.0, 8.0), "Nothing holds the samples back"),
        ((240.0, 95.0, 310.0), "These images are too few to judge the samples"),  # of 16 images
        ((400.0, 95.0, 310.0), "These images are too few to judge the samples"),
        ((600.0, 95.0, 310.0), "Stage 2 holds the samples back"),  # far beyond what few images do
    ],
)
def test_the_stage_that_adds_most_of_the_distance_is_named(figures, begins):
    sentence = verdict(measured(*figures))
    assert sentence.startswith(begins)
    for value in figures:
        assert f"{value:.4g}" in sentence
    assert sentence.endswith(".")


def test_held_out_images_decide_where_there_are_any():
    both = measured(60.0, 55.0, 8.0) | measured(300.0, 55.0, 8.0, ":held-out")
    assert verdict(both).startswith("Stage 2")
    assert [one.title for one in limits(both)] == [
        "Fréchet distance (lite0)",
        "Fréchet distance (lite0), held-out images",
    ]


@pytest.mark.parametrize("missing", ["real/fd_lite0", "reconstruction/fd_lite0", "fd_lite0"])
@pytest.mark.parametrize("value", [None, float("nan"), "x"])
def test_nothing_is_said_of_what_was_not_measured(missing, value):
    figures: dict = measured(105.0, 55.0, 8.0)
    figures[missing] = value
    assert verdict(figures) == ""
    del figures[missing]
    assert verdict(figures) == ""


def test_bounds_stand_beside_the_figure_and_not_as_figures_of_their_own():
    rows = figure_rows(
        measured(105.0, 55.0, 8.0) | {"psnr": 19.0, "copying_lite0:held-out": 0.58}, {"copying_lite0:held-out": 0.011}
    )
    assert [(title, value, bounds) for title, value, bounds, _ in rows] == [
        ("Fréchet distance (lite0)", "105", "reconstructions 55 · real images 8"),
        ("Fréchet distance (lite0), Gaussian (GLO baseline)", "200", ""),
        ("PSNR of reconstructions", "19.00 dB", ""),
        ("Copying (lite0), held-out images", "0.58 ± 0.01", ""),
    ]


def test_a_bound_without_its_figure_is_not_lost():
    assert [row[0] for row in figure_rows({"real/fd_lite0": 8.0})] == ["Fréchet distance (lite0), real images"]


def test_report_card_and_the_end_of_the_command_say_it(tmp_path):
    config = load("digits", ["name=mine", f"runs_dir={tmp_path}", "tracking.enabled=false"])
    figures = measured(295.0, 82.0, 8.0)
    report, card, end = texts_of(config, figures)
    for text in (report, card, end):
        assert verdict(figures) in text.replace("&#39;", "'")
    assert "reconstructions 82 · real images 8" in report


def test_what_counts_is_against_one_reference_and_of_the_baseline_the_distance():
    metrics = {
        "l1": 0.02,
        "real/fd_lite0": 13.0,
        "reconstruction/fd_lite0": 35.0,
        "fd_lite0": 60.0,
        "real/fd_lite0:held-out": 10.0,
        "reconstruction/fd_lite0:held-out": 40.0,
        "fd_lite0:held-out": 65.0,
        "copying_lite0:held-out": 0.52,
        "copying_codes": 0.6,
        "gaussian/fd_lite0": 160.0,
        "gaussian/fd_lite0:held-out": 167.0,
        "gaussian/recall_lite0:held-out": 0.5,
    }
    assert [
        (title, value, bounds) for title, value, bounds, _ in main_rows(metrics, {"copying_lite0:held-out": 0.01})
    ] == [
        ("L1 reconstruction error", "0.0200", ""),
        ("Fréchet distance (lite0)", "65", "reconstructions 40 · real images 10"),
        ("Copying (lite0)", "0.52 ± 0.01", ""),
        ("Copying (codes)", "0.60", ""),
        ("Fréchet distance (lite0), Gaussian (GLO baseline)", "167", ""),
    ]
    trained = {key: value for key, value in metrics.items() if "held-out" not in key}
    assert main_rows(trained) == figure_rows(trained), "where nothing is held out, all counts"
