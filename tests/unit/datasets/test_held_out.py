"""Held-out images: a share that depends on their bytes alone, never on both sides, packed and checked like the rest."""

import json
import os
import shutil

import numpy as np
import pytest
from glann.datasets import pack as packing
from glann.datasets.index import Index
from glann.datasets.left_out import in_words
from glann.datasets.pack import pack, summary
from glann.datasets.parts import is_held_out
from glann.datasets.reader import ImageRows
from glann.datasets.sources.open import open_source
from glann.datasets.verify import describe, verify
from glann.errors import UserError

IMAGES = 120
OPTIONS = {"resolution": 8, "channels": 1, "shard_size_mb": 0.02, "holdout": 0.25}


@pytest.fixture
def source(tmp_path):
    """Different images, of which the last twenty are those at the beginning once more."""
    images = np.random.default_rng(5).integers(0, 256, (IMAGES, 8, 8), np.uint8)
    images[-20:] = images[:20]
    np.savez(tmp_path / "in.npz", images=images, labels=np.arange(IMAGES))
    return str(tmp_path / "in.npz")


def files(folder):
    return {
        os.path.relpath(os.path.join(place, name), folder): open(os.path.join(place, name), "rb").read()
        for place, _, names in sorted(os.walk(folder))
        for name in names
    }


def contents(url):
    images = ImageRows(url)
    return [images.decode(row).tobytes() for row in range(len(images))]


def both(url):
    return contents(str(url)), contents(f"{url}/held-out")


def test_every_image_is_on_one_side_and_equal_images_on_the_same(source, tmp_path):
    index = pack(source, str(tmp_path / "set"), **OPTIONS)
    training, held_out = both(tmp_path / "set")
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(image.tobytes() for image in np.load(source)["images"])
    assert 10 < len(held_out) < 60
    assert index.held_out.rows == len(held_out)
    assert index.held_out.fingerprint == Index.load(str(tmp_path / "set" / "held-out")).fingerprint
    assert len(index.shards) > 1


def test_labels_stay_with_their_images(source, tmp_path):
    pack(source, str(tmp_path / "set"), **OPTIONS)
    images = np.load(source)["images"]
    for url in (str(tmp_path / "set"), str(tmp_path / "set" / "held-out")):
        index = Index.load(url)
        label_N = index.read_labels(ImageRows(url)._store).column("class")
        assert [images[label].tobytes() for label in label_N] == contents(url)


def test_which_images_are_held_out_depends_on_neither_order_nor_workers_nor_shards(source, tmp_path):
    images = np.load(source)["images"]
    np.savez(tmp_path / "turned.npz", images=images[::-1])
    pack(source, str(tmp_path / "a"), **OPTIONS)
    pack(source, str(tmp_path / "b"), name="a", workers=5, **OPTIONS)
    pack(str(tmp_path / "turned.npz"), str(tmp_path / "c"), **OPTIONS | {"shard_size_mb": 1})
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert [sorted(side) for side in both(tmp_path / "c")] == [sorted(side) for side in both(tmp_path / "a")]


