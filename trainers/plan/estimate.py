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
from ...cluster.placement import ranges
from ...config.run import Config
from ...config.samplers import ImleKeys
from ...config.sections import ClusterConfig
from ...datasets.fit import held_out_of, require_fit
from ...datasets.index import Index
from ...errors import EnvironmentFault, GlannError
from ...models.cost import Cost
from ...samplers.base import build_network
from ..stage import StageCost, StageInfo, numbered, stage_infos, stages_of
from .costs import build_networks, encoder_cost, step_flops, training_costs
from .devices import GPUS
from .evaluation import (
    GIB,
    EvaluationCost,
    InterimCost,
    evaluation_cost,
    interim_cost,
    worker_threads,
)
from .memory import WorkerMemory, memory_of, micro_batch

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
    """Contents of `--dry-run`; FLOPs count a multiply-add as two. memory: with the fewest workers, so the largest."""

    config: Config
    rows: Rows
    generator: Cost
    sampler_parameters: int
    loss: Cost
    encoder: Cost
    flops_per_image: int
    memory: WorkerMemory
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
        network = build_network(config.sampler, config.generator.latent_dim, config.constraint)
    costs = stage_costs(config, rows.count)
    total_flops = sum(stage.flops for stage in costs.values())
    evaluation = evaluation_cost(config, rows.count, rows.held_out, generator)
    memory = {
        workers: memory_of(config, generator, loss, evaluation, workers, len(ranges(rows.count, workers)[0]))
        for workers in sorted({config.cluster.min_workers, config.cluster.max_workers})
    }
    interim = interim_cost(config, rows.count, generator)
    return Plan(
        config=config,
        rows=rows,
        generator=generator,
        sampler_parameters=sum(parameter.numel() for parameter in network.parameters()),
        loss=loss,
        encoder=encoder_cost(config),
        flops_per_image=step_flops(config),
        memory=memory[config.cluster.min_workers],
        stages=stage_infos(config),
        costs=costs,
        evaluation=evaluation,
        interim=interim,
        estimates=tuple(
            estimate
            for workers, needed in memory.items()
            for estimate in estimates(
                config, workers, generator.flops + loss.flops, total_flops, evaluation, interim, needed.device
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


def estimates(
    config: Config,
    workers: int,
    timed_flops: int,
    total_flops: float,
    evaluation: EvaluationCost,
    interim: InterimCost,
    memory: int,
) -> tuple[Estimate, ...]:
    """Estimates for the whole run with `workers` workers: on CPUs such as this machine's, or on each known GPU.

    Args:
        memory: bytes that are needed on a worker's device.
    """
    if not config.cluster.gpus_per_worker:
        rate = timed_flops / seconds_per_image(config, workers, timed_flops)
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
        fits = memory < gpu.memory * GIB * min(1.0, config.cluster.gpus_per_worker)
        gpu_hours = hours * workers * config.cluster.gpus_per_worker
        found.append(Estimate(gpu.name, workers, rate, basis, hours, gpu_hours, fits, judged, paused))
    return tuple(found)


def seconds_per_image(config: Config, workers: int, timed_flops: int) -> float:
    """Seconds per image of one real step on the CPU, including Adam, with the threads and batch of a worker.

    Args:
        timed_flops: operations per image of that step, through the generator and the loss, or the critic.
    """
    generator, loss = build_networks(config, "cpu")
    batch = min(micro_batch(config, workers), max(1, TIMED_FLOPS // timed_flops))
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
        *([("encoder", f"{plan.encoder.parameters / 1e6:.2f} M parameters")] if plan.encoder.parameters else []),
        ("sampler", f"{plan.sampler_parameters / 1e6:.3f} M parameters ({config.sampler.kind})" + _batch(plan)),
        (
            "per image",
            f"{_flops(plan.flops_per_image)}: generator {_flops(plan.generator.flops)}, "
            f"{'loss' if config.has_codes else 'critic'} {_flops(plan.loss.flops)}"
            + (f", encoder {_flops(plan.encoder.flops)}" if plan.encoder.parameters else ""),
        ),
        *([("latent rate", _latent_rate(config, plan.rows.count))] if config.trainer == "glo" else []),
        ("steps", ", ".join(f"{cost.steps:,} of {numbered(plan.stages, name)}" for name, cost in plan.costs.items())),
        ("total", ", ".join(f"{_flops(cost.flops)} in stage {n}" for n, cost in enumerate(plan.costs.values(), 1))),
        ("evaluation", _evaluation(plan)),
        *([("", _interim(plan))] if plan.interim.measurements else []),
        *_memory(plan),
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


def _batch(plan: Plan) -> str:
    """The batch of stage 2, where it is larger than configured."""
    keys = plan.config.sampler
    if not isinstance(keys, ImleKeys) or (batch := keys.batch_of(plan.rows.count)) == keys.batch_size:
        return ""
    return f", in batches of {batch:,} (sampler.max_steps_per_epoch={keys.max_steps_per_epoch})"


def _evaluation(plan: Plan) -> str:
    """What the workers do at the end."""
    cost = plan.evaluation
    return (
        f"{cost.images:,} images drawn or read, {_flops(cost.flops)}; each worker decodes {cost.at_once} at once, with "
        f"{_bytes(cost.memory)}"
    )


def _memory(plan: Plan) -> list[tuple[str, str]]:
    """What a worker needs while it trains and while it measures, and beside its GPU."""
    cluster, memory = plan.config.cluster, plan.memory
    gpu, fewest = cluster.gpus_per_worker > 0, _with_fewest(cluster)
    where = f"on each worker's device{fewest}" if gpu else f"in each worker's process{fewest}"
    blocks = [
        ("memory", f"{where} while it trains", memory.training),
        ("", f"{where} while it measures the trained run", memory.evaluation),
    ]
    table = {"latent table, a process": memory.table} if memory.table else {}
    if gpu:
        blocks.append(("main memory", f"on each worker's node{fewest}", memory.process | table))
    elif table:
        blocks.append(("", f"in each worker's latent table, a process of its own{fewest}", {"codes": memory.table}))
    lines = []
    for label, words, parts in blocks:
        lines.append((label, f"{_bytes(sum(parts.values()))} {words}"))
        lines += [("", f"{_bytes(size):>11}  {name}") for name, size in parts.items() if len(parts) > 1]
    return lines


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
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):.1f} KiB"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
