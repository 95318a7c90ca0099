"""The report of a study: complete at any time, self-contained, safe; its ranking is right and its command is exact."""

import csv
import math
import random
import shlex
from itertools import pairwise

import pytest
from glann.config.parse import plain_data
from glann.config.run import load
from glann.errors import UserError
from glann.tuning import ledger
from glann.tuning.ledger import Ledger, Trial
from glann.tuning.report.charts import apart
from glann.tuning.report.importance import MIN_TRIALS, best_count, importances
from glann.tuning.report.leaderboard import as_yaml, command, leaderboard, recipe_params, text
from glann.tuning.report.parallel import ASIDE, MAX_NAMED, Scale, place, ticks_of
from glann.tuning.report.study import MAX_ROWS, gain, write_report
from glann.tuning.space import Dimension
from html_page import Page
from study_folder import fill_study, make_study


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "studies")


def page_of(study):
    return write_report(study).read_text(encoding="utf-8")


# The page ---------------------------------------------------------------------------------------


def test_the_page_tells_what_was_searched_and_what_it_found(study):
    trials = fill_study(study)
    values = {trial.number: trial.value for trial in trials if trial.value is not None}
    best = min(values, key=values.get)
    page = page_of(study)
    for part in (
        "5 keys of recipe digits, searched for the lowest fd_squeezenet",
        "12 of 12 trials: 6 finished, 3 stopped early, 2 failed, 1 running.",
        f"<b>{values[best]:.4g}</b>",
        f"<b>{values[0]:.4g}</b>",
        f"<b>{(values[0] - values[best]) / values[0]:.1%}</b>",
        f"Best: trial {best}",
        "loss or gradients were not finite for 5 steps",
        "PED-ANOVA: how much the distribution of a key differs between the best 3 and all 6 finished trials",
        "only indicative",
        "log_uniform:",
        "latent_lr: 0.1",
    ):
        assert part in page, part
    assert page.count("<svg") == 3
    assert page.count("data:image/png;base64,") == 2


def test_the_page_needs_no_network_runs_nothing_and_is_well_formed(study):
    fill_study(study)
    page = page_of(study)
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.addresses
    assert all(address.startswith(("data:image/", "#")) for address in parsed.addresses + parsed.links)
    assert "script" not in parsed.elements
    assert "default-src 'none'" in page
    assert "url(http" not in page
    assert "#010203" not in page


def test_nothing_hostile_or_secret_gets_out(tmp_path):
    evil = "<script>alert(1)</script>"
    study = make_study(
        tmp_path / "studies",
        space={
            "sampler.noise_dim": {"choice": [8, evil, "$x^{"]},
            "sampler.statistics": {"choice": ["noise", "batch"]},
        },
        overrides={"data.url": "s3://me:hunter2@bucket/digits", "tracking.uri": "https://me:hunter2@server"}
        | {"sampler.kind": "imle"},
    )
    open_ledger = Ledger(study.folder)
    open_ledger.end(open_ledger.start({}), state="finished", value=0.5)
    for name, state in (("$x^{", "failed"), (evil, "finished"), (evil, "failed"), (8, "finished")):
        trial = open_ledger.start({"sampler.noise_dim": name, "sampler.statistics": "noise" if name == 8 else evil})
        facts = {"value": 0.4 if name == 8 else 0.6} if state == "finished" else {}
        open_ledger.end(trial, state=state, why=f"=HYPERLINK() {evil} at s3://me:hunter2@b/\x00\ud800", **facts)
    open_ledger.close()
    page, table = page_of(study), (study.folder / "leaderboard.csv").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "hunter2" not in page + table
    assert "s3://***@bucket/digits" in page
    assert Page(page).open == []
    assert all(row["why"].startswith("'=HYPERLINK") for row in csv.DictReader(table.splitlines()) if row["why"])


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], "No trial has started."),
        (["running"], "1 of 12 trials: 1 running. None has a value yet."),
        (["failed", "stopped"], "2 of 12 trials: 1 stopped early, 1 failed. None has a value yet."),
        (["finished"], "no trial is better than the base recipe"),
        (["running", "finished"], "it has not finished, so there is nothing to compare with"),
        (["finished", "finished"], "Left out. At least 4 finished trials are needed; there are 2."),
    ],
)
def test_a_study_can_be_reported_at_any_time(study, states, expected):
    if states:
        fill_study(study, states)
    page = page_of(study)
    assert expected in page
    assert Page(page).open == []
    assert "What mattered" in page


def test_one_key_has_nothing_to_combine_and_a_shared_stage_one_has_no_losses_of_its_own(tmp_path):
    study = make_study(tmp_path / "studies", space={"sampler.noise_dim": {"integer": [8, 32]}})
    fill_study(study, ["finished"] * 5)
    page = page_of(study)
    assert "with one key there is nothing to combine" in page
    assert "The values of the trials hardly differ." in page
    assert "Loss of stage 2" in page
    assert "It also trains stage 1, which the trials shared." in page


