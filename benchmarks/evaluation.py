"""Evaluating samples of 28 px: batches side by side, one a core, against one batch at a time on all cores, in one run.

    python benchmarks/evaluation.py [--samples N --extractor NAME --groups GROUP ... --threads T]

Draws from a random generator of the demo's size, which is as fast as a trained one, and prints where the time goes:
drawing, features, and each group of metrics. The other way of running the extractor is timed on `--beside` images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from glann.config.samplers import ImleConfig
from glann.config.sections import GeneratorConfig
from glann.inference.model import SamplingModel
from glann.metrics import judge
from glann.metrics.features.extractor import Extractor, build_extractor
from glann.metrics.panel import Panel, Tallied
from glann.metrics.spec import GROUPS, Samples, measured_with
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from torch import Tensor

SIDE, LATENT, WIDTH = 28, 64, 32

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--beside", type=int, default=500)
    parser.add_argument("--extractor", default="lite0-96")
    parser.add_argument("--groups", nargs="*", default=[], choices=GROUPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    extractor = build_extractor(options.extractor)
    images, drawing_s = timed(lambda: list(draw(options.samples)))
    features, features_s = timed(lambda: [extractor(img_BCHW) for img_BCHW in images])
    some = torch.cat(images)[: options.beside]
    _, ours_s = timed(lambda: extractor(some))
    _, theirs_s = timed(lambda: one_batch_at_a_time(extractor, some))
    print(f"{options.samples} samples of {SIDE} px, {options.extractor}, {options.threads} threads")
    print(f"  drawing        {drawing_s:7.2f} s")
    print(f"  features       {features_s:7.2f} s   {options.samples / features_s:.0f} images/s")
    total = drawing_s + features_s
    for group in (None, *options.groups):
        seconds, values = measure(options.extractor, group, features)
        total += seconds
        print(f"  {group or 'always':14s} {seconds:7.2f} s   {values}")
    print(f"  in all         {total:7.2f} s")
    print(
        f"  {options.beside} images: batches side by side {ours_s:.2f} s, one at a time on all cores {theirs_s:.2f} s"
    )
    print(f"  ratio {theirs_s / ours_s:.2f}")


def draw(count: int) -> Iterator[Tensor]:
    """Images of a random model as an evaluation draws them, uint8 [B, 1, H, W]."""
    generator = build_generator(GeneratorConfig(kind="infogan", latent_dim=LATENT, width=WIDTH), SIDE, 1)
    mapping = build_mapping(ImleConfig(noise_dim=16), LATENT)
    return judge.draw(SamplingModel(generator, {"imle": mapping}), range(count), seed=0)


@torch.inference_mode()
def one_batch_at_a_time(extractor: Extractor, img_BCHW: Tensor) -> Tensor:
    """The same network on the same batches, with all threads in each layer."""
    return torch.cat([extractor._features(part) for part in img_BCHW.split(16)])


def measure(extractor: str, group: str | None, features: list[Tensor]) -> tuple[float, str]:
    """Seconds and values of the metrics of a group, against features of as many images that are somewhat different."""
    chosen = [m for m in measured_with(extractor, [group] if group else []) if m.group == group and m.extractor]
    needs = {m.name: m.needs for m in chosen if isinstance(m.needs, Samples)}
    panel = Panel(needs, {extractor: lambda seen: seen})
    others = [seen + 0.3 * seen.std() * torch.randn_like(seen) for seen in features]
    real = panel.tally(others)  # of real images: read once for all samplers, not counted

    def compare() -> str:
        drawn: Tallied = panel.tally(features)
        results = panel.compare(real, drawn, None, training=real)
        return ", ".join(f"{result.metric} {result.value:.4g}" for result in results)

    values, seconds = timed(compare)
    return seconds, values


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
