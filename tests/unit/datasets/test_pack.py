"""Packing: the same input gives the same bytes, an interruption costs nothing, and bad images are named."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import webdataset
from glann.datasets import pack as packing
from glann.datasets.decoding.picture import PROFILE
from glann.datasets.index import Index, _fingerprint
from glann.datasets.left_out import in_words
from glann.datasets.pack import pack, summary
from glann.datasets.reader import ImageRows
from glann.datasets.sources.open import open_source
from glann.datasets.verify import describe, verify
from glann.errors import EnvironmentFault, UserError
from glann.storage import local as storage
from PIL import Image

IMAGES = 50
OPTIONS = {"resolution": 16, "shard_size_mb": 0.01}


@pytest.fixture
def folder(tmp_path):
    """A folder of random pictures of several sizes; the packed name does not depend on the test's folder."""
    rng = np.random.default_rng(11)
    (tmp_path / "in").mkdir()
    for number in range(IMAGES):
        img_HWC = rng.integers(0, 256, (16 + number % 5, 16 + number % 3, 3), np.uint8)
        Image.fromarray(img_HWC).save(tmp_path / "in" / f"{number}.png")
    return str(tmp_path / "in")


def files(path):
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def test_the_same_input_gives_the_same_bytes_whatever_the_number_of_workers(folder, tmp_path):
    for place, workers in (("a", 1), ("b", 2), ("c", 7)):
        pack(folder, str(tmp_path / place), name="set", workers=workers, **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_any_webdataset_reader_opens_the_shards(folder, tmp_path):
    index = pack(folder, str(tmp_path / "set"), **OPTIONS)
    assert len(index.shards) > 3
    urls = [str(tmp_path / "set" / shard.file) for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    images = ImageRows(str(tmp_path / "set"))
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(IMAGES)]
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["png"].transpose(2, 0, 1), images.decode(row))


def test_every_image_is_where_the_index_says(folder, tmp_path):
    index = pack(folder, str(tmp_path / "set"), **OPTIONS)
    for row in range(index.rows):
        shard, record = index.shards[index.shard_of(row)], index.records_N[row]
        data = (tmp_path / "set" / shard.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256
        image = data[int(record["offset"]) :][: int(record["length"])]
        assert hashlib.sha256(image).digest() == record["sha256"].tobytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert tar.extractfile(index.key(row)).read() == image


def test_shards_keep_to_their_size(folder, tmp_path):
    index = pack(folder, str(tmp_path / "set"), **OPTIONS)
    assert sum(shard.rows for shard in index.shards) == IMAGES
    assert max(shard.bytes for shard in index.shards) <= 10_000 + 10_240  # images, then tar's padding
    assert index.name == "set"
    assert index.shards[0].file == "set-000000.tar"


@pytest.mark.parametrize(("resolution", "expected"), [(28, "png"), (64, "png"), (128, "jpeg")])
def test_small_images_are_kept_without_loss_and_large_ones_as_jpeg(folder, tmp_path, resolution, expected):
    assert pack(folder, str(tmp_path / "set"), resolution=resolution).image_format == expected


def test_packing_twice_finishes_at_once(folder, tmp_path):
    first = pack(folder, str(tmp_path / "set"), **OPTIONS)
    before = {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in os.listdir(tmp_path / "set")}
    assert pack(folder, str(tmp_path / "set"), **OPTIONS).fingerprint == first.fingerprint
    assert before == {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in os.listdir(tmp_path / "set")}


@pytest.mark.parametrize("change", [{"resolution": 8}, {"crop": "pad"}, {"channels": 1}, {"image_format": "webp"}])
def test_another_data_set_is_never_overwritten(folder, tmp_path, change):
    pack(folder, str(tmp_path / "set"), **OPTIONS)
    before = files(tmp_path / "set")
    with pytest.raises(UserError, match="already holds the data set set"):
        pack(folder, str(tmp_path / "set"), **(OPTIONS | change))
    assert files(tmp_path / "set") == before


def test_a_folder_with_other_things_in_it_is_refused(folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_bytes(b"")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis.tex\)"):
        pack(folder, str(tmp_path / "set"), **OPTIONS)
    assert os.listdir(tmp_path / "set") == ["thesis.tex"]


def interrupted(folder, place, at=35):
    def interrupt(done, total):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, str(place), progress=interrupt, **OPTIONS)


