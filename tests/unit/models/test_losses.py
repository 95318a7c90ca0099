"""Protects the reconstruction losses: values and gradients against float64 references, per-image means,
no graph through the real image, the paper's defaults, and patches that depend on their seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.config.sections import LossConfig
from glann.errors import UserError
from glann.models.losses import build_loss, default_levels, default_taps, l1_per_image
from glann.models.patches import crop, patch_seeds
from glann.models.perceptual import build_features
from scipy.ndimage import correlate1d

VGG_TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


def pair(rows: int, channels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.seed()
    print("seed", seed)
    return torch.rand(rows, channels, height, width), torch.rand(rows, channels, height, width)


def halved(x_BCHW: np.ndarray) -> np.ndarray:
    return (x_BCHW[..., ::2, ::2] + x_BCHW[..., 1::2, ::2] + x_BCHW[..., ::2, 1::2] + x_BCHW[..., 1::2, 1::2]) / 4


@pytest.fixture(scope="module")
def squeezenet():
    """The real architecture with fresh weights: no download is needed to test a loss."""
    from glann.models.perceptual import SqueezeNet

    return build_features("squeezenet", SqueezeNet("torch").state_dict(), "torch")


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_pixel_losses_are_sums_of_means_over_scales(kind):
    fake, real = pair(3, 3, 24, 16)
    loss_B = build_loss(LossConfig(kind=kind, levels=3, pixel_weight=0.5), 16)(fake, real)
    expected = 0
    x, y = fake.double().numpy(), real.double().numpy()
    for _ in range(3):
        difference = np.abs(x - y) if kind == "l1" else (x - y) ** 2
        expected = expected + 0.5 * difference.mean((1, 2, 3))
        x, y = halved(x), halved(y)
    assert loss_B.dtype == torch.float32
    np.testing.assert_allclose(loss_B, expected, rtol=1e-5)


def test_the_laplacian_loss_is_the_weighted_sum_over_its_bands():
    """GLO's own form, sum_j 4^j |band_j|_1, divided by the image's size (sides are powers of two)."""
    fake, real = pair(2, 3, 32, 32)
    loss_B = build_loss(LossConfig(kind="laplacian"), 32)(fake, real)

    def bands(x_CHW: np.ndarray) -> list[np.ndarray]:
        found = []
        for _ in range(2):
            kernel = np.array([1, 4, 6, 4, 1]) / 16
            smaller = correlate1d(correlate1d(x_CHW, kernel, 1, mode="mirror"), kernel, 2, mode="mirror")[:, ::2, ::2]
            found.append(x_CHW - doubled(doubled(smaller, 1), 2))
            x_CHW = smaller
        return [*found, x_CHW]

    for loss, x, y in zip(loss_B, fake.double().numpy(), real.double().numpy(), strict=True):
        terms = [4**j * np.abs(a - b).sum() for j, (a, b) in enumerate(zip(bands(x), bands(y), strict=True))]
        assert float(loss) == pytest.approx(sum(terms) / x.size, rel=1e-5)


def doubled(x: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation at twice the size, pixel centres kept (align_corners=False)."""
    x = np.moveaxis(x, axis, 0)
    padded = np.concatenate([x[:1], x, x[-1:]])
    out = np.empty((2 * len(x), *x.shape[1:]))
    out[::2] = 0.25 * padded[:-2] + 0.75 * padded[1:-1]
    out[1::2] = 0.75 * padded[1:-1] + 0.25 * padded[2:]
    return np.moveaxis(out, 0, axis)


