"""Estimate of the time and memory of a run, for `glann train --dry-run`.

Parameters, operations and activations are measured on the networks (`models.cost`), memory follows from
the ZeRO stage, time from a rate: on CPUs one real step is timed on this machine, for GPUs it is the data
sheet's peak times an assumed utilisation.  The plan states which.

Legend: N rows, M candidates, D latent dimension, W workers.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from ...cluster.latent_rates import latent_lr, movement
from ...cluster.placement import Share, ranges
from ...config.run import Config
from ...config.sections import ClusterConfig
from ...datasets.fit import held_out_of, require_fit
from ...datasets.index import Index
from ...errors import EnvironmentFault, GlannError
from ...models.cost import Cost
from ...samplers.base import build_network
from ..stage import StageCost, StageInfo, numbered, stage_infos, stages_of
from .costs import build_networks, training_costs
from .devices import GPUS
from .evaluation import (
    FLOAT,
    GIB,
    EvaluationCost,
    InterimCost,
    evaluation_cost,
    interim_cost,
    worker_threads,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

KNOWN_ROWS = {"digits": 5_000, "mnist-10k": 10_000, "mnist": 60_000, "fashion-mnist": 60_000, "orl-faces": 400}
ASSUMED_ROWS = {"cifar10": 50_000, "celebahq": 30_000, "celeba": 202_599, "": 30_000}  # by how an address begins
ASSUMED_UTILISATION = 0.3
TIMED_FLOPS, TIMED_SECONDS = 20_000_000_000, 5.0  # upper bounds of the timed step on CPUs


@dataclass(frozen=True)
class Rows:
    """Number of images. basis: its source. note: why the index could not be read, if so. held_out: unseen images."""

    count: int
    basis: str
    note: str = ""
    held_out: int = 0


@dataclass(frozen=True)
class Estimate:
    """Duration on `workers` workers of one kind of device. basis: source of the rate. fits: memory suffices.

    hours: of training with its measurements, and evaluation. interim, evaluation: hours of the latter two.
    """

    device: str
    workers: int
    flops_per_second: float
    basis: str
    hours: float
    device_hours: float
    fits: bool
    evaluation: float
    interim: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Contents of `--dry-run`; FLOPs count a multiply-add as two, memory is in bytes per worker."""

    config: Config
    rows: Rows
    generator: Cost
    sampler_parameters: int
    loss: Cost
    flops_per_image: int
    memory: dict[str, int]
    latent_bytes: int
    stages: dict[str, StageInfo]
    costs: dict[str, StageCost]
    evaluation: EvaluationCost
    interim: InterimCost
    estimates: tuple[Estimate, ...]

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        for label, text in _lines(self):
            table.add_row(label, Text(text))
        return Group(Text(f"plan of {self.config.name}: nothing was started"), table)


def make_plan(config: Config) -> Plan:
    """The plan of a run. Works offline, and before the data set exists.

    Raises:
        UserError: the data set exists but does not fit the configuration.
    """
    rows = count_rows(config)
    generator, loss = training_costs(config)
    with torch.device("meta"):
        network = build_network(config.sampler, config.generator.latent_dim, config.glo.constraint)
    flops_per_image = generator.flops + loss.flops
    # memory per worker is largest with the fewest workers
    memory = memory_per_worker(config, generator, loss, config.cluster.min_workers)
    largest = len(ranges(rows.count, config.cluster.min_workers)[0])
    costs = stage_costs(config, rows.count)
    total_flops = sum(stage.flops for stage in costs.values())
    evaluation = evaluation_cost(config, rows.count, rows.held_out, generator)
    interim = interim_cost(config, rows.count, generator)
    return Plan(
        config=config,
        rows=rows,
        generator=generator,
        sampler_parameters=sum(parameter.numel() for parameter in network.parameters()),
        loss=loss,
        flops_per_image=flops_per_image,
        memory=memory,
        latent_bytes=latent_bytes(config, largest),
        stages=stage_infos(config),
        costs=costs,
        evaluation=evaluation,
        interim=interim,
        estimates=tuple(
            estimate
            for workers in sorted({config.cluster.min_workers, config.cluster.max_workers})
            for estimate in estimates(
                config,
                workers,
                flops_per_image,
                total_flops,
                evaluation,
                interim,
                memory_per_worker(config, generator, loss, workers),
            )
        ),
    )


def count_rows(config: Config) -> Rows:
    """Number of rows from the index if it can be read, else an assumption, marked as one."""
    data = config.data
    # A plan must not wait minutes for an unreachable server.
    s3 = config.s3.model_copy(update={"max_attempts": 1, "timeout_s": min(config.s3.timeout_s, 3.0)})
    try:
        index = Index.load(data.url, s3)
    except GlannError as error:
        folder = data.url.rstrip("/").rpartition("/")[2]
        name = next(name for name in ASSUMED_ROWS if folder.startswith(name))
        count, basis, note = ASSUMED_ROWS[name], "assumed; time grows with it", str(error)
        if data.source in KNOWN_ROWS:
            count, basis, note = KNOWN_ROWS[data.source], f"of {data.source}, to be packed into {data.url}", ""
        if data.max_rows is not None and data.max_rows < count:
            count, basis = data.max_rows, f"data.max_rows; {basis}"
        return Rows(count, basis, note)
    held_out = 0
    with contextlib.suppress(EnvironmentFault):  # a plan does without what cannot be reached now
        found = held_out_of(config.model_copy(update={"s3": s3}), index)
        held_out = 0 if found is None else found[1].rows
    rows = require_fit(index, data, config.cluster.max_workers)
    return Rows(rows, f"index of {data.url}", held_out=held_out)


