"""Protects the generators: the published layers, checked against a float64 reference written with scipy alone,
and that neither padding rows, nor batch mates, nor activation checkpointing change an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.config.sections import GeneratorConfig
from glann.errors import UserError
from glann.models.generators import build_generator
from glann.models.norm import SharedBatchNorm
from glann.models.virtual_norm import VirtualBatchNorm
from scipy.signal import convolve2d, correlate2d
from torch import nn


def small(kind: str, **changes) -> GeneratorConfig:
    return GeneratorConfig(kind=kind, **({"latent_dim": 6, "width": 4, "max_width": 16} | changes))


def codes(rows: int, dim: int = 6) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def convolution(x_CHW: np.ndarray, kernel_OIKK: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    maps = [sum(correlate2d(x, k, mode="same") for x, k in zip(x_CHW, kernels, strict=True)) for kernels in kernel_OIKK]
    return np.stack(maps) + np.reshape(bias, (-1, 1, 1))


def transposed(x_CHW: np.ndarray, kernel_IOKK: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """4x4 stride-2 padding-1 transposed convolution: put zeros between pixels, convolve, cut the border."""
    channels, height, width = x_CHW.shape
    spread = np.zeros((channels, 2 * height - 1, 2 * width - 1))
    spread[:, ::2, ::2] = x_CHW
    out = [
        sum(convolve2d(spread[i], kernel_IOKK[i, o]) for i in range(channels))[1:-1, 1:-1]
        for o in range(kernel_IOKK.shape[1])
    ]
    return np.stack(out) + np.reshape(bias, (-1, 1, 1))


@pytest.mark.parametrize("upsample", ["native", "resize"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_infogan_equals_a_float64_reference(upsample, batch_norm):
    net = build_generator(small("infogan", upsample=upsample, batch_norm=batch_norm), 8, 3)
    z_BD = codes(5)
    net(z_BD)  # running statistics that are not those of a new layer
    net.eval()
    w = arrays(net)
    assert ("fc1.bias" in w) is not batch_norm  # BatchNorm takes a bias out again

    def norm(h: np.ndarray, i: int) -> np.ndarray:
        if not batch_norm:
            return h
        scale = w[f"norm{i}.weight"] / np.sqrt(w[f"norm{i}.running_var"] + 1e-5)
        shift = w[f"norm{i}.bias"] - w[f"norm{i}.running_mean"] * scale
        return h * scale.reshape(-1, *[1] * (h.ndim - 1)) + shift.reshape(-1, *[1] * (h.ndim - 1))

    def double(h: np.ndarray, i: int) -> np.ndarray:
        if upsample == "native":
            return transposed(h, w[f"up{i}.weight"], w.get(f"up{i}.bias", 0.0))
        return convolution(h.repeat(2, 1).repeat(2, 2), w[f"up{i}.1.weight"], w.get(f"up{i}.1.bias", 0.0))

    for z, img in zip(z_BD.double().numpy(), net(z_BD).detach().numpy(), strict=True):
        h = np.maximum(norm(w["fc1.weight"] @ z + w.get("fc1.bias", 0.0), 1), 0)
        h = np.maximum(norm(w["fc2.weight"] @ h + w.get("fc2.bias", 0.0), 2), 0).reshape(8, 2, 2)
        h = np.maximum(norm(double(h, 1), 3), 0)
        np.testing.assert_allclose(img, 1 / (1 + np.exp(-double(h, 2))), atol=1e-5)


class AsPublished(nn.Module):
    """The generator of yedidh/glann (model.py), stated anew with torch's own layers."""

    def __init__(self, dim: int, side: int, channels: int, width: int, norm: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 1024, bias=False), nn.Linear(1024, 2 * width * (side // 4) ** 2, bias=False)
        self.up1, self.up2 = (nn.ConvTranspose2d(*io, 4, 2, 1) for io in ((2 * width, width), (width, channels)))
        self.norm2 = nn.BatchNorm1d(self.fc2.out_features) if norm else nn.Identity()
        self.norm3 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.side, self.leak = side // 4, nn.LeakyReLU(0.2)

    def forward(self, z):
        h = self.leak(self.norm2(self.fc2(self.leak(self.fc1(z / z.norm(dim=1, keepdim=True).detach())))))
        h = h.view(len(h), -1, self.side, self.side)
        return torch.sigmoid(self.up2(self.leak(self.norm3(self.up1(h)))))


PUBLISHED = {
    "norm_after": ("fc2", "up1"),
    "activation": "leaky-relu",
    "init": "xavier",
    "fc_bias": False,
    "unit_input": True,
}


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_keys_can_state_the_published_code_exactly(batch_norm):
    """Forward and gradient of the code, in training; a bias in front of BatchNorm has no effect and is left out."""
    net = build_generator(small("infogan", batch_norm=batch_norm, **PUBLISHED), 8, 3).double()
    other = AsPublished(6, 8, 3, width=4, norm=batch_norm).double()
    missing, unexpected = other.load_state_dict(net.state_dict(), strict=False)
    assert (missing, unexpected) == (["up1.bias"] if batch_norm else [], [])
    z_BD = (codes(7).double() * torch.linspace(0.1, 3, 7)[:, None]).requires_grad_()
    same_BD = z_BD.detach().clone().requires_grad_()
    img, expected = net(z_BD), other(same_BD)
    torch.testing.assert_close(img, expected, rtol=1e-6, atol=1e-6)
    weights = torch.rand_like(img)
    (img * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(z_BD.grad, same_BD.grad, rtol=1e-5, atol=1e-6)


def test_xavier_has_the_deviation_of_the_published_code_and_the_default_stays():
    net = build_generator(GeneratorConfig(kind="infogan", **PUBLISHED), 28, 1)
    for layer, fans in (("fc1", 64 + 1024), ("fc2", 1024 + 6272), ("up1", 16 * (128 + 64))):
        deviation = float(net.get_submodule(layer).weight.detach().std())
        assert deviation == pytest.approx((2 * 2 / fans) ** 0.5, rel=0.02)
    assert float(net.up2.bias.detach().abs()) > 0  # PyTorch's own
    plain = build_generator(GeneratorConfig(kind="infogan"), 28, 1)
    assert float(plain.fc2.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_batch_norm_that_follows_no_layer_is_none():
    assert not GeneratorConfig(kind="infogan", norm_after=()).normalises
    assert not GeneratorConfig(kind="infogan", batch_norm=False).normalises
    assert not GeneratorConfig(kind="resnet").normalises
    one = build_generator(small("infogan", norm_after=("up1",)), 8, 1)
    assert [name for name, layer in one.named_modules() if isinstance(layer, SharedBatchNorm)] == ["norm3"]


def test_resnet_equals_a_float64_reference():
    net = build_generator(small("resnet", max_width=8), 16, 1)
    z_BD = codes(2)
    w = arrays(net)
    for z, img in zip(z_BD.double().numpy(), net(z_BD).detach().numpy(), strict=True):
        h = (w["fc.weight"] @ z + w["fc.bias"]).reshape(8, 4, 4)
        for i in range(3):
            block = f"blocks.{i}"
            residual = convolution(leaky(h), w[f"{block}.conv1.weight"], w[f"{block}.conv1.bias"])
            residual = convolution(leaky(residual), w[f"{block}.conv2.weight"], w[f"{block}.conv2.bias"])
            skip = convolution(h, w[f"{block}.skip.weight"]) if f"{block}.skip.weight" in w else h
            h = skip + 0.1 * residual
            if i < 2:
                h = h.repeat(2, 1).repeat(2, 2)
        out = np.tanh(convolution(leaky(h), w["to_image.weight"], w["to_image.bias"]))
        np.testing.assert_allclose(img, (out + 1) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "resolution"),
    [("infogan", 28), ("infogan", 32), ("infogan", 64), ("dcgan", 28), ("dcgan", 64), ("resnet", 64), ("resnet", 256)],
)
@pytest.mark.parametrize("upsample", ["native", "resize"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_asked_size_and_lie_between_0_and_1(kind, resolution, upsample, channels):
    net = build_generator(small(kind, upsample=upsample), resolution, channels)
    z_BD = codes(2).requires_grad_()
    img_BCHW = net(z_BD)
    assert img_BCHW.shape == (2, channels, resolution, resolution)
    assert img_BCHW.min() >= 0
    assert img_BCHW.max() <= 1
    (img_BCHW * torch.rand_like(img_BCHW)).sum().backward()
    assert z_BD.grad.norm(dim=1).min() > 0
    assert (net.latent_dim, net.resolution, net.channels) == (6, resolution, channels)


def test_the_published_widths():
    infogan = build_generator(GeneratorConfig(kind="infogan"), 28, 1)
    assert tuple(infogan.fc1.weight.shape) == (1024, 64)
    assert tuple(infogan.fc2.weight.shape) == (128 * 7 * 7, 1024)
    assert tuple(infogan.up1.weight.shape) == (128, 64, 4, 4)
    assert tuple(infogan.up2.weight.shape) == (64, 1, 4, 4)
    with torch.device("meta"):
        dcgan = build_generator(GeneratorConfig(kind="dcgan", latent_dim=100, width=128), 64, 3)
        example = build_generator(GeneratorConfig(kind="dcgan", latent_dim=100, width=64), 64, 3)
    assert tuple(dcgan.fc.weight.shape) == (1024 * 4 * 4, 100)
    assert [layer.out_channels for layer in [*dcgan.ups, dcgan.to_image]] == [512, 256, 128, 3]
    # PyTorch's example (nz 100, ngf 64) has this many, without our biases of the three colours
    assert sum(p.numel() for p in example.parameters()) == 3_576_704 + 3
    with torch.device("meta"):
        resnet = build_generator(GeneratorConfig(kind="resnet", latent_dim=256), 256, 3)
    assert tuple(resnet.fc.weight.shape) == (1024 * 4 * 4, 256)
    assert [block.conv1.in_channels for block in resnet.blocks] == [1024, 1024, 1024, 512, 256, 128, 64]
    assert not any(isinstance(layer, SharedBatchNorm) for layer in resnet.modules())


@pytest.mark.parametrize("kind", ["infogan", "dcgan", "resnet"])
def test_checkpointed_activations_change_no_number(kind):
    resolution = 8 if kind == "infogan" else 32
    plain, thrifty = (build_generator(small(kind), resolution, 3) for _ in range(2))
    thrifty.load_state_dict(plain.state_dict())
    thrifty.checkpoint_activations = True
    results = []
    z = codes(4)
    for net in (plain, thrifty):
        z_BD = z.clone().requires_grad_()
        img_BCHW = net(z_BD, torch.tensor([1.0, 1, 1, 0]))
        img_BCHW.square().sum().backward()
        results.append([img_BCHW, z_BD.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_padding_rows_do_not_touch_images_or_statistics():
    padded, exact = (build_generator(small("infogan"), 8, 1) for _ in range(2))
    exact.load_state_dict(padded.state_dict())
    z_BD = codes(5)
    mixed = torch.cat([z_BD, 50 * torch.ones(3, 6)])
    weight_B = torch.tensor([1.0] * 5 + [0.0] * 3)
    torch.testing.assert_close(padded(mixed, weight_B)[:5], exact(z_BD))
    for (name, ours), (_, theirs) in zip(padded.named_buffers(), exact.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_sample_does_not_depend_on_its_batch_mates():
    net = build_generator(small("infogan"), 8, 1)
    z_BD = codes(5)
    net(z_BD)
    net.eval()
    torch.testing.assert_close(net(z_BD)[3:4], net(z_BD[3:4]))


@pytest.mark.parametrize("kind", ["infogan", "dcgan"])
def test_with_a_reference_batch_a_row_does_not_depend_on_its_mates_in_training(kind):
    net = build_generator(small(kind, reference=7), 8, 1)
    net.reference_RD.copy_(codes(7))
    z_BD = codes(5)
    img_BCHW = net(z_BD)
    for row in range(5):
        torch.testing.assert_close(net(z_BD[row : row + 1])[0], img_BCHW[row])
    torch.testing.assert_close(net.eval()(z_BD), img_BCHW)
    before = img_BCHW[0].detach().clone()
    net.reference_RD.copy_(codes(7))
    assert not torch.allclose(net(z_BD)[0], before, atol=1e-4)
    assert "reference_RD" in net.state_dict()


def test_virtual_statistics_are_those_of_the_reference_and_the_row_together():
    for shape in ((6, 3), (6, 3, 4, 5)):
        norm = VirtualBatchNorm(3, 4)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        x = torch.randn(shape) * 3 + 2
        out = norm(x)
        for row in (4, 5):
            whole = nn.functional.batch_norm(
                torch.cat([x[:4], x[row : row + 1]]), None, None, norm.weight, norm.bias, training=True
            )
            torch.testing.assert_close(out[row], whole[4], atol=1e-5, rtol=1e-4)
        alone = nn.functional.batch_norm(x[:4], None, None, norm.weight, norm.bias, training=True)
        torch.testing.assert_close(out[:4], alone, atol=1e-5, rtol=1e-4)


def test_resize_draws_no_checkerboard_out_of_a_flat_map():
    flat = torch.ones(1, 8, 6, 6)
    native = build_generator(small("infogan"), 8, 1).up1(flat)[..., 2:-2, 2:-2]
    resized = build_generator(small("infogan", upsample="resize"), 8, 1).up1(flat)[..., 2:-2, 2:-2]
    assert resized.std((2, 3)).max() < 1e-6
    assert native.std((2, 3)).max() > 1e-3


@pytest.mark.parametrize(
    ("config", "resolution", "named"),
    [
        (small("infogan"), 128, "128"),
        (small("infogan"), 30, "30"),
        (small("resnet"), 96, "96"),
        (small("dcgan"), 30, "30"),
        (small("resnet", width=32), 64, "max_width"),
    ],
)
def test_impossible_generators_are_refused(config, resolution, named):
    with pytest.raises(UserError, match=named):
        build_generator(config, resolution, 3)


@pytest.mark.parametrize("kind", ["infogan", "resnet"])
@pytest.mark.parametrize("thrifty", [False, True])
def test_a_compiled_generator_makes_the_same_images(kind, thrifty):
    net = build_generator(small(kind), 8 if kind == "infogan" else 16, 1)
    net.checkpoint_activations = thrifty
    z_BD = codes(3)
    expected = net(z_BD)
    compiled = torch.compile(net, backend="aot_eager")(z_BD.requires_grad_())
    torch.testing.assert_close(compiled, expected)
    compiled.sum().backward()
    assert torch.isfinite(z_BD.grad).all()