def test_an_interrupted_pack_is_no_data_set(folder, tmp_path):
    interrupted(folder, tmp_path / "set")
    with pytest.raises(UserError, match="packing was interrupted, run the same"):
        Index.load(str(tmp_path / "set"))


def test_an_interrupted_pack_goes_on_and_ends_with_the_same_bytes(folder, tmp_path):
    pack(folder, str(tmp_path / "whole" / "set"), **OPTIONS)
    interrupted(folder, tmp_path / "set")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")}
    assert kept
    seen = []
    pack(folder, str(tmp_path / "set"), progress=lambda done, total: seen.append((done, total)), **OPTIONS)
    assert seen[0][0] > 1  # finished shards were not encoded again
    assert seen[-1] == (IMAGES, IMAGES)
    assert files(tmp_path / "set") == files(tmp_path / "whole" / "set")
    assert all((tmp_path / "set" / name).stat().st_mtime_ns == mtime for name, mtime in kept.items())


def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(folder, tmp_path):
    pack(folder, str(tmp_path / "whole" / "set"), **OPTIONS)
    program = (
        "import os, signal, sys\n"
        "from glann.datasets.pack import pack\n"
        "kill = lambda done, total: done == 35 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack(sys.argv[1], sys.argv[2], resolution=16, shard_size_mb=0.01, progress=kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, folder, str(tmp_path / "set")], check=False)
    assert done.returncode == -9
    assert "index.json" not in os.listdir(tmp_path / "set")
    pack(folder, str(tmp_path / "set"), **OPTIONS)
    assert files(tmp_path / "set") == files(tmp_path / "whole" / "set")


def test_an_interrupted_pack_of_something_else_is_refused(folder, tmp_path):
    interrupted(folder, tmp_path / "set")
    before = files(tmp_path / "set")
    with pytest.raises(UserError, match="unfinished pack of another source"):
        pack(folder, str(tmp_path / "set"), **(OPTIONS | {"resolution": 32}))
    os.remove(os.path.join(folder, "49.png"))
    with pytest.raises(UserError, match="unfinished pack of another source"):
        pack(folder, str(tmp_path / "set"), **OPTIONS)
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize("position", [1, IMAGES + 1])
def test_a_position_that_does_not_fit_the_images_is_refused(folder, tmp_path, position):
    """Behind the images of the shards, images would be packed twice; ahead of the source, left out without a word."""
    interrupted(folder, tmp_path / "set")
    entry = max((tmp_path / "set").glob("*.packed"))
    line, _, records = entry.read_bytes().partition(b"\n")
    entry.write_bytes(json.dumps(json.loads(line) | {"position": position}).encode() + b"\n" + records)
    with pytest.raises(UserError, match=r"packing\.json cannot be read; delete the destination"):
        pack(folder, str(tmp_path / "set"), **OPTIONS)


def as_earlier_versions_did(place):
    """Keep the finished shards of an interrupted pack in `packing.json` in place of a file beside each."""
    state = json.loads((place / "packing.json").read_text())
    for entry in sorted(place.glob("*.packed")):
        state["finished"].append(json.loads(entry.read_bytes().partition(b"\n")[0]))
        del state["finished"][-1]["records"]
        entry.unlink()
    (place / "packing.json").write_text(json.dumps(state))


def test_a_pack_that_an_earlier_version_began_is_finished(folder, tmp_path):
    pack(folder, str(tmp_path / "whole" / "set"), **OPTIONS)
    interrupted(folder, tmp_path / "set")
    as_earlier_versions_did(tmp_path / "set")
    seen = []
    pack(folder, str(tmp_path / "set"), progress=lambda done, total: seen.append(done), **OPTIONS)
    assert seen[0] > 1
    assert files(tmp_path / "set") == files(tmp_path / "whole" / "set")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: (place / "set-000000.packed").unlink(), "has lost set-000001.packed or a file like it"),
        (lambda place: (place / "set-000001.packed").write_bytes(b"{}\n"), "set-000001.packed cannot be read"),
        (
            lambda place: (place / "set-000001.packed").write_bytes((place / "set-000000.packed").read_bytes()),
            "set-000001.packed cannot be read",
        ),
        (
            lambda place: (place / "set-000001.packed").write_bytes((place / "set-000001.packed").read_bytes()[:-1]),
            "set-000001.packed cannot be read",
        ),
        (
            lambda place: (place / "set-000001.packed").write_bytes(
                (place / "set-000001.packed").read_bytes()[:-1] + b"?"
            ),
            "set-000001.packed cannot be read",
        ),
    ],
    ids=["lost", "empty", "of-another-shard", "torn", "changed"],
)
def test_what_was_kept_of_a_finished_shard_is_checked(folder, tmp_path, damage, message):
    interrupted(folder, tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        pack(folder, str(tmp_path / "set"), **OPTIONS)


def test_a_finished_shard_that_was_damaged_is_never_kept(folder, tmp_path):
    interrupted(folder, tmp_path / "set")
    shard = tmp_path / "set" / "set-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"set-000000\.tar is damaged"):
        pack(folder, str(tmp_path / "set"), **OPTIONS)


def test_all_corrupt_images_are_named_and_nothing_looks_finished(folder, tmp_path):
    for number in (7, 30):
        with open(os.path.join(folder, f"{number}.png"), "r+b") as file:
            file.truncate(100)
    with pytest.raises(UserError, match=r"2 corrupt images: .*/in/7\.png: .*/in/30\.png: ") as error:
        pack(folder, str(tmp_path / "set"), **OPTIONS)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="interrupted"):
        Index.load(str(tmp_path / "set"))


