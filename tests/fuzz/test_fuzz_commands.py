"""No odd value and no odd environment makes a command fail as if it had a bug: status 70, a traceback, or a hang.

Commands, parameters and configuration keys are those that there are, so a new one is swept by itself. A share of the
cases runs by default, the same ones every time; with GLANN_FUZZ_CASES as many as that, at most all.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
import typer
from command_zygote import CommandZygote, Outcome, can_change_user
from glann.cli.main import app
from glann.config.run import Config, known_keys
from glann.datasets.index import Index
from glann.datasets.pack import pack
from glann.inference.package import export_model
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.samplers.gaussian import gaussian
from odd_values import FEW_VALUES, VALUES, make_odd_files
from registered_runs import track

T = TypeVar("T")
WHOLE, FEW = 10_000, 50  # GLANN_FUZZ_CASES with which every case runs; the share of these that runs without it
ORDINARY_USER = 12345  # one without a line in /etc/passwd
BUG_WORDS = ("Traceback (most recent call last)", "this is a bug", "Exception ignored", "Fatal Python error")
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"url": "squares", "resolution": 28, "channels": 1, "threads": 1},
    "generator": {"kind": "infogan", "latent_dim": 4, "width": 4},
    "loss": {"kind": "l1"},
    "glo": {"epochs": 1, "batch_size": 4},
    "imle": {"epochs": 1, "batch_size": 4, "noise_dim": 3, "hidden_dim": 4},
    "engine": {"kind": "torch"},
    "s3": {"max_attempts": 1, "timeout_s": 1.0},
    "evaluation": {"samples": 4},
    "tracking": {"enabled": False},
}
REMOTE = TINY | {
    "name": "far",
    "data": TINY["data"] | {"url": "s3://bucket/data"},
    "checkpoint": {"url": "s3://bucket/runs"},
}
STUDY = {
    "name": "tiny-study",
    "recipe": "recipe.yaml",
    "space": {"glo.latent_lr": {"log_uniform": [0.005, 0.1]}},
    "metric": "psnr",
}
COMPARISON = {"name": "tiny-sides", "recipe": "recipe.yaml", "methods": {"same": {}, "gmm": {"sampler.kind": "gmm"}}}
ROWS = 6

# Good values, by parameter, or by command and parameter where one name has several meanings.
GOOD = {
    "config": "recipe.yaml",
    "submit config": "remote.yaml",
    "overrides": "name=another",
    "study": "study.yaml",
    "comparison": "comparison.yaml",
    "source": "runs/tiny",
    "data pack source": "pictures",
    "run": "runs/tiny",
    "evaluate run": "models:/tiny/1",  # its codes are not needed
    "folder": "runs/tiny",
    "url": "squares",
    "destination": "packed",
    "resolution": "28",
    "name": "tiny",
}


class Case(NamedTuple):
    arguments: tuple[str, ...]
    env: dict[str, str] = {}  # noqa: RUF012


def leaves(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that is no group, by the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(leaves(typer.main.get_command(app)))


def good_arguments(name: str) -> dict[str, list[str]]:
    """By parameter, what a good command line has; nothing for options that may be left out."""
    arguments = {}
    for parameter in COMMANDS[name].params:
        value = GOOD.get(f"{name} {parameter.name}", GOOD.get(parameter.name, "x"))
        needed = parameter.required or (parameter.param_type_name == "argument" and parameter.name == "config")
        option = parameter.param_type_name == "option"
        arguments[parameter.name] = ([f"{parameter.opts[0]}={value}"] if option else [value]) if needed else []
    return arguments


def odd_arguments(name: str) -> Iterator[Case]:
    """Every parameter of a command that takes a value, with every odd value in place of a good one."""
    good = good_arguments(name)
    for parameter in COMMANDS[name].params:
        if getattr(parameter, "is_flag", False):
            continue
        text = any(kind in str(parameter.type_descriptor.annotation) for kind in ("str", "Path"))
        for value in VALUES if text else FEW_VALUES:
            option = parameter.param_type_name == "option"
            odd = {parameter.name: [f"{parameter.opts[0]}={value}"] if option else [value]}
            options = [
                word for words in (good | odd).values() for word in words if word.startswith("--") and "=" in word
            ]
            words = [word for words in (good | odd).values() for word in words if word not in options]
            yield Case((*name.split(), *options, *words))


def odd_overrides(command: str) -> Iterator[Case]:
    """Every configuration key with every odd value; keys of text also where a run would use them."""
    recipe = next(iter(good_arguments(command).values()))[0]  # or the study
    for key, section in known_keys().items():
        text = "str" in str(section.annotation)
        if not text and command != "config":
            continue
        on = ("tracking.enabled=true",) if key.startswith("tracking.") and command == "train" else ()
        for value in VALUES if text else FEW_VALUES:
            yield Case((command, recipe, *on, f"{key}={value}"))


ODD_ENVIRONMENTS: dict[str, dict[str, str]] = {
    **{f"HOME={value}": {"HOME": value} for value in ("", "/nonexistent", "relative", "/dev/null", "é\udcff")},
    "no HOME": {"HOME": "<unset>", "USER": "<unset>", "LOGNAME": "<unset>", "GLANN_CACHE": "<unset>"},
    "no HOME, a cache": {"HOME": "<unset>", "USER": "<unset>", "LOGNAME": "<unset>"},
    **{f"TMPDIR={value}": {"TMPDIR": value} for value in ("/nonexistent", "/proc", "", "file", "x" * 200)},
    **{f"COLUMNS={value}": {"COLUMNS": value} for value in ("0", "1", "10", "-5", "x", "9" * 30)},
    **{f"TZ={value}": {"TZ": value} for value in ("", "Nowhere/Atlantis", "XYZ-99:99:99", ":/dev/null", "/etc/passwd")},
    **{f"TERM={value}": {"TERM": value} for value in ("", "dumb", "x" * 300)},
    **{
        f"{name}={value}": {name: value}
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        for value in (
            "",
            " ",
            "x",
            "http://[::1",
            "http://127.0.0.1:1",
            "http://127.0.0.1:99999",
            "s3://[b]/x",
            "\udcff",
        )
    },
    **{
        f"{name}={value}": {name: value}
        for name in ("GLANN_CACHE", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE", "AWS_PROFILE", "AWS_REGION", "AWS_CA_BUNDLE")
        for value in ("", " ", "x", "~nobody/x", "file", "folder", "http://[::1", "\udcff", "/dev/null")
    },
    **{f"{name}=x": {name: "x"} for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "AWS_MAX_ATTEMPTS", "NO_COLOR")},
    "umask 777": {"umask": "777"},
    "read-only folder": {"cwd": "read-only"},
}


class Place:
    """Copies of a folder with a recipe, a study, pictures, packed images, a finished run and odd files, one a case."""

    def __init__(self, workshop: Path, zygote: CommandZygote, around: Path, asked: int, ran: Counter[str]) -> None:
        self.workshop, self.zygote, self.around, self.asked, self.ran = workshop, zygote, around, asked, ran

    def share(self, cases: Iterable[T]) -> list[T]:
        """The cases that run this time: the same few every time, or others every time."""
        cases = list(cases)
        return random.Random(None if self.asked else 0).sample(
            cases, math.ceil(min(1.0, (self.asked or FEW) / WHOLE) * len(cases))
        )

    def run(self, case: Case) -> tuple[Outcome, str | None]:
        """How the command ended, and what is wrong with that; None where nothing is."""
        self.ran["commands"] += 1
        root = self.around / "case"
        root.mkdir()
        try:
            for name in ("home", "tmp", "cache"):
                (root / name).mkdir()
            shutil.copytree(self.workshop, root / "cwd", symlinks=True)
            make_odd_files(root / "cwd")
            before = look(root)
            outcome = self._outcome(case, root)
            above = any(word.split("=", 1)[-1] == ".." for word in case.arguments)
            return outcome, verdict(outcome, before, look(root), unseen="umask" in case.env, above=above)
        finally:
            subprocess.run(["chmod", "-R", "u+rwx", root], check=True)
            shutil.rmtree(root)

    def _outcome(self, case: Case, root: Path) -> Outcome:
        env = environment(root) | case.env
        how: dict[str, Any] = {"umask": int(env.pop("umask"), 8)} if "umask" in env else {}
        if env.pop("cwd", None):
            (root / "cwd").chmod(0o555)
        env = {name: value for name, value in env.items() if value != "<unset>"}
        return self.zygote.run(case.arguments, root / "cwd", env, **how)


def environment(root: Path) -> dict[str, str]:
    """A plain environment, in which nothing outside answers."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(root / "home"),
        "USER": "somebody",
        "TMPDIR": str(root / "tmp"),
        "GLANN_CACHE": str(root / "cache"),
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1",
        "RAY_ADDRESS": "127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
    }


