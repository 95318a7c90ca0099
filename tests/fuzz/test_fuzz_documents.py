"""Tampered indexes, checkpoints, models, run folders and configurations are read or refused, and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from glann.cli.run_status import Seen, described
from glann.cluster.checkpoints import reader, retention, writer
from glann.cluster.checkpoints.layout import Part, parse
from glann.cluster.checkpoints.lease import Lease
from glann.config import run as configuration
from glann.config.run import Config
from glann.datasets.index import Index, _fingerprint
from glann.datasets.journal import entry_bytes, entry_of
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.datasets.verify import verify
from glann.inference.package import export_model, load_model
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.reports.facts import RunFacts
from glann.reports.figures import metric_rows
from glann.reports.run import headline, render, timing_rows
from glann.reports.status import read_status
from glann.samplers.gaussian import gaussian
from glann.storage.local import LocalStore
from glann.tracking.outbox import OutboxState
from glann.trainers.run.state import load as load_saved
from held_rows import Held
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed_bytes, changed_trees, json_texts, texts, values

ROWS = 6


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a checkpoint, a model and a run folder, all good."""
    root = tmp_path_factory.mktemp("workshop")
    rng = np.random.default_rng(0)
    np.savez(root / "images.npz", images=rng.integers(0, 256, (ROWS, 28, 28), np.uint8))
    pack(str(root / "images.npz"), str(root / "data"), resolution=28, channels=1, shard_size_mb=0.004)
    make_run(root)
    return root


def tiny() -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "data": {"url": "data", "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": 4, "width": 4},
            "glo": {"epochs": 1},
            "imle": {"noise_dim": 3, "hidden_dim": 4},
        }
    )


def make_run(root: Path) -> None:
    config, run = tiny(), root / "run"
    generator = build_generator(config.generator, 28, 1).state_dict()
    mapping = build_mapping(config.sampler, 4).state_dict()
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, 4), dim=1)
    export_model(run / "model", config, generator, mapping, gaussian(z_ND), len(z_ND), "f" * 64)
    (run / "config.yaml").write_text(config.to_yaml())
    entry = {"time": 1.5, "stage": "glo", "epoch": 1, "loss": 0.5, "images_per_s": 3.0, "seconds": 1.0, "step": 1}
    lines = [entry, entry | {"step": 2, "time": 2.5}, {"stage": "evaluation", "fd_squeezenet": 3.0, "step": 3}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"metrics": {"l1": 0.1, "fd_squeezenet": 3.0}, "timings": {"train_s": 3.0}, "rows": 6, "fingerprint": "f"}
    (run / "summary.json").write_text(json.dumps(summary))
    OutboxState(key="k", uri="sqlite:///mlflow.db", run_id="r", sent_bytes=3).save(run)
    index = Index.load(str(root / "data"))
    state = {
        "position": {"stage": "imle", "epoch": 0, "step": 0, "serial": 4},
        "updates": {"generator": 3, "mapping": None},
        "rows": ROWS,
        "fingerprint": index.fingerprint,
    }
    checkpoint_writer = writer.CheckpointWriter(LocalStore(root / "saved"), 0, 1, 3, 20.0, "a1", block_bytes=60)
    latents = {"z": z_ND.numpy(), "steps": np.ones(ROWS, np.int32)}
    checkpoint_writer.save(4, {"generator": generator, "generator_ema": generator}, Held(0, latents), state)
    checkpoint_writer.wait()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@st.composite
def safetensors_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header says what it likes, of the right length or not."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    kinds = ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X")
    if draw(st.booleans()):  # another type with the same number of bytes or not
        name = draw(st.sampled_from(sorted(name for name in header if name != "__metadata__")))
        header[name]["dtype"] = draw(st.sampled_from(kinds))
        if draw(st.booleans()):
            header[name]["shape"] = draw(st.sampled_from(([0, 2**63 - 1], [2**63], [0], [-1], [], [1], [2, 3])))
    text = draw(json_texts(st.just(header)))
    told = draw(st.sampled_from((len(text), len(text), len(text), 0, 8, 10 << 30, 2**63, 2**64 - 1)))
    return told.to_bytes(8, "little") + text + draw(st.sampled_from((body, body, b"", body + b"x")))