def large(x: np.ndarray, times: float) -> torch.Tensor:
    """Linear interpolation at `times` the size along both sides, by its definition; sides are whole numbers."""
    for axis in (2, 3):
        size, enlarged = x.shape[axis], round(times * x.shape[axis])
        at = np.clip((np.arange(enlarged) + 0.5) * size / enlarged - 0.5, 0, size - 1)
        below = np.floor(at).astype(int)
        share = (at - below).reshape([-1 if a == axis else 1 for a in range(4)])
        x = (1 - share) * x.take(below, axis) + share * x.take(np.minimum(below + 1, size - 1), axis)
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.parametrize(("channels", "magnify"), [(1, 1), (3, 1), (1, 2), (3, 4), (1, 1.4)])
def test_the_perceptual_loss_is_pixels_plus_feature_maps_at_every_scale(squeezenet, channels, magnify):
    fake, real = pair(3, channels, 64, 64)
    config = LossConfig(network="squeezenet", levels=2, pixel_weight=0.25, feature_weight=2.0, magnify=magnify)
    loss_B = build_loss(config, 64, squeezenet)(fake, real)
    expected = 0
    x, y = fake, real
    for _ in range(2):
        expected = expected + 0.25 * (x.double() - y.double()).abs().mean((1, 2, 3))
        seen = [large(image.numpy(), magnify) for image in (x, y)]
        for a, b in zip(*(squeezenet(image, ("conv1", "fire3", "fire5")) for image in seen), strict=True):
            expected = expected + 2.0 * (a.double() - b.double()).abs().mean((1, 2, 3))
        x, y = (torch.from_numpy(halved(image.numpy())) for image in (x, y))
    torch.testing.assert_close(loss_B.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "deviation"), [("bernoulli", None), ("gaussian", 0.3)])
