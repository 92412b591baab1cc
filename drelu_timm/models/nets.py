"""Three small nets as timm models, for any image size and number of channels; importing this module registers them.

`dense` and `shallow_cnn` are the paper's own (Sooksatra and Rivas 2024, section 6, https://doi.org/10.3390/math12223551;
it gives no widths, these are ours). `strided_cnn` is that of Wong and Kolter 2018, https://arxiv.org/abs/1711.00851,
which work on certified defences trains: a seventh of `shallow_cnn`'s arithmetic.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from ..errors import InputError
from .registry import register_model


def height_and_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    """An image size as (H, W), from one number for both or from a pair."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height, width


class Classifier(nn.Module):
    """What timm asks of a classifier whose last layer is the Linear `fc`; a net adds its features."""

    num_features: int
    head_hidden_size: int
    fc: nn.Module

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: these nets are too small for gradient checkpointing to save anything."""
        if enable:
            raise InputError(f"{type(self).__name__} has no gradient checkpointing; it is small enough without")

    def get_classifier(self) -> nn.Module:
        """The output layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh output layer of ``num_classes`` in place; 0 leaves the hidden layer's output.

        Raises:
            InputError: A pooling is asked for; these nets flatten.
        """
        if global_pool is not None:
            raise InputError(f"global_pool {global_pool!r}: {type(self).__name__} flattens and has no pooling")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to what the head takes."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits [B, K]; ``pre_logits`` stops before the output layer."""
        return self.classify(x, pre_logits)

    def classify(self, x: Tensor, pre_logits: bool) -> Tensor:
        """The last hidden layer [B, hidden_size] to logits [B, K], or to itself with dropout."""
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, K]."""
        return self.forward_head(self.forward_features(x))


class Dense(Classifier):
    """Two hidden layers with ReLU on the flattened image.

    Args:
        num_classes: Size of the output; 0 for none.
        in_chans: Channels of the image.
        img_size: Height and width of the image in pixels, or one number for both.
        hidden_size: Units of each hidden layer.
        drop_rate: Dropout before the output layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        hidden_size: int = 256,
        drop_rate: float = 0.0,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        self.num_features = self.head_hidden_size = hidden_size
        height, width = height_and_width(img_size)
        self.fc1 = nn.Linear(in_chans * height * width, hidden_size)
        self.act1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.act2 = nn.ReLU()
        self.reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layer groups for layer-wise learning rates."""
        return {"stem": r"^fc1", "blocks": r"^fc2"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to the second hidden layer [B, hidden_size]."""
        x = self.act1(self.fc1(x.flatten(1)))
        return self.act2(self.fc2(x))


class ShallowCNN(Classifier):
    """Two 3x3 convolutions with ReLU and max-pooling, then a hidden layer with ReLU.

    With ``strided``, the convolutions are 4x4 of stride 2 and there is no pooling.

    Args:
        num_classes: Size of the output; 0 for none.
        in_chans: Channels of the image.
        img_size: Height and width of the image in pixels, or one number for both; at least 4.
        widths: Channels of the convolutions.
        hidden_size: Units of the hidden layer.
        drop_rate: Dropout before the output layer.
        strided: Whether strides halve the image, not pooling.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        widths: tuple[int, int] = (32, 64),
        hidden_size: int = 128,
        drop_rate: float = 0.0,
        strided: bool = False,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        height, width = height_and_width(img_size)
        if min(height, width) < 4:
            raise InputError(f"img_size {img_size} is too small for this net, which halves it twice; give at least 4")
        self.num_features = widths[1]
        self.head_hidden_size = hidden_size
        kernel, stride = (4, 2) if strided else (3, 1)
        self.conv1 = nn.Conv2d(in_chans, widths[0], kernel, stride, padding=1)
        self.act1 = nn.ReLU()
        self.pool1 = nn.Identity() if strided else nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(widths[0], widths[1], kernel, stride, padding=1)
        self.act2 = nn.ReLU()
        self.pool2 = nn.Identity() if strided else nn.MaxPool2d(2)
        self.fc1 = nn.Linear(widths[1] * (height // 4) * (width // 4), hidden_size)
        self.act3 = nn.ReLU()
        self.feature_info = [
            {"num_chs": widths[0], "reduction": 2 if strided else 1, "module": "act1"},
            {"num_chs": widths[1], "reduction": 4 if strided else 2, "module": "act2"},
        ]
        self.reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layer groups for layer-wise learning rates."""
        return {"stem": r"^conv1", "blocks": r"^conv2|^fc1"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to feature maps [B, widths[1], H // 4, W // 4]."""
        x = self.pool1(self.act1(self.conv1(x)))
        return self.pool2(self.act2(self.conv2(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps to logits [B, K]; ``pre_logits`` stops at the hidden layer [B, hidden_size]."""
        return self.classify(self.act3(self.fc1(x.flatten(1))), pre_logits)


def _cfg(first_conv: str | None) -> dict[str, Any]:
    # mean 0 and std 1: the paper's nets see the [0, 1] images as they are.
    data = {"input_size": (1, 28, 28), "fixed_input_size": True, "crop_pct": 1.0, "mean": (0.0,), "std": (1.0,)}
    return {**data, "num_classes": 10, "first_conv": first_conv, "classifier": "fc"}


default_cfgs = generate_default_cfgs(
    {
        "dense.untrained": _cfg(None),
        "shallow_cnn.untrained": _cfg("conv1"),
        "strided_cnn.untrained": _cfg("conv1"),
        "strided_cnn_wide.untrained": _cfg("conv1"),
    }
)


@register_model
def dense(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Image -> 256 ReLU -> 256 ReLU -> classes; see `Dense`."""
    if kwargs.get("features_only"):
        raise InputError("features_only: dense has no feature maps; shallow_cnn has")
    return build_model_with_cfg(Dense, "dense", pretrained, **kwargs)


@register_model
def shallow_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two convolutions (32, 64 channels), a hidden layer of 128 ReLU, classes; see `ShallowCNN`."""
    return build_model_with_cfg(ShallowCNN, "shallow_cnn", pretrained, feature_cfg={"out_indices": (0, 1)}, **kwargs)


@register_model
def strided_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two strided convolutions (16, 32 channels), a hidden layer of 100 ReLU, classes; see `ShallowCNN`."""
    return _strided("strided_cnn", pretrained, **{"widths": (16, 32), "hidden_size": 100, **kwargs})


@register_model
def strided_cnn_wide(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two strided convolutions (32, 64 channels), a hidden layer of 256 ReLU, classes; see `ShallowCNN`."""
    return _strided("strided_cnn_wide", pretrained, **{"widths": (32, 64), "hidden_size": 256, **kwargs})


def _strided(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    kwargs = {"strided": True, "feature_cfg": {"out_indices": (0, 1)}, **kwargs}
    return build_model_with_cfg(ShallowCNN, name, pretrained, **kwargs)
