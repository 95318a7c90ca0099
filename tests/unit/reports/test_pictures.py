"""Pictures: every image is where it should be, unharmed, and the nearest training image is the nearest."""

import errno

import numpy as np
import pytest
from glann.datasets.reader import CorruptImage
from glann.errors import EnvironmentFault, UserError
from glann.metrics.nearest import nearest_images
from glann.reports import pictures
from PIL import Image


@pytest.fixture
def rng(record_property):
    seed = int(np.random.SeedSequence().entropy % 2**32)
    record_property("seed", seed)
    print("seed", seed)
    return np.random.default_rng(seed)


def random_images(rng, count, side, channels):
    return rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_are_enlarged_by_a_whole_factor_in_reading_order(rng, channels):
    images = random_images(rng, 7, 28, channels)
    picture = np.asarray(pictures.grid(images, columns=3))
    shown = 28 * 3  # the least multiple of 28 that is not below 64
    pitch = shown + pictures.GAP
    assert picture.shape == (3 * pitch + pictures.GAP, 3 * pitch + pictures.GAP, 3)
    for number, image in enumerate(images):
        top, left = (pictures.GAP + index * pitch for index in divmod(number, 3))
        tile = picture[top : top + shown : 3, left : left + shown : 3]
        np.testing.assert_array_equal(tile, np.broadcast_to(image, (28, 28, 3)))
    assert (picture[-pitch:, -pitch:] == 255).all(), "places without an image are paper"


def test_large_images_are_reduced_and_medium_ones_left_alone(rng):
    assert pictures.grid(random_images(rng, 1, 1024, 3)).width == 256 + 2 * pictures.GAP
    picture = np.asarray(pictures.grid(images := random_images(rng, 1, 128, 3)))
    np.testing.assert_array_equal(picture[pictures.GAP : -pictures.GAP, pictures.GAP : -pictures.GAP], images[0])


def test_a_whole_grid_reduces_nothing_and_holds_one_batch_at_a_time(rng):
    images, alive = random_images(rng, 7, 300, 3), []

    def batches():
        for start in range(0, 7, 2):
            alive.append(start)
            yield images[start : start + 2]

    picture = np.asarray(pictures.whole_grid(batches(), 7))
    pitch = 300 + pictures.GAP
    assert picture.shape[1::-1] == pictures.grid_size(7, 300) == (3 * pitch + pictures.GAP, 3 * pitch + pictures.GAP)
    for number, image in enumerate(images):
        top, left = (pictures.GAP + index * pitch for index in divmod(number, 3))
        np.testing.assert_array_equal(picture[top : top + 300, left : left + 300], image)
    small = random_images(rng, 5, 28, 1)
    assert pictures.whole_grid(iter([small]), 5) == pictures.grid(small), "small ones are enlarged as ever"
    assert pictures.grid_size(2, 28, 8) == pictures.whole_grid(iter([small[:2]]), 2, 8).size
    with pytest.raises(UserError, match="at least one image"):
        pictures.whole_grid(iter([]), 1)


def test_each_reconstruction_stands_below_its_image(rng):
    real, fake = random_images(rng, 5, 64, 3), random_images(rng, 5, 64, 3)
    picture = np.asarray(pictures.labelled_rows(pictures.in_pairs([("x", real), ("G(z)", fake)], columns=3)))
    pitch = 64 + pictures.GAP
    margin = picture.shape[1] - 3 * pitch - pictures.GAP
    assert margin > 20, "there is room for labels"
    assert (picture[:, :margin] < 128).any(), "and labels are there"
    left = margin + pictures.GAP + pitch  # image 4: second row of pairs, second column
    for row, images in ((2, real), (3, fake)):
        top = pictures.GAP + row * pitch
        np.testing.assert_array_equal(picture[top : top + 64, left : left + 64], images[4])


def test_interpolations_are_one_row_each(rng):
    paths = rng.integers(0, 256, (2, 5, 64, 64, 1), dtype=np.uint8)
    picture = pictures.labelled_rows([("", path) for path in paths])
    pitch = 64 + pictures.GAP
    assert picture.size == (5 * pitch + pictures.GAP, 2 * pitch + pictures.GAP)


def test_what_is_not_an_image_is_refused(rng):
    with pytest.raises(UserError, match="uint8"):
        pictures.grid(np.zeros((2, 8, 8, 3), dtype=np.float32))
    with pytest.raises(UserError, match="uint8"):
        pictures.grid(np.zeros((0, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="as many images of each kind"):
        pictures.reconstructed(random_images(rng, 2, 8, 1), random_images(rng, 3, 8, 1))


def test_a_grid_survives_the_disk(rng, tmp_path):
    pictures.grid(random_images(rng, 4, 28, 1)).save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        image.verify()


class Rows:
    """Training images in memory, as ImageRows has them; some may be corrupt."""

    def __init__(self, img_NHWC, corrupt=()):
        self.img_NCHW, self.corrupt = img_NHWC.transpose(0, 3, 1, 2), corrupt

    def __len__(self):
        return len(self.img_NCHW)

    def decode(self, row):
        if row in self.corrupt:
            raise CorruptImage(row, "shard", "torn")
        return self.img_NCHW[row]


def test_nearest_equals_brute_force_over_more_than_one_chunk(rng):
    training, samples = random_images(rng, 601, 12, 3), random_images(rng, 9, 12, 3)
    samples[4] = training[600]  # a copy
    found = nearest_images(samples, Rows(training))
    difference = samples[:, None].astype(np.float64) - training[None]
    rms = np.sqrt((difference**2).mean((2, 3, 4))) / 255
    np.testing.assert_array_equal(found.rows_N, rms.argmin(1))
    np.testing.assert_allclose(found.distance_N, rms.min(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.img_NHWC, training[found.rows_N])
    assert found.rows_N[4] == 600
    assert found.distance_N[4] == 0
    assert found.searched == 601


def test_a_tie_goes_to_the_lowest_row_and_corrupt_rows_are_passed_over(rng):
    training = np.repeat(random_images(rng, 1, 8, 1), 600, axis=0)
    assert nearest_images(training[:1], Rows(training)).rows_N[0] == 0
    assert nearest_images(training[:1], Rows(training, corrupt={0, 1})).rows_N[0] == 2
    with pytest.raises(UserError, match="no training image could be read"):
        nearest_images(training[:1], Rows(training[:3], corrupt={0, 1, 2}))


def test_a_limited_search_says_how_many_it_looked_at(rng):
    found = nearest_images(random_images(rng, 1, 8, 1), Rows(random_images(rng, 100, 8, 1)), limit=10)
    assert found.searched == 10


def test_a_copy_of_a_large_image_is_found(rng):
    training = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8).repeat(32, 1).repeat(32, 2)
    found = nearest_images(training[3:4], Rows(training))
    assert found.rows_N[0] == 3
    assert found.distance_N[0] == pytest.approx(0, abs=1e-6)


def test_a_picture_that_finds_no_room_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    pictures.save(Image.new("L", (8, 8)), path)
    before = path.read_bytes()

    def torn(self, target, format):
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(EnvironmentFault, match=f"disk full while writing {path}"):
        pictures.save(Image.new("L", (9, 9)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
