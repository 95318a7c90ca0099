"""Metrics of kept features: exact against independent references, and the same however the images were cut."""

from __future__ import annotations

import numpy as np
import prdc
import pytest
import torch
from glann.errors import UserError
from glann.metrics import copying, distances, kernel
from glann.metrics.classes import ClassShares, inception_score, of_probabilities
from glann.metrics.copying import Copying, copying_of_codes, nearest_pairs, rank_statistic
from glann.metrics.distances import distance_blocks, nearest, neighbour_distances
from glann.metrics.kernel import kernel_distance
from glann.metrics.manifold import compare_manifolds, manifold
from glann.metrics.modes import count_modes, modes_of, pair_probability
from glann.metrics.prd import compare_distributions, prd_curve
from glann.metrics.tally import KeptFeatures, priority
from sklearn.metrics.pairwise import polynomial_kernel


@pytest.fixture
def rng(record_property):
    seed = int(np.random.SeedSequence().entropy % 2**32)
    record_property("seed", seed)
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that do not divide the sets evenly."""
    monkeypatch.setattr(distances, "BLOCK_BYTES", 8 * 7 * 101)
    monkeypatch.setattr(kernel, "BLOCK", 37)


def kept(features_NF, limit: int = 10_000, first: int = 0) -> KeptFeatures:
    features_NF = torch.as_tensor(np.asarray(features_NF))
    return KeptFeatures(limit).update(features_NF, torch.arange(first, first + len(features_NF)))


def by_loops(x_NF, y_MF):
    """Distances in float64, one pair at a time."""
    return np.array([[np.sqrt(((x - y) ** 2).sum()) for y in y_MF] for x in x_NF])


# What is kept of a set -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [5, 64, 1000])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_what_is_kept_depends_on_the_indices_alone(rng, workers: int, limit: int):
    """Batches of any size, in any order, over any number of workers: the same features to the last bit."""
    features_NF = torch.as_tensor(rng.normal(size=(311, 6)), dtype=torch.float32)
    whole = KeptFeatures(limit).update(features_NF, torch.arange(311))
    tallies = [KeptFeatures(limit) for _ in range(workers)]
    for index_B in torch.as_tensor(rng.permutation(311)).split(int(rng.integers(1, 40))):
        worker = int(rng.integers(workers))
        tallies[worker] = tallies[worker].update(features_NF[index_B], index_B)
    merged = KeptFeatures(limit)
    for tally in tallies:
        merged = merged.merge(tally)
    assert len(merged) == len(whole) == min(limit, 311)
    assert np.array_equal(merged.index_N, whole.index_N)
    assert np.array_equal(merged.features_NF, whole.features_NF)
    assert np.array_equal(merged.features_NF, features_NF[merged.index_N].double().numpy())
    lowest = priority(torch.arange(311)).argsort()[:limit].sort().values
    assert np.array_equal(whole.index_N, lowest.numpy())


def test_a_smaller_sample_is_what_a_smaller_limit_would_have_kept(rng):
    features_NF = rng.normal(size=(97, 3))
    first = kept(features_NF, 60).first(13)
    alone = kept(features_NF, 13)
    assert np.array_equal(first.index_N, alone.index_N)
    assert np.array_equal(first.features_NF, alone.features_NF)


def test_kept_indices_are_a_uniform_sample():
    """Every tenth of a set has its share, and neighbouring indices are independent."""
    index_N = kept(np.zeros((20_000, 1)), 4_000).index_N
    counts = np.bincount(index_N // 2_000, minlength=10)
    assert (abs(counts - 400) < 5 * np.sqrt(400)).all()
    pairs = np.isin(index_N + 1, index_N).sum()
    assert abs(pairs - 4_000 * 0.2) < 5 * np.sqrt(800)


def test_features_that_are_not_finite_of_other_size_or_missing_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        kept([[1.0], [np.nan]])
    with pytest.raises(UserError, match="use one extractor"):
        len(kept(np.zeros((3, 2))).merge(kept(np.zeros((3, 4)))))
    with pytest.raises(UserError, match="no images were seen"):
        _ = KeptFeatures().features_NF
    with pytest.raises(UserError, match="cannot be merged"):
        KeptFeatures(3).merge(KeptFeatures(4))


# Distances -----------------------------------------------------------------------------------------


def test_distances_equal_loops_in_float64_copies_included(rng, small_blocks):
    """Far from the origin, where the usual formula cancels: also copies, near copies and equal rows."""
    x_NF, y_MF = rng.normal(size=(53, 9)) + 1e3, rng.normal(size=(101, 9)) + 1e3
    y_MF[17], y_MF[90], y_MF[91] = x_NF[3], x_NF[3], x_NF[8] + 1e-7
    expected = by_loops(x_NF, y_MF)
    got = np.concatenate([block.copy() for _, block in distance_blocks(x_NF, y_MF)])
    np.testing.assert_allclose(got, expected, rtol=1e-7)
    assert got[3, 17] == got[3, 90] == 0
    distance_N, row_N = nearest(x_NF, y_MF)
    assert np.array_equal(row_N, expected.argmin(1))
    np.testing.assert_allclose(distance_N, expected.min(1), rtol=1e-7)
    apart = by_loops(y_MF, y_MF)
    np.testing.assert_allclose(neighbour_distances(y_MF, 4), np.sort(apart, 1)[:, 1:5], rtol=1e-7)


# Precision, recall, density, coverage --------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_four_equal_prdc_and_loops(rng, small_blocks, k: int, capsys):
    real_NF, drawn_NF = rng.normal(size=(83, 5)), 0.8 * rng.normal(size=(101, 5)) + 1.0
    got = manifold(kept(real_NF), kept(drawn_NF), k, k)
    expected = prdc.compute_prdc(real_NF, drawn_NF, k)
    assert vars(got) == pytest.approx(expected, abs=1e-12)
    apart, rr, dd = by_loops(real_NF, drawn_NF), by_loops(real_NF, real_NF), by_loops(drawn_NF, drawn_NF)
    reach_R, reach_N = np.sort(rr, 1)[:, k], np.sort(dd, 1)[:, k]
    assert got.precision == np.mean([any(apart[:, n] <= reach_R) for n in range(101)])
    assert got.recall == np.mean([any(apart[r] <= reach_N) for r in range(83)])
    assert got.density == pytest.approx(sum((apart[:, n] <= reach_R).sum() for n in range(101)) / (k * 101))
    assert got.coverage == np.mean([any(apart[r] <= reach_R[r]) for r in range(83)])
    assert 0 < got.recall < 1
    assert 0 < got.precision < 1
    capsys.readouterr()


def test_published_neighbours_and_equally_many_images(rng):
    """3 neighbours for precision and recall, 5 for density and coverage; the larger set is cut."""
    real, drawn = kept(rng.normal(size=(90, 4))), kept(rng.normal(size=(61, 4)) + 0.5)
    got, three, five = compare_manifolds(real, drawn), *(manifold(real.first(61), drawn, k, k) for k in (3, 5))
    assert (got.precision, got.recall) == (three.precision, three.recall)
    assert (got.density, got.coverage) == (five.density, five.coverage)
    assert 0 <= compare_manifolds(kept(np.eye(2)), kept(np.eye(2) + 3)).precision <= 1
    with pytest.raises(UserError, match="no 1 nearest neighbours"):
        compare_manifolds(kept(np.eye(1)), kept(np.eye(1)))


def test_a_set_with_duplicates_is_all_of_itself(rng):
    twice_NF = np.repeat(rng.normal(size=(20, 3)), 9, axis=0)  # each has 8 others at distance 0
    assert vars(compare_manifolds(kept(twice_NF), kept(twice_NF))) | {"density": 1} == dict.fromkeys(
        ("precision", "recall", "density", "coverage"), 1
    )


# Kernel distance -----------------------------------------------------------------------------------


def test_the_kernel_distance_equals_the_definition_and_scikit_learns_kernel(rng, small_blocks):
    x_NF, y_MF = rng.normal(size=(89, 7)), rng.normal(size=(89, 7)) * 1.2 + 0.2
    got = kernel_distance(kept(x_NF), kept(y_MF[:71]))
    kernel_of = lambda a, b: (a @ b / 7 + 1) ** 3  # noqa: E731
    within = lambda s: np.mean([kernel_of(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])  # noqa: E731
    between = np.mean([kernel_of(a, b) for a in x_NF for b in y_MF[:71]])
    assert got == pytest.approx(within(x_NF) + within(y_MF[:71]) - 2 * between, rel=1e-10)
    xx, xy, yy = (polynomial_kernel(a, b, degree=3) for a, b in ((x_NF, x_NF), (x_NF, y_MF), (y_MF, y_MF)))
    others = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (89 * 88)
    assert kernel_distance(kept(x_NF), kept(y_MF)) == pytest.approx(others - 2 * xy.mean(), rel=1e-10)
    with pytest.raises(UserError, match="at least 2 images"):
        kernel_distance(kept(x_NF[:1]), kept(y_MF))
    with pytest.raises(UserError, match="one extractor"):
        kernel_distance(kept(x_NF), kept(y_MF[:, :3]))


# Precision and recall of distributions ------------------------------------------------------------


def uniform_on(count: int, of: int = 20):
    return np.where(np.arange(of) < count, 1 / count, 0.0)


@pytest.mark.parametrize(
    ("real", "drawn", "f8", "f1_8"),
    [(20, 20, 1, 1), (20, 10, 0.5039, 0.9848), (10, 20, 0.9848, 0.5039), (20, 1, 0.0507, 0.7702)],
)
def test_prd_of_known_histograms(real: int, drawn: int, f8: float, f1_8: float):
    curve = prd_curve(uniform_on(real), uniform_on(drawn))
    assert (round(curve.f8, 4), round(curve.f1_8, 4)) == (f8, f1_8)


def test_prd_of_disjoint_histograms_is_zero():
    curve = prd_curve(uniform_on(10), uniform_on(10)[::-1])
    assert (curve.f8, curve.f1_8) == (0, 0)


def test_the_curve_equals_the_published_formula(rng):
    """alpha(l) = sum min(l P, Q), beta(l) = sum min(P, Q / l), l = tan of 1,001 equal angles, by loops."""
    real_K, drawn_K = rng.dirichlet(np.ones(13)), rng.dirichlet(np.ones(13))
    curve = prd_curve(real_K, drawn_K)
    for a in range(0, 1001, 50):
        slope = np.tan(1e-10 + a * (np.pi / 2 - 2e-10) / 1000)
        assert curve.precision_A[a] == pytest.approx(
            sum(min(slope * p, q) for p, q in zip(real_K, drawn_K, strict=True)), abs=1e-12
        )
        assert curve.recall_A[a] == pytest.approx(
            sum(min(p, q / slope) for p, q in zip(real_K, drawn_K, strict=True)), abs=1e-12
        )
    for beta, score in ((8, curve.f8), (1 / 8, curve.f1_8)):
        pairs = [(p, r) for p, r in zip(curve.precision_A, curve.recall_A, strict=True) if p + r > 0]
        assert score == pytest.approx(max((1 + beta**2) * p * r / (beta**2 * p + r) for p, r in pairs), abs=1e-12)


def test_features_of_half_the_modes_have_recall_one_half(rng):
    """Twenty well separated modes, samples on ten of them: what the histograms say, from features."""
    modes_KF = 100 * np.eye(20)
    real_NF = np.repeat(modes_KF, 21, 0) + 0.01 * rng.normal(size=(420, 20))
    drawn_NF = np.repeat(modes_KF[:10], 42, 0) + 0.01 * rng.normal(size=(420, 20))
    curve = compare_distributions(kept(real_NF), kept(drawn_NF))
    assert curve.f8 == pytest.approx(0.5039, abs=0.02)
    assert curve.f1_8 == pytest.approx(0.9848, abs=0.02)
    same = compare_distributions(kept(real_NF), kept(real_NF))
    assert (same.f8, same.f1_8) == pytest.approx((1, 1), abs=1e-6)
    again = compare_distributions(kept(real_NF), kept(drawn_NF))
    assert np.array_equal(curve.precision_A, again.precision_A)
    with pytest.raises(UserError, match="cannot be put into 20 clusters"):
        compare_distributions(kept(real_NF[:9]), kept(drawn_NF[:9]))


# Inception Score -----------------------------------------------------------------------------------


def scored(p_BK) -> float:
    return inception_score(of_probabilities((torch.zeros(0), torch.zeros(0)), torch.as_tensor(p_BK)))


def test_the_inception_score_of_sure_classes_is_their_number_and_of_constant_ones_1(rng):
    assert scored(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7, rel=1e-12)
    assert scored(np.tile(rng.dirichlet(np.ones(7)), (50, 1))) == pytest.approx(1, rel=1e-12)
    p_BK = rng.dirichlet(np.ones(7), 41)
    mean_K = p_BK.mean(0)
    assert scored(p_BK) == pytest.approx(np.exp(np.mean([(p * np.log(p / mean_K)).sum() for p in p_BK])), rel=1e-12)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_inception_score_of_logits_merges_over_workers(rng, workers: int):
    head = torch.as_tensor(rng.normal(size=(5, 8))).float(), torch.as_tensor(rng.normal(size=5)).float()
    features_NF = torch.as_tensor(rng.normal(size=(37, 8))).float()
    parts = features_NF.tensor_split(workers)
    merged = ClassShares(head)
    for part in parts:
        merged = merged.merge(ClassShares(head).update(part, torch.arange(len(part))))
    logits_NK = features_NF.double() @ head[0].double().T + head[1].double()
    assert merged.count == 37
    assert inception_score(merged) == pytest.approx(scored(logits_NK.softmax(1)), rel=1e-12)
    with pytest.raises(UserError, match="no images"):
        inception_score(ClassShares(head))


# Copying -------------------------------------------------------------------------------------------


def test_samples_of_the_distribution_have_no_preference_and_copies_have(rng):
    train, held_out, fresh = (kept(rng.normal(size=(600, 8))) for _ in range(3))
    honest = Copying(train, held_out, fresh)
    assert abs(honest.share - 0.5) < 5 * honest.deviation
    assert abs(honest.z) < 5
    copies = Copying(train, held_out, kept(train.features_NF[:300] + 0.01 * rng.normal(size=(300, 8))))
    assert copies.share == 1
    assert copies.z < -3
    far = Copying(train, held_out, kept(3 * rng.normal(size=(600, 8))))
    assert far.z > 3


def test_the_share_counts_nearest_images_among_equally_many(rng):
    train_TF, held_out_HF, drawn_NF = rng.normal(size=(70, 4)), rng.normal(size=(43, 4)), rng.normal(size=(59, 4))
    drawn_NF[5] = train_TF[2]
    held_out_HF[0] = train_TF[int(kept(train_TF, 43).index_N[7])]  # an image of both sets
    drawn_NF[11] = held_out_HF[0]
    got = Copying(kept(train_TF), kept(held_out_HF), kept(drawn_NF))
    cut_TF = train_TF[kept(train_TF, 43).index_N]
    nearer = [0.5 + 0.5 * np.sign(by_loops([d], held_out_HF).min() - by_loops([d], cut_TF).min()) for d in drawn_NF]
    assert got.share == pytest.approx(np.mean(nearer), abs=1e-12)
    assert got.deviation == pytest.approx(0.5 / np.sqrt(59))


def test_the_nearest_pairs_are_named_by_sample_and_training_row(rng):
    train_TF, drawn_NF = rng.normal(size=(80, 3)), rng.normal(size=(60, 3)) + 20
    drawn_NF[[40, 7]] = train_TF[[13, 77]] + [[1e-3], [1e-2]]
    samples, rows = nearest_pairs(kept(train_TF), kept(drawn_NF), 2)
    assert samples.tolist() == [40, 7]
    assert rows.tolist() == [13, 77]


def test_the_rank_statistic_equals_scipys(rng):
    """Ties included: the two-sided p-value of scipy's normal approximation without continuity correction."""
    from scipy.stats import mannwhitneyu, norm

    for decimals in (9, 1):
        drawn_N, held_out_H = rng.normal(size=61).round(decimals), rng.normal(0.2, size=47).round(decimals)
        expected = mannwhitneyu(drawn_N, held_out_H, use_continuity=False, method="asymptotic")
        z = rank_statistic(drawn_N, held_out_H)
        assert 2 * norm.sf(abs(z)) == pytest.approx(expected.pvalue, rel=1e-9)
        assert np.sign(z) == np.sign(expected.statistic - 61 * 47 / 2)
    assert rank_statistic(np.ones(5), np.ones(6)) == 0


