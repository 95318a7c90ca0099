"""The packaged model: what went in comes out, nothing hostile or damaged is opened, samples are reproducible."""

import json
import os
import re
import shutil

import mlflow
import numpy as np
import pytest
import safetensors.torch
import torch
from glann.config.run import Config
from glann.config.sections import S3Config
from glann.errors import UserError
from glann.inference.model import slerp
from glann.inference.package import FORMAT, GENERATOR, MANIFEST, export_model, load_model
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.models.noise import Stream, noise, stream_of
from glann.samplers.gaussian import gaussian

ROWS = 50
IMLE, GAUSSIAN = "sampler-imle.safetensors", "sampler-gaussian.safetensors"


def make_config(**sections):
    tree = {
        "name": "tiny",
        "data": {"url": "data", "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": 6, "width": 4},
        "glo": {"epochs": 1},
        "imle": {"noise_dim": 5, "hidden_dim": 8},
    }
    return Config.model_validate(tree | sections)


def make_networks(config, seed=0):
    """Networks whose BatchNorm statistics are not the initial ones, as after training."""
    torch.manual_seed(seed)
    generator = build_generator(config.generator, config.data.resolution, config.data.channels)
    mapping = build_mapping(config.sampler, config.generator.latent_dim)
    for _ in range(40):
        generator(mapping(torch.randn(16, config.sampler.noise_dim) + 0.5).detach())
    with torch.no_grad():  # fresh networks paint nearly uniform grey
        [p for p in generator.parameters() if p.ndim == 4][-1].mul_(20)
    return generator, mapping


@pytest.fixture
def config():
    return make_config()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    config = make_config()
    generator, mapping = make_networks(config)
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, 6), dim=1)
    folder = tmp_path_factory.mktemp("exported") / "model"
    return export_model(
        folder, config, generator.state_dict(), mapping.state_dict(), gaussian(z_ND), len(z_ND), "f" * 64
    )


@pytest.fixture
def folder(tmp_path, exported):
    return shutil.copytree(exported, tmp_path / "run" / "model")


