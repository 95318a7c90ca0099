"""No source of ours can run what it reads: no pickle, no code from data, no archive unpacked wherever it likes.

Names are followed through imports and their aliases, so that `from torch import load as l` is no way round.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import glann
import pytest

ROOT = Path(glann.__file__).parent
ELSEWHERE = {"tests", ".venv", "build", "runs", "data"}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if not ELSEWHERE & set(path.relative_to(ROOT).parts))
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen", "pty.spawn"),
    *("pandas.read_pickle", "joblib.load", "torch.hub.load", "torch.jit.load", "runpy.run_path", "code.interact"),
    *(
        "numpy.lib.npyio.NpzFile",
        "safetensors.torch.load_model",
        "mlflow.pyfunc.load_model",
        "mlflow.pytorch.load_model",
    ),
}
PICKLES = ("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "ray.cloudpickle")
YAML = {"yaml.safe_load", "yaml.safe_dump", "yaml.SafeLoader", "yaml.YAMLError"}
UNPACKS = ("extractall", "unpack_archive")
# The one reader of a pickle: of published weights, by their SHA-256, whose names are held against a list.
ONE_READER = {"datasets/assets/converters.py": {"pickle.Unpickler", "pickle.UnpicklingError"}}


def dangers(source: str, place: str = "") -> Iterator[str]:
    """`line: what` for everything in the source that must not be there."""
    tree = ast.parse(source)
    full = _imported(tree)

    def name(node: ast.expr) -> str:
        head, _, rest = ast.unparse(node).partition(".")
        return full.get(head, head) + ("." + rest if rest else "")

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            used = name(node)
            if used.startswith(PICKLES) and used not in (*PICKLES, *ONE_READER.get(place, ())):
                yield f"{node.lineno}: {used}"
            if used.startswith("yaml.") and used.count(".") == 1 and used not in YAML:
                yield f"{node.lineno}: {used}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PICKLES):
            yield f"{node.lineno}: from {node.module}"
        if isinstance(node, ast.Call):
            called = name(node.func)
            given = {key.arg: ast.unparse(key.value) for key in node.keywords}
            if called in RUNS_CODE or called.rpartition(".")[2] in UNPACKS:
                yield f"{node.lineno}: {called}"
            if called == "torch.load" and given.get("weights_only") != "True":
                yield f"{node.lineno}: torch.load without weights_only=True"
            if called == "numpy.load" and given.get("allow_pickle") != "False":
                yield f"{node.lineno}: numpy.load without allow_pickle=False"
            if given.get("allow_pickle", "False") != "False" or given.get("weights_only", "True") != "True":
                yield f"{node.lineno}: {called} with pickles allowed"
            if given.get("shell", "False") != "False" or "trust_remote_code" in given:
                yield f"{node.lineno}: {called} runs what it is given"


def _imported(tree: ast.AST) -> dict[str, str]:
    """What the names that are imported anywhere in the file stand for."""
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return full


def test_all_sources_are_looked_at():
    places = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {
        "config/run.py",
        "cli/main.py",
        "storage/s3.py",
        "inference/package.py",
        "cluster/checkpoints/writer.py",
    } <= places


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_in_the_sources_runs_what_it_reads(path: Path):
    assert list(dangers(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads\nloads(b)",
        "from pickle import Unpickler as U\nU(f).load()",
        "import cloudpickle\ncloudpickle.load(f)",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "from numpy import load as l\nl(f, allow_pickle=True)",
        "import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.unsafe_load(f)",
        "from yaml import full_load\nfull_load(f)",
        "eval(x)",
        "import builtins\nbuiltins.exec(x)",
        "def f():\n    from pandas import read_pickle\n    return read_pickle(x)",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import tarfile\ntarfile.open(x).extractall(y)",
        "import shutil\nshutil.unpack_archive(x)",
    ],
)
def test_what_is_looked_for_is_found(source: str):
    """The test of the test."""
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import yaml\nyaml.safe_load(f)",
        "import re\nre.compile(x)",
        "model.eval()",
    ],
)
def test_what_is_harmless_is_left_alone(source: str):
    assert not list(dangers(source))
