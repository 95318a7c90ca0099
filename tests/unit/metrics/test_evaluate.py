"""Evaluation measures what the table says: one entry is enough, and more entries cost no more passes over images."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from glann.config.run import find_recipe
from glann.datasets.pack import pack
from glann.errors import EnvironmentFault, UserError
from glann.inference.model import SamplingModel
from glann.inference.package import open_model
from glann.metrics import cache, judge
from glann.metrics import evaluate as evaluation
from glann.metrics.cache import TallyCache
from glann.metrics.features import extractor
from glann.metrics.features.extractor import EXTRACTORS, ExtractorSpec
from glann.metrics.frechet import FeatureMoments, frechet_distance
from glann.metrics.panel import build_panel, code_panel
from glann.metrics.reference import open_images, training_images
from glann.metrics.result import Result, by_key, deviations, to_key
from glann.metrics.spec import METRICS, Metric, Reconstructions, Samples
from glann.metrics.tally import KeptFeatures, priority
from glann.reports.card import write_card
from glann.reports.figures import metric_rows
from glann.storage.local import LocalStore
from glann.tuning.load import load_study
from registered_runs import DIM, ROWS, make_config, make_run
from torch import Tensor, nn

SEED = 4
ALWAYS = ("fd_squeezenet", "precision_squeezenet", "recall_squeezenet")  # of samples


class Pixels(nn.Module):
    """An extractor without weights: the image, small."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())

    def forward(self, img_B3HW):
        return self.layers(img_B3HW)


@dataclass(frozen=True)
class Brightness:
    """A tally of a metric that is in no table of ours."""

    count: int = 0
    total: float = 0.0

    def update(self, seen: Tensor, index_B: Tensor, /) -> Brightness:
        return self.merge(Brightness(seen.numel(), float(seen.double().sum())))

    def merge(self, other: Brightness, /) -> Brightness:
        return Brightness(self.count + other.count, self.total + other.total)

    def mean(self) -> float:
        return self.total / self.count


def darker(real: Brightness, drawn: Brightness) -> float:
    return drawn.mean() - real.mean()


def worst(fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    return (fake_BCHW.double() - real_BCHW.double()).abs().flatten(1).amax(1)


TOYS = (
    Metric("toy", "Toy distance", "how much brighter samples are", "higher", "{:.3f} lux", Samples(Brightness, darker)),
    Metric("fd_toy", "Toy of features", "the same", "lower", "{:.1f}", Samples(Brightness, darker, "squeezenet")),
    Metric("blot", "Worst", "largest error", "lower", "{:.1f}", Reconstructions(worst)),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a finished run and its data."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        config = make_config("x")
        make_run(config, 0.3)
    return SimpleNamespace(folder=folder, config=config)


@pytest.fixture
def world(home, monkeypatch):
    """A finished run, its codes, and how often its images were read, drawn and seen by the extractor."""
    monkeypatch.chdir(home.folder)
    seen = {"read": 0, "drawn": [], "features": 0}
    recipe = ExtractorSpec("none", 48, lambda *_: Pixels(), lambda img: img / 255)
    monkeypatch.setitem(EXTRACTORS, "squeezenet", recipe)
    monkeypatch.setattr(extractor, "load_weights", lambda name: ({}, ""))
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, DIM), dim=1).numpy()
    monkeypatch.setattr(evaluation.retention, "latest", lambda store: 1)
    monkeypatch.setattr(
        evaluation.reader, "load_rows", lambda store, step, rows, only: {"z": z_ND[rows.start : rows.stop]}
    )
    decode, draw = training_images, judge.draw
    features = extractor.Extractor.__call__

    def read(*args):
        for batch in decode(*args):
            seen["read"] += len(batch)
            yield batch

    def drawn(model, part, *args, **how):
        seen["drawn"].append(len(part))
        return draw(model, part, *args, **how)

    def looked(self, img_BCHW):
        seen["features"] += len(img_BCHW)
        return features(self, img_BCHW)

    monkeypatch.setattr(evaluation, "training_images", read)
    monkeypatch.setattr(judge, "training_images", read)
    monkeypatch.setattr(judge, "draw", drawn)
    monkeypatch.setattr(extractor.Extractor, "__call__", looked)
    manifest, model = open_model(home.config.run_dir, s3=home.config.s3)
    return SimpleNamespace(config=home.config, manifest=manifest, model=model, seen=seen, z_ND=z_ND)