def test_corrupt_images_are_left_out_when_that_is_asked_for(folder, tmp_path, caplog):
    good = pack(folder, str(tmp_path / "good" / "set"), **OPTIONS)
    with open(os.path.join(folder, "49.png"), "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="1 corrupt image: "):
        pack(folder, str(tmp_path / "set"), **OPTIONS)
    index = pack(folder, str(tmp_path / "set"), skip_corrupt=True, **OPTIONS)  # goes on with the finished shards
    assert index.rows == IMAGES - 1
    assert index.records_N[:49].tobytes() == good.records_N[:49].tobytes()
    assert "49.png" in caplog.text


def test_a_source_of_corrupt_images_only_makes_no_data_set(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"garbage")
    with pytest.raises(UserError, match="none of 1 image can be read"):
        pack(str(tmp_path / "in"), str(tmp_path / "set"), skip_corrupt=True, **OPTIONS)


def test_a_full_disk_is_said_so_and_packing_goes_on_afterwards(folder, tmp_path, monkeypatch):
    whole = pack(folder, str(tmp_path / "whole" / "set"), **OPTIONS)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(EnvironmentFault, match="disk full while writing"):
            pack(folder, str(tmp_path / "set"), **OPTIONS)
    assert pack(folder, str(tmp_path / "set"), **OPTIONS).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resolution": 0}, "resolution=0"),
        ({"channels": 4}, "channels=4 is not possible; use 1"),
        ({"crop": "stretch"}, "crop=stretch is not possible; use center, pad, none or a number of pixels"),
        ({"image_format": "gif"}, "format=gif"),
        ({"quality": 101}, "quality=101"),
        ({"shard_size_mb": 0}, "shard size 0"),
        ({"shard_size_mb": float("nan")}, "shard size nan"),
        ({"name": "../up"}, r"name=\.\./up"),
        ({"workers": 0}, "workers=0"),
        ({"levels": 100}, "levels=100 is not possible; use 255 to 65535"),
        ({"exclude": [""]}, "an empty pattern"),
    ],
)
def test_impossible_options_are_refused_and_leave_nothing(folder, tmp_path, change, match):
    with pytest.raises(UserError, match=match):
        pack(folder, str(tmp_path / "set"), **(OPTIONS | change))
    assert not (tmp_path / "set").exists()


def test_no_thread_outlives_a_pack(folder, tmp_path):
    before = threading.active_count()
    interrupted(folder, tmp_path / "set")
    assert threading.active_count() == before


def test_info_says_what_there_is(folder, tmp_path):
    index = pack(folder, str(tmp_path / "set"), **OPTIONS)
    info = describe(str(tmp_path / "set"))
    assert (info["name"], info["images"], info["resolution"], info["format"]) == ("set", IMAGES, 16, "png")
    assert info["fingerprint"] == index.fingerprint
    assert info["bytes"] == sum(path.stat().st_size for path in (tmp_path / "set").glob("*.tar"))


@pytest.fixture
def packed(folder, tmp_path):
    return pack(folder, str(tmp_path / "set"), **OPTIONS), tmp_path / "set"


