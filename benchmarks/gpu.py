"""Training of the generator of `celebahq-1024` on one GPU: seconds per 1,000 images, utilisation, batch that fits.

    python benchmarks/gpu.py [--bundle FILE.tar.gz] [--batches 8 16] [--resolution 1024]

Needs Python, torch, and of glann the folder models/ with errors.py: `--bundle` packs them with this file, so that it
can be carried to a machine that has nothing else (`tar xf FILE.tar.gz && python benchmarks/gpu.py`). A step is
generator, loss at full resolution, backward pass and Adam, on random codes and images; both sides of a ratio are
measured in one run. Without a GPU the rows say `not measured`, and the counts stand alone.

Legend: B batch, C channels, D latent dimension, H and W pixels.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness import Row, machine, not_measured, report  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ("benchmarks/gpu.py", "benchmarks/harness.py", "errors.py", "models")
bare = ModuleType("glann")  # the rooms that this needs, without the others
bare.__path__ = [str(ROOT)]
sys.modules.setdefault("glann", bare)

from glann.models.cost import Cost, cost, training_bytes  # noqa: E402
from glann.models.generators import build_generator  # noqa: E402
from glann.models.losses import build_loss  # noqa: E402
from glann.models.perceptual import Vgg16, build_features  # noqa: E402

# Those of configs/celebahq-1024.yaml; a test compares them.
SIDE, CHANNELS, FLOAT = 1024, 3, 4
GENERATOR: Any = SimpleNamespace(
    kind="resnet", latent_dim=256, width=16, max_width=512, upsample="native", unit_input=False, reference=0
)
LOSS: Any = SimpleNamespace(
    kind="perceptual", taps=None, levels=None, magnify=1.0, pixel_weight=1.0, feature_weight=1.0, patch=None,
    network="vgg16",
)  # fmt: skip
PEAKS = {"A10G": 70.0, "A100": 312.0, "H100": 989.0, "H200": 989.0}  # TFLOP/s in bf16, dense, from data sheets
MEMORIES = (24, 80, 141)  # GB
AIM_S_PER_KIMG, AIM_MFU = 5.0, 0.4


class Step(nn.Module):
    """Loss of the images of codes, as one module."""

    def __init__(self, side: int, recompute: bool) -> None:
        super().__init__()
        self.generator = build_generator(GENERATOR, side, CHANNELS)
        self.generator.checkpoint_activations = recompute
        self.loss = build_loss(LOSS, side, build_features("vgg16", Vgg16("caffe").state_dict(), "caffe"))

    def forward(self, z_BD: Tensor, real_BCHW: Tensor) -> Tensor:
        loss_B: Tensor = self.loss(self.generator(z_BD), real_BCHW)
        return loss_B


class Launches(TorchDispatchMode):
    """Counts the operations that compute something, each of which is a kernel or a few on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counts:
    """Of the networks, on paper. recomputed, kept: bytes of an image's activations in a step, in float32."""

    generator: Cost
    loss: Cost
    launches: int
    recomputed: int
    kept: int

    @property
    def flops(self) -> int:
        return self.generator.flops + self.loss.flops

    def batch(self, gigabytes: float, recompute: bool) -> int:
        """Images of a step that fit: weights, gradients and Adam in float32, activations in bf16."""
        fixed = FLOAT * (4 * self.generator.parameters + self.loss.frozen_parameters)
        image = (self.recomputed if recompute else self.kept) // 2
        return int((1e9 * gigabytes - fixed) // image)


def count(side: int = SIDE) -> Counts:
    image, code = (CHANNELS, side, side), (GENERATOR.latent_dim,)
    with torch.device("meta"):
        steps = {recompute: Step(side, recompute) for recompute in (True, False)}
    held = {recompute: training_bytes(step, 1, code, image) for recompute, step in steps.items()}
    with Launches() as launches, torch.device("meta"):
        steps[False](torch.empty(1, *code), torch.empty(1, *image)).sum().backward()
    step = steps[False]
    return Counts(cost(step.generator, code), cost(step.loss, image, image), launches.found, held[True], held[False])


def described(counts: Counts) -> list[str]:
    """The counts in words."""
    lines = [
        f"generator {counts.generator.parameters / 1e6:.1f} M parameters, {counts.generator.flops / 1e9:,.0f} GFLOP an "
        f"image; loss {counts.loss.flops / 1e9:,.0f} GFLOP; {counts.launches:,} operations a step without Adam"
    ]
    for name, recompute in (("recomputed", True), ("kept", False)):
        fits = ", ".join(f"{counts.batch(size, recompute):,} in {size} GB" for size in MEMORIES)
        held = (counts.recomputed if recompute else counts.kept) / 2**31
        lines.append(f"activations {name}: {held:.2f} GiB an image in bf16; batch that fits, on paper: {fits}")
    return lines


class Training:
    """Steps on one device, as the engine takes them: autocast, fused Adam, nothing read on the host."""

    def __init__(self, device: str, side: int, batch: int, recompute: bool, layout: torch.memory_format) -> None:
        torch.manual_seed(0)
        self.device, self.cuda = device, device == "cuda"
        self.step = Step(side, recompute).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.step.generator.parameters(), lr=1e-3, fused=self.cuda)
        self.z_BD = torch.randn(batch, GENERATOR.latent_dim, device=device, requires_grad=True)
        self.real_BCHW = torch.rand(batch, CHANNELS, side, side, device=device).to(memory_format=layout)
        self.forward: Callable[[Tensor, Tensor], Tensor] = self.step

    def take(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.forward(self.z_BD, self.real_BCHW).float().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.z_BD.grad = None

    def seconds_per_image(self, steps: int) -> float:
        """The mean over some steps that are queued without a wait."""
        self.wait()
        began = time.perf_counter()
        for _ in range(steps):
            self.take()
        self.wait()
        return (time.perf_counter() - began) / steps / len(self.z_BD)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def timed(sides: dict[str, Training], steps: int, repeats: int = 3) -> dict[str, float]:
    """The least seconds an image of each, in turns, after steps that do not count."""
    for side in sides.values():
        side.seconds_per_image(2)
    taken = {name: [side.seconds_per_image(steps) for _ in range(1)] for name, side in sides.items()}
    for _ in range(repeats - 1):
        for name, side in sides.items():
            taken[name].append(side.seconds_per_image(steps))
    return {name: min(of_one) for name, of_one in taken.items()}


def measured(counts: Counts, batches: list[int], device: str = "cuda", side: int = SIDE, steps: int = 10) -> list[Row]:
    last, rows = torch.channels_last, []
    best, peaks = float("inf"), dict[tuple[int, bool], int]()
    for batch in batches:
        for recompute in (True, False):
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds = timed({"": Training(device, side, batch, recompute, last)}, steps)[""]
            best = min(best, seconds)
            if device == "cuda":
                peaks[batch, recompute] = torch.cuda.max_memory_allocated()
            print(f"batch {batch}, recomputed {recompute}: {1 / seconds:.1f} images/s, {1e3 * seconds:.2f} s/kimg")
    work = f"1,000 images of {side} px, full-resolution loss, bf16"
    rows.append(Row(work, "aim", AIM_S_PER_KIMG, 1e3 * best, "s"))
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((1e12 * rate for mark, rate in PEAKS.items() if mark in name), None)
    if peak:
        mfu = counts.flops / best / peak
        rows.append(Row(work, f"{AIM_MFU:.0%} of the peak", 1e3 * counts.flops / (AIM_MFU * peak), 1e3 * best, "s",
                        note=f"MFU {mfu:.1%}"))  # fmt: skip
    batch, kept = batches[0], False
    sides = {
        "ours": Training(device, side, batch, kept, last),
        "NCHW": Training(device, side, batch, kept, torch.contiguous_format),
    }
    taken = timed(sides, steps)
    rows.append(Row(f"{work}, batch {batch}, channels last", "NCHW", 1e3 * taken["NCHW"], 1e3 * taken["ours"], "s"))
    del sides
    if len(batches) > 1 and peaks:
        print("\n".join(fitting(peaks, batches)))
    return rows


def fitting(peaks: dict[tuple[int, bool], int], batches: list[int]) -> list[str]:
    """The batches that fit into memories, by a line through two peaks of memory."""
    lines, (few, many) = [], (batches[0], batches[-1])
    for recompute in (True, False):
        image = (peaks[many, recompute] - peaks[few, recompute]) / (many - few)
        fixed = peaks[few, recompute] - few * image
        fits = ", ".join(f"{int((1e9 * size - fixed) // image):,} in {size} GB" for size in MEMORIES)
        lines.append(f"recomputed {recompute}: {image / 2**30:.2f} GiB an image, measured; batch that fits: {fits}")
    return lines


def bundle(path: str) -> None:
    """Pack what this benchmark needs."""
    with tarfile.open(path, "w:gz") as tar:
        for name in CARRIED:
            tar.add(ROOT / name, name, filter=lambda entry: None if "__pycache__" in entry.name else entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", metavar="FILE", help="pack it to be carried, and measure nothing")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--resolution", type=int, default=SIDE)
    options = parser.parse_args()
    side = options.resolution
    if options.bundle:
        bundle(options.bundle)
        return
    counts = count(side)
    print("\n".join(described(counts)))
    if torch.cuda.is_available():
        report(measured(counts, options.batches, side=side), machine(torch.cuda.get_device_name()))
        return
    aims = {f"{AIM_S_PER_KIMG:g} s/kimg": "1,000 images", f"{AIM_MFU:.0%} of the peak": "utilisation", "NCHW": "layout"}
    rows = [not_measured(f"{what} of {side} px", "no GPU here", aim) for aim, what in aims.items()]
    report(rows, machine("no GPU"))


if __name__ == "__main__":
    main()
