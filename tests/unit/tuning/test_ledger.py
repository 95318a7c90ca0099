"""The ledger of a study: a kill at any byte costs at most the line it was writing, and nothing damaged is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from glann.errors import UserError
from glann.tuning.ledger import FILE, STATES, Ledger, Trial, best_of, format_params, trials
from hypothesis import given, settings
from hypothesis import strategies as st

KEYS = st.sampled_from(["glo.latent_lr", "sampler.noise_dim", "loss.taps", "loss.patch"])
PARAMS = st.dictionaries(KEYS, st.none() | st.integers(-99, 99) | st.floats(1e-9, 1e9) | st.lists(st.text(max_size=3)))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e15, max_value=1e15)
FACTS = st.fixed_dictionaries(
    {"state": st.sampled_from(STATES[1:])},
    optional={
        "value": NUMBERS,
        "metrics": st.dictionaries(st.sampled_from(["l1", "fd_lite0"]), NUMBERS),
        "epoch": st.integers(0, 500),
        "loss": NUMBERS,
        "why": st.text(max_size=20),
        "seconds": st.floats(0, 1e6),
        "params": PARAMS,
    },
)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_bytes().splitlines()]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(PARAMS, st.none() | FACTS), max_size=6))
def test_what_was_entered_is_read_back(tmp_path_factory: pytest.TempPathFactory, entries: list[Any]):
    folder = tmp_path_factory.mktemp("study")
    ledger = Ledger(folder)
    for params, facts in entries:
        trial = ledger.start(params)
        if facts is not None:
            ledger.end(trial, **facts)
    ledger.close()
    assert list(trials(folder).values()) == ledger.trials
    assert [trial.number for trial in ledger.trials] == list(range(len(entries)))


def test_a_line_is_on_disk_before_anything_depends_on_it(tmp_path: Path):
    ledger = Ledger(tmp_path)  # never closed, as after a kill
    trial = ledger.start({"sampler.noise_dim": 9})
    assert trials(tmp_path) == {0: Trial(0, {"sampler.noise_dim": 9})}
    ledger.end(trial, 3.0, state="finished", value=0.5)
    assert trials(tmp_path)[0].value == 0.5


def test_a_start_after_a_kill_goes_on_with_the_same_trials(tmp_path: Path):
    first = Ledger(tmp_path)
    first.end(first.start({}), 1.0, state="finished", value=0.4)
    first.start({"sampler.noise_dim": 9})
    second = Ledger(tmp_path)  # the first was never closed
    assert [trial.state for trial in second.trials] == ["finished", "running"]
    second.end(second.trials[1], 2.0, state="stopped", epoch=3, loss=0.9)
    third = second.start({"sampler.noise_dim": 10})
    assert third.number == 2
    assert trials(tmp_path) == {trial.number: trial for trial in second.trials}
    assert trials(tmp_path)[1] == Trial(1, {"sampler.noise_dim": 9}, "stopped", epoch=3, loss=0.9, seconds=2.0)


def test_a_torn_last_line_is_nothing_that_happened(tmp_path: Path):
    whole = Ledger(tmp_path)
    whole.start({})
    whole.end(whole.start({"sampler.noise_dim": 9}), state="finished", value=0.5)
    whole.close()
    text = (tmp_path / FILE).read_bytes()
    last = text[:-1].rindex(b"\n") + 1
    for length in range(last, len(text)):
        (tmp_path / FILE).write_bytes(text[:length])
        assert trials(tmp_path)[1].state == "running"
        ledger = Ledger(tmp_path)
        ledger.end(ledger.trials[1], state="failed", why="lost")
        ledger.close()
        assert trials(tmp_path)[1].why == "lost"
        assert len(lines(tmp_path)) == 3  # two starts and an end


STARTED = {"event": "started", "trial": 1, "params": {}}
ENDED = {"event": "ended", "trial": 0, "state": "finished", "metrics": {}}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"3",
        b"\xff\xfe",
        {},
        STARTED | {"trial": 0},  # begun twice
        STARTED | {"trial": -1},
        STARTED | {"trial": True},
        STARTED | {"trial": "1"},
        STARTED | {"params": [1]},
        STARTED | {"event": "begun"},
        ENDED | {"trial": 5},  # never begun
        ENDED | {"state": "perfect"},
        ENDED | {"state": ["finished"]},
        ENDED | {"value": "low"},
        ENDED | {"loss": [0.1]},
        ENDED | {"epoch": 1.5},
        ENDED | {"seconds": None},
        ENDED | {"metrics": {"l1": "low"}},
        ENDED | {"metrics": None},
        ENDED | {"params": 3},
        ENDED | {"why": {"a": 1}},
        b'{"event":"ended","trial":0,"state":"finished","value":1e999}',
    ],
    ids=str,
)
def test_a_damaged_line_is_refused_in_one(tmp_path: Path, line: Any):
    ledger = Ledger(tmp_path)
    ledger.start({})
    ledger.close()
    with (tmp_path / FILE).open("ab") as file:
        file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    for read in (trials, Ledger):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / FILE} is damaged before byte ")
        assert str(caught.value).endswith("remove that line")
        assert "\n" not in str(caught.value)


def test_a_line_of_ending_does_not_make_a_trial_another_one(tmp_path: Path):
    (tmp_path / FILE).write_text(
        "".join(json.dumps(line) + "\n" for line in (STARTED, ENDED | {"trial": 1, "number": 7}))
    )
    assert trials(tmp_path)[1].number == 1


def test_no_ledger_is_no_trials(tmp_path: Path):
    assert trials(tmp_path) == {}


def test_the_time_of_a_start_is_added_to_what_went_before(tmp_path: Path):
    ledger = Ledger(tmp_path)
    assert ledger.end(Trial(0, {}, seconds=5.0), 2.0, state="failed").seconds == 7.0


def test_a_member_of_a_population_has_the_values_that_it_ended_with(tmp_path: Path):
    ledger = Ledger(tmp_path)
    ledger.end(ledger.start({"glo.latent_lr": 0.01}), state="finished", value=0.5, params={"glo.latent_lr": 0.012})
    assert trials(tmp_path)[0].params == {"glo.latent_lr": 0.012}
    assert lines(tmp_path)[0]["params"] == {"glo.latent_lr": 0.01}  # what it began with can still be seen


def test_a_metric_that_is_not_finite_is_not_entered(tmp_path: Path):
    ledger = Ledger(tmp_path)
    measured = {"l1": 0.1, "psnr": math.inf, "fd_lite0": math.nan}
    ledger.end(ledger.start({}), state="failed", metrics=measured)
    assert ledger.trials[0].metrics == {"l1": 0.1}
    assert trials(tmp_path)[0] == ledger.trials[0]


def test_a_line_with_the_suffix_of_old_is_read_under_the_key_of_today(tmp_path: Path):
    ledger = Ledger(tmp_path)
    ledger.end(ledger.start({}), state="finished", value=0.2, metrics={"fd_lite0": 0.1, "fd_lite0_glo": 0.2})
    assert trials(tmp_path)[0].metrics == {"fd_lite0": 0.1, "gaussian/fd_lite0": 0.2}


def test_the_best_is_the_first_of_equals_in_the_better_direction():
    known = [Trial(n, {}, "finished", value) for n, value in enumerate([0.5, 0.3, None, 0.3, 0.9])]
    assert best_of(known, minimize=True) == known[1]
    assert best_of(known, minimize=False) == known[4]
    assert best_of(known[2:3], minimize=True) is None


def test_values_format_params_are_short():
    assert format_params({}) == "the base recipe"
    assert (
        format_params({"glo.latent_lr": 0.0123456, "sampler.noise_dim": 16})
        == "glo.latent_lr=0.01235 sampler.noise_dim=16"
    )
