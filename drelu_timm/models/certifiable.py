"""Architectures that timm lacks: two models on which work on certified training reports its results."""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import InputError
from .architectures import Classifier, ShallowCNN, height_and_width


class CNN7(Classifier):
    """Five 3x3 convolutions and a hidden layer, each with BatchNorm and ReLU; the third convolution has stride 2.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", https://arxiv.org/abs/2103.15887. They
    have 64 and 128 channels and 512 units; ``channels`` scales all three.

    Args:
        num_classes, in_chans, drop_rate: See `architectures.Dense`.
        img_size: Height and width of the image in pixels, or one number for both; at least 2.
        channels: Channels of the first convolution.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        channels: int = 64,
        drop_rate: float = 0.0,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        sides = height_and_width(img_size)
        if min(sides) < 2:
            raise InputError(f"img_size {img_size} is too small for cnn7, which halves it once. Use at least 2.")
        self.num_features, self.head_hidden_size = 2 * channels, 8 * channels
        layers, before = [], in_chans
        for after, stride in ((channels, 1), (channels, 1), (2 * channels, 2), (2 * channels, 1), (2 * channels, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.features = nn.Sequential(*layers)
        height, width = ((side + 1) // 2 for side in sides)
        self.dense = nn.Sequential(
            nn.Linear(before * height * width, self.head_hidden_size),
            nn.BatchNorm1d(self.head_hidden_size),
            nn.ReLU(),
        )
        self.feature_info = [
            {"num_chs": channels, "reduction": 1, "module": "features.5"},
            {"num_chs": 2 * channels, "reduction": 2, "module": "features.14"},
        ]
        self.reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return layer groups for layer-wise learning rates."""
        return {"stem": r"^features\.0", "blocks": r"^features|^dense"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to feature maps [B, 2 * channels, ceil(H / 2), ceil(W / 2)]."""
        return self.features(x)

    def hidden(self, x: Tensor) -> Tensor:
        """Map feature maps to the hidden layer [B, 8 * channels]."""
        return self.dense(x.flatten(1))


_CFG = {"num_classes": 10, "input_size": (1, 28, 28), "fixed_input_size": True, "mean": (0.0,), "std": (1.0,)}
_CFG |= {"crop_pct": 1.0, "classifier": "fc"}
default_cfgs = generate_default_cfgs(
    {
        "cnn7.untrained": _CFG | {"first_conv": "features.0"},
        "strided_cnn_wide.untrained": _CFG | {"first_conv": "conv1"},
    }
)


@register_model
def cnn7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model with five convolutions, a hidden layer, and BatchNorm after each; see `CNN7`."""
    return build_model_with_cfg(CNN7, "cnn7", pretrained, feature_cfg={"out_indices": (0, 1)}, **kwargs)


@register_model
def strided_cnn_wide(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model with two strided convolutions (32, 64 channels) and 256 hidden ReLU; see `ShallowCNN`."""
    kwargs = {"strided": True, "widths": (32, 64), "hidden_size": 256, "feature_cfg": {"out_indices": (0, 1)}, **kwargs}
    return build_model_with_cfg(ShallowCNN, "strided_cnn_wide", pretrained, **kwargs)
