"""Files and environment of a submitted job: the package's own files, and the run's configuration.

Ray unpacks both on every node that the job uses. It would install a wheel with all its dependencies, torch and Ray
included; a folder it only adds to the path. So the dependencies are part of the nodes' image or set-up, and a job ships
the code.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...config.run import Config
from ...datasets.assets.catalogue import ASSETS
from ...errors import ExitStatus, UserError
from .revision import FILE as REVISION_FILE
from .revision import PACKAGE, code_revision

DATA_SUFFIXES = {".yaml", ".html", ".md"}  # `package-data` in pyproject.toml
ROOT_FILES = ("__init__.py", "__main__.py", "errors.py", "py.typed")
CONFIG_FILE, STUDY_FILE, START_FILE = "config.yaml", "study.yaml", "start.sh"
JOBS_FOLDER = "glann-jobs"  # in the home folder on the head; working folder of jobs, to which runs_dir is relative
STATUS_LINE = "glann: exit status"
JOB_VARIABLE = "GLANN_JOB"  # set in a job, which then names no paths of the head to the user

# Ray signals every process of a stopped job. The shell waits for the command, which saves, and then prints its exit
# status, since Ray keeps none of a stopped job. `-P`: a folder called glann in the working folder is not imported.
START_SCRIPT = f"""\
trap : INT TERM
folder="$PWD"
mkdir -p "$HOME/{JOBS_FOLDER}" && cd "$HOME/{JOBS_FOLDER}" || exit {ExitStatus.ENVIRONMENT:d}
export {JOB_VARIABLE}="$1"
if [ -e "$folder/{STUDY_FILE}" ]; then
    python3 -P -m glann tune "$folder/{STUDY_FILE}"
else
    python3 -P -m glann train "$folder/{CONFIG_FILE}"
fi
status=$?
echo "{STATUS_LINE} $status"
exit $status
"""


def package_files(root: Path = PACKAGE) -> list[Path]:
    """Files of the built package, relative to `root`, without tests, data, runs and caches.

    A folder belongs to the package if it has an `__init__.py`, both in a checkout and in site-packages.
    """
    files = [root / name for name in ROOT_FILES if (root / name).is_file()]
    for folder in sorted(path.parent for path in root.rglob("__init__.py") if path.parent != root):
        between = folder.relative_to(root).parents
        if all((root / parent / "__init__.py").is_file() for parent in between):
            files += [path for path in folder.iterdir() if path.suffix in {".py", *DATA_SUFFIXES} and path.is_file()]
    return sorted(path.relative_to(root) for path in files)


def stage_package(folder: Path) -> Path:
    """Copy the package to `folder/glann`, for `py_modules`, with the commit that it is of, where that is known."""
    staged = folder / "glann"
    for file in package_files():
        (staged / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / file, staged / file)
    if commit := code_revision():
        (staged / REVISION_FILE).write_text(f"{commit}\n", encoding="utf-8")
    return staged


def stage_run(folder: Path, config: Config, study: str = "") -> Path:
    """Write the configuration, or the YAML of a study, and the start script to `folder/run`, for `working_dir`."""
    staged = folder / "run"
    staged.mkdir()
    (staged / (STUDY_FILE if study else CONFIG_FILE)).write_text(study or config.to_yaml(), encoding="utf-8")
    (staged / START_FILE).write_text(START_SCRIPT, encoding="utf-8")
    return staged


def entrypoint(name: str) -> str:
    """Command of a job; the name is shown in Ray's own lists."""
    return f"exec sh {START_FILE} {shlex.quote(name)}"


def for_cluster(config: Config) -> Config:
    """The configuration for the cluster's head.

    Raises:
        UserError: a path of this machine, or checkpoints that would be lost with the head.
    """
    cluster = config.cluster.model_copy(update={"address": "auto"})
    config = config.model_copy(update={"cluster": cluster})
    advice = "give s3://bucket/prefix, or the absolute path of a folder that every node shares"
    if config.checkpoint.url is None:
        raise UserError(f"checkpoint.url is empty, so the run could not be resumed on another cluster; {advice}")
    places = {
        "data.url": config.data.url,
        "checkpoint.url": config.checkpoint.url,
        "evaluation.data": config.evaluation.data,
    }
    for key, value in places.items():
        if value is not None and not _travels(value):
            raise UserError(f"{key}={value} is a path of this machine; {advice}")
    for key, given in (("data.source", config.data.source), ("loss.weights", config.loss.weights)):
        if given and given not in ASSETS and not _travels(given):
            raise UserError(f"{key}={given} is a path of this machine; name an asset, or {advice}")
    return config


def _travels(place: str) -> bool:
    return "://" in place or place.startswith("/")


def digest(config: Config, study: str = "") -> str:
    """Short hash of the configuration, and of the YAML of a study, to compare two submissions."""
    return hashlib.sha256((config.to_yaml() + study).encode()).hexdigest()[:16]


def environment(keys: Iterable[str]) -> dict[str, str]:
    """The variables of this process that are passed to a job.

    Raises:
        UserError: one of them is not set here.
    """
    passed = {}
    for key in keys:
        if "=" in key:
            raise UserError(f"--env {key.partition('=')[0]}=...: give the name alone; its value is taken from here")
        if key not in os.environ:
            raise UserError(f"--env {key}: not set here; export it first")
        passed[key] = os.environ[key]
    return passed


def forgotten_keys(config: Config, variables: Iterable[str]) -> str | None:
    """A hint if the run uses S3 and this machine's settings for it are not passed; None otherwise."""
    if not any(url.startswith("s3://") for url in (config.data.url, config.checkpoint_url)):
        return None
    keys = () if config.s3.anonymous else ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    usual = (*keys, "AWS_ENDPOINT_URL")
    missing = [key for key in usual if key in os.environ and key not in variables]
    if "AWS_ENDPOINT_URL" in missing and config.s3.endpoint_url:
        missing.remove("AWS_ENDPOINT_URL")
    if not missing:
        return None
    flags = " ".join(f"--env {key}" for key in missing)
    return f"{', '.join(missing)} of this machine are not passed to the job; unless the nodes have a role: {flags}"