def test_the_share_is_what_was_asked_for_and_a_larger_one_holds_the_smaller():
    draws = [number.to_bytes(4, "big") for number in range(20_000)]
    tenth = {draw for draw in draws if is_held_out(draw, 0.1)}
    assert abs(len(tenth) - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    assert tenth <= {draw for draw in draws if is_held_out(draw, 0.2)}
    assert not any(is_held_out(draw, 0) for draw in draws)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("own", [False, True], ids=["a share", "images of the source"])
@pytest.mark.parametrize("after", [1, 30, 75, 119, 121, 130])
def test_an_interrupted_pack_ends_with_the_same_bytes(source, tmp_path, after, own):
    """Also if both parts were interrupted at different places, labels included."""
    options = dict(OPTIONS)
    if own:
        images = np.load(source)["images"]
        labels = {"labels": np.arange(80), "test_labels": np.arange(120)}
        np.savez(tmp_path / "own.npz", images=images[20:100], test_images=images, **labels)
        source, options = str(tmp_path / "own.npz"), options | {"holdout": None}
    pack(source, str(tmp_path / "whole"), name="x", **options)
    seen = 0

    def stop(done, total):
        nonlocal seen
        seen += 1
        if seen == after:
            raise Stopped

    try:
        pack(source, str(tmp_path / "set"), name="x", progress=stop, **options)
    except Stopped:
        assert not (tmp_path / "set" / "index.json").exists()
        with pytest.raises(UserError, match="packing was interrupted"):
            Index.load(str(tmp_path / "set"))
    pack(source, str(tmp_path / "set"), name="x", **options)
    assert files(tmp_path / "set") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    "last", ["held-out/images.bin", "held-out/index.json", "labels.bin", "images.bin", "index.json"]
)
def test_a_pack_killed_while_it_is_completed_ends_with_the_same_bytes(source, tmp_path, monkeypatch, last):
    pack(source, str(tmp_path / "whole"), name="x", **OPTIONS)
    from glann.storage.local import LocalStore

    write = LocalStore.write

    def killed(self, key, data, **how):
        if os.path.relpath(self.path(key), tmp_path / "set") == last:
            raise Stopped
        write(self, key, data, **how)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", killed)
        with pytest.raises(Stopped):
            pack(source, str(tmp_path / "set"), name="x", **OPTIONS)
    pack(source, str(tmp_path / "set"), name="x", **OPTIONS)
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_test_images_are_held_out_but_for_those_that_are_training_images(tmp_path):
    images = np.random.default_rng(5).integers(0, 256, (60, 8, 8), np.uint8)
    np.savez(tmp_path / "in.npz", images=images[:40], test_images=images[30:])
    options = {"resolution": 8, "channels": 1}
    index = pack(str(tmp_path / "in.npz"), str(tmp_path / "set"), **options)
    training, held_out = both(tmp_path / "set")
    assert (training, held_out) == ([i.tobytes() for i in images[:40]], [i.tobytes() for i in images[40:]])
    part = Index.load(str(tmp_path / "set" / "held-out"))
    assert part.header.remarks == {"equal to a training image, left out": 10}
    assert part.header.left_out == ()
    assert "20 images held out" in summary(index, "x")
    with pytest.raises(UserError, match=r"has 30 held-out images of its own.*--holdout 0 leaves them out"):
        pack(str(tmp_path / "in.npz"), str(tmp_path / "other"), holdout=0.5, **options)
    assert pack(str(tmp_path / "in.npz"), str(tmp_path / "none"), holdout=0, **options).held_out is None
    assert not (tmp_path / "none" / "held-out").exists()
    with pytest.raises(UserError, match="already holds"):
        pack(str(tmp_path / "in.npz"), str(tmp_path / "set"), holdout=0, **options)


def test_the_training_images_are_the_same_data_set_with_and_without_a_test_set_beside_them(tmp_path):
    """The fingerprint, by which runs know their data, and what an earlier version has packed is not packed again."""
    images = np.random.default_rng(5).integers(0, 256, (60, 8, 8), np.uint8)
    np.savez(tmp_path / "in.npz", images=images[:40], labels=np.arange(40), test_images=images[40:])
    np.savez(tmp_path / "old.npz", images=images[:40])
    options = {"resolution": 8, "channels": 1, "name": "x"}
    index = pack(str(tmp_path / "in.npz"), str(tmp_path / "set"), **options)
    old = pack(str(tmp_path / "old.npz"), str(tmp_path / "old"), **options)
    assert index.fingerprint == old.fingerprint
    before = files(tmp_path / "old")
    assert pack(str(tmp_path / "in.npz"), str(tmp_path / "old"), **options).held_out is None
    assert files(tmp_path / "old") == before