def test_a_study_of_many_trials_shows_the_best_and_says_how_many_more(tmp_path):
    study = make_study(tmp_path / "studies", budget={"trials": 130})
    open_ledger = Ledger(study.folder)
    for number in range(130):
        trial = open_ledger.start({"glo.latent_lr": 0.01} if number else {})
        open_ledger.end(trial, state="finished", value=1.0 - number / 200)
    open_ledger.close()
    page = page_of(study)
    assert page.count('<td class="words">finished') == MAX_ROWS
    assert "30 more are not shown." in page
    assert len(list(csv.DictReader((study.folder / "leaderboard.csv").open()))) == 130


def test_what_is_damaged_is_named_and_the_old_page_stays(study):
    fill_study(study)
    before = page_of(study)
    (study.run_dir(0) / "images" / "samples.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"samples\.png is not a readable picture"):
        write_report(study)
    assert (study.folder / "report.html").read_text(encoding="utf-8") == before
    assert not list(study.folder.glob(".*.tmp"))


# The command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [{}, {"kind": "population", "interval": 2}])
def test_the_command_trains_what_the_best_trial_trained(tmp_path, search):
    space = {"glo.latent_lr": {"log_uniform": [1e-7, 1e-2]}, "glo.generator_lr": {"log_uniform": [1e-7, 1e-2]}}
    overrides = {"glo.schedule": {"kind": "cosine", "floor": 1e-5}, "glo.latent_lr": 0.5, "data.source": "it's $HOME"}
    changes = {"space": space, "overrides": overrides, "metric": "fd_lite0", "search": search}
    study = make_study(tmp_path / "studies", **changes)
    trial = Trial(7, {"glo.latent_lr": 1e-6, "glo.generator_lr": 0.00012345678901234567})
    words = shlex.split(command(study, trial))
    assert words[:3] == ["glann", "train", "digits"]
    again = load(words[2], words[3:])
    there = study.trial(7, trial.params)
    assert again.model_dump(exclude={"name", "runs_dir"}) == there.model_dump(exclude={"name", "runs_dir"})
    assert again.name == "digits-study-best"


def test_the_command_is_on_the_page_for_the_best_trial(study):
    trials = fill_study(study)
    best = min((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)
    assert command(study, best) in page_of(study)  # nothing in it needs escaping


@pytest.mark.parametrize(
    "value", [1e-5, 1e22, True, None, "true", "1e-5", "", "a: b", "x\ny", {"kind": "cosine", "floor": 1e-3}, [1, 2.5]]
)
def test_a_value_in_an_override_reads_back_as_it_was(value):
    assert plain_data(as_yaml(value)) == value
    assert "\n" not in text(value)


# The ranking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "first"), [("fd_squeezenet", 2), ("psnr", 1)])
def test_the_best_come_first_then_who_got_far_then_who_failed(study, metric, first):
    study = study.model_copy(update={"metric": metric})
    trials = [
        Trial(0, {}, "finished", 5.0),
        Trial(1, {}, "finished", 9.0),
        Trial(2, {}, "finished", 1.0),
        Trial(3, {}, "failed", epoch=11),
        Trial(4, {}, "stopped", epoch=3, loss=2.0),
        Trial(5, {}, "stopped", epoch=3, loss=1.0),
        Trial(6, {}, "stopped", epoch=9, loss=9.0),
        Trial(7, {}),
        Trial(8, {}, "finished", None),
    ]
    random.Random(0).shuffle(trials)
    rows = leaderboard(study, trials)
    assert [row.trial.number for row in rows] == [first, 0, 3 - first, 8, 6, 5, 4, 7, 3]
    assert [row.rank for row in rows] == [1, 2, 3, None, None, None, None, None, None]
    assert [row.name for row in rows if row.is_base] == ["digits-study-0000"]


def test_the_table_beside_the_page_has_every_value_in_full(study):
    trials = fill_study(study)
    write_report(study)
    rows = {row["trial"]: row for row in csv.DictReader((study.folder / "leaderboard.csv").open())}
    assert len(rows) == len(trials)
    for trial in trials:
        row = rows[f"digits-study-{trial.number:04d}"]
        assert row["state"] == trial.state
        assert row["fd_squeezenet"] == ("" if trial.value is None else repr(trial.value))
        if trial.number:
            assert row["glo.latent_lr"] == repr(trial.params["glo.latent_lr"])
            assert row["glo.schedule.floor"] == str(trial.params.get("glo.schedule.floor", ""))
    assert rows["digits-study-0000"]["glo.latent_lr"] == "0.1"  # the recipe's


def test_the_recipe_has_values_for_the_keys_that_apply_to_it(study):
    assert recipe_params(study) == {
        "glo.latent_lr": 0.1,
        "glo.schedule.kind": "cosine",
        "glo.schedule.floor": 0.02,
        "sampler.noise_dim": 32,
        "sampler.statistics": "noise",
    }
    constant = study.model_copy(update={"overrides": {"glo.schedule.kind": "constant", "sampler.kind": "imle"}})
    assert "glo.schedule.floor" not in recipe_params(constant)


@pytest.mark.parametrize(
    ("metric", "best", "base", "expected"),
    [
        ("fd_squeezenet", 0.75, 1.0, "25.0%"),
        ("l1", 0.9999, 1.0, "less than 0.1%"),
        ("psnr", 22.0, 20.5, "1.50 dB"),
        ("l1", -1.0, 0.0, "1"),
    ],
)
def test_what_was_gained_is_shown_in_the_unit_of_the_metric(study, metric, best, base, expected):
    assert gain(best, base, study.model_copy(update={"metric": metric})) == expected


# What mattered ----------------------------------------------------------------------------------


def drawn(study, count, seed):
    """Random trials whose value hangs on one key, and a little on another."""
    rng, valued = random.Random(seed), []
    for _ in range(count):
        params = {
            "glo.latent_lr": math.exp(rng.uniform(math.log(0.005), math.log(0.1))),
            "glo.schedule.kind": rng.choice(["constant", "cosine"]),
            "sampler.noise_dim": rng.randint(8, 32),
            "sampler.statistics": rng.choice(["noise", "batch"]),
        }
        if params["glo.schedule.kind"] == "cosine":
            params["glo.schedule.floor"] = rng.uniform(0, 0.5)
        valued.append((params, abs(math.log(params["glo.latent_lr"] / 0.02))))
    return valued


@pytest.mark.parametrize("sign", [1, -1])
def test_the_key_that_matters_is_found_also_among_conditional_ones(study, sign):
    study = study.model_copy(update={"direction": "minimize" if sign == 1 else "maximize"})
    found = importances(study, [(params, sign * value) for params, value in drawn(study, 60, seed=1)])
    assert found[0].key == "glo.latent_lr"
    assert found[0].share > 0.7
    assert {one.key for one in found} == set(study.space)
    assert sum(one.share for one in found) == pytest.approx(1)
    floor = next(one for one in found if one.key == "glo.schedule.floor")
    assert 0 < floor.trials < 60


@pytest.mark.parametrize("count", [MIN_TRIALS, 5, 11, 60])
def test_shares_can_be_told_from_few_trials_and_from_values_outside_the_space(study, count):
    valued = drawn(study, count, seed=2)
    valued[0][0]["glo.latent_lr"] = 3.0  # an earlier start had a wider space
    found = {one.key: one for one in importances(study, valued)}
    assert found["glo.latent_lr"].trials == count - 1
    assert all(0 <= one.share <= 1 for one in found.values())


def test_the_best_are_never_all():
    assert [best_count(trials) for trials in (4, 6, 10, 40, 100)] == [2, 3, 5, 5, 10]


# Drawings ---------------------------------------------------------------------------------------


def test_labels_keep_their_distance_and_their_order():
    assert apart([0.5, 0.1, 0.52], 0.1) == [0.5, 0.1, 0.6]


def test_ticks_are_at_both_ends_and_do_not_crowd():
    for scale in (Scale(0.005, 0.1, True), Scale(8, 32, False), Scale(1e-7, 1e-2, True), Scale(0.9, 1.1, True)):
        ticks = sorted(scale.ticks())
        assert ticks[0][0] == 0
        assert ticks[-1][0] == 1
        assert all(after - before >= 0.0999 for (before, _), (after, _) in pairwise(ticks))
    assert Scale(0.3, 0.3, False).ticks() == [(0.5, "0.3")]


def test_of_many_choices_the_first_the_last_and_some_between_are_named():
    ticks = ticks_of(Dimension(choice=tuple(range(1000))))
    assert len(ticks) == MAX_NAMED + 1
    assert (ticks[0], ticks[-1]) == ((0, "0"), (1, "999"))
    assert [text for _, text in ticks_of(Dimension(choice=("a", "b" * 50)))] == ["a", "b" * 15 + "…"]


def test_a_place_on_an_axis_is_by_magnitude_by_number_or_by_choice():
    log = Dimension(log_uniform=(0.01, 1.0))
    assert place(log, {"k": 0.1}, "k") == pytest.approx(0.5)
    assert place(log, {}, "k") == place(log, {"k": 2.0}, "k") == ASIDE
    choice = Dimension(choice=("a", None, "c"))
    assert [place(choice, {"k": value}, "k") for value in ("a", None, "c", "d")] == [0, 0.5, 1, ASIDE]
    assert place(choice, {}, "k") == ASIDE


def test_every_state_of_a_trial_has_a_label(study):
    from glann.tuning.report.study import STATE_LABELS

    assert set(STATE_LABELS) == set(ledger.STATES)
