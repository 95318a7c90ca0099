"""A small classifier of digits, trained on the real ones: what the quality of samples is judged by.

Not part of the product. Shapes: N images, H, W height and width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

EPOCHS = 15


class DigitJudge(nn.Module):
    """Two convolutions and two dense layers; over 97% on held-out real digits after a few epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, img_N1HW: Tensor) -> Tensor:
        return self.layers(img_N1HW)


def train_judge(images_NHW: np.ndarray, labels_N: np.ndarray, seed: int) -> tuple[DigitJudge, float]:
    """A judge and its accuracy on a fifth of the digits that it has not seen."""
    torch.manual_seed(seed)
    order = torch.randperm(len(images_NHW))
    x = torch.from_numpy(images_NHW).float()[:, None] / 255
    y = torch.from_numpy(labels_N.astype(np.int64))
    held, used = order[: len(order) // 5], order[len(order) // 5 :]
    judge = DigitJudge()
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in used[torch.randperm(len(used))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(judge(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    judge.eval()
    with torch.no_grad():
        accuracy = (judge(x[held]).argmax(1) == y[held]).float().mean()
    return judge, float(accuracy)


@torch.no_grad()
def judge_samples(judge: DigitJudge, images_NHW: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of images that are some digit with confidence >= 0.9, and the share of each digit among all."""
    probability = judge(torch.from_numpy(images_NHW).float()[:, None] / 255).softmax(1)
    confidence, digit = probability.max(1)
    return float((confidence >= 0.9).float().mean()), np.bincount(digit.numpy(), minlength=10) / len(digit)