def stage_costs(config: Config, rows: int) -> dict[str, StageCost]:
    """Costs of the stages of a run on `rows` images, by name, in order."""
    costs = {name: kind.cost(config, rows) for name, kind in zip(stage_infos(config), stages_of(config), strict=True)}
    if config.stage_one is not None:
        costs[next(iter(costs))] = StageCost(0, 0.0)  # taken over from another run
    return costs


def memory_per_worker(config: Config, generator: Cost, loss: Cost, workers: int) -> dict[str, int]:
    """Bytes of each kind on a worker's device while the generator trains (Rajbhandari et al. 2020, Sec. 5).

    Weights and gradients are float32; autocast keeps bfloat16 copies of the weights during a step.
    Convolution workspace and the reserve of the memory allocator are not included.
    """
    stage = config.engine.zero
    weights = FLOAT * generator.parameters
    half = config.engine.precision == "bf16"
    batch = micro_batch(config, workers)
    activations = batch * (generator.activation_bytes + loss.activation_bytes)
    memory = {
        "weights": weights // (workers if stage >= 3 else 1),
        "gradients": weights // (workers if stage >= 2 else 1),
        "optimiser (Adam)": 2 * weights // (workers if stage >= 1 else 1),
        "activations": activations // (2 if half else 1),
        "loss network": FLOAT * loss.frozen_parameters,
    }
    if stage >= 1:
        memory["ZeRO's own copy of its share"] = weights // workers
    if half:
        memory["bfloat16 copies"] = (weights + FLOAT * loss.frozen_parameters) // 2
    if config.glo.ema:
        memory["averaged generator"] = weights
    return memory


def micro_batch(config: Config, workers: int) -> int:
    """Rows per worker and micro-batch."""
    accumulation = config.engine.accumulation
    return Share(config.glo.batch_size, 0, workers, accumulation).size // accumulation


def latent_bytes(config: Config, rows: int) -> int:
    """Bytes of codes, optimiser state and step counters of one worker's rows, in its node's main memory."""
    code = FLOAT * config.generator.latent_dim
    state = {"adam": 2 * code, "adagrad": FLOAT, "published": 0}[config.glo.latent_optimizer]
    return rows * (code + state + 8)


def estimates(
    config: Config,
    workers: int,
    flops_per_image: int,
    total_flops: float,
    evaluation: EvaluationCost,
    interim: InterimCost,
    memory: dict[str, int],
) -> tuple[Estimate, ...]:
    """Estimates for the whole run with `workers` workers: on CPUs such as this machine's, or on each known GPU."""
    if not config.cluster.gpus_per_worker:
        rate = flops_per_image / seconds_per_image(config, workers, flops_per_image)
        share = min(1.0, (os.cpu_count() or 1) / (workers * config.cluster.cpus_per_worker))
        if config.cluster.address is not None:
            share = 1.0  # the workers have machines of their own
        judged, paused = evaluation.hours(config, workers, rate * share), interim.hours(workers, rate * share)
        hours = total_flops / (rate * workers * share) / 3600 + judged + paused
        threads = worker_threads(config)
        basis = f"measured: one step on this machine, {threads} thread{'s' if threads > 1 else ''} a worker"
        cores = workers * config.cluster.cpus_per_worker
        return (Estimate("CPU", workers, rate * share, basis, hours, hours * cores, True, judged, paused),)
    found = []
    for gpu in GPUS:
        peak = gpu.peak(config.engine)
        share = ASSUMED_UTILISATION * min(1.0, config.cluster.gpus_per_worker)
        rate = peak * share
        single = gpu.fp32 * 1e12 * share  # images are drawn in float32
        judged, paused = evaluation.hours(config, workers, single), interim.hours(workers, single)
        hours = total_flops / (rate * workers) / 3600 + judged + paused
        basis = f"assumed: {ASSUMED_UTILISATION:.0%} of {peak / 1e12:g} TFLOP/s"
        fits = sum(memory.values()) < gpu.memory * GIB * min(1.0, config.cluster.gpus_per_worker)
        gpu_hours = hours * workers * config.cluster.gpus_per_worker
        found.append(Estimate(gpu.name, workers, rate, basis, hours, gpu_hours, fits, judged, paused))
    return tuple(found)