def test_packing_a_data_set_again_keeps_what_is_held_out(source, tmp_path):
    """At another size too, where other bytes would give another share; labels as well, and nothing lies beside."""
    pack(source, str(tmp_path / "set"), **OPTIONS)
    inner = open_source(str(tmp_path / "set"))
    assert inner.left_out == ()
    index = pack(str(tmp_path / "set"), str(tmp_path / "small"), resolution=4, channels=1)
    assert index.header.left_out == ()
    assert index.held_out.rows == Index.load(str(tmp_path / "set")).held_out.rows
    for part in ("", "/held-out"):
        small, large = (Index.load(f"{tmp_path / name}{part}") for name in ("small", "set"))
        stores = [ImageRows(f"{tmp_path / name}{part}")._store for name in ("small", "set")]
        assert (small.read_labels(stores[0]).value_NL == large.read_labels(stores[1]).value_NL).all()
    (tmp_path / "set" / "notes.txt").write_text("mine")
    assert in_words(open_source(str(tmp_path / "set")).left_out) == "1 beside the packed data set"
    shutil.rmtree(tmp_path / "set" / "held-out")
    with pytest.raises(UserError, match="held-out images of set are not at"):
        open_source(str(tmp_path / "set"))


def test_info_and_verify_know_the_held_out_part_and_the_labels(source, tmp_path):
    url = str(tmp_path / "set")
    index = pack(source, url, **OPTIONS)
    facts = describe(url)
    assert (facts["held_out"], facts["labels"]) == (index.held_out.rows, "class")
    seen = []
    assert verify(url, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (IMAGES, IMAGES)

    def broken(name, change):
        path = tmp_path / "set" / name
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        found = [str(fault) for fault in verify(url)]
        path.write_bytes(whole)
        return found

    flip = lambda data: data[:-600] + bytes([data[-600] ^ 1]) + data[-599:]  # noqa: E731
    shard = "set-held-out-000000.tar"
    assert any(fault.startswith(f"held-out/{shard}: ") for fault in broken(f"held-out/{shard}", flip))
    assert any("labels.bin" in fault for fault in broken("labels.bin", lambda data: b"\1" + data[1:]))
    assert any("held-out/labels.bin" in fault for fault in broken("held-out/labels.bin", lambda data: data[:-4]))
    other = lambda data: (tmp_path / "set" / "index.json").read_bytes()  # noqa: E731
    assert any(fault.startswith("held-out: ") for fault in broken("held-out/index.json", other))


@pytest.mark.parametrize(
    ("share", "match"),
    [
        (-0.1, "holdout=-0.1 is not possible"),
        (float("nan"), "holdout=nan is not possible"),
        (1, "holdout=1 is not possible"),
        (0.05, "holdout=0.05 of 120 images is fewer than 10"),
    ],
)
def test_an_impossible_share_is_refused_and_leaves_nothing(source, tmp_path, share, match):
    with pytest.raises(UserError, match=match):
        pack(source, str(tmp_path / "set"), **OPTIONS | {"holdout": share})
    assert not (tmp_path / "set").exists()


def test_a_side_without_images_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr("glann.datasets.parts.is_held_out", lambda data, share: False)
    with pytest.raises(UserError, match="0 images would be held-out; hold out another share"):
        pack(source, str(tmp_path / "set"), **OPTIONS)


def test_another_share_at_the_same_destination_is_refused(source, tmp_path):
    pack(source, str(tmp_path / "set"), **OPTIONS)
    for change in ({"holdout": 0.5}, {"holdout": None}, {"holdout": 0}):
        with pytest.raises(UserError, match="already holds the data set"):
            pack(source, str(tmp_path / "set"), **OPTIONS | change)


def test_unreadable_images_are_counted_once(tmp_path):
    """Which side they would be on is unknown."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(7)
    from PIL import Image

    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "3.png").write_bytes(b"broken")
    index = pack(str(tmp_path / "in"), str(tmp_path / "set"), skip_corrupt=True, **OPTIONS)
    assert in_words(index.header.left_out) == "1 unreadable image"
    assert index.rows + index.held_out.rows == 59
    assert "left_out" not in json.loads((tmp_path / "set" / "held-out" / "index.json").read_text())


def test_no_thread_outlives_a_pack_with_two_parts(source, tmp_path):
    import threading

    pack(source, str(tmp_path / "set"), **OPTIONS)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("glann-")]
    assert packing.READER == 2
