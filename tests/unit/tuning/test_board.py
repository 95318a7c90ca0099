"""What a study shows: a line for every start and end where there is no terminal, and a table that fits a narrow one."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from glann.tuning.board import ROWS, Board
from glann.tuning.ledger import Ledger
from glann.tuning.study import StudyConfig
from rich.console import Console
from study_folder import fill_study, make_study


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return make_study(tmp_path)


def board_of(study: StudyConfig, terminal: bool = False, width: int = 80) -> tuple[Board, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    return Board(study, Ledger(study.folder), console), file


def drawn(board: Board, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(board.screen())
    return file.getvalue().splitlines()


def test_without_a_terminal_every_start_and_end_is_one_line(study: StudyConfig):
    board, file = board_of(study)
    with board:
        ledger = board.ledger
        base, other = ledger.start({}), ledger.start({"glo.latent_lr": 0.0123456, "sampler.noise_dim": 16})
        board.on_step_begin(0, [])
        ledger.end(base, state="finished", value=0.5, metrics={"fd_squeezenet": 0.5})
        board.on_step_begin(1, [])
        ledger.end(other, state="finished", value=0.25, metrics={"fd_squeezenet": 0.25})
        worse = ledger.start({"sampler.noise_dim": 9})
        ledger.end(worse, state="finished", value=0.75)
        board.on_step_begin(2, [])
        ledger.end(ledger.start({"sampler.noise_dim": 10}), state="stopped", epoch=3, loss=0.98765)
        ledger.end(ledger.start({"sampler.noise_dim": 11}), state="failed", why="loss or gradients were not finite")
    assert file.getvalue().splitlines() == [
        "trial 0   starts     the base recipe",
        "trial 1   starts     glo.latent_lr=0.01235 sampler.noise_dim=16",
        "trial 0   finished   fd_squeezenet 0.5  the base recipe  best so far",
        "trial 1   finished   fd_squeezenet 0.25  glo.latent_lr=0.01235 sampler.noise_dim=16  best so far",
        "trial 2   finished   fd_squeezenet 0.75  sampler.noise_dim=9",
        "trial 3   stopped    after epoch 3, loss 0.9877  sampler.noise_dim=10",
        "trial 4   failed     loss or gradients were not finite  sampler.noise_dim=11",
    ]


def test_the_best_is_marked_in_the_better_direction(tmp_path: Path):
    study = make_study(tmp_path, metric="psnr")
    board, file = board_of(study)
    with board:
        for value in (20.0, 25.0, 22.0):
            board.ledger.end(board.ledger.start({}), state="finished", value=value)
            board.on_step_begin(0, [])
    assert [line.endswith("best so far") for line in file.getvalue().splitlines()] == [True, True, False]


def test_what_an_earlier_start_printed_is_not_printed_again(study: StudyConfig):
    fill_study(study, ["finished", "stopped", "running"])
    board, file = board_of(study)
    with board:
        board.on_step_begin(0, [])
    assert [line.split()[:3] for line in file.getvalue().splitlines()] == [["trial", "2", "starts"]]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_is_one_line_for_each_trial(study: StudyConfig, width: int):
    fill_study(study)
    board, _ = board_of(study)
    board.running = 1
    lines = drawn(board, width)
    title, header, *rows = lines
    assert all(len(line.rstrip()) <= width for line in lines)
    assert title.startswith("digits-study: 11 of 12 trials, best 0.")
    assert header.split() == ["trial", "state", "fd_squeezenet", "so", "far", "values"]
    assert len(rows) == len(board.ledger.trials)
    found = {int(row.split()[0]): row.split()[1:] for row in rows}
    for trial in board.ledger.trials:  # numbers are whole, however narrow
        assert found[trial.number][0] == trial.state
        if trial.value is not None:
            assert found[trial.number][1] == f"{trial.value:.4g}"


def test_the_title_of_a_usual_study_fits_a_usual_terminal(study: StudyConfig):
    fill_study(study)
    board, _ = board_of(study)
    board.running = 1
    assert drawn(board, 80)[0].rstrip().endswith("min left")


def test_a_long_study_shows_what_runs_the_latest_and_the_best(tmp_path: Path):
    study = make_study(tmp_path, budget={"trials": 60})
    board, _ = board_of(study)
    for number in range(50):
        board.ledger.end(board.ledger.start({}), state="finished", value=0.1 if number == 7 else 0.5)
    running = [board.ledger.start({}) for _ in range(3)]
    shown = board.shown(board.ledger.trials)
    assert shown[:3] == running
    assert [trial.number for trial in shown[3:]] == [7, *range(49, 49 - ROWS + 3, -1)]


def test_it_says_how_far_each_trial_is(study: StudyConfig):
    board, _ = board_of(study)
    first, second = board.ledger.start({}), board.ledger.start({"sampler.noise_dim": 9})
    result: dict[str, Any] = {"number": 0, "stage": "glo", "stage_epoch": 3, "reached_loss": 0.51239}
    board.on_trial_result(0, [], None, result)
    assert board.progress(first) == "stage 1, epoch 3, loss 0.5124"
    assert board.progress(second) == "starting"
    board.on_trial_result(0, [], None, {"number": 0, "stage": "imle", "stage_epoch": 1})
    assert board.progress(first) == "stage 2, epoch 1"
    assert board.progress(board.ledger.end(first, 90.0, state="finished", value=0.4)) == "1.5 min"


def test_the_time_left_is_estimated_from_the_trials_so_far(tmp_path: Path):
    study = make_study(tmp_path, budget={"trials": 10})
    board, _ = board_of(study)
    assert "left" not in board.title(board.ledger.trials)
    for _ in range(4):
        board.ledger.end(board.ledger.start({}), 600.0, state="finished", value=0.4)
    running: Any = [
        SimpleNamespace(status="RUNNING"),
        SimpleNamespace(status="RUNNING"),
        SimpleNamespace(status="ERROR"),
    ]
    board.on_step_begin(0, running)
    assert board.title(board.ledger.trials).endswith("about 30 min left")  # six trials of ten minutes, two at a time
    for _ in range(6):
        board.ledger.end(board.ledger.start({}), 600.0, state="finished", value=0.4)
    assert "left" not in board.title(board.ledger.trials)


def test_on_a_terminal_only_ends_stay(study: StudyConfig):
    board, file = board_of(study, terminal=True)
    board.ledger.end(board.ledger.start({}), state="finished", value=0.5)
    board.ledger.start({"sampler.noise_dim": 9})
    board.print_changes()
    assert file.getvalue().splitlines() == ["trial 0   finished   fd_squeezenet 0.5  the base recipe  best so far"]
