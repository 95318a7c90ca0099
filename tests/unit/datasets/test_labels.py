"""Labels: from folders and files of every form, matched by name, kept in the order of the rows; others are refused."""

import gzip
import json
import zipfile

import numpy as np
import pytest
from glann.datasets.pack import pack
from glann.datasets.reader import read_labels
from glann.datasets.sources.labels import with_labels
from glann.datasets.sources.open import open_source
from glann.errors import UserError
from PIL import Image

NAMES = ("cats/000001.jpg", "cats/000002.jpg", "dogs/000003.jpg", "dogs/000010.jpg")
OPTIONS = {"resolution": 8, "channels": 1, "image_format": "png"}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(2)
    for name in NAMES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(path)
    return tmp_path / "in"


def labelled(source, given):
    labels = with_labels(open_source(str(source)), str(given)).labels
    return [column.name for column in labels.columns], labels.value_NL.tolist()


def test_the_names_of_folders_are_labels_only_where_that_is_asked_for(folder, tmp_path):
    assert open_source(str(folder)).labels is None
    index = pack(str(folder), str(tmp_path / "set"), labels="folder", **OPTIONS)
    assert index.labels.columns[0].values == ("cats", "dogs")
    assert read_labels(str(tmp_path / "set")).column("folder").tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="no label is called age; there are folder"):
        read_labels(str(tmp_path / "set")).column("age")
    with pytest.raises(UserError, match="lie in no folders"):
        with_labels(open_source(str(folder / "cats")), "folder")


def test_labels_change_neither_the_images_nor_the_fingerprint(folder, tmp_path):
    plain = pack(str(folder), str(tmp_path / "plain"), name="x", **OPTIONS)
    with_them = pack(str(folder), str(tmp_path / "set"), name="x", labels="folder", **OPTIONS)
    assert plain.fingerprint == with_them.fingerprint
    assert read_labels(str(tmp_path / "plain")) is None
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "images.bin", "index.json", "labels.bin", "x-000000.tar",
    ]  # fmt: skip
    for place, given in (("plain", "folder"), ("set", None)):
        with pytest.raises(UserError, match="already holds"):
            pack(str(folder), str(tmp_path / place), name="x", labels=given, **OPTIONS)
    assert pack(str(folder), str(tmp_path / "set"), name="x", labels="folder", **OPTIONS).labels == with_them.labels


CELEBA = "3\nSmiling Male \n000001.jpg  1 -1\n000003.jpg -1 -1\n000010.jpg -1  1\n"


@pytest.mark.parametrize(
    ("name", "text", "columns", "values"),
    [
        ("list_attr_celeba.txt", CELEBA, ["Smiling", "Male"], [[1, 0], [-1, -1], [0, 0], [0, 1]]),
        ("kaggle.csv", "image_id,Smiling\n000001.jpg,1\n000002.jpg,-1\n", ["Smiling"], [[1], [0], [-1], [-1]]),
        ("a.csv", "file,kind,age\ncats/000002.png,tabby,3\n000010,poodle,\n", ["kind", "age"],
         [[-1, -1], [1, 3], [-1, -1], [0, -1]]),
        ("n.csv", "\ufefffile,age\r\n000001.jpg,-1\r\n000003.jpg,7\r\n", ["age"], [[-1], [-1], [7], [-1]]),
        ("dataset.json", '{"labels": [["cats/000001.png", 6], ["dogs/000003.png", 2]]}', ["class"],
         [[6], [-1], [2], [-1]]),
        ("v.json", '{"labels": [["000002.jpg", [0, 1.0]]]}', ["0", "1"], [[-1, -1], [0, 1], [-1, -1], [-1, -1]]),
    ],
)  # fmt: skip
def test_a_file_of_labels_is_matched_by_name(folder, tmp_path, name, text, columns, values):
    """By path, or by file name alone, whatever the extension; images that it does not name are unknown."""
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert labelled(folder, tmp_path / name) == (columns, values)


def test_words_are_numbered_in_their_natural_order(folder, tmp_path):
    (tmp_path / "a.csv").write_text("file,size\n000001,size 10\n000002,size 9\n000003,size 10\n")
    labels = with_labels(open_source(str(folder)), str(tmp_path / "a.csv")).labels
    assert labels.columns[0].values == ("size 9", "size 10")
    assert labels.value_NL[:, 0].tolist() == [1, 0, 1, -1]