def blocks_of(z_ND, size: int = 37):
    """The codes of consecutive rows, in blocks."""
    return lambda rows: iter(torch.from_numpy(z_ND[rows.start : rows.stop]).split(size))


def evaluated(world) -> list[Result]:
    return evaluation.evaluate(world.config, world.manifest, world.model, seed=SEED)


def test_results_name_metric_and_sampler(world):
    results = evaluated(world)
    assert [(result.metric, result.sampler) for result in results] == [
        ("l1", None),
        ("psnr", None),
        ("fd_squeezenet", "real"),
        ("fd_squeezenet", "reconstruction"),
        *((name, sampler) for sampler in ("own", "gaussian") for name in ALWAYS),
    ]
    assert {result.reference for result in results} == {None}
    assert list(by_key(results)) == [
        *("l1", "psnr", "real/fd_squeezenet", "reconstruction/fd_squeezenet"),
        *(*ALWAYS, *(f"gaussian/{name}" for name in ALWAYS)),
    ]


@pytest.fixture
def one_thread():
    """Batches are drawn by one thread each; with more, a grey value may be rounded the other way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_values_are_those_of_the_images_as_users_draw_them(world, one_thread):
    images = open_images(world.config)
    real = torch.cat(list(training_images(images, range(ROWS), world.config)))
    look = extractor.build_extractor("squeezenet")
    values = by_key(evaluated(world))
    for key, method in (("fd_squeezenet", "imle"), ("gaussian/fd_squeezenet", "glo")):
        drawn = torch.from_numpy(world.model.sample(200, SEED, method=method)).permute(0, 3, 1, 2)
        expected = frechet_distance(FeatureMoments.of(look(real)), FeatureMoments.of(look(drawn)))
        assert values[key] == pytest.approx(expected, rel=1e-9)
    fake = torch.from_numpy(world.model.decode(torch.from_numpy(world.z_ND))).permute(0, 3, 1, 2)
    assert values["l1"] == pytest.approx((fake.double() - real.double()).abs().mean().item() / 255)


def test_a_metric_more_is_one_entry_of_the_table_and_costs_no_pass(world, monkeypatch, tmp_path):
    """It is measured, shown on the card, and can be a study's objective."""
    before = by_key(evaluated(world))
    cost = dict(world.seen)
    world.seen.update(read=0, drawn=[], features=0)
    for toy in TOYS:
        monkeypatch.setitem(METRICS, toy.name, toy)
    results = evaluated(world)
    values = by_key(results)
    assert world.seen == cost == {"read": 2 * ROWS, "drawn": [200, 200], "features": ROWS + 3 * 200}
    assert before.items() <= values.items()
    names = ["toy", "gaussian/toy", "fd_toy", "gaussian/fd_toy", "blot"]
    assert set(values) == set(before) | set(names)
    assert Result("toy", values["gaussian/toy"], "gaussian") in results

    rows = {title: (value, meaning) for title, value, meaning in metric_rows(values)}
    meaning = "how much brighter samples are; higher is better; against training images"
    assert rows["Toy distance"] == (f"{values['toy']:.3f} lux", meaning)
    assert "Toy distance, Gaussian (GLO baseline)" in rows
    path = world.config.run_dir / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": values}))
    assert f"| Toy distance | {values['toy']:.3f} lux |" in write_card(world.config.run_dir).read_text()

    study = tmp_path / "study.yaml"
    base = f"name: s\nrecipe: {find_recipe('digits')}\nspace: {{sampler.components: {{integer: [8, 16]}}}}\nmetric: "
    study.write_text(f"{base}toy")
    assert load_study(study).minimize is False
    study.write_text(f"{base}fd_toy")
    assert load_study(study).minimize is True
    assert load_study(study).base().evaluation.extractor == "squeezenet"
    study.write_text("\n".join([base.replace("sampler.components", "glo.batch_size") + to_key("toy", "gaussian")]))
    assert load_study(study).metric == "gaussian/toy"