def hostile(content: bytes, suffix: str) -> st.SearchStrategy[bytes]:
    """Something in place of a file with this content."""
    anything = changed_bytes(st.just(content)) | st.binary(max_size=200)
    if suffix == ".safetensors":
        return safetensors_files(content) | safetensors_files(content) | anything
    if suffix == ".json":
        return json_texts(st.just(json.loads(content))) | anything
    return anything


# data sets ---------------------------------------------------------------------------------------


@given(data=st.data())
def test_index(jail, workshop, data):
    """Fingerprint and hashes are made to fit: an attacker can do that too."""
    files = files_of(workshop / "data")
    tree = json.loads(files["index.json"])
    kind = data.draw(st.sampled_from(("tree", "text", "records", "shard")))
    if kind == "records":
        files["images.bin"] = data.draw(changed_bytes(st.just(files["images.bin"])) | st.binary(max_size=400))
        tree["images_sha256"] = sha256(files["images.bin"])
    elif kind == "shard":
        name = tree["shards"][0]["file"]
        files[name] = data.draw(changed_bytes(st.just(files[name])))
        tree["shards"][0] |= {"sha256": sha256(files[name]), "bytes": max(1024, len(files[name]))}
    elif kind == "tree":
        tree = data.draw(changed_trees(st.just(tree)))
    if kind == "text":
        files["index.json"] = data.draw(json_texts(st.just(tree)))
    else:
        if isinstance(tree, dict):
            with contextlib.suppress(TypeError, ValueError):
                tree["fingerprint"] = _fingerprint(tree)
        files["index.json"] = json.dumps(tree).encode()
    folder = jail.fill(files)
    if jail.read(lambda: Index.load(str(folder))):
        jail.read(lambda: verify(str(folder)))
        rows = ImageRows(str(folder))
        for row in range(min(len(rows), ROWS)):
            jail.read(lambda row=row: rows.decode(row))


@given(data=st.data())
def test_unfinished_pack(jail, workshop, data):
    """`packing.json` and the shards it names, as `glann data pack` finds them when it goes on."""
    files = {name: content for name, content in files_of(workshop / "data").items() if name.endswith(".tar")}
    index = Index.load(str(workshop / "data"))
    finished = [{"shard": shard.model_dump(), "position": 1 + n} for n, shard in enumerate(index.shards)]
    tree = {"recipe": index.header.recipe, "finished": finished[:-1]}
    del files[index.shards[-1].file]
    if data.draw(st.booleans()):
        name = index.shards[0].file
        files[name] = data.draw(changed_bytes(st.just(files[name])))
        finished[0]["shard"] |= {"sha256": sha256(files[name]), "bytes": max(1024, len(files[name]))}
    else:
        tree = data.draw(changed_trees(st.just(tree)))
    files["packing.json"] = data.draw(json_texts(st.just(tree)) | st.just(json.dumps(tree).encode()))
    if data.draw(st.booleans()):  # as earlier versions did not: a file beside each shard
        files["packing.json"] = json.dumps({"recipe": index.header.recipe}).encode()
        records = index.records_N.tobytes()
        for position, shard in enumerate(index.shards[:-1], 1):
            own, records = records[: 44 * shard.rows], records[44 * shard.rows :]
            files[entry_of(shard)] = entry_bytes(shard, position, {}, own)
        victim = data.draw(st.sampled_from(sorted(name for name in files if name.endswith(".packed"))))
        files[victim] = data.draw(changed_bytes(st.just(files[victim])) | st.binary(max_size=200))
    folder = jail.fill(files)
    options = {"resolution": 28, "channels": 1, "shard_size_mb": 0.004, "name": "data"}
    jail.read(lambda: pack(str(workshop / "images.npz"), str(folder), **options))


# checkpoints -------------------------------------------------------------------------------------


def read_checkpoint(folder: Path, index: Index) -> None:
    """What a run does with its folder of checkpoints when it goes on."""
    store = LocalStore(folder)
    step = retention.latest(store)
    for name in reader.names(store, 4 if step is None else step):
        reader.load_tensors(store, 4 if step is None else step, name)
    reader.load_rows(store, 4 if step is None else step, range(1, ROWS))
    load_saved(store, 4 if step is None else step, index, ROWS)


