"""ResNet with bottlenecks and GroupNorm: He et al., Deep residual learning, 2016, table 1; Wu and He 2018, section 4.1.

As models are written: norms and activations one after the other, and the activation of a block after its shortcut.
"""

from typing import Any

import torch
from torch import nn

__all__ = ["ResNet"]

Tensor = Any


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, and a shortcut; the 3x3 one takes the stride."""

    def __init__(self, before: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.norm3 = nn.GroupNorm(groups, after)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if stride == 1 and before == after else nn.Sequential(
            nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(groups, after)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        identity = self.shortcut(x)
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """blocks: of each stage; (3, 4, 6, 3) is ResNet-50. width: of the first stage, 64 there."""

    def __init__(self, blocks: tuple[int, ...], width: int, groups: int, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.GroupNorm(groups, width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )  # fmt: skip
        stages: list[Any] = []
        channels = width
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                stages.append(Bottleneck(channels, width << stage, stride, groups))
                channels = 4 * (width << stage)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (N, classes)."""
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.stages(self.stem(x)), 1), 1))
