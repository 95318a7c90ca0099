"""Random faults against jobs on a cluster of namespaced nodes, for as long as asked; then a table of what they cost.

    sudo python benchmarks/soak.py --minutes 60 --seed 1

Theme: the failure model of docs/reliability.md over hours. Jobs run one after another, each with a few faults at
random moments; a fault is survived if the job takes a step again and ends bit for bit where an undisturbed one ends.
Every fault strikes in every phase, in random order, before any pair of them comes again.
Needs root, iproute2 and the test tools (`pip install -e .[test]`); about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from cluster_faults import FILLER, MOMENTS, SHARD, TRAINER, Missed, Script, Strike, fill, small_disk
from cluster_job import GLO_EPOCHS, ROWS, End, Job, pack_digits
from cluster_nodes import HEAD, MLFLOW, Cluster
from netns import why_not

FAULTS_OF_A_JOB = (1, 3)
JOB_LIMIT_S = 900


@dataclass
class Tally:
    """What has happened to one kind of fault. `back_s`: seconds until a new step, of those that cost a restart."""

    injected: int = 0
    survived: int = 0
    phases: set[str] = field(default_factory=set)
    back_s: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with Cluster() as cluster:
        pack_digits(cluster)
        undisturbed = Job(cluster, "undisturbed").start()
        if undisturbed.wait(JOB_LIMIT_S):
            print(f"error: the undisturbed job failed\n{undisturbed.said()[-3000:]}", file=sys.stderr)
            return 1
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "runs", megabytes=48) as disk:
            return soak(cluster, undisturbed.end(), disk, arguments.minutes, arguments.seed)


def soak(cluster: Cluster, wanted: End, disk: Path, minutes: float, seed: int) -> int:
    """Run jobs until the time is up, and print the table; 0 if nothing was lost. `disk` holds the run folders."""
    deck, tallies = Deck(seed), {name: Tally() for name in FAULTS}
    began, jobs, lost, twice, unequal = time.monotonic(), 0, 0, 0, 0
    while time.monotonic() - began < 60 * minutes:
        jobs += 1
        job = Job(cluster, f"soak-{jobs}", "s3.timeout_s=4", "cluster.max_failures=10", runs_dir=str(disk)).start()
        script = Script(job, seed)
        try:
            struck = inject(script, deck, tallies)
            status = job.wait(JOB_LIMIT_S)
            end = job.end()
        except (RuntimeError, TimeoutError, TimeoutExpired, OSError) as error:
            print(f"soak-{jobs}: NOT survived: {error}", flush=True)
            cluster.kill(HEAD)
            cluster.repair()
            continue
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)
        rows = np.full(ROWS, GLO_EPOCHS)
        lost, twice = lost + int((end.visits_N < rows).sum()), twice + int((end.visits_N > rows).sum())
        differing = end.differences(wanted)
        unequal += bool(differing)
        if status == 0 and not differing:
            for name in struck:
                tallies[name].survived += 1
        else:
            print(f"soak-{jobs}: status {status}, differing {differing[:5]}\n{job.said()[-2000:]}", flush=True)
    report(tallies, (time.monotonic() - began) / 60, seed, jobs, lost, twice, unequal)
    return int(bool(lost or twice or unequal) or any(t.survived < t.injected for t in tallies.values()))


class Deck:
    """Every (phase, fault), dealt in random order; all of them again when none is left."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.left: list[tuple[str, str]] = []

    def deal(self) -> list[tuple[str, str]]:
        """A few for one job: of different phases, in the order of a run."""
        if not self.left:
            self.left = [(phase, fault) for phase in MOMENTS for fault in FAULTS]
            self.random.shuffle(self.left)
        hand: dict[str, str] = {}
        count = self.random.randint(*FAULTS_OF_A_JOB)
        for phase, fault in self.left:
            if len(hand) < count:
                hand.setdefault(phase, fault)
        self.left = [pair for pair in self.left if pair not in hand.items()]
        return sorted(hand.items(), key=lambda pair: list(MOMENTS).index(pair[0]))


def inject(script: Script, deck: Deck, tallies: dict[str, Tally]) -> list[str]:
    """Strike a few times; the faults that struck. A job may be past a phase when its turn comes: another one's then."""
    struck = []
    for phase, name in deck.deal():
        tally = tallies[name]
        tally.injected += 1
        try:
            strike = FAULTS[name](script, phase)
        except Missed as missed:
            tally.injected -= 1
            deck.left.append((phase, name))
            print(f"{script.job.name}: {str(missed).splitlines()[0]}", flush=True)
            continue
        struck.append(name)
        tally.phases.add(phase)
        print(f"{script.job.name}: {strike}", flush=True)
        if strike.back_s is not None:
            tally.back_s.append(strike.back_s)
    return struck


