"""Semi-discrete optimal transport: the cells of the exact assignment, and the maps on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from code_clouds import CPU, build, fitted, steps
from glann.cluster.neighbours import nearest
from glann.config.samplers import OtConfig
from glann.samplers.base import Codes, build_network
from glann.samplers.ot import TransportMap
from glann.samplers.transport import Heights, lifted, unlifted
from scipy.optimize import linear_sum_assignment


def heights_for(x_SD: torch.Tensor, z_ND: torch.Tensor, steps: int, lr: float) -> Heights:
    """Heights for fixed points instead of fresh ones, stopped where every cell holds its share."""
    codes, heights = Codes(z_ND, range(len(z_ND)), len(z_ND)), Heights(len(z_ND), CPU)
    for step in range(steps):
        before_N = heights.height_N.detach().clone()
        rate = lr * 1e-5 ** (step / steps)
        _, counted_N, _ = heights.step(x_SD, codes, rate, float(z_ND.std(0).norm()), torch.zeros(0))
        if bool((counted_N == len(x_SD) // len(z_ND)).all()):
            with torch.no_grad():
                heights.height_N.copy_(before_N)
            return heights
    raise RuntimeError("the heights were not found")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cells_are_those_of_the_exact_assignment(seed):
    torch.manual_seed(seed)
    count, points = 50, 2000
    z_ND, x_SD = 0.4 * torch.randn(count, 2), torch.randn(points, 2)
    cost_SN = (x_SD[:, None].double() - z_ND[None].double()).square().sum(2) / 2
    row_S, column_S = linear_sum_assignment(np.repeat(cost_SN.numpy(), points // count, axis=1))
    exact_S = torch.as_tensor(column_S // (points // count))
    cost = cost_SN[row_S, exact_S].mean()
    heights = heights_for(x_SD, z_ND, 1000, 0.1)
    cell_S = heights.cells(x_SD, Codes(z_ND, range(count), count))
    assert torch.equal(cell_S, exact_S)
    assert float(cost_SN[torch.arange(points), cell_S].mean() / cost) == pytest.approx(1, abs=1e-5)
    height_N = heights.height_N.detach().double()
    value = (x_SD.double() @ z_ND.double().T + height_N).max(1).values.mean() - height_N.mean()
    dual = (x_SD.double().square().sum(1).mean() + z_ND.double().square().sum(1).mean()) / 2 - value
    assert float(dual / cost) == pytest.approx(1, abs=1e-4)


def test_the_largest_value_is_the_nearest_of_the_lifted_points():
    torch.manual_seed(0)
    for dim in (2, 64):
        x_SD, z_ND, height_N = torch.randn(1000, dim), torch.randn(300, dim), torch.randn(300)
        value_SN = x_SD.double() @ z_ND.double().T + height_N.double()
        assert torch.equal(nearest(unlifted(x_SD), lifted(z_ND, height_N))[0], value_SN.argmax(1))


def test_boundaries_of_cells_on_a_line_are_the_quantiles():
    """In one dimension the code of rank i gets the noise between the quantiles i / K and (i + 1) / K."""
    torch.manual_seed(0)
    count = 20
    z_ND = (0.3 * torch.randn(count, 1)).sort(0).values
    sampler = fitted("ot", z_ND, extension="none", epochs=30, steps=40, samples=100, lr=0.1)
    u_S = (torch.arange(20_000).double() + 0.5) / 20_000
    drawn_S = sampler.codes(torch.special.ndtri(u_S).float()[:, None])[:, 0]
    for rank, code in enumerate(z_ND[:, 0]):
        own_S = u_S[drawn_S == code]
        assert float(own_S.min()) == pytest.approx(rank / count, abs=0.02)
        assert float(own_S.max()) == pytest.approx((rank + 1) / count, abs=0.02)


def test_without_an_extension_a_draw_is_a_training_code():
    torch.manual_seed(0)
    z_ND = torch.nn.functional.normalize(torch.randn(50, 6), dim=1)
    drawn_BD = fitted("ot", z_ND, codes_on="sphere", extension="none", epochs=4).codes(torch.randn(500, 6))
    distance_B = nearest(drawn_BD, z_ND)[1]
    assert float(distance_B.max()) < 1e-10


def test_pairs_are_mixed_up_to_the_angle_and_no_further():
    """Normals (y, -1) of codes at 0.0, 0.1 and 0.9 on an axis: angles of 0.0997, 0.6331 and 0.7328."""
    code = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.9, 0.0]])
    e_B2 = torch.tensor([[-2.0, 0.0], [5.0, 0.0]])  # in the cells of the first and the last code
    for angle, expected in ((0.09, [0.0, 0.9]), (0.11, [0.025, 0.9]), (0.64, [0.025, 0.7])):
        network = TransportMap(OtConfig(extension="pair", angle=angle, share=0.25), 2, "ball")
        network.resize(3)
        network.code.copy_(code)
        torch.testing.assert_close(network(e_B2)[:, 0], torch.tensor(expected))
    assert math.atan(0.9) - math.atan(0.1) == pytest.approx(0.6331, abs=1e-4)


def test_a_point_in_a_simplex_of_centres_has_its_barycentric_coordinates():
    network = TransportMap(OtConfig(extension="simplex"), 2, "ball")
    network.resize(3)
    network.code.copy_(torch.tensor([[0.1, 0.0], [-0.05, 0.2], [-0.05, -0.2]]))
    network.centre.copy_(torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]]))
    network.count.fill_(9)
    share_3 = torch.tensor([0.5, 0.3, 0.2])
    inside, outside = share_3 @ network.centre, torch.tensor([3.0, 0.0])
    drawn_22 = network(torch.stack([inside, outside]))
    torch.testing.assert_close(drawn_22[0], share_3 @ network.code)
    assert torch.equal(drawn_22[1], network.code[0])
    network.count[1] = 0  # a cell that no point fell into has no centre of mass
    assert torch.equal(network(inside[None])[0], network.code[0])


def test_a_network_takes_the_number_of_codes_from_its_weights():
    """Also where the network has no memory yet, as when a packaged model is opened; other shapes are refused."""
    sampler = fitted("ot", 0.3 * torch.randn(30, 3), extension="simplex", epochs=2)
    state = sampler.state()["weights"]
    with torch.device("meta"):
        network = build_network(sampler.config, 3, "ball")
    network.load_state_dict(state, assign=True)
    e_BD = torch.randn(9, 3)
    assert torch.equal(network(e_BD), sampler.codes(e_BD))
    for wrong in ({"code": torch.zeros(30, 4)}, {"code": torch.zeros(29, 3)}, {"height": torch.zeros(30, 1)}):
        with pytest.raises(RuntimeError, match="size mismatch"):
            build_network(sampler.config, 3, "ball").load_state_dict(state | wrong)


def test_the_loss_is_the_total_variation_of_the_cells():
    z_ND = 0.3 * torch.randn(40, 2)
    done = [step for step in steps(build("ot", 2, epochs=16, samples=50.0), z_ND) if step.epoch_facts]
    losses = [step.epoch_facts["loss"] for step in done]
    assert losses[0] > 0.05
    assert losses[-1] < 0.03  # 1,000 points a cell: 0.013 of it is their noise