def test_a_metric_of_another_extractor_is_not_measured(world, monkeypatch):
    other = replace(TOYS[0], name="other", needs=Samples(Brightness, darker, "lite0"))
    monkeypatch.setitem(METRICS, "other", other)
    assert "other" not in by_key(evaluated(world))


def test_without_the_codes_only_samples_and_real_images_are_measured(world):
    results = evaluation.evaluate(world.config, world.manifest, world.model, with_codes=False)
    assert {(result.metric, result.sampler) for result in results} == {
        *((name, sampler) for name in ALWAYS for sampler in ("own", "gaussian")),
        ("fd_squeezenet", "real"),
    }


def test_the_closest_pairs_are_those_of_all_samples_and_rows(world):
    """Image by image: no sample is nearer to a training image than those that are shown."""
    images = open_images(world.config)
    samples, training = evaluation.closest_pairs(world.config, world.model, images, 3, SEED)
    assert samples.shape == training.shape == (3, 28, 28, 1)
    look = extractor.build_extractor("squeezenet")
    drawn_NHWC = world.model.sample(200, SEED)
    real = torch.cat(list(training_images(images, range(ROWS), world.config)))
    drawn = torch.from_numpy(drawn_NHWC).permute(0, 3, 1, 2)
    distance_NR = torch.cdist(look(drawn).double(), look(real).double(), compute_mode="donot_use_mm_for_euclid_dist")
    order_N = distance_NR.min(1).values.argsort()[:3]
    assert abs(samples.astype(int) - drawn_NHWC[order_N]).max() <= 1, "but for the rounding of a grey value"
    assert (training == real[distance_NR[order_N].argmin(1)].permute(0, 2, 3, 1).numpy()).all()


def test_held_out_images_are_named_and_copying_is_measured_against_them(world, tmp_path):
    """The training images themselves, in another order, in place of held-out ones: no preference but for ties."""
    images = open_images(world.config)
    real = torch.cat(list(training_images(images, range(ROWS), world.config)))
    other = real.flip(0)[:150].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "other.npz", images=other)
    pack(str(tmp_path / "other.npz"), str(tmp_path / "other"), resolution=28, channels=1)
    results = evaluation.evaluate(world.config, world.manifest, world.model, seed=SEED, data=str(tmp_path / "other"))
    values = by_key(results)
    assert {result.reference for result in results} == {"held-out"}
    copying = ("copying_squeezenet",)
    assert list(values) == [
        "real/fd_squeezenet:held-out",
        "reconstruction/fd_squeezenet:held-out",
        *(f"{name}:held-out" for name in (*ALWAYS, *copying)),
        *(f"gaussian/{name}:held-out" for name in (*ALWAYS, *copying)),
    ]
    assert 0 < values["copying_squeezenet:held-out"] < 1
    known = deviations(results)
    assert set(known) == {f"{sampler}copying_squeezenet:held-out" for sampler in ("", "gaussian/")}
    assert known["copying_squeezenet:held-out"] == pytest.approx(0.5 / 200**0.5), "of as many samples"
    without = evaluation.evaluate(
        world.config, world.manifest, world.model, seed=SEED, data=str(tmp_path / "other"), with_codes=False
    )
    assert not {result.metric for result in without} & set(copying)