def test_images_are_those_of_the_networks_that_were_exported(folder, config):
    generator, mapping = make_networks(config)
    model = load_model(folder)
    with torch.inference_mode():
        img = generator.eval()(mapping.eval()(model.noise(torch.arange(5), seed=3)))
    expected = (img * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    got = model.sample(5, seed=3)
    assert got.shape == (5, 28, 28, 1)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


def test_a_run_folder_is_as_good_as_its_model_folder(folder):
    np.testing.assert_array_equal(load_model(folder).sample(2), load_model(folder.parent).sample(2))


@pytest.mark.parametrize("sampler", ["imle", "gaussian"])
def test_image_i_of_a_seed_does_not_depend_on_n_or_batch(folder, sampler):
    """One grey level of tolerance: kernels of other batch sizes round differently."""
    model = load_model(folder)
    whole = model.sample(11, seed=7, sampler=sampler)
    cut = model.sample(11, seed=7, sampler=sampler, batch=3)
    fewer = model.sample(4, seed=7, sampler=sampler)
    assert np.abs(whole.astype(int) - cut).max() <= 1
    assert np.abs(whole[:4].astype(int) - fewer).max() <= 1
    assert np.abs(whole.astype(int) - model.sample(11, seed=8, sampler=sampler)).max() > 1


def test_truncation_zero_is_one_image_and_one_is_the_model(folder):
    model = load_model(folder)
    still = model.sample(4, truncation=0.0)
    assert np.abs(still.astype(int) - still[:1]).max() <= 1
    np.testing.assert_array_equal(model.sample(4), model.sample(4, truncation=1.0))
    assert (model.sample(4) != model.sample(4, truncation=0.5)).any()


def test_glo_codes_have_the_moments_of_the_training_codes(tmp_path):
    """Inside the ball nothing is projected, so mean and covariance can be compared."""
    config = make_config(glo={"epochs": 1, "constraint": "ball"})
    generator, _ = make_networks(config)
    mix = torch.randn(6, 6) * 0.05
    z_ND = torch.randn(4000, 6) @ mix + 0.1
    folder = export_model(tmp_path / "model", config, generator.state_dict(), None, gaussian(z_ND), len(z_ND), "f")
    model = load_model(folder)
    drawn = model.codes(model.noise(torch.arange(20000), 0, "gaussian"), "gaussian")
    torch.testing.assert_close(drawn.mean(0), z_ND.mean(0), atol=6e-3, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(z_ND.T), atol=4e-3, rtol=0)
    with pytest.raises(UserError, match=r"no sampler 'imle' \(stage 2 was not trained\); it has gaussian"):
        model.sample(1)


def test_glo_codes_are_of_unit_norm_on_the_sphere(folder):
    model = load_model(folder)
    norm_B = model.codes(model.noise(torch.arange(30), 0, "gaussian"), "gaussian").norm(dim=1)
    torch.testing.assert_close(norm_B, torch.ones(30))


def test_the_gaussian_of_fewer_codes_than_dimensions_exists():
    z_ND = torch.randn(3, 8)
    fitted = gaussian(z_ND)
    torch.testing.assert_close(fitted["root"] @ fitted["root"].T, torch.cov(z_ND.T), atol=1e-5, rtol=1e-4)
    single = gaussian(z_ND[:1])
    assert single["root"].abs().max() == 0


def test_interpolations_begin_and_end_at_their_images(folder):
    model = load_model(folder)
    images = model.sample(5, seed=2)
    path = model.interpolate([(0, 3), (4, 4)], steps=6, seed=2)
    assert path.shape == (2, 6, 28, 28, 1)
    for row, (start, end) in enumerate([(0, 3), (4, 4)]):
        assert np.abs(path[row, 0].astype(int) - images[start]).max() <= 1
        assert np.abs(path[row, -1].astype(int) - images[end]).max() <= 1


def test_interpolations_in_batches_are_the_same_images(folder):
    """In memory for a batch at a time, across the ends of pairs."""
    model, pairs = load_model(folder), [(0, 3), (4, 4), (2, 1)]
    whole = model.interpolate(pairs, steps=5, seed=2).reshape(15, 28, 28, 1)
    batches = list(model.stream_interpolations(pairs, steps=5, seed=2, batch=4))
    assert [len(batch) for batch in batches] == [4, 4, 4, 3]
    assert np.abs(np.concatenate(batches).astype(int) - whole).max() <= 1, "but for the rounding of a grey value"


def test_slerp_keeps_to_the_circle_and_survives_equal_and_opposite_ends():
    a, b = torch.randn(1, 9), torch.randn(1, 9)
    share = torch.linspace(0, 1, 5)[:, None]
    lengths = slerp(a, b, share).norm(dim=1)
    expected = torch.lerp(a.norm(), b.norm(), torch.linspace(0, 1, 5))
    torch.testing.assert_close(lengths, expected)
    torch.testing.assert_close(slerp(a, a, share), a.expand(5, -1))
    assert slerp(a, -a, share).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 1, "seed": -1}, "seed=-1"),
        ({"n": 1, "truncation": float("nan")}, "truncation=nan"),
        ({"n": 1, "sampler": "gan"}, "no sampler 'gan'; it has gaussian, imle"),
        ({"n": 1, "batch": 0}, "batch=0"),
    ],
)
def test_impossible_requests_are_one_line(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        load_model(folder).sample(**arguments)


def rewrite(folder, change):
    path = folder / MANIFEST
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_a_damaged_file_is_never_opened(folder):
    path = folder / GENERATOR
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"generator.safetensors does not have the SHA-256"):
        load_model(folder)
    path.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"has \d+ bytes, model.json says \d+"):
        load_model(folder)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        load_model(folder)


