"""What a budget of random trials buys: against counting every choice of k trials."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from glann.tuning.report.budget_curve import best_of_k_KQ
from glann.tuning.report.study import write_report
from study_folder import fill_study, make_study


@pytest.mark.parametrize("minimize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7, 9])
def test_quantiles_are_those_of_all_choices_of_k_trials(n, minimize):
    rng = np.random.default_rng()
    values, quantiles = rng.normal(size=n).tolist(), (0.1, 0.5, 0.9)
    found_KQ = best_of_k_KQ(values, quantiles, minimize)
    best = min if minimize else max
    for k in range(1, n + 1):
        outcomes = sorted((best(drawn) for drawn in itertools.combinations(values, k)), reverse=not minimize)
        expected = [outcomes[math.ceil(q * len(outcomes) - 1e-9) - 1] for q in quantiles]
        np.testing.assert_array_equal(found_KQ[k - 1], expected)


def test_more_trials_are_never_worse_and_all_of_them_give_the_best():
    values = np.random.default_rng().normal(size=60).tolist()
    found_KQ = best_of_k_KQ(values, (0.1, 0.5, 0.9), minimize=True)
    assert (np.diff(found_KQ, axis=0) <= 0).all()
    assert (found_KQ[-1] == min(values)).all()


def test_a_failed_trial_is_the_worst():
    found_KQ = best_of_k_KQ([1.0, math.inf, math.inf], (0.1, 0.5, 0.9), minimize=True)
    assert found_KQ[0].tolist() == [1.0, math.inf, math.inf], "one trial in three has a value"
    assert found_KQ[2].tolist() == [1.0, 1.0, 1.0]


def test_a_random_study_shows_its_curve_and_any_other_says_why_not(tmp_path):
    random = make_study(tmp_path / "a", search={"kind": "random"}, scheduler={"kind": "none"})
    fill_study(random, ["finished"] * 6 + ["failed"] * 2)
    page = write_report(random).read_text()
    assert "the median, and between the edges eight draws in ten" in page
    modelled = make_study(tmp_path / "b")
    fill_study(modelled)
    assert "follows from trials that were drawn at random" in write_report(modelled).read_text()
    few = make_study(tmp_path / "c", search={"kind": "random"}, scheduler={"kind": "none"})
    fill_study(few, ["finished"] * 3)
    assert "at least 5 random trials are needed; there are 2" in write_report(few).read_text()