def test_the_floor_is_that_of_two_disjoint_parts_of_the_real_images(world, one_thread):
    """As many random images as samples, at most half of all, against all the others; no image is read again for it."""
    images = open_images(world.config)
    real = torch.cat(list(training_images(images, range(ROWS), world.config)))
    features_NF = extractor.build_extractor("squeezenet")(real)
    chosen = priority(torch.arange(ROWS)).argsort()[: min(200, ROWS // 2)]
    others = torch.tensor([row not in set(chosen.tolist()) for row in range(ROWS)])
    expected = frechet_distance(FeatureMoments.of(features_NF[others]), FeatureMoments.of(features_NF[chosen]))
    values = by_key(evaluated(world))
    assert values["real/fd_squeezenet"] == pytest.approx(expected, rel=1e-9)
    assert values["real/fd_squeezenet"] < values["fd_squeezenet"]


def packed(img_NHWC, folder, name: str, **options) -> str:
    """The address of a packed data set of these images."""
    np.savez(folder / f"{name}.npz", images=img_NHWC)
    pack(str(folder / f"{name}.npz"), str(folder / name), channels=1, **({"resolution": 28} | options))
    return str(folder / name)


@pytest.fixture
def unseen(world, tmp_path) -> str:
    rng = np.random.default_rng(3)
    return packed(rng.integers(0, 256, (120, 28, 28, 1), np.uint8), tmp_path, "unseen")


def test_configured_held_out_images_are_measured_against_beside_the_training_images(world, unseen):
    """One drawing serves both references; what is measured against the training images stays as it is without."""
    before, drawn = by_key(evaluated(world)), list(world.seen["drawn"])
    world.seen["drawn"].clear()
    evaluation_section = world.config.evaluation.model_copy(update={"data": unseen})
    world.config = world.config.model_copy(update={"evaluation": evaluation_section})
    results = evaluated(world)
    values = by_key(results)
    assert world.seen["drawn"] == drawn
    assert {key: value for key, value in values.items() if ":" not in key} == before
    names = (*ALWAYS, "copying_squeezenet")
    assert {key for key in values if ":" in key} == {
        "real/fd_squeezenet:held-out",
        "reconstruction/fd_squeezenet:held-out",
        *(f"{sampler}{name}:held-out" for name in names for sampler in ("", "gaussian/")),
    }
    assert {result.against for result in results} == {"training", "held-out"}
    direct = by_key(evaluation.evaluate(world.config, world.manifest, world.model, seed=SEED, data=unseen))
    assert {key: value for key, value in values.items() if ":" in key} == pytest.approx(direct)


def test_the_held_out_part_of_the_data_set_is_the_default(world, tmp_path, monkeypatch):
    images = open_images(world.config)
    real_NHWC = torch.cat(list(training_images(images, range(ROWS), world.config))).permute(0, 2, 3, 1).numpy()
    rng = np.random.default_rng(3)
    np.savez(tmp_path / "x.npz", images=real_NHWC, test_images=rng.integers(0, 256, (120, 28, 28, 1), np.uint8))
    index = pack(str(tmp_path / "x.npz"), str(tmp_path / "x"), resolution=28, channels=1)
    manifest = world.manifest.model_copy(update={"fingerprint": index.fingerprint})
    data = world.config.data.model_copy(update={"url": str(tmp_path / "x")})
    config = world.config.model_copy(update={"data": data})
    values = by_key(evaluation.evaluate(config, manifest, world.model, seed=SEED))
    assert {"fd_squeezenet", "fd_squeezenet:held-out", "copying_squeezenet:held-out"} <= values.keys()
    (tmp_path / "x" / "held-out").rename(tmp_path / "x" / "elsewhere")
    with pytest.raises(UserError, match=r"held-out images of x are not at .*x/held-out; copy this folder"):
        evaluation.evaluate(config, manifest, world.model, seed=SEED)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda home, folder: str(folder / "nowhere"), "no data set at .*nowhere"),
        (lambda home, folder: home.config.data.url, "holds the training images themselves"),
        (
            lambda home, folder: packed(np.ones((9, 28, 28, 1), np.uint8), folder, "a", resolution=32),
            "has resolution 32",
        ),
        (lambda home, folder: packed(np.ones((1, 28, 28, 1), np.uint8), folder, "b"), "holds 1 image"),
        (lambda home, folder: "s3://user:***@host/x", "the password of .* was not kept"),
    ],
)
def test_held_out_images_that_cannot_be_compared_are_refused_before_training(world, home, tmp_path, make, said):
    from glann.trainers.run.preflight import open_data
    from rich.console import Console

    url = make(home, tmp_path)
    section = world.config.evaluation.model_copy(update={"data": url})
    with pytest.raises(UserError, match=said) as caught:
        open_data(world.config.model_copy(update={"evaluation": section}), Console())
    assert "\n" not in str(caught.value)


