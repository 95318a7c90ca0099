"""What only an accelerator shows: the same numbers on CUDA as on CPU, bf16 training, and the fused optimiser."""

from __future__ import annotations

import pytest
import torch
from glann.cluster.neighbours import nearest
from glann.config.run import validate
from glann.models.generators import build_generator
from glann.models.losses import build_loss
from glann.models.noise import noise
from glann.models.perceptual import build_features
from glann.trainers.engine.build import build_engine
from glann.trainers.engine.optimizer import OptimizerConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


def config(**engine):
    return validate(
        {
            "name": "t",
            "data": {"url": "x", "resolution": 64},
            "generator": {"kind": "resnet", "latent_dim": 32, "width": 16},
            "glo": {"epochs": 1, "batch_size": 8},
            "engine": {"kind": "torch"} | engine,
        },
        "test",
    )


def test_neighbours_on_cuda_are_those_of_float64():
    torch.manual_seed(0)
    z_ND, c_MD = torch.randn(1003, 65), torch.randn(2017, 65)
    c_MD[100] = c_MD[7]
    index_N, distance_N = nearest(z_ND.cuda(), c_MD.cuda())
    brute_NM = torch.cdist(z_ND.double(), c_MD.double()).square()
    assert torch.equal(index_N.cpu(), brute_NM.argmin(1))
    torch.testing.assert_close(distance_N.cpu(), brute_NM.min(1).values)


def test_noise_on_cuda_is_that_of_the_cpu():
    index = torch.arange(5000)
    torch.testing.assert_close(noise(3, 1, index, 33, "cuda").cpu(), noise(3, 1, index, 33), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_perceptual_step_reduces_the_loss(precision):
    settings = config(precision=precision)
    torch.manual_seed(0)
    network = build_generator(settings.generator, 64, 3)
    optimizer = OptimizerConfig(settings.glo.generator_lr, settings.glo.betas, settings.glo.ema)
    engine = build_engine(network, optimizer, settings.engine, settings.glo.batch_size, CUDA)
    weights = {name: torch.randn(shape) * 0.05 for name, shape in vgg_shapes()}
    features = build_features("vgg16", weights, "torch")
    loss = build_loss(settings.loss, 64, features).to(CUDA)
    z_BD = torch.nn.functional.normalize(torch.randn(8, 32), dim=1).cuda()
    img_BCHW, ones = torch.rand(8, 3, 64, 64, device=CUDA), torch.ones(8, device=CUDA)
    losses = [
        engine.step(z_BD, ones, lambda fake, part: loss(fake, img_BCHW[part]).float(), 1e-3).loss for _ in range(30)
    ]
    assert losses[-1] < 0.9 * losses[0]
    assert engine.optimizer.defaults["fused"]


def vgg_shapes():
    from glann.models.perceptual import Vgg16

    return [(name, tensor.shape) for name, tensor in Vgg16("torch").state_dict().items()]
