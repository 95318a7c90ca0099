"""How well a critic classifies held-out images: counted exactly, only those with a label, however they are dealt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.config.run import validate
from glann.trainers import labelled
from glann.trainers.labelled import ACCURACY, HeldOut
from glann.trainers.stage import StageStep
from torch import nn
from toy_images import ToyImages

ROWS = 211  # more than one batch, which has 100


def config(**critic):
    tree = {
        "name": "t",
        "method": "gan",
        "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
        "generator": {"kind": "infogan", "latent_dim": 5, "width": 4},
        "networks": {"epochs": 1, "critic": {"width": 4, "classes": 3, **critic}, "labelled": 6},
        "sampler": {"kind": "prior"},
        "engine": {"kind": "torch"},
    }
    return validate(tree, "test")


class ByHeight(nn.Module):
    """A critic whose class is a function of the image alone; in training mode it is always wrong."""

    def judge(self, img_BCHW, weight_B):
        height_B = (img_BCHW[:, 0] > 0).any(2).sum(1)
        head_BK = nn.functional.one_hot((height_B % 3).long(), 3).float()
        return type("Judged", (), {"head_BQ": head_BK * (-1 if self.training else 1)})()


def classes(images):
    """What `ByHeight` says, one image at a time."""
    return np.array([(images.decode(row)[0] > 0).any(1).sum() % 3 for row in range(len(images))])


@pytest.fixture
def label_N():
    found = np.random.default_rng().integers(0, 3, ROWS).astype(np.int32)
    found[::7] = -1
    return found


def test_the_accuracy_is_the_share_of_the_labelled_images(label_N):
    images, critic = ToyImages(ROWS), ByHeight()
    found = HeldOut(config(), images, label_N).accuracy(critic, torch.device("cpu"))
    assert found == pytest.approx(np.mean(classes(images)[label_N >= 0] == label_N[label_N >= 0]), abs=1e-12)
    assert critic.training, "as it was"


def test_workers_count_what_one_counts(label_N, monkeypatch):
    images, parts = ToyImages(ROWS), []
    monkeypatch.setattr(labelled, "world_size", lambda: 3)
    monkeypatch.setattr(labelled, "all_sum", lambda hits: parts.append(hits.clone()) or hits)
    for number in range(3):
        monkeypatch.setattr(labelled, "rank", lambda number=number: number)
        HeldOut(config(), images, label_N).accuracy(ByHeight(), torch.device("cpu"))
    right, known = torch.stack(parts).sum(0).tolist()
    assert known == (label_N >= 0).sum()
    assert right == (classes(images) == label_N).sum()


def test_it_is_among_the_facts_of_the_end_of_an_epoch_alone(label_N):
    steps = [StageStep(1, 0, 2, torch.zeros(3)), StageStep(1, 1, 2, torch.zeros(3), facts={"a": 1.0}, ends_epoch=True)]
    held_out = HeldOut(config(), ToyImages(ROWS), label_N)
    first, last = held_out.measured(steps, ByHeight(), torch.device("cpu"))
    assert ACCURACY not in first.facts
    assert last.facts["a"] == 1.0
    assert 0 < last.facts[ACCURACY] < 1


@pytest.mark.parametrize(
    ("critic", "unseen", "measured"),
    [({}, True, True), ({}, False, False), ({"kernels": 4}, True, False)],
    ids=["labels", "no held-out images", "minibatch discrimination"],
)
def test_it_is_measured_where_classes_are_of_one_image(critic, unseen, measured, monkeypatch):
    monkeypatch.setattr(labelled, "held_out_images", lambda *_: ToyImages(ROWS) if unseen else None)
    assert (HeldOut.of(config(**critic), ToyImages(20)) is not None) == measured


def test_no_accuracy_without_classes(monkeypatch):
    monkeypatch.setattr(labelled, "held_out_images", lambda *_: pytest.fail("nothing is to be read"))
    plain = config()
    networks = plain.networks.model_copy(update={"critic": plain.networks.critic.model_copy(update={"classes": 0})})
    assert HeldOut.of(plain.model_copy(update={"networks": networks}), ToyImages(20)) is None
