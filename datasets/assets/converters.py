"""Conversion of published files to the cache's formats: safetensors for weights, npz or a folder for images.

A converter is `convert(raw, product, metadata)`: it reads the files in the folder `raw`, whose SHA-256
was checked before, and writes `product`.  Fetched pickles are read by a restricted unpickler only.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np

VGG16_BLOCKS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
# Indices of the convolutions in torchvision's `features`: five blocks of conv, relu, ..., pool.
TORCHVISION_VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
DIGITS_SIDE = 28


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of plain containers and numpy arrays; raises UnpicklingError for any other name in it."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"the pickle uses {module}.{name}; only numpy arrays are allowed")
        return allowed[module, name]


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """The empty array that a pickle then fills; a public equivalent of numpy's `_reconstruct`."""
    del kind, shape, dtype
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def vgg16_onnx(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert the 13 convolutions of an ONNX file, by initialiser name."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(_single(raw))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {}
    for block, count in VGG16_BLOCKS.items():
        for i in range(1, count + 1):
            source = f"functional_1/block{block}_conv{i}_1"
            weights[f"conv{block}_{i}.weight"] = arrays[f"{source}/convolution/ReadVariableOp:0"]
            weights[f"conv{block}_{i}.bias"] = arrays[f"{source}/Squeeze:0"]
    _save(weights, product, metadata)


def vgg16_torchvision(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert the 13 convolutions of torchvision's state dict."""
    state = _state_dict(raw)
    names = [f"conv{block}_{i}" for block, count in VGG16_BLOCKS.items() for i in range(1, count + 1)]
    weights = {
        f"{name}.{part}": state[f"features.{place}.{part}"]
        for name, place in zip(names, TORCHVISION_VGG16, strict=True)
        for part in ("weight", "bias")
    }
    _save(weights, product, metadata)


def squeezenet_pickle(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert SqueezeNet 1.1 from a pickled dictionary of [kernel HWIO, bias] lists."""
    with _single(raw).open("rb") as stream:
        layers = ArrayUnpickler(stream).load()
    weights = {}
    for layer, (kernel_hwio, bias) in layers.items():
        name = (
            layer.replace("/squeeze1x1", ".squeeze").replace("/expand1x1", ".expand1").replace("/expand3x3", ".expand3")
        )
        weights[f"{name}.weight"] = np.transpose(kernel_hwio, (3, 2, 0, 1))
        weights[f"{name}.bias"] = bias
    _save(weights, product, metadata)


def state_dict(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert a PyTorch state dict, with unchanged names."""
    _save(_state_dict(raw), product, metadata)


def digits_csv(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert rows of 784 pixels (0-255) and a label."""
    del metadata
    table = np.loadtxt(_single(raw), delimiter=",", dtype=np.uint8)
    images = table[:, :-1].reshape(-1, DIGITS_SIDE, DIGITS_SIDE)
    np.savez_compressed(product, images=images, labels=table[:, -1])


def idx_pairs(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert MNIST's four idx files: `images`, `labels` (training set), `test_images`, `test_labels` (test set)."""
    del metadata
    np.savez_compressed(
        product,
        images=_idx(raw / "train-images-idx3-ubyte"),
        labels=_idx(raw / "train-labels-idx1-ubyte"),
        test_images=_idx(raw / "t10k-images-idx3-ubyte"),
        test_labels=_idx(raw / "t10k-labels-idx1-ubyte"),
    )


def idx_first_10k(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert the first 10,000 entries of the two idx files of MNIST's training set: `images`, `labels`."""
    del metadata
    images, labels = _idx(raw / "train-images-idx3-ubyte"), _idx(raw / "train-labels-idx1-ubyte")
    np.savez_compressed(product, images=images[:10_000], labels=labels[:10_000])


def idx_test(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Convert the two idx files of MNIST's test set: `images`, `labels`."""
    del metadata
    images, labels = _idx(raw / "t10k-images-idx3-ubyte"), _idx(raw / "t10k-labels-idx1-ubyte")
    np.savez_compressed(product, images=images, labels=labels)


def folder(raw: Path, product: Path, metadata: dict[str, str]) -> None:
    """Move the files, unchanged."""
    del metadata
    shutil.move(raw, product)


def _idx(path: Path) -> np.ndarray:
    """Read an idx file of bytes: two zero bytes, type 8, number of dimensions, their sizes (big-endian), data."""
    content = path.read_bytes()
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape.astype(int))


def _state_dict(raw: Path) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(_single(raw), map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}


def _single(raw: Path) -> Path:
    (path,) = (path for path in raw.rglob("*") if path.is_file())
    return path


def _save(weights: dict[str, np.ndarray], product: Path, metadata: dict[str, str]) -> None:
    from safetensors.numpy import save

    # Written by Python, so that a full disk raises OSError.
    product.write_bytes(save({name: np.ascontiguousarray(value) for name, value in weights.items()}, metadata))