def test_a_test_of_copying_without_enough_held_out_images_is_refused_before_training(world, unseen):
    from glann.trainers.run.preflight import open_data
    from rich.console import Console

    section = world.config.evaluation.model_copy(update={"data": unseen, "metrics": ("copying",)})
    with pytest.raises(UserError, match=r"needs 200 held-out images, and .*unseen holds 120"):
        open_data(world.config.model_copy(update={"evaluation": section}), Console())


def test_codes_are_compared_without_decoding(world, monkeypatch):
    world.config = world.config.model_copy(
        update={"evaluation": world.config.evaluation.model_copy(update={"metrics": ("codes",)})}
    )
    values = by_key(evaluated(world))
    names = [f"{name}_codes" for name in ("precision", "recall", "density", "coverage", "copying")]
    assert [key for key in values if key.endswith("_codes")] == [*names, *(f"gaussian/{name}" for name in names)]
    panel = code_panel(METRICS[name] for name in names)
    decoded = []
    monkeypatch.setattr(SamplingModel, "decode", lambda *_: decoded.append(1))
    results = evaluation.measure_codes(panel, world.model, blocks_of(world.z_ND), ROWS, 200, SEED)
    assert not decoded
    assert by_key(results) == {key: value for key, value in values.items() if key.endswith("_codes")}


@pytest.mark.parametrize("workers", [2, 3])
def test_features_kept_by_workers_give_the_same_results_to_the_last_bit(workers: int, world):
    """A worker has a range of the set, and numbers its images as they are in the whole."""
    images = torch.randint(0, 256, (47, 1, 28, 28), dtype=torch.uint8)
    names = [f"{name}_squeezenet" for name in ("precision", "recall", "density", "coverage", "kid", "modes")]
    panel = build_panel(METRICS[name] for name in names)
    panel = replace(panel, extractors={"squeezenet": lambda img: img.flatten(1).float()})
    parts, at = [], 0
    for part in images.tensor_split(workers):
        parts.append(panel.tally(part.split(5), first=at))
        at += len(part)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole, other = panel.tally(images.split(9)), panel.tally([images.flip(3)[:31]])
    assert merged.count == 47
    assert panel.compare(whole, other, "own") == panel.compare(merged, other, "own")


@pytest.fixture
def kept_tallies(tmp_path, monkeypatch):
    """A cache folder, and the toy extractor as one of a known asset."""
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(EXTRACTORS, "squeezenet", replace(EXTRACTORS["squeezenet"], weights="squeezenet-caffe"))
    return tmp_path / "cache" / "tallies"


def test_real_images_are_tallied_once(world, kept_tallies):
    """The second evaluation reads no real image for the samples' metrics, and ends in the same bits."""
    first, cost = by_key(evaluated(world)), dict(world.seen)
    assert cost["features"] == ROWS + 3 * 200
    assert by_key(evaluated(world)) == first
    assert world.seen["features"] - cost["features"] == 3 * 200
    assert world.seen["read"] - cost["read"] == ROWS, "of the reconstructions' errors"
    files = list(kept_tallies.iterdir())
    assert len(files) == 2, "moments, and features"
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    cost = dict(world.seen)
    assert by_key(evaluated(world)) == first, "damaged files are made again"
    assert world.seen["features"] - cost["features"] == ROWS + 3 * 200