def look(root: Path) -> set[str]:
    """Everything in a case's folders, but what MLflow's database leaves beside it."""
    found = {str(path.relative_to(root)) for path in root.glob("*")} | {str(path) for path in root.parent.glob("*")}
    for name in ("cwd", "home", "tmp", "cache"):
        found |= {str(path.relative_to(root)) for path in (root / name).rglob("*")}
    return {path for path in found if "mlflow.db" not in path}


def verdict(
    outcome: Outcome, before: set[str], after: set[str], unseen: bool = False, above: bool = False
) -> str | None:
    """What is wrong with an outcome; None where nothing is.

    unseen: it cannot look into a folder that it has made. above: it was asked to write above its folder.
    """
    text = outcome.out + outcome.err
    if outcome.status is None:
        return "it hangs"
    if outcome.status not in (0, 1, 2):
        return f"status {outcome.status}: {outcome.err[-500:]}"
    if any(words in text for words in BUG_WORDS):
        return f"it looks like a bug: {text[-500:]}"
    if outcome.status and not outcome.err.strip():
        return f"status {outcome.status} without a word"
    if missing := before - after:
        return f"it removed {sorted(missing)}"
    made = after - before
    if outcome.status == 2 and made and not unseen:
        return f"it refused and left {sorted(made)}: {outcome.err[-300:]}"
    if left := sorted(path for path in made if path.split("/")[0] not in ("cwd", "home", "cache") and not above):
        return f"it left {left}"
    return None


