"""What labels and codes have to do with images: conditions, classes, and the information of an image about its code.

Labels are integers from 0; -1 is unknown.

Shapes: B batch, C, H, W channels, height, width, D latent dimension, K classes or categories, Q numbers of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def one_hot(label_B: Tensor, classes: int) -> Tensor:
    """1 at each label, float32 [B, K]; an unknown one has zeros only."""
    return (label_B[:, None] == torch.arange(classes, device=label_B.device)).float()


def with_maps(img_BCHW: Tensor, label_B: Tensor, classes: int) -> Tensor:
    """Images with a channel for each class, which is 1 all over for the class of the image (Mirza & Osindero 2014)."""
    hot_BK11 = one_hot(label_B, classes)[:, :, None, None].to(img_BCHW.dtype)
    return torch.cat([img_BCHW, hot_BK11.expand(-1, -1, *img_BCHW.shape[2:])], 1)


def with_category(code_BD: Tensor, label_B: Tensor, classes: int) -> Tensor:
    """Codes whose category, their last numbers, is the label."""
    return torch.cat([code_BD[:, : code_BD.shape[1] - classes], one_hot(label_B, classes).to(code_BD.dtype)], 1)


def class_loss(logit_BK: Tensor, label_B: Tensor) -> Tensor:
    """Cross-entropy of each row; 0 where the label is unknown."""
    return F.cross_entropy(logit_BK, label_B, ignore_index=-1, reduction="none")


def information(head_BQ: Tensor, code_BD: Tensor, categories: int, continuous: int) -> Tensor:
    """A bound from below on what an image says of its code, in nats, per row (Chen et al. 2016, Sec. 5).

    H(c) + log Q(c | image), whose mean is the mutual information where Q is the posterior. The first numbers of a code,
    uniform from -1 to 1, have a normal Q of unit variance, whose mean the head gives; its category, the last numbers,
    has the logits of the head.

    Args:
        head_BQ: means [B, continuous] and logits [B, categories].
    """
    mean_BC, logit_BK = head_BQ.split([continuous, categories], 1)
    apart_BC = code_BD[:, :continuous] - mean_BC
    bound_B = (math.log(2) - 0.5 * math.log(2 * math.pi) - 0.5 * apart_BC.square()).sum(1)
    if not categories:
        return bound_B
    hot_BK = code_BD[:, code_BD.shape[1] - categories :]
    return bound_B + math.log(categories) + (hot_BK * logit_BK.log_softmax(1)).sum(1)