def test_the_test_of_copying_averages_the_statistic_over_cells_as_published(rng):
    """C_T = sum P(cell) Z(cell) / sum P(cell) over cells with enough samples, in each against its training images."""
    train_TF, held_out_HF, drawn_NF = (rng.normal(size=(count, 2)) for count in (900, 500, 400))
    cells = copying._cells(train_TF, held_out_HF, drawn_NF)
    assert len(np.unique(cells[0])) == 9
    scores, weights = [], []
    for cell in range(9):
        t, h, d = (images[c == cell] for images, c in zip((train_TF, held_out_HF, drawn_NF), cells, strict=True))
        if min(len(h), len(d)) >= 20:
            near_h, near_d = by_loops(h, t).min(1), by_loops(d, t).min(1)
            above = (near_d[:, None] > near_h).sum()
            scores.append((above - len(h) * len(d) / 2) / np.sqrt(len(h) * len(d) * (len(h) + len(d) + 1) / 12))
            weights.append(len(h) / 500)
    expected = np.dot(scores, weights) / sum(weights)
    got = Copying(kept(train_TF), kept(held_out_HF), kept(drawn_NF)).z
    assert got == pytest.approx(expected, rel=1e-9)


def test_copying_in_one_region_is_seen_among_samples_that_are_too_far_away_elsewhere(rng):
    """Why there are cells: over all of them the two faults hide one another."""
    centres = np.array([[0.0, 0.0], [100.0, 0.0]])
    train_TF, held_out_HF = (np.repeat(centres, 500, 0) + rng.normal(size=(1000, 2)) for _ in range(2))
    drawn_NF = held_out_HF + rng.normal(size=(1000, 2)) * 0.02
    drawn_NF[:500] = train_TF[:500] + 1e-3
    drawn_NF[500:] = centres[1] + 2.5 * rng.normal(size=(500, 2))
    z_of = lambda rows: Copying(kept(train_TF[rows]), kept(held_out_HF[rows]), kept(drawn_NF[rows])).z  # noqa: E731
    assert z_of(slice(0, 500)) < -3
    assert z_of(slice(500, 1000)) > 0
    assert Copying(kept(train_TF), kept(held_out_HF), kept(drawn_NF)).z < 0