def report(
    tallies: dict[str, Tally], minutes: float, seed: int, jobs: int, lost: int, twice: int, unequal: int
) -> None:
    """The table, as docs/reliability.md holds it."""
    print("\n| fault | phases | injected | survived | median s | worst s |\n|---|---|---|---|---|---|")
    for name, tally in tallies.items():
        times = tally.back_s
        median, worst = (f"{statistics.median(times):.1f}", f"{max(times):.1f}") if times else ("-", "-")
        print(f"| {name} | {len(tally.phases)} | {tally.injected} | {tally.survived} | {median} | {worst} |")
    everything = [seconds for tally in tallies.values() for seconds in tally.back_s]
    injected, survived = (sum(getattr(t, key) for t in tallies.values()) for key in ("injected", "survived"))
    median, worst = (f"{statistics.median(everything):.1f}", f"{max(everything):.1f}") if everything else ("-", "-")
    print(f"| all | {len(MOMENTS)} | {injected} | {survived} | {median} | {worst} |")
    print(f"\n{minutes:.0f} minutes, seed {seed}: {jobs} jobs; rows lost {lost}, rows visited twice {twice}, ", end="")
    print(f"jobs that ended elsewhere than the undisturbed one {unequal}")


# Faults --------------------------------------------------------------------------------------


def kill_a_process(title: str) -> Callable[[Script, str], Strike]:
    def fault(script: Script, phase: str) -> Strike:
        strike = script.strike(f"{title} SIGKILL", phase, lambda: script.kill_process(title))
        script.training_again(strike)
        return strike

    return fault


def kill_a_node(script: Script, phase: str) -> Strike:
    node = script.node()
    strike = script.strike("node SIGKILL", phase, lambda: script.cluster.kill(node))
    script.training_again(strike)
    script.cluster.start(node)
    return strike


def cut_a_link(script: Script, phase: str) -> Strike:
    node = script.node()
    strike = script.strike("link cut", phase, lambda: script.cluster.cut(node))
    script.training_again(strike)
    script.cluster.heal(node)
    script.cluster.repair()  # Ray gives up a node it has not heard of; a machine's supervisor starts it again
    return strike


def slow_a_link(script: Script, phase: str) -> Strike:
    node = script.node()
    strike = script.strike("link slow", phase, lambda: script.cluster.slow(node, 20, 0.01))
    time.sleep(script.uniform(2, 6))
    script.cluster.heal(node)
    return strike


def kill_the_driver(script: Script, phase: str) -> Strike:
    strike = script.strike("driver SIGKILL", phase, script.kill_driver)
    script.job.start()
    script.training_again(strike)
    return strike


def lose_the_head(script: Script, phase: str) -> Strike:
    strike = script.strike("head node SIGKILL", phase, lambda: script.cluster.kill(HEAD))
    script.cluster.repair()
    script.job.start()
    script.training_again(strike)
    return strike


def trouble_s3(script: Script, phase: str) -> Strike:
    kind, value = script.random.choice((("status", 500), ("status", 503), ("reset", 0), ("stall", 6), ("truncate", 0)))
    proxy = script.cluster.proxy
    reads = kind == "truncate"  # there is no such thing as a truncated answer to a write
    wanted = (lambda method, path: method == "GET") if reads else None
    times = script.random.randint(1, 3)
    return script.strike(f"S3 {kind}", phase, lambda: proxy.inject(kind, times, value, wanted))


def restart_mlflow(script: Script, phase: str) -> Strike:
    strike = script.strike("MLflow down", phase, lambda: script.cluster.kill(MLFLOW))
    time.sleep(script.uniform(2, 10))
    script.cluster.start_mlflow()
    return strike


def fill_the_disk(script: Script, phase: str) -> Strike:
    disk = script.job.folder.parent
    strike = script.strike("disk full", phase, lambda: fill(disk))
    try:
        status = script.job.wait(120)
    finally:
        (disk / FILLER).unlink()
    if status != 1:
        raise RuntimeError(f"a full disk ended the run with {status}, not 1:\n{script.job.said()[-3000:]}")
    script.job.start()
    script.training_again(strike)
    return strike


FAULTS: dict[str, Callable[[Script, str], Strike]] = {
    "training worker SIGKILL": kill_a_process(TRAINER),
    "latent actor SIGKILL": kill_a_process(SHARD),
    "node SIGKILL": kill_a_node,
    "link cut and healed": cut_a_link,
    "link slow and lossy": slow_a_link,
    "driver SIGKILL": kill_the_driver,
    "head node SIGKILL": lose_the_head,
    "S3: 500, 503, reset, stall, truncation": trouble_s3,
    "MLflow down": restart_mlflow,
    "disk of the run folder full": fill_the_disk,
}

if __name__ == "__main__":
    sys.exit(main())