def test_a_whole_data_set_has_no_faults(packed):
    seen = []
    assert verify(str(packed[1]), progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (IMAGES, IMAGES)


def test_verify_names_a_flipped_bit(packed):
    index, place = packed
    shard = place / index.shards[1].file
    row = int(index.first_S[1]) + 3
    data = bytearray(shard.read_bytes())
    data[int(index.records_N["offset"][row]) + 20] ^= 1
    shard.write_bytes(data)
    faults = [str(fault) for fault in verify(str(place))]
    assert faults == [f"{shard.name}: wrong SHA-256", f"{shard.name}: {index.key(row)}: wrong SHA-256"]


def test_verify_names_missing_and_truncated_shards(packed):
    index, place = packed
    (place / index.shards[0].file).unlink()
    with open(place / index.shards[1].file, "r+b") as file:
        file.truncate(1000)
    faults = [str(fault) for fault in verify(str(place))]
    assert faults[0].startswith(f"{index.shards[0].file}: no such file")
    assert faults[1] == f"{index.shards[1].file}: 1000 bytes long, not {index.shards[1].bytes}"
    assert any("beyond the end of the shard" in fault for fault in faults)


def test_verify_refuses_a_shard_with_a_name_that_escapes(packed):
    index, place = packed
    shard = place / index.shards[0].file
    data = shard.read_bytes()
    header = bytearray(data[:512])
    header[:100] = b"../../evil.png".ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    shard.write_bytes(bytes(header) + data[512:])
    faults = [str(fault) for fault in verify(str(place))]
    assert f"{shard.name}: ../../evil.png: a member that is not in the index" in faults


# the account of what is not packed ---------------------------------------------------------------


@pytest.fixture
def mixed(folder):
    """The folder with things that are no pictures, in several ways, and with one link to nothing."""
    for name in (".git/a.png", "CelebAMask-HQ-mask-anno/0_hair.png", "IMG_7.HEIC", "notes.txt"):
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"x")
    os.symlink("/mnt/lost/7.png", os.path.join(folder, "zz.png"))
    return folder


ACCOUNT = "1 .heic, 1 .txt, 1 in hidden folders (.git/), 1 mask (CelebAMask-HQ-mask-anno/), 1 unreadable image"


def test_every_file_is_packed_or_accounted_for(mixed, tmp_path):
    index = pack(mixed, str(tmp_path / "set"), skip_corrupt=True, **OPTIONS)
    assert in_words(index.header.left_out) == ACCOUNT
    files_seen = sum(len(names) for _, _, names in os.walk(mixed))
    assert index.rows + sum(group.count for group in index.header.left_out) == files_seen
    again = pack(mixed, str(tmp_path / "set"), skip_corrupt=True, **OPTIONS)
    shards = len(index.shards)
    for known in (index, again, Index.load(str(tmp_path / "set"))):
        assert summary(known, "set") == f"50 images of 16 px in {shards} shards: set; left out: {ACCOUNT}"
    assert describe(str(tmp_path / "set"))["left_out"] == ACCOUNT


def test_a_link_to_nothing_is_named_with_its_target(mixed, tmp_path):
    with pytest.raises(
        UserError, match=r"^1 corrupt image: .*/in/zz\.png: a link to /mnt/lost/7\.png, where nothing is"
    ):
        pack(mixed, str(tmp_path / "set"), **OPTIONS)


def test_an_interruption_does_not_change_the_account(mixed, tmp_path):
    for number in (3, 20):
        with Image.open(os.path.join(mixed, f"{number}.png")) as image:
            image.save(os.path.join(mixed, f"{number}.png"), icc_profile=b"no profile")
    os.remove(os.path.join(mixed, "5.png"))
    os.symlink("/mnt/lost/5.png", os.path.join(mixed, "5.png"))
    whole = pack(mixed, str(tmp_path / "whole" / "set"), skip_corrupt=True, **OPTIONS)
    assert whole.header.remarks == {PROFILE: 2}
    assert "2 unreadable images" in summary(whole, "set")
    assert summary(whole, "set").endswith("; 2 with an unusable colour profile, taken as sRGB")

    def interrupt(done, total):
        if done == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(mixed, str(tmp_path / "set"), skip_corrupt=True, progress=interrupt, **OPTIONS)
    pack(mixed, str(tmp_path / "set"), skip_corrupt=True, **OPTIONS)
    assert files(tmp_path / "set") == files(tmp_path / "whole" / "set")