def test_a_likelihood_and_its_gradient_are_those_of_the_distribution(kind, deviation):
    """Against torch.distributions in float64; the normal one without its constant, which no network changes."""
    fake, real = pair(3, 1, 8, 8)
    fake = (0.02 + 0.96 * fake).requires_grad_()
    wide = fake.detach().double().requires_grad_()
    if deviation is None:
        there = torch.distributions.Bernoulli(wide, validate_args=False)
        expected = -there.log_prob(real.double()).flatten(1).sum(1)
    else:
        there = torch.distributions.Normal(wide, deviation)
        constant = torch.distributions.Normal(0.0, deviation).log_prob(torch.tensor(0.0))
        expected = (constant - there.log_prob(real.double())).flatten(1).sum(1)
    keys = {} if deviation is None else {"deviation": deviation}
    loss_B = build_loss(LossConfig(kind=kind, **keys), 8)(fake, real)
    torch.testing.assert_close(loss_B.double(), expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    loss_B.sum().backward()
    torch.testing.assert_close(fake.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_a_saturated_pixel_has_a_finite_likelihood():
    real = torch.tensor([0.0, 1.0, 0.5]).view(1, 1, 1, 3)
    fake = torch.tensor([1.0, 0.0, 1.0]).view(1, 1, 1, 3).requires_grad_()
    loss_B = build_loss(LossConfig(kind="bernoulli"), 28)(fake, real)
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    assert fake.grad.isfinite().all()


def test_a_likelihood_has_one_scale():
    with pytest.raises(UserError, match=r"remove loss\.levels"):
        build_loss(LossConfig(kind="gaussian", levels=2), 28)


@pytest.mark.parametrize("kind", ["perceptual", "laplacian", "l1", "l2", "bernoulli", "gaussian"])
def test_the_real_image_is_a_constant_and_an_image_has_its_own_loss(squeezenet, kind):
    fake, real = pair(4, 1, 28, 28)
    fake.requires_grad_(), real.requires_grad_()
    loss = build_loss(LossConfig(kind=kind, network="squeezenet"), 28, squeezenet)
    loss_B = loss(fake, real)
    assert loss_B.shape == (4,)
    torch.testing.assert_close(loss_B[2:3], loss(fake[2:3], real[2:3]))
    loss_B[2].backward()
    assert real.grad is None
    assert fake.grad[2].abs().sum() > 0
    assert fake.grad[[0, 1, 3]].abs().sum() == 0
    assert all(parameter.grad is None for parameter in loss.parameters())


@pytest.mark.parametrize("kind", ["perceptual", "laplacian", "l1", "l2"])
def test_equal_images_have_no_loss(squeezenet, kind):
    fake, _ = pair(2, 3, 32, 32)
    loss = build_loss(LossConfig(kind=kind, network="squeezenet"), 32, squeezenet)
    assert loss(fake, fake).abs().max() == 0


def test_the_fused_l1_has_the_gradient_of_the_plain_one():
    fake, real = pair(3, 5, 7, 4)
    fake.requires_grad_()
    weight_B = torch.randn(3)
    (l1_per_image(fake, real) * weight_B).sum().backward()
    fused, fake.grad = fake.grad, None
    ((fake - real).abs().mean((1, 2, 3)) * weight_B).sum().backward()
    torch.testing.assert_close(fused, fake.grad)


def test_the_fused_l1_may_be_differentiated_twice():
    """Against finite differences away from equal values, where the sign has no derivative."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    real = torch.rand(3, 2, 5, dtype=torch.float64, generator=generator)
    sign = torch.randint(2, real.shape, generator=generator) * 2 - 1
    fake = (real + sign * (0.1 + torch.rand(real.shape, generator=generator))).requires_grad_()
    weight_B = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def weighted(fake, weight_B):
        return l1_per_image(fake.square(), real.square()) * weight_B

    assert torch.autograd.gradgradcheck(weighted, (fake, weight_B))


def test_l1_of_half_precision_maps_is_summed_in_float32():
    fake, real = pair(2, 64, 64, 64)
    loss_B = l1_per_image(fake.bfloat16(), real.bfloat16())
    assert loss_B.dtype == torch.float32
    expected = (fake.bfloat16().double() - real.bfloat16().double()).abs().mean((1, 2, 3))
    torch.testing.assert_close(loss_B.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("resolution", "taps", "levels"),
    [(28, 3, 1), (32, 3, 1), (64, 4, 1), (128, 5, 2), (256, 5, 2), (512, 5, 3), (1024, 5, 4)],
)
def test_the_defaults_are_the_papers(resolution, taps, levels):
    assert default_taps("vgg16", resolution) == VGG_TAPS[:taps]
    assert default_levels(LossConfig(), resolution) == levels


@pytest.mark.parametrize(
    ("options", "resolution", "named"),
    [
        ({"taps": ("relu9_9",), "network": "squeezenet"}, 64, "relu9_9"),
        ({"levels": 6, "network": "squeezenet"}, 64, "at most 5"),
        ({"levels": 1, "patch": 32, "network": "squeezenet"}, 64, "loss.levels"),
        ({"kind": "l1", "patch": 32}, 64, "loss.patch"),
        ({"kind": "l2", "taps": ("conv1",)}, 64, "loss.taps"),
    ],
)
def test_impossible_options_are_refused(squeezenet, options, resolution, named):
    with pytest.raises(UserError, match=named):
        build_loss(LossConfig(**options), resolution, squeezenet)


def test_a_patch_is_cut_where_its_seed_says_and_nowhere_else():
    images = torch.arange(6 * 2 * 20 * 30, dtype=torch.float32).view(6, 2, 20, 30)
    seeds = patch_seeds(3, 5, torch.arange(100, 106))
    patches = crop(images, 8, seeds)
    corners = set()
    for b, patch in enumerate(patches):
        offset = int(patch[0, 0, 0]) - int(images[b, 0, 0, 0])
        top, left = divmod(offset, 30)
        torch.testing.assert_close(patch, images[b, :, top : top + 8, left : left + 8])
        corners.add((top, left))
        torch.testing.assert_close(crop(images[b : b + 1], 8, seeds[b : b + 1])[0], patch)  # whatever the batch
    assert len(corners) > 1


def test_patches_cover_the_image_evenly_and_move_every_epoch():
    rows = torch.arange(40_000)
    one_row = torch.arange(9.0).view(1, 1, 1, 9).expand(len(rows), 1, 1, 9)
    counts = [torch.bincount(crop(one_row, 1, patch_seeds(0, e, rows)).flatten().long(), minlength=9) for e in (0, 1)]
    for count in counts:
        assert (count - len(rows) / 9).abs().max() < 6 * (len(rows) / 9) ** 0.5
    assert (patch_seeds(0, 0, rows) != patch_seeds(0, 1, rows)).all()
    assert (patch_seeds(0, 0, rows) != patch_seeds(1, 0, rows)).all()
    assert len(patch_seeds(0, 0, rows).unique()) == len(rows)


def test_patch_seeds_never_change():
    """A run resumed under a later version must cut the same patches."""
    seeds = patch_seeds(7, 11, torch.tensor([0, 1, 2**40])).tolist()
    assert seeds == [splitmix_reference(7, 11, row) for row in (0, 1, 2**40)]
    assert seeds == [-5820749403645412224, -3528180118738955514, -6006113347356372146]
    pixels = torch.arange(32.0 * 44).view(1, 1, 32, 44).expand(3, 1, 32, 44)
    corners = crop(pixels, 8, patch_seeds(7, 11, torch.tensor([0, 1, 2**40])))[:, 0, 0, 0].int().tolist()
    assert [divmod(corner, 44) for corner in corners] == [(12, 31), (0, 21), (22, 30)]


def splitmix_reference(seed: int, epoch: int, row: int) -> int:
    """The same in Python's big integers, modulo 2^64."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    start = mix(mix(seed + golden & mask) ^ mix(epoch + golden & mask))
    value = mix((row * golden + start) & mask)
    return value - 2**64 if value >> 63 else value


def test_patches_restrict_features_at_full_size_to_the_patch(squeezenet):
    fake, real = pair(2, 3, 64, 64)
    fake.requires_grad_()
    seeds = patch_seeds(0, 0, torch.arange(2))
    loss = build_loss(LossConfig(network="squeezenet", patch=32, pixel_weight=0, levels=2), 64, squeezenet)
    loss_B = loss(fake, real, seeds)
    torch.testing.assert_close(loss_B, loss(fake, real, seeds), rtol=0, atol=0)
    small = torch.nn.functional.avg_pool2d
    expected = 0
    for a, b in ((crop(fake, 32, seeds), crop(real, 32, seeds)), (small(fake, 2), small(real, 2))):
        for maps in zip(*(squeezenet(image, ("conv1", "fire3", "fire5")) for image in (a, b)), strict=True):
            expected = expected + (maps[0] - maps[1]).abs().mean((1, 2, 3))
    torch.testing.assert_close(loss_B, expected)


def test_without_a_seed_patches_are_refused_in_training_and_the_whole_image_is_used_in_evaluation(squeezenet):
    fake, real = pair(2, 3, 64, 64)
    config = LossConfig(network="squeezenet", patch=32)
    loss = build_loss(config, 64, squeezenet)
    with pytest.raises(ValueError, match="patch_seed_B"):
        loss(fake, real)
    whole = build_loss(config.model_copy(update={"patch": None, "levels": 2}), 64, squeezenet)
    torch.testing.assert_close(loss.eval()(fake, real), whole(fake, real))


def test_a_compiled_loss_gives_the_same_numbers_and_gradients(squeezenet):
    fake, real = pair(2, 3, 64, 64)
    seeds = patch_seeds(0, 0, torch.arange(2))
    loss = build_loss(LossConfig(network="squeezenet", patch=32), 64, squeezenet)
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        image = fake.clone().requires_grad_()
        loss_B = function(image, real, seeds)
        loss_B.sum().backward()
        results.append((loss_B, image.grad))
    torch.testing.assert_close(results[0], results[1])
