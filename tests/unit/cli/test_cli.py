"""The command line: what was wrong is one line on stderr with the right exit status, and help costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from glann.cli import main as cli
from glann.errors import EnvironmentFault, UserError
from glann.metrics import evaluate as evaluation
from glann.metrics.result import Result
from glann.tracking import source
from glann.trainers.run import driver


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command line."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def failing(error: BaseException):
    """A stand-in for `trainers.driver.train` that fails."""

    def train(config: object, console: object) -> None:
        raise error

    return train


def in_a_process(*arguments: str, code: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments] if code else [sys.executable, "-m", "glann", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


COMMANDS = [
    [],
    ["train"],
    ["sample"],
    ["interpolate"],
    ["evaluate"],
    ["report"],
    ["config"],
    ["recipes"],
    ["doctor"],
    ["data"],
    ["data", "pack"],
    ["data", "info"],
    ["data", "verify"],
    ["registry"],
    ["registry", "list"],
    ["registry", "show"],
    ["registry", "register"],
    ["registry", "promote"],
    ["registry", "rollback"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, *command, "--help")
    assert (status, err) == (0, "")
    assert "Usage: glann" in out
    if command and command[-1] not in ("data", "recipes", "info", "verify", "registry", "list"):
        assert f"glann {' '.join(command)} " in out.split("Usage:")[1].split("\n", 1)[1], "there is no example"


def test_help_imports_nothing_heavy():
    code = "import sys\nfrom glann.cli.main import main\n"
    code += "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
    code += (
        "print('HEAVY', sorted({'torch', 'ray', 'mlflow', 'deepspeed', 'boto3', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    assert "HEAVY []" in in_a_process(code=code).stdout


def test_python_m_glann_is_the_command():
    result = in_a_process("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("glann ")


def test_the_resolved_configuration_is_printed(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "config", "digits", "glo.epochs=3")
    assert status == 0
    assert yaml.safe_load(out)["glo"]["epochs"] == 3


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "config", "--schema")
    assert status == 0
    assert "glo" in json.loads(out)["properties"]


def test_all_keys_are_listed(capsys: pytest.CaptureFixture[str]):
    _, out, _ = run(capsys, "config", "--keys")
    assert "glo.latent_lr\n" in out


@pytest.mark.parametrize("arguments", [[], ["digits", "--schema"], ["--keys", "--schema"]])
def test_config_wants_one_thing(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "config", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: give one of")


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]):
    _, out, _ = run(capsys, "recipes")
    assert len(out.splitlines()) >= 8
    assert "celebahq-1024" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "info", "s3://faces/x"],
        ["data", "verify", "s3://faces/x"],
        ["data", "pack", "s3://faces/x", "out", "--resolution", "28"],
        ["sample", "s3://faces/x"],
        ["interpolate", "s3://faces/x"],
    ],
)
def test_no_sign_request_reads_a_public_bucket(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = []
    monkeypatch.setattr("glann.storage.s3.S3Store.__init__", lambda self, url, s3: asked.append(s3) or failing_store())
    for flags, anonymous in ((["--no-sign-request"], True), ([], False)):
        assert run(capsys, *arguments, *flags)[0] == 2
        assert asked.pop().anonymous == anonymous


def failing_store() -> None:
    raise UserError("far enough")


def test_a_folder_that_may_not_be_written_to_is_named_before_anything_is_drawn(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for out in ("x.png", "new/folder", "new/x.npz"):
        status, _, err = run(capsys, "sample", "runs/x", "--out", out)
        assert (status, f"--out {out}: . cannot be written to" in err) == (2, True)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "digits", "glo.epoch=3"], "error: unknown key glo.epoch (did you mean glo.epochs?)"),
        (["train", "digit"], "error: no such recipe: digit (did you mean digits?)"),
        (["train", "digits", "--dry-run", "cluster.workers=300"], "error: glo.batch_size=128 leaves no row"),
        (["config", "digits", "engine.zero=7"], "error: engine.zero=7 is not possible"),
        (["sample", "runs/nothing"], "error: no such run or model folder: runs/nothing"),
        (["sample", "runs/nothing", "--out", "x.gif"], "error: --out x.gif: use x.png"),
        (["evaluate", "runs/nothing"], "error: runs/nothing is not a run folder"),
        (["report", "runs/nothing"], "error: "),
        (["data", "info", "nothing"], "error: no data set at nothing"),
        (["data", "verify", "nothing"], "error: no data set at nothing"),
        (["data", "pack", "nothing", "out", "--resolution", "28"], "error: "),
        (
            ["data", "info", "x", "--endpoint-url", "\udcff"],
            "error: --endpoint-url '\\udcff' is not possible: it is not",
        ),
        (["data", "info", "~nemo/x"], "error: ~nemo/x: there is no user nemo here"),
        (["data", "info", "ftp://host/x"], "error: ftp:// addresses are not supported"),
        (["data", "info", "s3:/faces/x"], "error: s3:/faces/x is not a complete address; did you mean s3://faces/x?"),
        (["data", "pack", "s3:/faces/x.zip", "out", "--resolution", "28"], "error: s3:/faces/x.zip is not a complete"),
        (["data", "pack", "nothing", "S3://faces/x", "--resolution", "28"], "error: S3://faces/x is not a complete"),
        (["sample", "s3:/faces/runs/x"], "error: s3:/faces/runs/x is not a complete address; did you mean s3://faces"),
        (
            ["sample", "runs/x", "--out", "s3://faces/x.png"],
            "error: --out: s3:/faces/x.png is an address, and this must",
        ),
        (["interpolate", "runs/x", "--out", "gs://faces/x"], "error: --out: gs:/faces/x is an address"),
        (
            ["registry", "register", "s3://faces/runs/x"],
            "error: RUN: s3://faces/runs/x is an address, and this must be",
        ),
        (
            ["train", "digits", "data.url=s3:/faces/x"],
            "error: data.url='s3:/faces/x' is not possible: s3:/faces/x is not",
        ),
        (
            ["train", "digits", "data.url=s3://[faces]/x", "--dry-run"],
            "error: data.url='s3://[faces]/x' is not possible",
        ),
        (["train", "digits", "checkpoint.url=s3:/faces/x"], "error: checkpoint.url='s3:/faces/x' is not possible"),
        (["train", "digits", "runs_dir=s3://faces/runs"], "error: runs_dir='s3://faces/runs' is not possible"),
        (["data", "info", "s3://[faces]/x"], "error: s3://[faces]/x: no bucket can be called '[faces]'"),
        (["data", "info", "s3://faces/x", "--endpoint-url", "http://[::1"], "error: the S3 endpoint 'http://[::1'"),
        (["sample", "s3://faces/x", "--endpoint-url", "http://h:port"], "error: the S3 endpoint 'http://h:port'"),
    ],
)
def test_wrong_input_is_one_line_with_status_2_and_leaves_nothing(
    arguments: list[str], line: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith(line)
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["train"], ["sample", "x", "--n", "0"], ["sample", "x", "--seed", "-1"]]
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "Usage: glann" in err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("this is wrong"), 2, "error: this is wrong"),
        (EnvironmentFault("s3 is gone"), 1, "error: s3 is gone"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "error: Permission denied: /root/x"),
        (KeyError("epoch"), 70, "error: unexpected KeyError: 'epoch'; this is a bug"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes the run"),
    ],
)
def test_how_a_run_may_fail(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(driver, "train", failing(error))
    given, _, err = run(capsys, "train", "digits")
    assert given == status
    assert err.strip().splitlines()[-1].startswith(line)
    assert "Traceback" not in err


def test_a_saved_run_is_stopped_not_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from glann.trainers.run.recovery import RunStopped

    monkeypatch.setattr(driver, "train", failing(RunStopped("saved at step 3")))
    assert run(capsys, "train", "digits")[::2] == (75, "stopped: saved at step 3\n")


@pytest.mark.parametrize("place", [0, 1, 3])
def test_traceback_is_shown_on_request_wherever_the_flag_stands(place: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "train", failing(UserError("this is wrong")))
    arguments = ["train", "digits", "glo.epochs=3"]
    arguments.insert(place, "--traceback")
    with pytest.raises(UserError, match="this is wrong"):
        cli.main(arguments)


def test_what_a_run_returns_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(driver, "train", lambda config, console: f"{config.name} with {config.glo.epochs} epochs")
    assert run(capsys, "train", "digits", "glo.epochs=3") == (0, "digits with 3 epochs\n", "")


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(driver, "train", failing(AssertionError("started")))
    status, out, _ = run(capsys, "train", "paper-mnist", "--dry-run")
    assert status == 0
    for word in ("parameters", "FLOP", "steps", "GPU-hours", "assumed", "latent table"):
        assert word in out
    assert list(elsewhere.iterdir()) == []


def test_a_closed_pipe_is_quiet():
    """`glann config --keys | head -1` ends without a word on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glann", "config", "--keys"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) != 0


