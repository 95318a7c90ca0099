"""Random faults against jobs on a cluster of namespaced nodes, for as long as asked; then a table of what they cost.

    sudo python benchmarks/soak.py --minutes 60 --seed 1

Theme: the failure model of docs/reliability.md over hours. Jobs run one after another, each with a few faults at
random moments; a fault is survived if the job takes a step again and ends bit for bit where an undisturbed one ends.
Needs root, iproute2 and the test tools (`pip install -e .[test]`); about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from cluster_faults import MOMENTS, SHARD, TRAINER, Missed, Script, Strike
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
        return soak(cluster, undisturbed.end(), arguments.minutes, arguments.seed)


def soak(cluster: Cluster, wanted: End, minutes: float, seed: int) -> int:
    """Run jobs until the time is up, and print the table; 0 if nothing was lost."""
    lottery, tallies = random.Random(seed), {name: Tally() for name in FAULTS}
    began, jobs, lost, twice, unequal = time.monotonic(), 0, 0, 0, 0
    while time.monotonic() - began < 60 * minutes:
        jobs += 1
        job = Job(cluster, f"soak-{jobs}", "s3.timeout_s=4", "cluster.max_failures=10").start()
        script = Script(job, seed)
        chosen = sorted(lottery.sample(list(MOMENTS), lottery.randint(*FAULTS_OF_A_JOB)), key=list(PHASES).index)
        faults = [(phase, lottery.choice(list(FAULTS))) for phase in chosen]
        try:
            struck = inject(script, faults, tallies)
            status = job.wait(JOB_LIMIT_S)
            end = job.end()
        except (RuntimeError, TimeoutError, TimeoutExpired, OSError) as error:
            print(f"soak-{jobs}: NOT survived: {error}", flush=True)
            cluster.kill(HEAD)
            cluster.repair()
            continue
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


def inject(script: Script, faults: list[tuple[str, str]], tallies: dict[str, Tally]) -> list[str]:
    """Strike in each (phase, fault); the faults that struck. A job may be past a phase when its turn comes."""
    struck = []
    for phase, name in faults:
        tallies[name].injected += 1
        try:
            strike = FAULTS[name](script, phase)
        except Missed as missed:
            tallies[name].injected -= 1
            print(f"{script.job.name}: {str(missed).splitlines()[0]}", flush=True)
            continue
        struck.append(name)
        print(f"{script.job.name}: {strike}", flush=True)
        if strike.back_s is not None:
            tallies[name].back_s.append(strike.back_s)
    return struck


def report(
    tallies: dict[str, Tally], minutes: float, seed: int, jobs: int, lost: int, twice: int, unequal: int
) -> None:
    """The table, as docs/reliability.md holds it."""
    print("\n| fault | injected | survived | median s | worst s |\n|---|---|---|---|---|")
    for name, tally in tallies.items():
        times = tally.back_s
        median, worst = (f"{statistics.median(times):.1f}", f"{max(times):.1f}") if times else ("-", "-")
        print(f"| {name} | {tally.injected} | {tally.survived} | {median} | {worst} |")
    everything = [seconds for tally in tallies.values() for seconds in tally.back_s]
    injected, survived = (sum(getattr(t, key) for t in tallies.values()) for key in ("injected", "survived"))
    median, worst = (f"{statistics.median(everything):.1f}", f"{max(everything):.1f}") if everything else ("-", "-")
    print(f"| all | {injected} | {survived} | {median} | {worst} |")
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
}
PHASES = ("GLO", "checkpoint", "between the stages", "neighbour search", "IMLE updates")  # in the order of a run

if __name__ == "__main__":
    sys.exit(main())
