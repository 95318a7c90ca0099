"""Which files are the pictures that the user means: each is taken, or counted with its reason, in every container."""

import io
import os
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from glann.datasets.left_out import MAX_PLACES, MAX_REASONS, Tally, in_words
from glann.datasets.sources.base import natural
from glann.datasets.sources.names import Rules
from glann.datasets.sources.open import open_source
from glann.errors import UserError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

BUFFER = io.BytesIO()
Image.new("RGB", (8, 8), "teal").save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


def folder(path, names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(PNG)
    return str(path)


def in_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            member = zipfile.ZipInfo("x")
            member.filename = name  # as it is, with backslashes too
            archive.writestr(member, PNG)
    return str(path)


def in_tar(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(PNG)
            archive.addfile(member, io.BytesIO(PNG))
    return str(path)


def taken(source):
    """The names of the images below the source."""
    return [item.name.split(": ")[-1].split("/x/")[-1] for item in source.items(0)]


MAKERS = {"folder": lambda p, n: folder(p / "x", n), "zip": lambda p, n: in_zip(p / "x.zip", n)}
MAKERS["tar"] = lambda p, n: in_tar(p / "x.tar", n)
every_container = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_container
@pytest.mark.parametrize("above", ["", "CelebAMask-HQ/", "downloads/faces/"])
def test_masks_of_known_data_sets_are_left_out_wherever_they_lie(tmp_path, make, above):
    names = [f"{above}CelebA-HQ-img/{n}.jpg" for n in (1, 2, 10)]
    masks = [f"{above}CelebAMask-HQ-mask-anno/{n}/{n:05d}_{part}.png" for n in range(2) for part in ("hair", "skin")]
    source = open_source(make(tmp_path, names + masks + [f"{above}CelebAMask-HQ-mask-anno/README.txt"]))
    assert taken(source) == names
    assert in_words(source.left_out) == f"4 masks ({above}CelebAMask-HQ-mask-anno/), 1 .txt"


@every_container
def test_hidden_and_system_folders_are_left_out(tmp_path, make):
    names = [".ipynb_checkpoints/a.png", ".Trash-1000/files/b.png", "s/@eaDir/a.png/THUMB_M.png", "#recycle/c.png"]
    names += ["$RECYCLE.BIN/d.png", "System Volume Information/e.png", "__MACOSX/._a.png", ".hidden.png", "a.png"]
    source = open_source(make(tmp_path, names))
    assert taken(source) == ["a.png"]
    assert {group.reason: group.count for group in source.left_out} == {
        "hidden folder": 2,
        "system folder": 5,
        "hidden file": 1,
    }
    assert sum(group.count for group in source.left_out) + source.count == len(names)


@every_container
def test_other_files_are_counted_by_their_extension(tmp_path, make):
    names = ["a.png", "b.JFIF", "c.jpe", "IMG_3.HEIC", "d.cr2", "notes.txt", "README", "scan.0001", "e.psd", "f.psd"]
    source = open_source(make(tmp_path, names))
    assert taken(source) == ["a.png", "b.JFIF", "c.jpe"]
    assert in_words(source.left_out) == "2 .psd, 1 .cr2, 1 .heic, 1 .txt, 1 without extension, 1 with another extension"


@every_container
def test_patterns_of_the_user_take_and_leave_out(tmp_path, make):
    names = ["a.png", "b.png", "masks/a.png", ".old/c.png", "d.dat"]
    path = make(tmp_path, names)
    rules = Rules(include=(".old/*", "*.dat"), exclude=("masks/*", "b.*"))
    source = open_source(path, rules=rules)
    assert sorted(taken(source)) == [".old/c.png", "a.png", "d.dat"]
    assert in_words(source.left_out) == "2 by --exclude"
    with pytest.raises(UserError, match=r"holds no images; left out: 5 by --exclude"):
        open_source(path, rules=Rules(exclude=("*",)))


@every_container
def test_a_folder_that_looks_like_labels_is_taken_with_a_warning(tmp_path, make):
    """`masks` may be what the data set is about: people who wear them."""
    source = open_source(make(tmp_path, ["images/a.png", "images/b.png", "Masks/a.png"]))
    assert source.count == 3
    assert source.doubts == (
        "1 of 3 images lie in a folder Masks/; if they are labels and no pictures, leave them out with "
        "--exclude '*Masks/*'",
    )
    (tmp_path / "only").mkdir()
    assert open_source(make(tmp_path / "only", ["masks/a.png"])).doubts == ()


@every_container
def test_a_source_without_images_says_what_it_holds(tmp_path, make):
    with pytest.raises(UserError, match=r"holds no images; left out: 2 \.heic, 1 \.txt \(readable: \.jpg .*--include"):
        open_source(make(tmp_path, ["a.heic", "b.heic", "c.txt"]))


# other digits, long numbers ----------------------------------------------------------------------


@every_container
def test_other_digits_in_names_are_no_numbers(tmp_path, make):
    """Python counts them as digits, but cannot read them as a number."""
    names = ["10²5.png", "plain.png", "①2024/anna.png", "②2024/bert.png", "٣.png", "9" * 250 + ".png"]
    assert sorted(taken(open_source(make(tmp_path, names)))) == sorted(names)


def test_a_number_of_any_length_is_a_number():
    assert natural("9" * 5000 + ".png") > natural("8" * 5000 + ".png") > natural("9" * 4999 + ".png")


@given(numbers=st.lists(st.integers(0, 10**30), min_size=2, max_size=5))
def test_numbers_are_ordered_by_value(numbers):
    keys = [f"s{n}/x.png" for n in numbers]
    assert sorted(keys, key=natural) == [f"s{n}/x.png" for n in sorted(numbers)]


@given(names=st.lists(st.text()))
def test_any_names_can_be_ordered(names):
    assert len(sorted(names, key=natural)) == len(names)


# archives of Windows -----------------------------------------------------------------------------


def test_a_backslash_separates(tmp_path):
    source = open_source(in_zip(tmp_path / "x.zip", ["faces\\10.png", "faces\\2.png", "faces\\@eaDir\\2.png"]))
    assert taken(source) == ["faces/2.png", "faces/10.png"]
    assert in_words(source.left_out) == "1 in folders of the system (faces/@eaDir/)"


@pytest.mark.parametrize(
    "name", ["..\\x.png", "a\\..\\..\\x.png", "C:\\x.png", "\\\\server\\x.png", "C:/x.png", "/x.png"]
)
@pytest.mark.parametrize("make", [MAKERS["zip"], MAKERS["tar"]], ids=["zip", "tar"])
def test_a_backslash_leads_nowhere_else(tmp_path, make, name):
    with pytest.raises(UserError, match="hostile member name"):
        open_source(make(tmp_path, ["good.png", name]))


def test_the_same_name_written_in_two_ways_is_refused(tmp_path):
    with pytest.raises(UserError, match="twice"):
        open_source(in_zip(tmp_path / "x.zip", ["faces\\2.png", "faces//2.png"]))


# what is no regular file -------------------------------------------------------------------------


def test_a_pipe_among_pictures_is_left_out_and_named(tmp_path):
    path = folder(tmp_path / "x", ["a.png"])
    os.mkfifo(tmp_path / "x" / "live.png")
    source = open_source(path)
    assert [item.read() for item in source.items(0)] == [PNG]
    assert in_words(source.left_out) == "1 link, pipe or device (live.png: a named pipe)"


def test_links_in_archives_are_counted(tmp_path):
    with tarfile.open(in_tar(tmp_path / "x.tar", ["a.png"]), "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with zipfile.ZipFile(in_zip(tmp_path / "x.zip", ["a.png"]), "a") as archive:
        member = zipfile.ZipInfo("b.png")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    for name in ("x.tar", "x.zip"):
        source = open_source(str(tmp_path / name))
        assert (source.count, source.left_out[0].reason, source.left_out[0].count) == (1, "special", 1)


# what decides what a folder is -------------------------------------------------------------------


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)


@pytest.mark.parametrize("content", [b'{"pictures": ["a.png"]}', b"", b"not json", b'{"version": 2, "shards": []}'])
def test_an_index_of_others_is_a_file_like_any(tmp_path, content):
    path = folder(tmp_path / "x", ["a.png"])
    (tmp_path / "x" / "index.json").write_bytes(content)
    (tmp_path / "x" / "packing.json").write_bytes(content)
    source = open_source(path)
    assert (taken(source), in_words(source.left_out)) == (["a.png"], "2 .json")


def test_a_parquet_file_without_images_decides_nothing(tmp_path):
    path = folder(tmp_path / "x", ["a.png"])
    parquet(tmp_path / "x" / "metadata.parquet", file_name=["a.png"], embedding=[bytes(64)])
    (tmp_path / "x" / "broken.parquet").write_bytes(b"PAR1")
    source = open_source(path)
    assert (taken(source), in_words(source.left_out)) == (["a.png"], "2 .parquet")


def test_images_of_two_kinds_are_refused_with_the_way_out(tmp_path):
    path = folder(tmp_path / "x", ["preview.png"])
    parquet(tmp_path / "x" / "data" / "train.parquet", image=[{"bytes": PNG, "path": None}] * 2)
    with pytest.raises(
        UserError, match=r"holds 1 image and 1 parquet file of images; name one of them, or .*--exclude"
    ):
        open_source(path)
    assert open_source(path, rules=Rules(exclude=("*.png",))).count == 2
    assert open_source(path, rules=Rules(exclude=("*.parquet",))).count == 1


def test_parquet_files_without_images_beside_those_with_are_counted(tmp_path):
    parquet(tmp_path / "x" / "0.parquet", image=[PNG, PNG])
    parquet(tmp_path / "x" / "1.parquet", image=[PNG])
    parquet(tmp_path / "x" / "meta.parquet", embedding=[bytes(64)])
    source = open_source(str(tmp_path / "x"))
    assert (source.count, in_words(source.left_out)) == (3, "1 .parquet")


@pytest.mark.parametrize("make", [in_tar, in_zip])
def test_a_folder_of_shards_is_one_source_in_order(tmp_path, make):
    """As img2dataset and other tools write them, with metadata beside."""
    suffix = make.__name__[3:]
    for shard in (0, 1, 10, 2):
        make(tmp_path / f"{shard}.{suffix}", [f"{shard}-{n}.png" for n in range(3)] + ["stats.json"])
    make(tmp_path / f"11.{suffix}", ["only.txt"])
    parquet(tmp_path / "0.parquet", url=["u"])
    source = open_source(str(tmp_path))
    names = [f"{shard}-{n}.png" for shard in (0, 1, 2, 10) for n in range(3)]
    assert taken(source) == names
    for start in range(13):
        assert [item.name.split(": ")[-1] for item in source.items(start)] == names[start:]
    assert in_words(source.left_out) == "4 .json, " + ", ".join(sorted(["1 .parquet", "1 .txt", f"1 .{suffix}"]))
    before = source.identity
    make(tmp_path / f"2.{suffix}", [f"2-{n}.png" for n in range(4)])
    assert open_source(str(tmp_path)).identity != before


def test_a_shard_that_is_missing_is_named(tmp_path):
    in_tar(tmp_path / "0.tar", ["a.png"])
    (tmp_path / "1.tar").symlink_to("/mnt/lost/1.tar")
    with pytest.raises(UserError, match=r"1\.tar is a link to /mnt/lost/1\.tar, where nothing is"):
        open_source(str(tmp_path))


# counting ----------------------------------------------------------------------------------------


def test_the_account_stays_small_whatever_it_counts():
    tally = Tally()
    for number in range(20_000):
        tally.add("hidden folder", f"s{number}/.git/")
        tally.add(f".x{number}")
    groups = tally.groups()
    assert sum(group.count for group in groups) == 40_000
    assert len(groups) <= MAX_REASONS + 1
    assert all(len(group.places) <= MAX_PLACES for group in groups)
    assert len(in_words(groups)) < 400


def test_places_do_not_depend_on_the_order():
    one, other = Tally(), Tally()
    for number in range(100):
        one.add("mask", f"{number}/")
        other.add("mask", f"{99 - number}/")
    assert one.groups() == other.groups()


def test_names_that_no_terminal_shows_are_written_out():
    tally = Tally()
    tally.add("mask", "a\x1b[2J\udc80\u202e/")
    assert in_words(tally.groups()) == "1 mask (a\\x1b[2J\\udc80\\u202e/)"
