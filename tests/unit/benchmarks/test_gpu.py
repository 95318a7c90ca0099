"""The benchmark of a GPU runs with torch and models/ alone, and is that of the recipe it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from glann.config.run import load
from glann.models.cost import cost
from glann.trainers.plan.costs import training_costs
from glann.trainers.plan.devices import GPUS

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
# Imports what it is told to run, where of all installed packages there is only torch with what it needs itself.
ALONE = """
import runpy, sys, torch, torch.utils.flop_counter, torch.utils.checkpoint, torch.distributed.nn.functional
ours = {"pydantic", "yaml", "ray", "deepspeed", "mlflow", "boto3", "PIL", "scipy", "safetensors", "typer"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ours and name not in sys.modules:
            raise ModuleNotFoundError(f"no {name} on this machine")

sys.meta_path.insert(0, Missing())
sys.path.insert(0, "benchmarks")
sys.argv = ["gpu.py", "--resolution", "64"]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bench_gpu", BENCHMARKS / "gpu.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_gpu"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_its_constants_are_those_of_the_recipe_and_of_the_data_sheets(gpu):
    config = load("celebahq-1024", [])
    assert config.data.resolution == gpu.SIDE
    for section, held in ((config.generator, gpu.GENERATOR), (config.loss, gpu.LOSS)):
        assert {key: getattr(section, key) for key in vars(held)} == vars(held)
    assert {gpu.mark: gpu.bf16 for gpu in GPUS} == gpu.PEAKS


def test_its_counts_are_those_of_the_plan(gpu):
    counts = gpu.count(64)
    config = load("celebahq-1024", ["data.resolution=64", "engine.activation_checkpointing=false", "loss.levels=1"])
    generator, loss = training_costs(config)
    assert (counts.generator, counts.loss) == (generator, loss)
    assert counts.flops == generator.flops + loss.flops
    assert 100 < counts.launches < 1000
    assert counts.batch(80, True) > counts.batch(24, True) > 0


def test_it_runs_on_a_bare_machine(gpu, tmp_path):
    """Carried there as a bundle; without a GPU it says so, and prints the counts."""
    gpu.bundle(str(tmp_path / "bench.tar.gz"))
    with tarfile.open(tmp_path / "bench.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "GFLOP an image" in lines[0]
    assert lines[-1].endswith("0 meets, 0 falls short, 3 not measured")
    assert len(list((tmp_path / "benchmarks" / "results").glob("no-gpu-*.json"))) == 1


def test_a_step_of_it_trains_on_any_device(gpu, capsys):
    rows = gpu.measured(gpu.count(32), [1, 2], device="cpu", side=32, steps=1)
    assert [row.against for row in rows] == ["aim", "NCHW"]
    assert all(row.ratio > 0 for row in rows)
    step = gpu.Training("cpu", 32, 1, True, torch.channels_last)
    before = [parameter.clone() for parameter in step.step.generator.parameters()]
    step.take()
    assert not all(map(torch.equal, before, step.step.generator.parameters()))
    assert cost(step.step.generator, (gpu.GENERATOR.latent_dim,)).parameters == sum(p.numel() for p in before)