@given(data=st.data())
def test_checkpoint(jail, workshop, data):
    """One file is tampered with, and its size and hash in the manifest made to fit, or the manifest itself is."""
    files = files_of(workshop / "saved")
    [place] = [name for name in files if name.endswith("manifest.json")]
    manifest = json.loads(files[place])
    victim = data.draw(st.sampled_from(sorted(files)))
    files[victim] = data.draw(hostile(files[victim], Path(victim).suffix))
    entry = {"size": len(files[victim]), "sha256": sha256(files[victim])}
    for name in [name for name in manifest["files"] if victim.endswith(name)]:
        manifest["files"][name] |= entry
        files[place] = json.dumps(manifest).encode()
    index = Index.load(str(workshop / "data"))
    folder = jail.fill(files)
    jail.read(lambda: read_checkpoint(folder, index))


@given(text=json_texts(st.just({"attempt": "a", "world": 2, "files": {"x.json": {"size": 1, "sha256": "0" * 64}}})))
def test_part(jail, text):
    jail.read(lambda: parse(Part, text, "part-0.json"))


LEASE = {"number": 1, "owner": "0f", "holder": "me", "since": "now", "process": "here 1", "count": 3, "released": False}


@given(text=json_texts(st.just(LEASE)))
def test_lease(jail, text):
    jail.read(lambda: parse(Lease, text, "lease-000001.json"))


STATUS = {
    **{"name": "x", "state": "running", "host": "h", "began": 1.0, "updated": 2.0, "stage": "stage 1", "epoch": 1},
    **{"epochs": 9, "done": 0.1, "left_s": 3.0, "images": [1, 2], "loss": 0.5, "images_per_s": 4.0, "mfu": 0.3},
    **{"checkpoint_step": 7, "checkpoint_at": 1.5, "best": {"metric": "m", "value": 0.5, "step": 3}, "workers": 1},
    "devices": [{"rank": 0, "node": "n", "device": "d", "gpu": True, "use": 0.9, "memory": 5, "total": 6}],
}


@given(text=json_texts(st.just(STATUS)))
def test_status(jail, text):
    """What `glann jobs status` reads from a store and puts into words."""
    folder = jail.fill({"status.json": text})

    def show() -> None:
        status = read_status(LocalStore(folder))
        assert status is not None
        assert described(Seen(status))
        assert Seen(status).line(3.0)

    jail.read(show)


# models and run folders --------------------------------------------------------------------------


@given(data=st.data())
def test_model(jail, workshop, data):
    files = files_of(workshop / "run" / "model")
    manifest = json.loads(files["model.json"])
    victim = data.draw(st.sampled_from(sorted(files)))
    files[victim] = data.draw(hostile(files[victim], Path(victim).suffix))
    if victim != "model.json":
        manifest["files"][victim] = {"size": len(files[victim]), "sha256": sha256(files[victim])}
        files["model.json"] = json.dumps(manifest).encode()
    folder = jail.fill(files)
    jail.read(lambda: load_model(folder).sample(2))


@given(data=st.data())
def test_run_folder(jail, workshop, data):
    """What `glann report` and a resumed run read."""
    files = {name: content for name, content in files_of(workshop / "run").items() if "/" not in name}
    victim = data.draw(st.sampled_from(("metrics.jsonl", "summary.json", "tracking.json", "config.yaml")))
    if victim == "metrics.jsonl":
        lines = files[victim].splitlines()
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = data.draw(json_texts(st.just(json.loads(lines[at]))))
        files[victim] = b"\n".join(lines) + b"\n"
    elif victim == "config.yaml":
        files[victim] = data.draw(yaml_texts(st.just(yaml.safe_load(files[victim])))).encode("utf-8", "surrogatepass")
    else:
        files[victim] = data.draw(json_texts(st.just(json.loads(files[victim]))))
    folder = jail.fill(files)
    drawn = data.draw(st.integers(0, 9)) == 0  # charts take most of a second

    def report() -> None:
        facts = RunFacts.read(folder)
        assert headline(facts)
        metric_rows(facts.metrics), timing_rows(facts.timings)
        if drawn:
            render(facts)

    jail.read(report)
    jail.read(lambda: OutboxState.load(folder))


