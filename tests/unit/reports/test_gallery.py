"""Images open at full size: embedded while they are few, else from files beside the page; and from the right place."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from glann.config.run import Config
from glann.reports import gallery as module
from glann.reports import pictures
from glann.reports.gallery import Wanted, gallery
from glann.reports.page import SHOWN_WIDTH, figure
from glann.reports.run import write_report
from glann.reports.sheets import Sheet, Tile, tiles_of, wholes_of
from glann.storage.journal import Journal
from html_page import Page
from PIL import Image

SIDE = 320
CONFIG = {
    "name": "tiny",
    "data": {"url": "data", "resolution": 1024},
    "generator": {"kind": "resnet"},
    "loss": {"kind": "l1"},
    "glo": {"epochs": 3},
}


def begun(run_dir):
    """A run folder with a journal of two epochs."""
    (run_dir / "config.yaml").write_text(Config.model_validate(CONFIG).to_yaml())
    journal = Journal(run_dir / "metrics.jsonl")
    for epoch in (1, 2):
        journal.append({"stage": "glo", "epoch": epoch, "step": epoch, "loss": 1.0, "time": 1.0})
    return run_dir


def painted(count: int, side: int = SIDE, channels: int = 3):
    """Images of one brightness each."""
    return np.stack([np.full((side, side, channels), 8 * number % 256, np.uint8) for number in range(count)])


def saved(path, count=12, side=SIDE):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = painted(count, side)
    Sheet(pictures.beside_nearest(tiles_of(images), tiles_of(255 - images))).save(path)
    return path


def test_an_image_is_kept_whole_beside_the_picture_only_where_that_shows_it_smaller(tmp_path):
    small = Tile.of(painted(2, 256, 1)[1])
    assert (small.shown_HWC.shape, small.whole) == ((256, 256, 1), b"")
    large = Tile.of(painted(4, 1024, 1)[3])
    assert large.shown_HWC.shape == (256, 256, 1)
    with Image.open(io.BytesIO(large.whole)) as whole:
        assert (whole.format, whole.size) == ("WEBP", (1024, 1024))
        assert abs(np.asarray(whole).astype(int) - 24).max() <= 2
    path = saved(tmp_path / "x.png")
    assert sorted(each.name for each in (tmp_path / "x").iterdir())[:2] == ["00-00.webp", "00-01.webp"]
    assert len(list((tmp_path / "x").iterdir())) == 24
    saved(path, side=64)
    assert not (tmp_path / "x").exists(), "no whole images of another picture stay behind"


def test_each_spot_lies_on_the_image_that_it_opens(tmp_path):
    """24 images in rows of 8 and 4 with labels at their left; the brightness tells them apart."""
    path = saved(tmp_path / "x.png")
    with Image.open(path) as picture:
        pixels, (width, height) = np.asarray(picture), picture.size
    found = wholes_of(path, (width, height))
    assert [whole.path.name for whole in found][7:10] == ["00-07.webp", "01-00.webp", "01-01.webp"]
    for whole in found:
        left, top, wide, tall = whole.box
        part = pixels[
            round(top * height) : round((top + tall) * height), round(left * width) : round((left + wide) * width)
        ]
        assert part.shape == (256, 256, 3)
        with Image.open(whole.path) as image:
            assert abs(part.astype(int) - int(np.asarray(image)[0, 0, 0])).max() <= 2, whole.path


def report_of(tmp_path, **sizes):
    run_dir = begun(tmp_path)
    saved(run_dir / "images" / "nearest.png", **sizes)
    for epoch in (1, 2):
        saved(run_dir / "images" / f"glo-epoch-{epoch:03d}-reconstructions.png", **sizes)
    text = write_report(run_dir).read_text()
    return run_dir, text, Page(text)


def test_few_full_images_are_in_the_page_and_open_without_scripts(tmp_path):
    run_dir, text, page = report_of(tmp_path)
    opened = {link.removeprefix("#") for link in page.links if link.startswith("#full-")}
    assert len(opened) == 3 * 24
    for id in opened:
        assert text.count(f'id="{id}"') == 1
    assert {link for link in page.links if link.startswith("#") and "full" not in link} == {
        "#nearest",
        "#glo-reconstructions",
    }, "and close to where they were"
    assert not [link for link in page.links if link.startswith("images/")]
    assert "script" not in page.elements
    assert page.open == []
    (first,) = re.findall(r'id="full-1"[^>]*><img src="data:image/webp;base64,([^"]+)"', text)
    assert base64.b64decode(first) == (run_dir / "images" / "nearest" / "00-00.webp").read_bytes()


def test_many_are_files_beside_the_page_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EMBEDDED", 1000)
    run_dir, text, page = report_of(tmp_path)
    beside = [link for link in page.links if link.startswith("images/")]
    assert len(beside) == 3 * 24
    assert all((run_dir / link).is_file() for link in beside)
    assert "beside this page: copy it with the page" in text
    assert "full-1" not in text
    assert len(text) < 400_000


def test_a_picture_that_is_only_reduced_opens_itself(tmp_path):
    """Images of 256 px are whole in the picture, which is wider than a page shows it."""
    path = tmp_path / "images" / "samples.png"
    path.parent.mkdir()
    Sheet(pictures.in_grid(tiles_of(painted(64, 256)))).save(path)
    made = gallery(tmp_path, [Wanted(path, "Samples", "samples"), Wanted(path, "Samples, epoch 1", "film", 704)])
    assert [shown.figure.width for shown in made.shown] == [SHOWN_WIDTH, 704]
    assert [one.figure.width for one in made.opened] == [2084, 2084]
    assert [spot.style for spot in made.shown[0].spots] == ["left:0.000%;top:0.000%;width:100.000%;height:100.000%"]
    assert figure(path, "x", 4000).width == 2084
    small = tmp_path / "images" / "small.png"
    Sheet(pictures.in_grid(tiles_of(painted(9, 28)))).save(small)
    assert gallery(tmp_path, [Wanted(small, "x", "y")]).shown[0].spots == []


def test_a_report_at_1024_px_stays_small_enough_for_mail(tmp_path):
    """Of noisy images, which compress no better than photographs."""
    side = 1024
    run_dir, rng = begun(tmp_path), np.random.default_rng(0)
    coarse = rng.integers(0, 256, (64, 64, 64, 3), np.uint8)
    images = [np.asarray(Image.fromarray(image).resize((side, side))) for image in coarse]
    noise = rng.normal(0, 12, (side, side, 3))
    images = [np.clip(image + noise, 0, 255).astype(np.uint8) for image in images[:16]]
    (run_dir / "images").mkdir(exist_ok=True)
    tiles = tiles_of(images)
    Sheet(pictures.in_grid(tiles * 4)).save(run_dir / "images" / "samples.png")
    assert sum(path.stat().st_size for path in run_dir.rglob("*.webp")) > module.EMBEDDED
    size = write_report(run_dir).stat().st_size
    assert size < 3 << 20, size