def test_too_few_samples_for_the_test_of_copying_is_one_line(rng):
    few = kept(rng.normal(size=(10, 2)))
    with pytest.raises(UserError, match="draw more samples, or hold out more images"):
        _ = Copying(few, few, few).z


def test_codes_are_copied_half_of_the_time_if_they_are_drawn_from_the_same(rng):
    train, fresh = kept(rng.normal(size=(800, 6))), kept(rng.normal(size=(700, 6)))
    assert copying_of_codes(train, fresh) == pytest.approx(0.5, abs=0.08)
    assert copying_of_codes(train, train) == 1
    train_TF, fresh_NF = train.features_NF[:40], fresh.features_NF[:30]
    apart_T = np.sort(by_loops(train_TF, train_TF), 1)[:, 1]
    near_N = by_loops(fresh_NF, train_TF).min(1)
    assert copying_of_codes(kept(train_TF), kept(fresh_NF)) == pytest.approx((near_N[:, None] < apart_T).mean())


# Modes ---------------------------------------------------------------------------------------------


def test_of_1000_modes_38_draws_have_a_pair_as_likely_as_not():
    assert pair_probability(37, 1000) < 0.5 < pair_probability(38, 1000)
    assert modes_of(38, 0) == pytest.approx(1000, rel=0.05)
    expected = 1 - np.prod([1 - i / 365 for i in range(23)])
    assert pair_probability(23, 365) == pytest.approx(expected, rel=1e-12)


def test_modes_are_counted_from_samples_that_look_alike(rng):
    """2,000 draws of 1,000 modes: within 5 standard deviations of the number of pairs, 2.2 % each."""
    centres_KF = 10 * rng.normal(size=(1000, 12))
    drawn_NF = centres_KF[rng.integers(1000, size=2000)] + 1e-3 * rng.normal(size=(2000, 12))
    real = kept(10 * rng.normal(size=(900, 12)))
    assert count_modes(real, kept(drawn_NF)) == pytest.approx(1000, rel=5 * 0.0224)
    exact = [modes_of(2000, pairs(rng.integers(1000, size=2000))) for _ in range(20)]
    assert np.mean(exact) == pytest.approx(1000, rel=0.05)
    assert count_modes(real, kept(drawn_NF[:1].repeat(5, 0))) == 1
    with pytest.raises(UserError, match="draw at least 2"):
        modes_of(1, 0)


def pairs(modes_N) -> int:
    return sum(int(n) * (int(n) - 1) // 2 for n in np.bincount(modes_N))