def test_a_doctor_with_bad_news_has_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    status, out, err = run(capsys, "doctor")
    assert status == 1
    assert "BAD   ray auth       RAY_AUTH_MODE is not set" in out
    assert "BAD   ray            nothing answers at 127.0.0.1:1" in out
    assert "do: export RAY_AUTH_MODE=token" in out
    assert err == "2 of the checks are bad\n"


@pytest.mark.parametrize("variables", [{"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN_PATH": "missing"}])
def test_a_token_that_cannot_be_read_is_named(variables: dict[str, str], elsewhere: Path):
    """In a process of its own: Ray keeps what it has read of these variables."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}  # of a local Ray
    environment = others | {"HOME": str(elsewhere)} | variables
    done = in_a_process("jobs", "list", "--address", "http://127.0.0.1:1", env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no token to send to http://127.0.0.1:1: RAY_AUTH_MODE or RAY_AUTH_TOKEN_PATH")


class Model:
    """Stands in for a packaged model: image i is i everywhere."""

    resolution = 4

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def stream(self, n: int, seed: int, truncation: float, method: str):
        self.asked = (n, seed, truncation, method)
        for start in range(0, n, 3):
            numbers = np.arange(start, min(start + 3, n), dtype=np.uint8)
            yield np.broadcast_to(numbers[:, None, None, None], (len(numbers), 4, 4, self.channels)).copy()

    def stream_interpolations(self, pairs: list[tuple[int, int]], steps: int, seed: int, truncation: float, name: str):
        self.asked = (pairs, steps)
        for _ in pairs:
            yield np.zeros((steps, 4, 4, self.channels), np.uint8)


@pytest.fixture(params=[1, 3])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    stub = Model(request.param)
    monkeypatch.setattr(source, "load_model", lambda source, s3, device: stub)
    return stub


def test_samples_are_saved_as_one_array(model: Model, elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["sample", "runs/x", "--n", "7", "--seed", "5", "--truncation", "0.5", "--method", "glo"]
    assert run(capsys, *arguments, "--out", "deep/x.npz")[0] == 0
    images = np.load(elsewhere / "deep" / "x.npz")["images"]
    assert images.shape == (7, 4, 4, model.channels)
    assert images[:, 0, 0, 0].tolist() == list(range(7))
    assert model.asked == (7, 5, 0.5, "glo")


def test_samples_are_saved_as_a_folder(model: Model, elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    assert run(capsys, "sample", "runs/x", "-n", "4", "-o", "many")[0] == 0
    files = sorted((elsewhere / "many").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(4)]
    with Image.open(files[3]) as image:
        assert image.mode == ("L" if model.channels == 1 else "RGB")
        assert np.unique(np.asarray(image)).tolist() == [3]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["sample", "runs/x", "--n", str(10**30)], "name a folder, which is written image by image: --out samples"),
        (["sample", "runs/x", "--n", str(10**17), "--out", "x.npz"], "GB left"),
        (["sample", "runs/x", "--n", str(10**6)], "make a picture of 68,004 x 68,004 px"),
        (["sample", "runs/x", "--n", str(10**30), "--out", "many/of"], "GB left"),
        (["interpolate", "runs/x", "--pairs", str(10**15)], "give fewer --pairs or --steps"),
        (["interpolate", "runs/x", "--steps", str(10**15), "--out", "many"], "give fewer --pairs or --steps"),
    ],
)
def test_more_images_than_fit_are_refused_at_once(model: Model, elsewhere: Path, capsys, words: list[str], remedy: str):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert remedy in " ".join(err.split())
    assert not list(elsewhere.iterdir())


def test_samples_and_interpolations_are_saved_as_grids(
    model: Model, elsewhere: Path, capsys: pytest.CaptureFixture[str]
):
    from PIL import Image

    assert run(capsys, "sample", "runs/x", "--out", "grid.png")[0] == 0
    assert run(capsys, "interpolate", "runs/x", "--pairs", "2", "--steps", "5", "--out", "way.png")[0] == 0
    assert model.asked == ([(0, 1), (2, 3)], 5)
    with Image.open(elsewhere / "way.png") as image:
        assert image.width > 2 * image.height


def test_a_run_is_evaluated_as_asked(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from glann.config.run import load

    run_dir = elsewhere / "runs" / "digits"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(load("digits").to_yaml())
    asked = SimpleNamespace(arguments=())

    def measure(config, *opened: object, **how: object) -> list[Result]:
        asked.arguments = (config.evaluation.extractor, config.evaluation.samples, *opened, how)
        return [Result("fd_vgg16", 12.5, "own"), Result("fd_vgg16", 13.5, "gaussian")]

    monkeypatch.setattr(evaluation, "evaluate", measure)
    monkeypatch.setattr(source, "open_model", lambda run, s3, device: ("manifest", SimpleNamespace(own="imle")))
    status, out, _ = run(capsys, "evaluate", "runs/digits", "--extractor", "vgg16")
    assert (status, out.split()) == (0, ["fd_vgg16", "12.5", "gaussian/fd_vgg16", "13.5"])
    assert callable(asked.arguments[-1].pop("on_images"))
    how = {"seed": 0, "data": None, "with_codes": True, "step": None}
    assert asked.arguments == ("vgg16", 2000, "manifest", SimpleNamespace(own="imle"), how)
    status, _, err = run(capsys, "evaluate", "runs/digits", "--extractor", "resnet")
    assert status == 2
    assert err.startswith("error: evaluation.extractor='resnet' is not possible")


def test_a_data_set_is_packed_described_and_verified(elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    (elsewhere / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(elsewhere / "pictures" / f"{number}.png")
    status, out, _ = run(capsys, "data", "pack", "pictures", "packed", "--resolution", "32")
    assert (status, out) == (0, "5 images of 32 px in 1 shard: packed\n")
    assert "resolution     32" in run(capsys, "data", "info", "packed")[1]
    assert run(capsys, "data", "verify", "packed")[:2] == (0, "packed is intact\n")

    shard = next((elsewhere / "packed").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 0xFF
    shard.write_bytes(bytes(data))
    status, out, err = run(capsys, "data", "verify", "packed")
    assert (status, out) == (1, "")
    assert shard.name in err
    assert os.path.exists("packed/index.json")


def test_help_shows_every_word(capsys):
    """Square brackets are markup to the printer of help, and vanish unless they are escaped."""
    import typer
    from rich.text import Text

    def texts(command):
        yield command.help or ""
        for parameter in command.params:
            yield getattr(parameter, "help", None) or ""
        for inner in getattr(command, "commands", {}).values():
            yield from texts(inner)

    found = [text for text in texts(typer.main.get_command(cli.app)) if text]
    assert len(found) > 100
    for text in found:
        assert Text.from_markup(text).plain == text.replace("\\[", "[").replace("\b", ""), text


def test_examples_in_help_are_commands_that_there_are():
    """Indented lines that begin with glann, and nothing else: a line without its command once stood among them."""
    import typer

    def commands(command, path=("glann",)):
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from commands(inner, (*path, name))

    known = dict(commands(typer.main.get_command(cli.app)))
    for path, command in known.items():
        _, mark, examples = (command.help or "").partition("\b\n")
        for line in examples.split("\n\n")[0].splitlines() if mark else ():
            words = line.split()
            assert words[0] == "glann", f"{' '.join(path)}: {line}"
            assert tuple(words[:2]) in known, line


def test_paragraphs_of_help_fill_the_terminal(capsys):
    """Typer breaks the later ones where the source does, and then again at the edge."""
    status, out, _ = run(capsys, "evaluate", "--help")
    first, *_, last = cli.evaluate.__doc__.strip().split("\n\n")
    assert status == 0
    lines = [line.strip() for line in out.splitlines()]
    assert first in " ".join(lines)
    assert not set(map(str.strip, last.splitlines()[:-1])) & set(lines)  # none ends where that of the source does


def test_a_long_command_shows_how_far_it_is(capsys, monkeypatch):
    """Without a terminal a line every so often, on stderr: the output is for other programs."""
    from glann.cli import progress

    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.counted("evaluating", "images") as show:
        show(1000, 2906)
    assert capsys.readouterr() == ("", "evaluating  1,000 of 2,906 images\n")
