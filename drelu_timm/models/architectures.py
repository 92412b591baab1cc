"""Architectures that timm lacks: three small models and RobustBench's pre-activation residual networks.

`dense` and `shallow_cnn` are the paper's (Sooksatra and Rivas 2024, section 6, https://doi.org/10.3390/math12223551;
the widths are ours, as it gives none). `strided_cnn` is the model of work on certified defenses (Wong and Kolter 2018,
https://arxiv.org/abs/1711.00851), with a seventh of `shallow_cnn`'s arithmetic. The others are from He et al. 2016
(https://arxiv.org/abs/1603.05027), Zagoruyko and Komodakis 2016 (https://arxiv.org/abs/1605.07146), Rice et al. 2020
(https://arxiv.org/abs/2002.11569, `preact_resnet18`) and Gowal et al. 2020 (https://arxiv.org/abs/2010.03593).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier, create_conv2d, get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .surgery import height_and_width
from .weights import preloaded

Layer = Callable[..., nn.Module]


class Classifier(nn.Module):
    """timm's interface of a classifier whose last layer is the Linear `fc`, for a small model without pooling."""

    num_features: int
    head_hidden_size: int
    fc: nn.Module

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse gradient checkpointing, which saves nothing in a small model."""
        if enable:
            raise InputError(f"{type(self).__name__} has no gradient checkpointing, because it is small.")

    def get_classifier(self) -> nn.Module:
        """Return the output layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the output layer by a new one for ``num_classes``; 0 for the output of the hidden layer.

        Raises:
            InputError: A pooling is requested.
        """
        if global_pool is not None:
            raise InputError(f"global_pool {global_pool!r}: {type(self).__name__} flattens its features. Leave it out.")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to the input of the head."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits [B, K], or with ``pre_logits`` to the input of the output layer."""
        x = F.dropout(self.hidden(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def hidden(self, x: Tensor) -> Tensor:
        """Map features to the input of the output layer [B, head_hidden_size]."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        return self.forward_head(self.forward_features(x))


class Dense(Classifier):
    """Two hidden layers with ReLU on the flattened image.

    Args:
        num_classes: Number of outputs; 0 for none.
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
        """Return layer groups for layer-wise learning rates."""
        return {"stem": r"^fc1", "blocks": r"^fc2"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to the second hidden layer [B, hidden_size]."""
        x = self.act1(self.fc1(x.flatten(1)))
        return self.act2(self.fc2(x))


class ShallowCNN(Classifier):
    """Two 3x3 convolutions with ReLU and max-pooling, then a hidden layer with ReLU.

    With ``strided``, the convolutions are 4x4 with stride 2 and nothing pools.

    Args:
        num_classes, in_chans, drop_rate: See `Dense`.
        img_size: Height and width of the image in pixels, or one number for both; at least 4.
        widths: Channels of the convolutions.
        hidden_size: Units of the hidden layer.
        strided: Halve the image by strides instead of pooling.
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
            raise InputError(f"img_size {img_size} is too small for two layers that halve the image. Use at least 4.")
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
        """Return layer groups for layer-wise learning rates."""
        return {"stem": r"^conv1", "blocks": r"^conv2|^fc1"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to feature maps [B, widths[1], H // 4, W // 4]."""
        x = self.pool1(self.act1(self.conv1(x)))
        return self.pool2(self.act2(self.conv2(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """Map feature maps to the hidden layer [B, hidden_size]."""
        return self.act3(self.fc1(x.flatten(1)))


class PreActBlock(nn.Module):
    """Norm, activation and 3x3 convolution, twice, with a shortcut.

    A shortcut that changes the shape is a 1x1 convolution of the first activation's output.

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output.
        stride: Stride of the first convolution.
        padding: timm's padding of the convolutions: "" is symmetric; "same" is TensorFlow's, which for stride 2 and an
            image of even size pads only below and on the right.
        act_layer, norm_layer: Create an activation, and a norm for a number of channels.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, padding: str, act_layer: Layer, norm_layer: Layer):
        super().__init__()
        self.norm1 = norm_layer(in_chans)
        self.act1 = act_layer()
        self.conv1 = create_conv2d(in_chans, out_chans, 3, stride=stride, padding=padding)
        self.norm2 = norm_layer(out_chans)
        self.act2 = act_layer()
        self.conv2 = create_conv2d(out_chans, out_chans, 3, padding=padding)
        same_shape = stride == 1 and in_chans == out_chans
        self.shortcut = None if same_shape else create_conv2d(in_chans, out_chans, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_chans, H, W] to [B, out_chans, H / stride, W / stride]."""
        out = self.act1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.act2(self.norm2(self.conv1(out))))
        return out + shortcut


class PreActResNet(Classifier):
    """A 3x3 convolution, stages of `PreActBlock`, norm, activation and pooling. Stages after the first halve the image.

    The defaults are the PreActResNet-18 of Rice et al. 2020.

    Args:
        num_classes, in_chans, drop_rate: See `Dense`.
        global_pool: timm's name of a pooling.
        depths: Blocks per stage.
        channels: Channels per stage.
        stem_chans: Channels of the first convolution.
        padding: See `PreActBlock`.
        act_layer: Class, or timm's name for it.
        norm_layer: See `PreActBlock`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 2, 2),
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_chans: int = 64,
        padding: str = "",
        act_layer: str | Layer = nn.ReLU,
        norm_layer: Layer = nn.BatchNorm2d,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        act = act_layer if callable(act_layer) else get_act_layer(act_layer)
        assert act is not None
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = channels[-1]
        self.conv1 = create_conv2d(in_chans, stem_chans, 3)
        self.stages = [f"layer{index}" for index in range(1, len(depths) + 1)]
        before = stem_chans
        make = partial(PreActBlock, padding=padding, act_layer=act, norm_layer=norm_layer)
        for name, depth, chans in zip(self.stages, depths, channels, strict=True):
            stride = 1 if name == "layer1" else 2
            blocks = (make(before, chans, stride), *(make(chans, chans, 1) for _ in range(depth - 1)))
            self.add_module(name, nn.Sequential(*blocks))
            before = chans
        self.norm = norm_layer(self.num_features)
        self.act = act()
        self.feature_info = [
            {"num_chs": chans, "reduction": 2**index, "module": name}
            for index, (name, chans) in enumerate(zip([*self.stages[:-1], "act"], channels, strict=True))
        ]
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return layer groups for layer-wise learning rates."""
        block = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1", "blocks": [(block, None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, which recomputes the rest."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the output layer by a new one for ``num_classes``; 0 for the pooled features.

        Args:
            num_classes: Number of outputs; 0 for none.
            global_pool: timm's name of a pooling; by default the pooling stays.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(  # pyright: ignore[reportAssignmentType]
            self.num_features, num_classes, pool_type=pool
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to feature maps [B, num_features, H / 2**n, W / 2**n] of n + 1 stages."""
        x = self.conv1(x)
        for name in self.stages:
            for block in self.get_submodule(name).children():
                # timm's checkpointing is reentrant, which does not support the torch.autograd.grad of attacks.
                x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return self.act(self.norm(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Map feature maps to the pooled features [B, num_features]."""
        return self.global_pool(x)


class WideResNet(PreActResNet):
    """WideResNet with SiLU as defined by Gowal et al. 2020, not the original of Zagoruyko and Komodakis.

    Wang et al. 2023 (https://arxiv.org/abs/2302.04638) and most of RobustBench's strongest CIFAR entries use this one.
    It differs from the original in the activation and in the padding "same" of its convolutions.

    Args:
        depth: Number of layers, 6 n + 4.
        widen_factor: The stages have 16, 32 and 64 times as many channels.
        act_layer, **kwargs: See `PreActResNet`.

    Raises:
        InputError: A depth that is not 6 n + 4.
    """

    def __init__(self, depth: int = 28, widen_factor: int = 10, act_layer: str | Layer = nn.SiLU, **kwargs: Any):
        if depth < 10 or depth % 6 != 4:
            raise InputError(f"depth {depth} does not divide into the blocks of a WideResNet. Use 10, 16, 22, 28, ...")
        super().__init__(
            depths=((depth - 4) // 6,) * 3,
            channels=tuple(chans * widen_factor for chans in (16, 32, 64)),
            stem_chans=16,
            padding="same",
            act_layer=act_layer,
            norm_layer=partial(nn.BatchNorm2d, momentum=0.01),
            **kwargs,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def _cfg(input_size: tuple[int, int, int], first_conv: str | None, **kwargs: Any) -> dict[str, Any]:
    shared = {"num_classes": 10, "crop_pct": 1.0, "classifier": "fc"}
    return {**shared, "input_size": input_size, "first_conv": first_conv, **kwargs}


# The paper's models take [0, 1] images without normalization; the others use the statistics of CIFAR-10.
_SMALL = partial(_cfg, (1, 28, 28), fixed_input_size=True, mean=(0.0,), std=(1.0,))
_CIFAR = partial(_cfg, (3, 32, 32), "conv1", mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))

default_cfgs = generate_default_cfgs(
    {
        "dense.untrained": _SMALL(None),
        "shallow_cnn.untrained": _SMALL("conv1"),
        "strided_cnn.untrained": _SMALL("conv1"),
        "preact_resnet18.untrained": _CIFAR(pool_size=(4, 4)),
        "wide_resnet28_10.untrained": _CIFAR(pool_size=(8, 8)),
        "wide_resnet34_10.untrained": _CIFAR(pool_size=(8, 8)),
        "wide_resnet70_16.untrained": _CIFAR(pool_size=(8, 8)),
    }
)


def _create(cls: type[Classifier], name: str, pretrained: bool, stages: int, **kwargs: Any) -> nn.Module:
    cfg = resolve_pretrained_cfg(name, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None))
    kwargs["pretrained_cfg"] = preloaded(cfg) if pretrained else cfg
    return build_model_with_cfg(cls, name, pretrained, feature_cfg={"out_indices": tuple(range(stages))}, **kwargs)


@register_model
def dense(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model with two hidden layers of 256 ReLU; see `Dense`."""
    if kwargs.get("features_only"):
        raise InputError("features_only: dense has no feature maps. Use shallow_cnn.")
    return _create(Dense, "dense", pretrained, 0, **kwargs)


@register_model
def shallow_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model with two convolutions (32, 64 channels) and a hidden layer of 128 ReLU; see `ShallowCNN`."""
    return _create(ShallowCNN, "shallow_cnn", pretrained, 2, **kwargs)


@register_model
def strided_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model with two strided convolutions (16, 32 channels) and 100 hidden ReLU; see `ShallowCNN`."""
    kwargs = {"strided": True, "widths": (16, 32), "hidden_size": 100, **kwargs}
    return _create(ShallowCNN, "strided_cnn", pretrained, 2, **kwargs)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a PreActResNet-18 with ReLU; see `PreActResNet`."""
    return _create(PreActResNet, "preact_resnet18", pretrained, 4, **kwargs)


@register_model
def wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a WideResNet-28-10 with SiLU; see `WideResNet`."""
    return _create(WideResNet, "wide_resnet28_10", pretrained, 3, **{"depth": 28, "widen_factor": 10, **kwargs})


@register_model
def wide_resnet34_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a WideResNet-34-10 with SiLU; see `WideResNet`."""
    return _create(WideResNet, "wide_resnet34_10", pretrained, 3, **{"depth": 34, "widen_factor": 10, **kwargs})


@register_model
def wide_resnet70_16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a WideResNet-70-16 with SiLU; see `WideResNet`."""
    return _create(WideResNet, "wide_resnet70_16", pretrained, 3, **{"depth": 70, "widen_factor": 16, **kwargs})
