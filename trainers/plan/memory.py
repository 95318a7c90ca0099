"""Memory that a worker needs, by what it is for: on its device, and in the main memory of its node."""

from __future__ import annotations

from dataclasses import dataclass

from ...cluster.placement import Share
from ...config.run import Config
from ...inference.model import DEFAULT_BATCH
from ...models.cost import Cost
from ..engine.deepspeed import bucket_size
from .costs import adversary_cost, cache_bytes, critic_cost, encoder_cost, require_cache_fits, step_bytes
from .evaluation import FLOAT, EvaluationCost

PROCESS = 600 << 20  # of a training worker that has imported all, and joined its group: 580 MiB measured
EXTRACTOR = 256 << 20  # weights of a feature extractor, and its activations of some images
# On CPUs a process takes more than its tensors: buffers of the kernels, and freed memory that malloc keeps, also from
# one phase to the next. The most measured at 1024 px, for a byte of activations, and of images decoded at once.
BESIDE_ACTIVATIONS, BESIDE_DECODED = 1.5, 0.75


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes that a worker needs, by what for.

    training, evaluation: on its device, at one time each; the larger of the two must fit. process: of its main memory
    all the time; on CPUs, whose device has that memory, part of the other two. table: codes of its rows, in a process
    of their own on its node.
    """

    training: dict[str, int]
    evaluation: dict[str, int]
    process: dict[str, int]
    table: int

    @property
    def device(self) -> int:
        """The most that is needed on the device."""
        return max(sum(self.training.values()), sum(self.evaluation.values()))


def memory_of(
    config: Config, generator: Cost, loss: Cost, evaluation: EvaluationCost, workers: int, rows: int
) -> WorkerMemory:
    """Memory of each of `workers` workers.

    Args:
        rows: of the worker with the most.
    Raises:
        UserError: the feature maps of so many rows need more than `loss.cache_features`.
    """
    require_cache_fits(config, rows)
    saved = 3 * FLOAT * (generator.parameters + encoder_cost(config).parameters)
    process = {"Python, torch and Ray": PROCESS, "networks to be saved": saved}
    ahead, measured = images_in_memory(config, workers)
    training = of_training(config, generator, loss, workers)
    if kept_maps := cache_bytes(config, rows):
        training["feature maps of real images"] = kept_maps
    measuring = {"generator": FLOAT * generator.parameters, "images decoded at once": evaluation.memory}
    measuring["feature extractor"] = EXTRACTOR
    if config.trainer == "pixels":  # its own rows, and up to three blocks of candidates on their way round the workers
        numbers = config.data.channels * min(config.pixels.side, config.data.resolution) ** 2
        training["images compared"] = round(FLOAT * numbers * rows * (1 + 3 * config.pixels.candidates))
    if config.cluster.gpus_per_worker:
        process["images read ahead, or measured"] = max(ahead, measured)
    else:
        kept = round(BESIDE_ACTIVATIONS * training["activations"])
        training = process | training | {"images read ahead": ahead, "kernels and malloc": kept}
        kept += round(BESIDE_DECODED * evaluation.memory)
        measuring = process | measuring | {"images measured": measured, "kernels and malloc": kept}
    return WorkerMemory(training, measuring, process, latent_bytes(config, rows))


def images_in_memory(config: Config, workers: int) -> tuple[int, int]:
    """Bytes of images in uint8 in the main memory of a worker: that are read ahead of a step, and that are measured."""
    image = config.data.channels * config.data.resolution**2
    ahead = (config.data.prefetch + 1) * Share(config.batch_size, 0, workers).size
    return ahead * image, 2 * DEFAULT_BATCH * image  # a batch, and the parts that it is made of


def of_training(config: Config, generator: Cost, loss: Cost, workers: int) -> dict[str, int]:
    """Bytes of each kind on a worker's device while the generator trains (Rajbhandari et al. 2020, Sec. 5).

    Weights and gradients are float32; autocast keeps bfloat16 copies of the weights during a step.
    Convolution workspace and the reserve of the memory allocator are not included.
    """
    stage = config.engine.zero
    weights = FLOAT * generator.parameters
    half = config.engine.precision == "bf16"
    activations = step_bytes(config, config.generator.reference + micro_batch(config, workers))
    memory = {
        "weights": weights // (workers if stage >= 3 else 1),
        "gradients": weights // (workers if stage >= 2 else 1),
        "optimiser (Adam)": 2 * weights // (workers if stage >= 1 else 1),
        "activations": activations // (2 if half else 1),
    }
    if config.has_codes and loss.frozen_parameters:
        memory["loss network"] = FLOAT * loss.frozen_parameters
    critic = critic_cost(config).parameters + adversary_cost(config).parameters
    if critic:
        memory["critic (weights, gradients, Adam)"] = 4 * FLOAT * critic  # at most: ZeRO cuts it, too
    encoder = encoder_cost(config).parameters
    if encoder:
        memory["encoder (weights, gradients, Adam)"] = 4 * FLOAT * encoder  # at most, as of a critic
    if stage >= 1:
        memory["ZeRO's own copy of its share"] = weights // workers
        buckets = sum(map(bucket_size, (generator.parameters, critic, encoder)))
        memory["ZeRO's buckets of gradients"] = FLOAT * buckets
    if half:
        memory["bfloat16 copies"] = (weights + FLOAT * loss.frozen_parameters) // 2
    if config.glo.ema if config.has_codes else config.networks.ema:
        memory["averaged generator"] = weights
    return memory


def micro_batch(config: Config, workers: int) -> int:
    """Rows per worker and micro-batch."""
    accumulation = config.engine.accumulation
    return Share(config.batch_size, 0, workers, accumulation).size // accumulation


def latent_bytes(config: Config, rows: int) -> int:
    """Bytes of codes, optimiser state and step counters of one worker's rows, in its node's main memory."""
    if not config.has_codes:
        return 0
    code = FLOAT * config.generator.latent_dim
    optimizer = config.glo.latent_optimizer if config.trainer == "glo" else "none"
    state = {"adam": 2 * code, "adagrad": FLOAT, "published": 0, "none": 0}[optimizer]
    return rows * (code + state + 8)
