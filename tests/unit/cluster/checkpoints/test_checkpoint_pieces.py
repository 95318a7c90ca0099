"""Protects how a checkpoint is cut, dealt out and sent: nothing is lost, and nobody's share depends on chance."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import safetensors.torch
import torch
from glann.cluster.checkpoints.layout import DamagedCheckpoint, Manifest, group_files
from glann.cluster.checkpoints.pieces import LazyTensor, copy_share, cut, deal, put, serialized, write_rows
from glann.cluster.snapshot import Snapshot
from glann.storage.local import LocalStore
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.dictionaries(
    st.from_regex(r"\A[a-km-z][a-z_]{0,8}\Z"),
    st.dictionaries(st.text(min_size=1, max_size=8), st.integers(0, 100), max_size=12),
    max_size=5,
)


@given(SIZES, st.integers(1, 150))
@settings(max_examples=200, deadline=None)
def test_every_tensor_is_in_one_file_and_only_single_tensors_exceed_the_limit(sizes, limit):
    pieces = cut(sizes, limit)
    found = [(piece.group, name) for piece in pieces for name in piece.names]
    assert sorted(found) == sorted((group, name) for group, tensors in sizes.items() for name in tensors)
    assert len({piece.file for piece in pieces}) == len(pieces)
    for piece in pieces:
        assert piece.nbytes == sum(sizes[piece.group][name] for name in piece.names)
        assert piece.nbytes <= limit or len(piece.names) == 1
    assert {piece.group for piece in pieces} == set(sizes)


@given(SIZES, st.integers(1, 150), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_shares_differ_by_no_more_than_the_largest_file(sizes, limit, world):
    pieces = cut(sizes, limit)
    owners = deal(pieces, world)
    assert owners == deal(list(pieces), world)
    load = [sum(p.nbytes for p, owner in zip(pieces, owners, strict=True) if owner == rank) for rank in range(world)]
    assert max(load) - min(load) <= max((piece.nbytes for piece in pieces), default=0)


def test_the_order_in_which_tensors_are_given_does_not_matter():
    assert cut({"a": {"x": 5, "y": 6, "b": 7}}, 11) == cut({"a": {"y": 6, "b": 7, "x": 5}}, 11)


@pytest.mark.parametrize("name", ["latents-0-5", "../x", "", "A", "x" * 65])
def test_groups_have_names_that_make_files(name):
    with pytest.raises(ValueError, match="cannot be the name"):
        cut({name: {"x": 1}}, 10)


def tensors():
    return {
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "count": torch.tensor(9),
        "steps": torch.arange(5, dtype=torch.int32),
        "flag": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "codes": torch.randn(4, 6),
        'näme\n"': torch.ones(1),
    }


def test_what_is_sent_is_what_the_safetensors_library_reads():
    data = b"".join(serialized(tensors() | {"codes": torch.full((4, 6), 2.0)}))
    held = safetensors.torch.load(data)
    assert set(held) == set(tensors())
    torch.manual_seed(0)
    mine = tensors()
    held = safetensors.torch.load(b"".join(serialized(mine)))
    for name, tensor in mine.items():
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name], tensor)


def test_what_is_sent_is_not_copied():
    tensor = torch.zeros(100)
    *_, body = serialized({"x": tensor})
    tensor[0] = 1.0
    assert bytes(body[:4]) == torch.tensor(1.0).numpy().tobytes()


def test_every_rank_copies_its_share_and_makes_every_lazy_tensor_whole(tmp_path):
    asked: list[tuple[int, str]] = []
    world = 3

    def groups(rank):
        def lazy(name):
            def whole():
                asked.append((rank, name))
                return torch.full((10,), float(ord(name)))

            return LazyTensor(40, whole)

        return {"weights": {name: lazy(name) for name in "dcba"}, "moments": {"x": torch.ones(3), "y": torch.zeros(2)}}

    shares = [copy_share(groups(rank), rank, world, 50) for rank in range(world)]
    assert [name for rank, name in asked if rank == 0] == list("abcd")
    for before, after in pairwise(range(world)):
        assert [n for rank, n in asked if rank == before] == [n for rank, n in asked if rank == after]
    files = [file for share in shares for file in share]
    assert sorted(files) == ["moments.safetensors", *(f"weights-0000{n}-of-00004.safetensors" for n in range(1, 5))]
    held = {name: tensor for share in shares for file in share.values() for name, tensor in file.items()}
    assert {name: float(tensor[0]) for name, tensor in held.items()} == {n: float(ord(n)) for n in "abcd"} | {
        "x": 1.0,
        "y": 0.0,
    }


def test_the_hash_is_that_of_what_is_stored(tmp_path):
    store = LocalStore(tmp_path)
    big = memoryview(bytes(range(256)) * 40_000)
    file = put(store, "x", iter([big, memoryview(b""), memoryview(b"end")]))
    data = store.read("x")
    assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert data == bytes(big) + b"end"


def test_rows_are_written_in_blocks(tmp_path):
    z = torch.arange(20.0).reshape(10, 2)
    files = write_rows(LocalStore(tmp_path), "step-000001/a", 5, Snapshot({"z": z}), block_bytes=24)
    assert list(files) == [f"latents-{a}-{b}.safetensors" for a, b in ((5, 8), (8, 11), (11, 14), (14, 15))]
    assert write_rows(LocalStore(tmp_path), "x", 0, Snapshot({"z": z[:0]}), 24) == {}


@pytest.mark.parametrize(
    "names",
    [
        ["g-00001-of-00002"],
        ["g-00001-of-00003", "g-00003-of-00003"],
        ["g", "g-00001-of-00002", "g-00002-of-00002"],
        ["g-00001-of-00002", "g-00002-of-00003"],
        [],
    ],
)
def test_a_group_of_which_a_file_is_not_listed_is_damaged(tmp_path, names):
    file = {"size": 1, "sha256": "0" * 64}
    manifest = Manifest(step=1, attempt="a", rows=0, files={f"{name}.safetensors": file for name in names})
    with pytest.raises(DamagedCheckpoint, match="does not contain g completely"):
        group_files(LocalStore(tmp_path), manifest, "g")
