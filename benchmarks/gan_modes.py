"""Every adversarial objective on 25 Gaussians, in one run: modes found, and share of good draws.

    python benchmarks/gan_modes.py [--cloud grid|ring] [--steps 4000] [--seeds 1] [--kinds relativistic wasserstein ...]

Theme: mode collapse. The generator and the critic are three hidden layers of 128, with the same budget for each
objective; what an objective needs to be bounded (a penalty) it has. A draw is good within 3 standard deviations (0.05)
of a centre of the grid (from -2 to 2); a mode is found if one of 2,500 draws is good there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from glann.config.networks import OBJECTIVES, ObjectiveConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from code_clouds import DRAWS, modes_covered
from gan_clouds import Game

# Penalty and its weight, where one bounds the critic; margin and such are the defaults.
PENALTIES = {
    "wasserstein": ("between", 10.0),
    "relativistic": ("r1-r2", 0.1),
    "loss-sensitive": ("none", 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cloud", choices=("grid", "ring"), default="grid")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    words = parser.parse_args()
    torch.set_num_threads(1)
    print("| objective | penalty | modes | good draws | CPU s |\n|---|---|---|---|---|")
    for kind in words.kinds:
        penalty, weight = PENALTIES.get(kind, ("none", 0.0))
        modes, shares, start = [], [], time.process_time()
        for seed in range(words.seeds):
            game = Game(ObjectiveConfig(kind=kind), words.cloud, penalty, weight, seed=seed)
            game.train(words.steps)
            found, good = modes_covered(game.draw(DRAWS), words.cloud)
            modes.append(found)
            shares.append(good)
        seconds = (time.process_time() - start) / words.seeds
        bound = penalty if penalty == "none" else f"{penalty} {weight:g}"
        print(
            f"| {kind} | {bound} | {statistics.mean(modes):.1f} | {statistics.mean(shares):.2f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