def seconds_per_image(config: Config, workers: int, flops_per_image: int) -> float:
    """Seconds per image of one real step on the CPU, including Adam, with the threads and batch of a worker."""
    generator, loss = build_networks(config, "cpu")
    batch = min(micro_batch(config, workers), max(1, TIMED_FLOPS // flops_per_image))
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.glo.generator_lr)
    z_BD = torch.randn(batch, config.generator.latent_dim).requires_grad_()
    real_BCHW = torch.rand(batch, config.data.channels, config.data.resolution, config.data.resolution)
    seeds = {"patch_seed_B": torch.arange(batch)} if config.loss.patch else {}
    before = torch.get_num_threads()
    torch.set_num_threads(worker_threads(config))
    try:
        times: list[float] = []
        while len(times) < 3 and sum(times) < TIMED_SECONDS:  # the first one also warms up
            start = perf_counter()
            loss(generator(z_BD), real_BCHW, **seeds).sum().backward()
            optimizer.step()
            times.append(perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return min(times) / batch


def _lines(plan: Plan) -> list[tuple[str, str]]:
    """Lines (label, text) of the printed plan."""
    config, cluster = plan.config, plan.config.cluster
    device = f"{cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else f"{cluster.cpus_per_worker:g} CPU"
    engine = config.engine
    lines = [
        ("data", f"{plan.rows.count:,} images of {config.data.resolution} px ({plan.rows.basis})"),
        *([("", plan.rows.note)] if plan.rows.note else []),
        ("workers", f"{_count(cluster)} x {device}; {engine.kind}, ZeRO {engine.zero}, {engine.precision}"),
        ("generator", f"{plan.generator.parameters / 1e6:.2f} M parameters ({config.generator.kind})"),
        ("sampler", f"{plan.sampler_parameters / 1e6:.3f} M parameters ({config.sampler.kind})"),
        (
            "per image",
            f"{_flops(plan.flops_per_image)}: generator {_flops(plan.generator.flops)}, loss {_flops(plan.loss.flops)}",
        ),
        ("latent rate", _latent_rate(config, plan.rows.count)),
        ("steps", ", ".join(f"{cost.steps:,} of {numbered(plan.stages, name)}" for name, cost in plan.costs.items())),
        ("total", ", ".join(f"{_flops(cost.flops)} in stage {n}" for n, cost in enumerate(plan.costs.values(), 1))),
        ("evaluation", _evaluation(plan)),
        *([("", _interim(plan))] if plan.interim.measurements else []),
        ("memory", f"{_bytes(sum(plan.memory.values()))} on each worker's device{_with_fewest(cluster)}"),
        *(("", f"{_bytes(size):>9}  {name}") for name, size in plan.memory.items()),
        ("", f"{_bytes(plan.latent_bytes):>9}  latent table, in its node's main memory"),
    ]
    for number, estimate in enumerate(plan.estimates):
        cost_text = f"{estimate.device_hours:,.1f} {'GPU' if cluster.gpus_per_worker else 'core'}-hours"
        warning = "" if estimate.fits else "; does NOT fit its memory"
        device = estimate.device + (f" x {estimate.workers}" if cluster.min_workers < cluster.max_workers else "")
        share = f"{_duration(estimate.hours)} with {_duration(estimate.evaluation)} of evaluation"
        if estimate.interim:
            percent = 100 * estimate.interim / estimate.hours
            share += f" and {_duration(estimate.interim)} ({percent:.2g}%) of measuring while it trains"
        text = f"{device}: {share}, {cost_text} ({estimate.basis}){warning}"
        lines.append(("" if number else "time", text))
    return lines


def _evaluation(plan: Plan) -> str:
    """What the workers do at the end."""
    cost = plan.evaluation
    return (
        f"{cost.images:,} images drawn or read, {_flops(cost.flops)}; {cost.at_once} decoded at once, with "
        f"{_bytes(cost.memory)} on each worker's device"
    )


def _interim(plan: Plan) -> str:
    """What the workers pause for."""
    cost = plan.interim
    return (
        f"while it trains {cost.measurements} measurements, {cost.images:,} images drawn, {_flops(cost.flops)}; "
        "the training pauses for them"
    )


def _latent_rate(config: Config, rows: int) -> str:
    """The rate of the codes, and the one of the published optimiser that moves them as far."""
    glo, rate = config.glo, latent_lr(config.glo, rows)
    if glo.latent_optimizer != "adam" or not glo.bounds_movement:
        return f"{rate:.4g}, {glo.latent_optimizer}"
    steps = math.ceil(rows / glo.batch_size)
    times = movement(steps, glo.betas)
    source = "auto, " if glo.latent_lr == "auto" else ""
    return (
        f"{rate:.4g} ({source}{times:.3g} x {rate / times:.3g} of the published optimiser, at {steps:,} steps an epoch)"
    )


def _count(cluster: ClusterConfig) -> str:
    elastic = cluster.min_workers < cluster.max_workers
    return f"{cluster.min_workers} to {cluster.max_workers}" if elastic else str(cluster.max_workers)


def _with_fewest(cluster: ClusterConfig) -> str:
    fewest = cluster.min_workers
    return f" with {fewest} workers" if fewest < cluster.max_workers else ""


def _flops(flops: float) -> str:
    power = min(max(int(math.log10(max(flops, 1)) // 3), 2), 6)
    return f"{flops / 1000**power:.3g} {'MGTPE'[power - 2]}FLOP"


def _bytes(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / (1 << 20):.1f} MiB"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
