"""Evaluation of a trained run by its workers, on their devices: the driver may be on a small head node without a GPU.

Shapes: D latent dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from time import monotonic
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...config.run import Config
from ...config.samplers import GaussianConfig, SamplerConfig
from ...datasets.reader import ImageRows
from ...inference.model import SamplingModel
from ...metrics.evaluate import GIB, ImageSets, Trained, images_in_all, kinds_of, measure, stored_codes
from ...metrics.frechet import FeatureMoments
from ...metrics.judge import Codes
from ...metrics.nearest import nearest_images
from ...metrics.reference import held_out_images
from ...metrics.result import Result
from ...metrics.team import ALONE, Team, counting
from ...models.comm import world_size
from ...models.generators import generator_of
from ...reports import pictures
from ...reports.code_map import code_map, taken
from ...reports.sheets import Sheet, Tile, tiles_of
from ...samplers.base import build_network
from ...samplers.gaussian import of_moments
from ..glo import GENERATOR
from ..plan.devices import name_of
from ..previews import sample_tiles
from ..sampler import MAPPING
from ..stage import State, final_weights

EVALUATION = "evaluation"  # phase of the workers, and stage of its entry in the journal
PAIRS, STEPS = [(2 * row, 2 * row + 1) for row in range(8)], 9  # samples to interpolate between
Item = TypeVar("Item")


@dataclass(frozen=True)
class Evaluated:
    """Results and pictures of a trained run, and what its package needs of the codes.

    step: of the checkpoint. gaussian: state of the Gaussian over the codes, if there are any. seconds: duration.
    hardware: the devices of the workers. code_map: codes of images and of the sampler, as in `reports.code_map`.
    """

    step: int
    gaussian: dict[str, Tensor] | None
    results: list[Result]
    drawn: dict[str, Sheet]
    seconds: float
    hardware: str
    code_map: dict[str, Any] | None = None


def evaluate_trained(
    config: Config,
    images: ImageRows,
    step: int,
    networks: Mapping[str, State],
    device: torch.device,
    on_images: Callable[[int, int], None],
) -> Evaluated | None:
    """Measure a trained run and draw its pictures, each worker a part; None except on rank 0. Collective.

    Args:
        images: the training images.
        step: the checkpoint that is measured. networks: its states by name, on every worker.
        on_images: called with the images that this worker has worked on, and the number of all its images.
    """
    began = monotonic()
    held_out = held_out_images(config, images.index)
    total = images_in_all(config, len(images), 0 if held_out is None else len(held_out), kinds_of(config))

    team = Team.of_all(counting(on_images, total // world_size()))

    def codes(rows: range) -> Iterator[Tensor]:
        return stored_codes(config, rows, step)

    shown: list[Tensor] = []  # of this worker's part

    def passed(rows: range) -> Iterator[Tensor]:
        first = rows.start
        for z_BD in codes(rows):
            shown.append(taken(z_BD, first, len(images)))
            first += len(z_BD)
            yield z_BD

    gaussian = gaussian_of(passed, len(images), team) if config.has_codes else None
    model = model_of(config, networks, gaussian, device)
    trained = Trained(model, len(images), codes if config.has_codes else None)
    results = measure(config, trained, ImageSets(images, held_out=held_out), team=team)
    drawn = draw_pictures(model, images, config.preview.images, team)
    devices = Counter(team.collected(name_of(device)))
    hardware = ", ".join(f"{number} x {name}" for name, number in devices.items())
    on_map = joined(team.collected(shown))
    if not team.leads:
        return None
    codes_shown = map_of(model, torch.cat(on_map)) if on_map else None
    return Evaluated(step, gaussian, results, drawn, monotonic() - began, hardware, codes_shown)


def map_of(model: SamplingModel, images_ND: Tensor) -> dict[str, Any] | None:
    """Codes of images beside as many that the model draws; None of too few, or of one dimension."""
    if min(images_ND.shape) < 2:
        return None
    return code_map(images_ND, model.codes(model.noise(torch.arange(len(images_ND)), 0)).cpu())


def gaussian_of(codes: Codes, rows: int, team: Team) -> dict[str, Tensor]:
    """State of the Gaussian over all codes, on every worker. Collective."""
    moments: FeatureMoments | None = None
    for z_BD in codes(team.part(rows)):
        block = FeatureMoments.of(z_BD)
        moments = block if moments is None else moments.merge(block)
    parts = [part for part in team.shared((moments,)) if part[0] is not None]
    whole = reduce(FeatureMoments.merge, (part for (part,) in parts if part is not None))
    return of_moments(whole.count, torch.from_numpy(whole.mean_F), torch.from_numpy(whole.scatter_FF))


def model_of(
    config: Config, networks: Mapping[str, State], gaussian: dict[str, Tensor] | None, device: torch.device
) -> SamplingModel:
    """The model that is packaged of these networks, on a device; in stage 1 its own sampler is the Gaussian.

    Args:
        gaussian: of the codes; None leaves it out.
    """
    generator = generator_of(config)
    generator.load_state_dict(final_weights(networks[GENERATOR]))
    memory = int(config.evaluation.memory_gb * GIB)
    states: list[tuple[SamplerConfig, dict[str, Tensor]]] = []
    if gaussian is not None:
        states.append((GaussianConfig(), gaussian))
    if MAPPING in networks:
        states.append((config.sampler, networks[MAPPING]["weights"]))
    elif not config.has_codes:
        states.append((config.sampler, {}))  # the distribution that the generator is trained with
    samplers = {}
    for sampler, state in states:
        samplers[sampler.kind] = build_network(sampler, config.generator.latent_dim, config.constraint)
        samplers[sampler.kind].load_state_dict(state)
    return SamplingModel(generator.to(device), samplers, states[-1][0].kind, memory=memory)


def draw_pictures(model: SamplingModel, images: ImageRows, count: int, team: Team) -> dict[str, Sheet]:
    """Samples, interpolations, and samples beside their nearest training images, on rank 0. Collective."""
    drawn = drawn_from(model, count, team)
    samples = model.sample(2 * len(PAIRS))
    nearest = nearest_images(samples, images, team=team)
    if nearest is None:
        return {}
    rows = pictures.beside_nearest(tiles_of(samples), tiles_of(nearest.img_NHWC))
    return drawn | {"nearest": Sheet(rows)}


def drawn_from(model: SamplingModel, count: int, team: Team = ALONE) -> dict[str, Sheet]:
    """Samples and interpolations, of which each worker draws a part, on rank 0. Collective."""
    part = team.part(len(PAIRS))
    strips = [tiles_of(model.interpolate([pair], STEPS)[0]) for pair in PAIRS[part.start : part.stop]]
    samples = joined(team.collected(sample_tiles(model, team.part(count), seed=0)))
    rows: pictures.Rows[Tile] = [("", strip) for strip in joined(team.collected(strips))]
    return {"samples": Sheet(pictures.in_grid(samples)), "interpolations": Sheet(rows)} if team.leads else {}


def joined(parts: list[list[Item]]) -> list[Item]:
    """The items of all workers, by rank."""
    return list(chain.from_iterable(parts))