def make_tiny_run() -> Config:
    """The run folder runs/tiny, finished, with random networks."""
    config = Config.model_validate(TINY)
    generator = build_generator(config.generator, 28, 1).state_dict()
    mapping = build_mapping(config.sampler, 4).state_dict()
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, 4), dim=1)
    fingerprint = Index.load("squares").fingerprint
    export_model(config.run_dir / "model", config, generator, mapping, gaussian(z_ND), len(z_ND), fingerprint)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    entry = {"time": 1.5, "stage": "glo", "epoch": 1, "loss": 0.5, "images_per_s": 3.0, "seconds": 1.0, "step": 1}
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    summary = {
        "metrics": {"l1": 0.1, "psnr": 3.0},
        "timings": {"train_s": 3.0},
        "rows": ROWS,
        "fingerprint": fingerprint,
    }
    (config.run_dir / "summary.json").write_text(json.dumps(summary))
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cases: int, ran: Counter[str]) -> Iterator[Place]:
    from PIL import Image

    root = tmp_path_factory.mktemp("commands")
    workshop, before = root / "workshop", os.getcwd()
    (workshop / "pictures").mkdir(parents=True)
    (root / "around").mkdir()
    os.chdir(workshop)
    for number in range(ROWS):
        Image.fromarray(np.full((28, 28), 40 * number, np.uint8)).save(f"pictures/{number}.png")
    pack("pictures", "squares", resolution=28, channels=1)
    Path("recipe.yaml").write_text(json.dumps(TINY | {"name": "other"}))
    Path("remote.yaml").write_text(json.dumps(REMOTE))
    Path("study.yaml").write_text(json.dumps(STUDY))
    Path("comparison.yaml").write_text(json.dumps(COMPARISON))
    config = make_tiny_run()
    track(config, f"sqlite:///{workshop}/mlflow.db", register_as="tiny")  # MLflow keeps stores by address
    os.chdir(before)
    zygote = CommandZygote(environment(root), ORDINARY_USER if can_change_user() else None)
    yield Place(workshop, zygote, root / "around", cases, ran)
    zygote.close()


def sweep(place: Place, every: Iterable[Case]) -> None:
    cases = place.share(every)
    wrong = [(case, found) for case in cases if (found := place.run(case)[1])]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}", *(f"{case}\n    {found}" for case, found in wrong)])


def odd_environments() -> Iterator[Case]:
    """Every command as it is meant, in every odd environment."""
    for env in ODD_ENVIRONMENTS.values():
        for name in COMMANDS:
            yield Case((*name.split(), *(word for words in good_arguments(name).values() for word in words)), env)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_good_command_is_not_refused(place, name):
    """Otherwise every case would be refused for one dull reason."""
    outcome, wrong = place.run(Case((*name.split(), *(w for words in good_arguments(name).values() for w in words))))
    assert wrong is None
    assert outcome.status != 2 or name.startswith("registry"), outcome.err


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_arguments(place, name):
    sweep(place, odd_arguments(name))


@pytest.mark.parametrize("name", [name for name in COMMANDS if "overrides" in good_arguments(name)])
def test_odd_overrides(place, name):
    sweep(place, odd_overrides(name))


def test_odd_environments(place):
    sweep(place, odd_environments())


# Read by Python before any code of ours, so they take a process each: seconds.
STREAMS = (">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full")
ENCODINGS = ("LC_ALL=C", "LC_ALL=POSIX", "LC_ALL=tlh_QX.KLINGON", "PYTHONIOENCODING=ascii", "PYTHONUTF8=0 LC_ALL=C")


def odd_shells() -> Iterator[str]:
    for name in COMMANDS:
        words = (word for words in good_arguments(name).values() for word in words)
        command = f"{sys.executable} -m glann {name} {' '.join(words)}"
        if name == "train":
            command += " --dry-run"
        yield from (f"{command} {streams}" for streams in STREAMS)
        yield from (f"{encoding} {command} name=é" for encoding in ENCODINGS if "overrides" in good_arguments(name))
        yield from (f"{encoding} {command}" for encoding in ENCODINGS)


def test_odd_streams_and_encodings(place, tmp_path):
    wrong = []
    for command in place.share(odd_shells()):
        place.ran["commands"] += 1
        done = subprocess.run(
            ["bash", "-c", command], cwd=place.workshop, env=environment(tmp_path), capture_output=True, timeout=120
        )
        text = (done.stdout + done.stderr).decode("utf-8", "replace")
        if done.returncode not in (0, 1, 2) or any(words in text for words in BUG_WORDS):
            wrong.append((command, done.returncode, text[-300:]))
    assert not wrong, "\n".join(map(str, wrong))