def test_a_file_that_is_not_safetensors_is_refused_though_its_hash_fits(folder):
    import hashlib
    import pickle

    content = pickle.dumps({"a": 1})
    (folder / IMLE).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(folder, lambda tree: tree["files"].update({IMLE: entry}))
    with pytest.raises(UserError, match="not a safetensors file"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree["files"].update({"../../etc/passwd": tree["files"][GAUSSIAN]}),
            "not a packaged model: files",
        ),
        (lambda tree: tree.update(format=FORMAT + 1), "format 3; this glann reads formats 1 and 2"),
        (lambda tree: tree.update(extra=1), "not a packaged model: extra"),
        (lambda tree: tree["generator"].update(width=10**9), "not a packaged model: generator.width"),
        (lambda tree: tree["files"].pop(GAUSSIAN), "the model is incomplete: files does not name sampler-gaussian"),
        # a network of 4 GB is claimed: refused by its shapes, before memory is taken
        (lambda tree: tree["generator"].update(width=1024), "does not fit the networks in model.json"),
        (lambda tree: tree["generator"].update(latent_dim=7), "generator.safetensors of .* does not fit the networks"),
    ],
)
def test_a_hostile_or_foreign_description_is_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message) as refusal:
        load_model(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff\xfe", b"[]", b" " * (2 << 20)])
def test_a_description_that_is_not_one_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match="not a packaged model"):
        load_model(folder)


def as_format_1(folder):
    """The same model as glann 0.1 wrote it."""
    tree = json.loads((folder / MANIFEST).read_text())
    samplers, files = tree.pop("samplers"), tree["files"]
    tree |= {"format": 1, "imle": {k: v for k, v in samplers["imle"]["config"].items() if k != "kind"}}
    del tree["own"]
    for new, old in ((IMLE, "mapping.safetensors"), (GAUSSIAN, "latents.safetensors")):
        (folder / new).rename(folder / old)
        files[old] = files.pop(new)
    (folder / MANIFEST).write_text(json.dumps(tree))


