"""Stage 2 with a bounded number of steps an epoch: what larger batches do to the mapping, for several N.

    python benchmarks/growing_batches.py [--rows 2000 8000 32000] [--batch 32] [--steps 63] [--epochs 50] [--seeds 2]

Synthetic codes on the unit sphere, in groups (`codes.py`), the same mixture for every N; as many again are
held out as are drawn. For every N the mapping is fitted with batches of `--batch` rows, and once more with at most
`--steps` steps an epoch (`sampler.max_steps_per_epoch`), at the same learning rate.

Columns: steps an epoch, and rows of a batch; the Fréchet distance of 2,000 draws to held-out codes, in code space and
in units of 1e-3; precision and recall against them (k = 3, Kynkäänniemi et al. 2019); the mean squared distance of a
code's match in the last epoch; CPU seconds without the search. The last lines are what held-out codes would get.

Legend: N codes, H held-out codes, B draws, D latent dimension.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from codes import kept, synthetic
from glann.config.samplers import ImleConfig
from glann.metrics.frechet import FeatureMoments, frechet_distance
from glann.metrics.manifold import compare_manifolds
from glann.models.noise import Stream, noise
from glann.samplers.base import Codes
from glann.samplers.imle import Imle
from torch import Tensor

DRAWN = 2000
Figures = dict[str, float]


def fitted(config: ImleConfig, z_ND: Tensor, seed: int) -> tuple[Tensor, Figures]:
    """Draws of a mapping that was fitted to codes, and what the fit took."""
    torch.manual_seed(seed + 1)
    sampler = Imle(config, z_ND.shape[1], "sphere", seed=seed, device=torch.device("cpu"))
    facts: Figures = {}
    began, searched, searching = time.process_time(), 0.0, 0.0

    def enter(phase: str) -> None:
        nonlocal searched, searching
        now = time.process_time()
        if phase == "search":
            searching = now
        else:
            searched += now - searching

    for step in sampler.fit(Codes(z_ND, range(len(z_ND)), len(z_ND)), 0, lambda: torch.zeros(0), enter):
        facts = step.epoch_facts or facts
    taken = time.process_time() - began - searched
    e_BE = noise(seed, 0, torch.arange(DRAWN), config.noise_dim, stream=Stream.SAMPLES)
    return sampler.codes(e_BE), {"match": facts["distance"], "CPU s": taken}


def quality(drawn_BD: Tensor, held_HD: Tensor) -> Figures:
    near = compare_manifolds(kept(held_HD), kept(drawn_BD))
    distance = 1e3 * frechet_distance(FeatureMoments.of(drawn_BD), FeatureMoments.of(held_HD))
    return {"Fréchet": distance, "precision": near.precision, "recall": near.recall}


def cells(name: str, rows: list[Figures]) -> str:
    """A line of the table: the mean of the seeds, and their range where it is that of a quality."""
    found = []
    for column in rows[0]:
        values = [row[column] for row in rows]
        spread = f" ({min(values):.3g} to {max(values):.3g})" if len(rows) > 1 and column != "CPU s" else ""
        found.append(f"{statistics.mean(values):.3g}{spread}")
    return f"| {name} | " + " | ".join(found) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 8000, 32000])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[63], help="most steps of an epoch, besides no bound")
    parser.add_argument("--power", type=float, default=0.0, help="the rate grows with this power of the batch")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    drawn = [DRAWN, DRAWN]
    print("| N | steps of a batch of | " + " | ".join(("Fréchet", "precision", "recall", "match", "CPU s")) + " |")
    print("|---" * 7 + "|")
    for rows in options.rows:
        *held, z_ND = synthetic(sum(drawn) + rows, options.dim).split([*drawn, rows])
        bounds = [bound for bound in options.steps if rows > bound * options.batch]
        for bound in [None, *bounds]:
            config = ImleConfig(batch_size=options.batch, epochs=options.epochs, max_steps_per_epoch=bound)
            lr = config.lr * (config.batch_of(rows) / options.batch) ** options.power
            config = config.model_copy(update={"lr": lr})
            found = []
            for seed in range(options.seeds):
                drawn_BD, taken = fitted(config, z_ND, seed)
                found.append(quality(drawn_BD, held[0]) | taken)
            batch = config.batch_of(rows)
            print(cells(f"{rows:,} | {-(-rows // batch):,} of {batch:,}", found), flush=True)
    print(cells("held-out codes | ", [quality(held[1], held[0])]))


if __name__ == "__main__":
    main()