def test_stylegans_json_is_found_inside_the_zip(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in NAMES:
            archive.write(folder / name, name)
        archive.writestr("dataset.json", json.dumps({"labels": [[name, at] for at, name in enumerate(NAMES)]}))
    assert labelled(tmp_path / "set.zip", "dataset.json") == (["class"], [[0], [1], [2], [3]])
    (folder / "dataset.json").write_text(json.dumps({"labels": [[NAMES[1], 5]]}))
    assert labelled(folder, "dataset.json") == (["class"], [[-1], [5], [-1], [-1]])


@pytest.mark.parametrize("pressed", [False, True])
def test_idx_labels_are_in_the_order_of_the_images(tmp_path, pressed):
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    header = (0x803).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in images.shape)
    (tmp_path / "x-images-idx3-ubyte").write_bytes(header + images.tobytes())
    labels = (0x801).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes([7, 2, 1])
    path = tmp_path / "x-labels-idx1-ubyte"
    path.write_bytes(gzip.compress(labels) if pressed else labels)
    assert labelled(tmp_path / "x-images-idx3-ubyte", path) == (["class"], [[7], [2], [1]])
    path.write_bytes(gzip.compress(labels[:-1]) if pressed else labels[:-1])
    with pytest.raises(UserError, match="has 3 labels for 3 images"):
        labelled(tmp_path / "x-images-idx3-ubyte", path)
    with pytest.raises(UserError, match="no file names"):
        labelled(tmp_path / "x-images-idx3-ubyte", _written(tmp_path, "file,a\n000001,1\n"))


def _written(tmp_path, text):
    (tmp_path / "labels.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / "labels.txt"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"\xff\xfe\0", "no file of labels"),
        ("", "no file of labels"),
        ("{", "StyleGAN's has"),
        ('{"labels": null}', "StyleGAN's has"),
        ('{"labels": [["000001.jpg", 0.5]]}', "StyleGAN's has"),
        ("[" * 100_000, "StyleGAN's has"),
        ("file,a\n000001,1,2\n", "row 1 '000001' has 2 labels, not 1"),
        ("file,a\nelse,1\n", "names none of the images"),
        ("file,a\n000001,3000000000\n", "must be from -1"),
        ("file,a\n000001,-2\n", "must be from -1"),
        ('file,a\n"000001,1\n', r"has 0 labels|cannot be read"),
        ("file," + ",".join(map(str, range(5000))) + "\n000001\n", "at most 4096"),
    ],
)
def test_what_is_no_file_of_labels_of_these_images_is_refused_in_one_line(folder, tmp_path, text, match):
    with pytest.raises(UserError, match=match) as caught:
        labelled(folder, _written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_name_that_may_be_several_images_is_refused(folder, tmp_path):
    (folder / "dogs" / "000001.jpg").write_bytes((folder / "cats" / "000001.jpg").read_bytes())
    with pytest.raises(UserError, match="'000001' may be several images; give their paths"):
        labelled(folder, _written(tmp_path, "file,a\n000001,1\n"))
    assert labelled(folder, _written(tmp_path, "file,a\ndogs/000001,1\n"))[1] == [[-1], [-1], [1], [-1], [-1]]


def test_a_file_beside_the_working_folder_is_found_however_it_is_written(folder, tmp_path, monkeypatch):
    _written(tmp_path, "file,a\n000001,1\n")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for given in ("../labels.txt", "./../labels.txt", str(tmp_path / "labels.txt"), f"file://{tmp_path}/labels.txt"):
        assert labelled(folder, given)[1] == [[1], [-1], [-1], [-1]]


def test_a_file_that_is_not_there_is_one_line(folder):
    with pytest.raises(UserError, match=r"--labels nowhere\.csv: no such file, nor one in the source"):
        labelled(folder, "nowhere.csv")


def test_labels_follow_what_is_left_out_and_survive_an_interruption(folder, tmp_path):
    """Row for row, with an unreadable image in the middle and a shard for each image."""
    (folder / "cats" / "000002.jpg").write_bytes(b"broken")
    options = OPTIONS | {"shard_size_mb": 0.001, "skip_corrupt": True, "name": "x", "labels": "folder"}
    whole = pack(str(folder), str(tmp_path / "whole"), **options)
    assert read_labels(str(tmp_path / "whole")).value_NL[:, 0].tolist() == [0, 1, 1]

    def stop(done, total):
        if done == 3:
            raise InterruptedError

    with pytest.raises(Exception):  # noqa: B017, PT011
        pack(str(folder), str(tmp_path / "set"), progress=stop, **options)
    with pytest.raises(UserError, match="unfinished pack of another source, with other options"):
        pack(str(folder), str(tmp_path / "set"), **options | {"labels": None})
    assert pack(str(folder), str(tmp_path / "set"), **options).labels == whole.labels
    assert not list((tmp_path / "set").glob("*.labels"))