def test_a_model_of_format_1_draws_the_images_that_it_always_drew(folder, config):
    """Held against what glann 0.1 computed, written out: a new kind of sampler must not change anybody's images."""
    generator, mapping = make_networks(config)
    codes = safetensors.torch.load_file(folder / GAUSSIAN)
    as_format_1(folder)
    model = load_model(folder)
    index_B = torch.arange(7)
    with torch.inference_mode():
        e_BE = noise(5, 0, index_B, config.sampler.noise_dim, stream=Stream.SAMPLES)
        g_BD = noise(5, 1, index_B, 6, stream=Stream.SAMPLES)
        of_mapping = mapping.eval()(e_BE)
        of_gaussian = torch.nn.functional.normalize(codes["mean"] + g_BD @ codes["root"].T, dim=1)
        for sampler, z_BD in (
            (None, of_mapping),
            ("imle", of_mapping),
            ("gaussian", of_gaussian),
            ("glo", of_gaussian),
        ):
            img_BCHW = generator.eval()(z_BD).clamp(0, 1)
            expected = (img_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(model.sample(7, seed=5, sampler=sampler), expected)


def test_the_noise_of_a_kind_follows_from_its_name():
    """The first numbers of the kinds that there were before kinds had names, and no two kinds alike."""
    assert (stream_of("imle"), stream_of("gaussian")) == (0, 1)
    kinds = ["imle", "gaussian", "rs-imle", "adaptive-imle", "ot", "flow", "drift", "coupling", "ar", "gmm", "prior"]
    assert len({stream_of(kind) for kind in kinds}) == len(kinds)
    assert stream_of("flow") == stream_of("flow") < 2**32


def test_the_old_name_of_sampler_still_works_and_says_what_replaces_it(folder):
    model = load_model(folder)
    with pytest.warns(DeprecationWarning, match="sampler="):
        drawn = model.sample(3, method="glo")
    np.testing.assert_array_equal(drawn, model.sample(3, sampler="gaussian"))


def test_models_that_were_logged_before_still_find_what_they_import():
    """The code in a logged model of glann 0.1 imports from there."""
    from glann.tracking.packaged import load_model as from_the_old_place

    assert from_the_old_place is load_model


def test_missing_folders_say_so(tmp_path):
    with pytest.raises(UserError, match="no such run or model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="has the run finished"):
        load_model(tmp_path)


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, folder, config):
    generator, mapping = make_networks(config)
    state = generator.state_dict()
    state["fc1.weight"][0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        export_model(tmp_path / "bad", config, state, mapping.state_dict(), gaussian(torch.randn(4, 6)), 4, "f")
    assert not (tmp_path / "bad").exists()
    safetensors.torch.save_file(state, folder / GENERATOR)
    from glann.inference.package import _entry

    rewrite(folder, lambda tree: tree["files"].update({GENERATOR: _entry(folder / GENERATOR).model_dump()}))
    with pytest.raises(UserError, match="NaN or infinity"):
        load_model(folder)


def test_exporting_again_replaces_the_model_and_leaves_nothing_behind(folder, config):
    generator, _ = make_networks(config, seed=1)
    export_model(folder, config, generator.state_dict(), None, gaussian(torch.randn(4, 6)), 4, "g")
    assert sorted(os.listdir(folder)) == sorted([GENERATOR, GAUSSIAN, MANIFEST])
    assert os.listdir(folder.parent) == ["model"]
    assert list(load_model(folder).samplers) == ["gaussian"]


def test_a_resnet_is_packaged_too(tmp_path):
    config = make_config(
        data={"url": "d", "resolution": 64, "channels": 3},
        generator={"kind": "resnet", "latent_dim": 6, "width": 4, "max_width": 8},
    )
    generator, mapping = make_networks(config)
    folder = export_model(
        tmp_path / "model", config, generator.state_dict(), mapping.state_dict(), gaussian(torch.randn(9, 6)), 9, "f"
    )
    assert load_model(folder).sample(2).shape == (2, 64, 64, 3)


def test_the_mlflow_model_predicts_the_same_images_and_runs_no_pickle(tmp_path, folder):
    from glann.tracking.registry.models import save_pyfunc

    save_pyfunc(folder, tmp_path / "pyfunc")
    names = {path.name for path in (tmp_path / "pyfunc").rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pth", ".pt", ".bin"))]
    model = mlflow.pyfunc.load_model(str(tmp_path / "pyfunc"))
    expected = load_model(folder).sample(3, seed=4, truncation=0.5)
    got = model.predict({"n": 3, "seed": 4, "truncation": 0.5})
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)
    import pandas as pd

    table = pd.DataFrame([{"n": 3, "seed": 4, "truncation": 0.5}, {"n": 1, "seed": 0, "truncation": 1.0}])
    served = model.predict(table)
    np.testing.assert_array_equal(served[:3], expected)
    assert len(served) == 4
    assert model.predict({"n": 2}).shape == (2, 28, 28, 1)
    with pytest.raises(Exception, match="the limit is 4096"):
        model.predict({"n": 10**9})


@pytest.fixture
def bucket(monkeypatch):
    """An S3 server with one empty bucket `models`, and how to reach it."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="models")
    yield client, S3Config(endpoint_url=endpoint, max_attempts=1, timeout_s=5)
    server.stop()


def test_a_model_is_loaded_from_s3_and_only_what_it_names_is_fetched(bucket, folder):
    client, s3 = bucket
    for path in folder.iterdir():
        client.upload_file(str(path), "models", f"runs/tiny/model/{path.name}")
    client.put_object(Bucket="models", Key="runs/tiny/model/evil.pkl", Body=b"never fetched")
    expected = load_model(folder).sample(3)
    for address in ("s3://models/runs/tiny", "s3://models/runs/tiny/model"):
        np.testing.assert_array_equal(load_model(address, s3=s3).sample(3), expected)
    with pytest.raises(UserError, match="holds no packaged model"):
        load_model("s3://models/runs", s3=s3)
    client.delete_object(Bucket="models", Key=f"runs/tiny/model/{GAUSSIAN}")
    with pytest.raises(UserError, match=r"incomplete: sampler-gaussian\.safetensors is missing"):
        load_model("s3://models/runs/tiny", s3=s3)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda", rf"--device cuda: this machine has no CUDA device \(torch {re.escape(torch.__version__)}\)"),
        ("cuda:7", "--device cuda:7: this machine has no CUDA device"),
        ("gpu", "--device 'gpu' is not possible; use auto, cpu, cuda, or cuda:1"),
        ("meta", "--device 'meta' is not possible"),
        ("", "--device '' is not possible"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(device, reason, folder, monkeypatch):
    """Before a file is read; torch raises an AssertionError or a RuntimeError."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=reason):
        load_model(folder, device=device)


def test_a_gpu_beyond_the_last_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:2: this machine has 2 CUDA devices; the last is cuda:1"):
        load_model(folder, device="cuda:2")
