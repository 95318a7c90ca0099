"""The table and the report of a comparison: means and deviations, bounds, copies in words, failures as rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison_folder import DISTANCE, fill_comparison, make_comparison
from glann.cli.evaluate import report
from glann.errors import UserError
from glann.tuning.compare.comparison import Cell
from glann.tuning.compare.driver import Clock, remaining
from glann.tuning.compare.folder import refuse_other_comparison, saved_comparison
from glann.tuning.compare.report import TABLE, write_report
from glann.tuning.compare.table import as_markdown, build_table, last_line, published_as_markdown
from glann.tuning.ledger import Ledger, trials
from html_page import Page


@pytest.fixture
def comparison(tmp_path):
    made = make_comparison(tmp_path)
    fill_comparison(made)
    return made


def table_of(comparison):
    return build_table(comparison, trials(comparison.folder).values())


def test_methods_are_ranked_by_their_distance_to_held_out_images_and_a_copying_one_last(comparison):
    table = table_of(comparison)
    assert table.columns[0].key == f"{DISTANCE}:held-out"
    names = [row.name for row in table.rows]
    assert names == ["real images (floor)", "reconstructions of imle", "gmm", "imle", "ot", "published"]


def test_a_figure_is_the_mean_over_the_seeds_with_its_deviation(comparison):
    table = table_of(comparison)
    held_out, training = table.columns[:2]
    assert table.row("gmm").cell(held_out) == "64 ± 1.414"
    assert table.row("gmm").cell(training) == "61 ± 1.414"
    assert table.row("real images (floor)").cell(training) == "8 ± 0"
    assert table.row("reconstructions of imle").cell(held_out) == "–", "not measured against held-out images here"
    assert table.row("published").cell(training) == "–"


def test_published_figures_stand_apart_with_their_source_and_are_not_ranked(tmp_path):
    groups = [{"source": "Someone 2019", "figures": {"theirs": 6.5, "best": 2.0}}]
    with_published = make_comparison(tmp_path, published=groups)
    fill_comparison(with_published)
    assert [row.name for row in table_of(with_published).methods] == ["gmm", "imle", "ot", "published"]
    text = published_as_markdown(with_published)
    assert text.index("| best | 2 | Someone 2019 |") < text.index("| theirs | 6.5 | Someone 2019 |")
    page = write_report(with_published).read_text()
    assert page.index("Published by others") > page.index("Figures")
    assert "Someone 2019" in page
    assert text in with_published.folder.joinpath(TABLE).read_text()


def test_without_published_figures_nothing_is_said_of_them(comparison):
    assert not published_as_markdown(comparison)
    assert "Published by others" not in write_report(comparison).read_text()


def test_one_seed_has_no_deviation(tmp_path):
    single = make_comparison(tmp_path, seeds=[0])
    fill_comparison(single)
    assert table_of(single).row("gmm").cell(table_of(single).columns[0]) == "63"


def test_a_sampler_that_copies_is_named_in_words_and_no_other_is(comparison):
    remarks = {row.name: " ".join(row.remarks) for row in table_of(comparison).rows}
    assert "COPIES: 91% of its samples" in remarks["ot"]
    assert "nearly all of its codes lie at training codes" in remarks["ot"]
    assert not any("COPIES" in words for name, words in remarks.items() if name != "ot")
    assert "COPIES" in as_markdown(table_of(comparison))


def test_a_failure_is_a_row_with_its_reason_and_no_end(comparison):
    [row] = [row for row in table_of(comparison).rows if row.name == "published"]
    assert row.remarks[0].startswith("seed 0 failed: the budget of 4 minutes is spent")
    assert row.remarks[1] == "not done yet: seed 1"


def test_the_last_line_is_the_one_distance_over_the_other(comparison):
    line = last_line(comparison, table_of(comparison))
    assert line == "gmm over imle, Fréchet distance (lite0-96), held-out: 0.58 (64 / 111)"
    write_report(comparison)
    assert (comparison.folder / TABLE).read_text().splitlines()[-1] == line
    unmeasured = comparison.model_copy(update={"ratio": ("gmm", "published")})
    assert "not measured" in last_line(unmeasured, table_of(comparison))


def test_the_page_needs_no_network_is_well_formed_and_holds_no_secret(comparison):
    text = write_report(comparison).read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses + page.links)
    assert "script" not in page.elements
    assert "hunter2" not in text + (comparison.folder / TABLE).read_text()
    assert text.count("<img") == 4, "the training images and three methods"
    assert text.count("<svg") == 1
    assert "3 of them" not in text
    assert "2 of them start from the stage 1 that another one has trained" in text
    assert "8 runs: 6 finished, 1 failed, 1 waiting" in text


def test_a_report_of_what_has_only_begun_and_the_command_for_it(tmp_path, capsys):
    begun = make_comparison(tmp_path)
    begun.folder.mkdir(parents=True)
    (begun.folder / "comparison.yaml").write_text(begun.to_yaml())
    report(begun.folder)
    assert capsys.readouterr().out.strip() == str(begun.folder / "report.html")
    assert "No run has finished" in (begun.folder / "report.html").read_text()


# Resume --------------------------------------------------------------------------------------------


def test_what_has_ended_is_not_made_again_and_what_was_killed_is(comparison):
    ledger = Ledger(comparison.folder)
    assert remaining(comparison, ledger.trials, retry=False) == [Cell("published", 1)]
    ledger.start({"method": "published", "seed": 1})
    ledger.close()
    assert remaining(comparison, list(trials(comparison.folder).values()), retry=False) == [Cell("published", 1)]
    again = remaining(comparison, list(trials(comparison.folder).values()), retry=True)
    assert again == [Cell("published", 0), Cell("published", 1)]


def test_the_last_trial_of_a_run_counts(comparison):
    ledger = Ledger(comparison.folder)
    trial = ledger.start({"method": "published", "seed": 0})
    ledger.end(trial, 1.0, state="finished", metrics={DISTANCE: 50.0})
    ledger.close()
    row = table_of(comparison).row("published")
    assert row.cell(table_of(comparison).columns[1]) == "50"
    assert row.remarks == ("not done yet: seed 1",)


def test_methods_may_be_added_and_none_changed(comparison):
    more = comparison.methods | {"flow": {"sampler.kind": "flow"}}
    refuse_other_comparison(comparison.model_copy(update={"methods": more, "seeds": (0, 1, 2), "budget_minutes": 9.0}))
    other = comparison.methods | {"gmm": {"sampler.kind": "gmm", "sampler.components": 3}}
    with pytest.raises(UserError, match=r"holds another comparison: methods\.gmm is .* there"):
        refuse_other_comparison(comparison.model_copy(update={"methods": other}))
    with pytest.raises(UserError, match="evaluation is"):
        refuse_other_comparison(comparison.model_copy(update={"evaluation": load_evaluation(samples=9)}))


def load_evaluation(**changes):
    return make_comparison(Path("nowhere"), evaluation=changes).evaluation


def test_a_damaged_file_is_one_line(comparison):
    (comparison.folder / "comparison.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"comparison\.yaml is damaged"):
        saved_comparison(comparison.folder)


# Budget --------------------------------------------------------------------------------------------


def test_a_budget_counts_from_the_first_training_and_with_the_stage_1_that_is_taken_over(monkeypatch):
    from glann.trainers.run.events import Training, Waiting
    from glann.tuning.compare import driver

    now = [1000.0]
    monkeypatch.setattr(driver, "monotonic", lambda: now[0])
    clock = Clock(2.0, used_s=90.0)
    clock.notify(Waiting(0, 2))
    now[0] += 500
    assert clock.stop() == "", "waiting for workers is no training"
    clock.notify(Training.__new__(Training))
    now[0] += 29
    assert clock.stop() == ""
    now[0] += 2
    assert clock.stop() == "the budget of 2 minutes is spent"
    assert clock.spent
    assert Clock(None).stop() == ""