# configuration -----------------------------------------------------------------------------------

NASTY_YAML = (
    "&a [*a]",
    "&a {x: *a}",
    "2001-99-99",
    "2001-01-01 99:99:99",
    "!!python/object/apply:os.system ['touch ../outside/evil']",
    "!!python/name:os.system",
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!unknown x",
    "<<: 1",
    "{<<: {name: x}}",
    "{? [a] : b}",
    "{? {a: b} : c}",
    "{1: 2, 1.5: x, null: y, true: z}",
    "1:99:99",
    "0x" + "f" * 400,
    "1" * 6000,
    ".nan",
    "-.inf",
    "1e400",
    "'\ud800'",
    "\0",
    "[" * 3000,
    "- " * 3000,
    "%YAML 9.9\n---\nx",
    "--- 1\n--- 2",
    "*nothing",
    "=",
    "@x",
    "k" * 3000,
)
BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'lol'] * 9)}]" for n in range(9))


@st.composite
def yaml_texts(draw: st.DrawFn, trees: st.SearchStrategy[Any]) -> str:
    """YAML of a tampered tree, at times with something in it that only YAML knows."""
    text = yaml.safe_dump(draw(changed_trees(trees) | trees | values), allow_unicode=True)
    kind = draw(st.sampled_from(("whole",) * 3 + ("nasty", "nasty", "bomb", "noise")))
    if kind == "nasty":
        nasty = draw(st.sampled_from(NASTY_YAML))
        key = draw(st.sampled_from(("name", "data", "glo", "data.url", "seed", "cluster", "surprise", "k" * 2000)))
        text = draw(st.sampled_from((nasty, f"{text}\n{key}: {nasty}\n", f"{key}: {nasty}\n")))
    elif kind == "bomb":
        text = f"{BOMB}\n{text}\n{draw(st.sampled_from(('name', 'data', 'glo', 'x')))}: *a8\n"
    elif kind == "noise":
        text = draw(changed_bytes(st.just(text.encode("utf-8", "replace")))).decode("utf-8", "replace")
    return text


RECIPE = yaml.safe_load((configuration.RECIPES / "digits.yaml").read_text())
KEYS = sorted(configuration.known_keys())


@st.composite
def overrides(draw: st.DrawFn) -> str:
    """An override of a known key or another by any value."""
    key = draw(st.sampled_from(KEYS) | st.sampled_from(KEYS).map(lambda key: key + ".x") | texts)
    value = draw(st.sampled_from(NASTY_YAML) | st.sampled_from((BOMB,)) | values.map(json.dumps) | texts)
    return f"{key}={value}"


@given(text=yaml_texts(st.just(RECIPE)), given_overrides=st.lists(overrides(), max_size=3))
def test_configuration(jail, text, given_overrides):
    folder = jail.fill({"recipe.yaml": text.encode("utf-8", "surrogatepass")})
    jail.read(lambda: used(configuration.load(folder / "recipe.yaml", given_overrides)))


@given(given_overrides=st.lists(overrides(), min_size=1, max_size=3))
def test_overrides(jail, given_overrides):
    jail.read(lambda: used(configuration.load("digits", given_overrides)))


def used(config: Config) -> None:
    """Whatever is accepted can be written down and read again."""
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_the_documents_are_good_before_they_are_tampered_with(jail, workshop):
    """Otherwise every case would be refused for one dull reason."""
    index = Index.load(str(workshop / "data"))
    assert jail.read(lambda: verify(str(workshop / "data")) and pytest.fail("damaged"))
    assert jail.read(lambda: read_checkpoint(jail.fill(files_of(workshop / "saved")), index))
    assert jail.read(lambda: load_model(jail.fill(files_of(workshop / "run" / "model"))).sample(2))
    assert jail.read(lambda: render(RunFacts.read(jail.fill(files_of(workshop / "run")))))
    assert jail.read(lambda: used(configuration.load("digits")))