def test_one_more_metric_reads_the_images_for_that_alone(world, kept_tallies, monkeypatch):
    """What is kept of the others is not made again, and they stay the same."""
    first = by_key(evaluated(world))
    names = {file.name for file in kept_tallies.iterdir()}
    monkeypatch.setitem(METRICS, TOYS[1].name, TOYS[1])
    updated = []
    update = FeatureMoments.update
    monkeypatch.setattr(FeatureMoments, "update", lambda self, *seen: updated.append(1) or update(self, *seen))
    assert first.items() < by_key(evaluated(world)).items()
    assert len(updated) == 3 * -(-200 // 64), "of samples and reconstructions only"
    assert {file.name for file in kept_tallies.iterdir()} == names, "the toy's tally has no arrays"


def test_kept_tallies_are_those_of_the_same_images_parts_and_extractor(world, kept_tallies):
    look, moments = extractor.build_extractor("squeezenet"), FeatureMoments.empty(48)
    tallies = TallyCache("a", 9, 3)
    others = [
        tallies.name(look, moments),
        tallies.name(look, KeptFeatures()),
        tallies.name(replace(look, name="vgg16"), moments),
        *(TallyCache(*which).name(look, moments) for which in (("b", 9, 3), ("a", 8, 3), ("a", 9, 4))),
    ]
    assert len(set(others)) == 6
    assert tallies.name(look, moments) == others[0]
    assert tallies.name(look, Brightness()) is None, "it has no arrays"
    features = torch.rand(5, 48)
    for empty in (moments, KeptFeatures(), KeptFeatures(3)):
        seen = [empty.update(features, torch.arange(5)), empty]
        name = tallies.name(look, empty)
        assert tallies.load(name, empty) is None or empty is not moments
        tallies.save(name, seen)
        for got, expected in zip(tallies.load(name, empty), seen, strict=True):
            for key, array in expected.to_arrays().items():
                assert np.array_equal(got.to_arrays()[key], array)
    bad = replace(moments, count=5, mean_F=np.full(48, np.nan))
    tallies.save("bad.safetensors", [bad, moments])
    assert tallies.load("bad.safetensors", moments) is None
    assert tallies.load(tallies.name(look, moments), FeatureMoments.empty(7)) is None


def test_the_cache_of_tallies_stays_small_and_a_read_only_one_is_reported(kept_tallies, monkeypatch, caplog):
    monkeypatch.setattr(cache, "LARGEST_FOLDER", 3000)
    tallies, kept = TallyCache("a", 9, 3), KeptFeatures().update(torch.ones(25, 8), torch.arange(25))
    for number in range(4):
        tallies.save(f"{number}.safetensors", [kept, KeptFeatures()])
        os.utime(kept_tallies / f"{number}.safetensors", (number, number))
    tallies.save("9.safetensors", [kept, KeptFeatures()])
    assert sorted(file.name for file in kept_tallies.glob("*.safetensors")) == ["3.safetensors", "9.safetensors"]
    monkeypatch.setenv("GLANN_CACHE", str(kept_tallies / "9.safetensors"))
    tallies.save("x.safetensors", [kept, KeptFeatures()])
    assert "are not kept" in caplog.text


def test_tallies_beside_shared_data_serve_other_machines(kept_tallies, tmp_path, monkeypatch, caplog):
    kept, store = KeptFeatures().update(torch.ones(25, 8), torch.arange(25)), LocalStore(tmp_path / "shared")
    TallyCache("a", 9, 3, store).save("x.safetensors", [kept, KeptFeatures()])
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path / "another machine"))
    some, _ = TallyCache("a", 9, 3, store).load("x.safetensors", KeptFeatures())
    assert np.array_equal(some.index_N, kept.index_N)
    assert TallyCache("a", 9, 3).load("x.safetensors", KeptFeatures()) is not None, "now it is on this machine too"

    def refuse(*_, **__):
        raise EnvironmentFault("AccessDenied")

    monkeypatch.setattr(store, "write", refuse)
    TallyCache("a", 9, 3, store).save("y.safetensors", [kept, KeptFeatures()])
    assert "not kept beside them: AccessDenied" in caplog.text
    assert TallyCache("a", 9, 3).load("y.safetensors", KeptFeatures()) is not None


def test_tallies_of_workers_merge(world):
    """What two workers have seen is what one sees, up to rounding."""
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    panel = build_panel(METRICS[name] for name in ("fd_squeezenet", "l1"))
    whole, one, two = (panel.tally([part]) for part in (images, images[:7], images[7:]))
    assert list(whole.by_metric) == ["fd_squeezenet"]
    assert (whole.count, one.count, two.count) == (20, 7, 13)
    merged = one.by_metric["fd_squeezenet"].merge(two.by_metric["fd_squeezenet"])
    torch.testing.assert_close(merged.mean_F, whole.by_metric["fd_squeezenet"].mean_F)