def test_what_is_left_out_changes_neither_the_data_nor_its_fingerprint(folder, tmp_path):
    first = pack(folder, str(tmp_path / "a" / "set"), **OPTIONS)
    with open(os.path.join(folder, "notes.txt"), "wb") as file:
        file.write(b"x")
    second = pack(folder, str(tmp_path / "b" / "set"), **OPTIONS)
    assert (first.header.left_out, in_words(second.header.left_out)) == ((), "1 .txt")
    assert (first.fingerprint, first.header.recipe) == (second.fingerprint, second.header.recipe)
    assert "left_out" not in (tmp_path / "a" / "set" / "index.json").read_text()  # as glann 0.1 wrote and reads it
    assert verify(str(tmp_path / "b" / "set")) == []


def test_a_data_set_of_an_earlier_version_is_finished(folder, tmp_path):
    """It was read without colour profiles; the same command keeps it."""
    pack(folder, str(tmp_path / "set"), **OPTIONS)
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    options = packing.Options("set", 16, 3, "center", "png", 95, 10_000)
    assert index["recipe"] == options.recipe(open_source(folder))
    index["recipe"] = options.recipe(open_source(folder), 1)
    index["fingerprint"] = _fingerprint(index)
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    assert pack(folder, str(tmp_path / "set"), **OPTIONS).fingerprint == index["fingerprint"]


def test_an_unknown_range_stops_a_pack_also_when_corrupt_images_are_skipped(folder, tmp_path):
    """Otherwise all pictures of a microscope would be lost as corrupt."""
    ramp = np.linspace(0, 4095, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(ramp).save(os.path.join(folder, "scan.png"))
    with pytest.raises(UserError, match=r"/in/scan\.png: .* --levels 4095"):
        pack(folder, str(tmp_path / "set"), skip_corrupt=True, **OPTIONS)
    pack(folder, str(tmp_path / "set"), levels=65535, **OPTIONS)  # what is default otherwise: the shards are kept
    with pytest.raises(UserError, match="with other options"):
        pack(folder, str(tmp_path / "set"), levels=4095, **OPTIONS)


def test_files_beside_a_packed_data_set_are_accounted_for(folder, tmp_path):
    pack(folder, str(tmp_path / "set"), **OPTIONS)
    (tmp_path / "set" / "preview.png").write_bytes(b"x")
    assert in_words(open_source(str(tmp_path / "set")).left_out) == "1 beside the packed data set"


def test_an_unfinished_pack_is_no_source(folder, tmp_path):
    interrupted(folder, tmp_path / "set")
    with pytest.raises(UserError, match="is an unfinished pack"):
        open_source(str(tmp_path / "set"))


def test_a_folder_of_packed_data_sets_is_no_source(folder, tmp_path):
    """Their shards would be mixed without their indices."""
    for name in ("a", "b"):
        pack(folder, str(tmp_path / "sets" / name), **OPTIONS)
    with pytest.raises(UserError, match=r"holds packed data sets \(a, b\); name one of them"):
        open_source(str(tmp_path / "sets"))


def test_one_image_is_counted_in_good_english(folder, tmp_path):
    for number in range(1, IMAGES):
        os.remove(os.path.join(folder, f"{number}.png"))
    assert summary(pack(folder, str(tmp_path / "set"), **OPTIONS), "set") == "1 image of 16 px in 1 shard: set"


def test_images_that_are_smaller_than_the_crop_are_refused_or_left_out(folder, tmp_path):
    """The pictures are 16 to 20 px high and 16 to 18 px wide: every third one is 18 px wide."""
    with pytest.raises(UserError, match=r"corrupt images.*16 x 16 is smaller than crop=18"):
        pack(folder, str(tmp_path / "all"), crop="18", **OPTIONS)
    index = pack(folder, str(tmp_path / "some"), crop="18", skip_corrupt=True, **OPTIONS)
    large = [number for number in range(IMAGES) if number % 3 == 2 and number % 5 >= 2]
    assert index.rows == len(large)
    assert in_words(index.header.left_out) == f"{IMAGES - len(large)} unreadable images"
    with pytest.raises(UserError, match="already holds"):
        pack(folder, str(tmp_path / "some"), crop="17", skip_corrupt=True, **OPTIONS)
