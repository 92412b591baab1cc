"""The pre-activation residual nets of RobustBench's CIFAR entries, which timm lacks: `wide_resnet*`, `preact_resnet18`.

Sources: He et al. 2016, "Identity Mappings in Deep Residual Networks" (https://arxiv.org/abs/1603.05027); Zagoruyko and
Komodakis 2016, "Wide Residual Networks" (https://arxiv.org/abs/1605.07146); Gowal et al. 2020, "Uncovering the Limits
of Adversarial Training" (https://arxiv.org/abs/2010.03593); Rice et al. 2020, "Overfitting in Adversarially Robust Deep
Learning" (https://arxiv.org/abs/2002.11569). Importing this module registers them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier, create_conv2d, get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .registry import register_model

Layer = Callable[..., nn.Module]


class PreActBlock(nn.Module):
    """Norm, activation and 3x3 convolution, twice, beside a shortcut.

    A shortcut that changes the shape is a 1x1 convolution of what the first activation gives.

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output.
        stride: Of the first convolution.
        padding: Of the convolutions, in timm's words: "" is symmetric, "same" is TensorFlow's, which with stride 2
            pads an image of even size below and on the right alone.
        act_layer: Makes an activation.
        norm_layer: Makes a norm, for a number of channels.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, padding: str, act_layer: Layer, norm_layer: Layer):
        super().__init__()
        self.norm1 = norm_layer(in_chans)
        self.act1 = act_layer()
        self.conv1 = create_conv2d(in_chans, out_chans, 3, stride=stride, padding=padding)
        self.norm2 = norm_layer(out_chans)
        self.act2 = act_layer()
        self.conv2 = create_conv2d(out_chans, out_chans, 3, padding=padding)
        changes = stride != 1 or in_chans != out_chans
        self.shortcut = create_conv2d(in_chans, out_chans, 1, stride=stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, out_chans, H / stride, W / stride]."""
        out = self.act1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.act2(self.norm2(self.conv1(out))))
        return out + shortcut


class PreActResNet(nn.Module):
    """A 3x3 convolution, stages of `PreActBlock` of which all but the first halve the image, norm, activation, pooling.

    The defaults are PreActResNet-18 as Rice et al. 2020 train it.

    Args:
        num_classes: Size of the output; 0 for none.
        in_chans: Channels of the image.
        global_pool: timm's name of a pooling.
        drop_rate: Dropout before the output layer.
        depths: Blocks of each stage.
        channels: Channels of each stage.
        stem_chans: Channels of the first convolution.
        padding: See `PreActBlock`.
        act_layer: A class, or timm's name of one.
        norm_layer: Makes a norm, for a number of channels.
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
        super().__init__()
        act = act_layer if callable(act_layer) else get_act_layer(act_layer)
        assert act is not None
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = channels[-1]
        self.conv1 = create_conv2d(in_chans, stem_chans, 3)
        self.stages = [f"layer{index}" for index in range(1, len(depths) + 1)]
        before = stem_chans
        for name, depth, chans in zip(self.stages, depths, channels, strict=True):
            stride = 1 if name == "layer1" else 2
            make = partial(PreActBlock, padding=padding, act_layer=act, norm_layer=norm_layer)
            self.add_module(
                name, nn.Sequential(make(before, chans, stride), *(make(chans, chans, 1) for _ in range(depth - 1)))
            )
            before = chans
        self.norm = norm_layer(self.num_features)
        self.act = act()
        self.feature_info = [
            {"num_chs": chans, "reduction": 2**index, "module": name}
            for index, (name, chans) in enumerate(zip([*self.stages[:-1], "act"], channels, strict=True))
        ]
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        block = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1", "blocks": [(block, None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The output layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh output layer of ``num_classes`` in place; 0 leaves the pooled features.

        Args:
            num_classes: Size of the output; 0 for none.
            global_pool: timm's name of a pooling; by default it stays.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(  # pyright: ignore[reportAssignmentType]
            self.num_features, num_classes, pool_type=pool
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to feature maps [B, num_features, H / 2**n, W / 2**n] of n + 1 stages."""
        x = self.conv1(x)
        for name in self.stages:
            for block in self.get_submodule(name).children():
                # timm's own checkpointing is reentrant, which refuses the torch.autograd.grad of attacks.
                x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps to logits [B, K]; ``pre_logits`` stops at the pooled features."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, K]."""
        return self.forward_head(self.forward_features(x))


class WideResNet(PreActResNet):
    """WideResNet with SiLU as Gowal et al. 2020 define it, not the original of Zagoruyko and Komodakis.

    Wang et al. 2023 (https://arxiv.org/abs/2302.04638) and most of RobustBench's strongest CIFAR entries train this
    one. From the original it differs in the activation and in the padding "same" of its convolutions.

    Args:
        num_classes: See `PreActResNet`.
        depth: Layers, 6 n + 4.
        widen_factor: The stages have 16, 32 and 64 times as many channels.
        act_layer: See `PreActResNet`.
        **kwargs: See `PreActResNet`.

    Raises:
        InputError: A depth that does not divide into blocks.
    """

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 28,
        widen_factor: int = 10,
        act_layer: str | Layer = nn.SiLU,
        **kwargs: Any,
    ):
        if depth < 10 or depth % 6 != 4:
            raise InputError(f"depth {depth} does not divide into a wide resnet's blocks; give 10, 16, 22, 28, ...")
        super().__init__(
            num_classes,
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


def _cfg(pool_side: int) -> dict[str, Any]:
    statistics = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}  # CIFAR-10's
    data = {"input_size": (3, 32, 32), "pool_size": (pool_side, pool_side), "crop_pct": 1.0, **statistics}
    return {**data, "num_classes": 10, "first_conv": "conv1", "classifier": "fc"}


default_cfgs = generate_default_cfgs(
    {
        "preact_resnet18.untrained": _cfg(4),
        "wide_resnet28_10.untrained": _cfg(8),
        "wide_resnet34_10.untrained": _cfg(8),
        "wide_resnet70_16.untrained": _cfg(8),
    }
)


def _create(cls: type[PreActResNet], name: str, pretrained: bool, stages: int, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(cls, name, pretrained, feature_cfg={"out_indices": tuple(range(stages))}, **kwargs)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-18 with ReLU; see `PreActResNet`."""
    return _create(PreActResNet, "preact_resnet18", pretrained, 4, **kwargs)


@register_model
def wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-28-10 with SiLU; see `WideResNet`."""
    return _create(WideResNet, "wide_resnet28_10", pretrained, 3, **{"depth": 28, "widen_factor": 10, **kwargs})


@register_model
def wide_resnet34_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-34-10 with SiLU; see `WideResNet`."""
    return _create(WideResNet, "wide_resnet34_10", pretrained, 3, **{"depth": 34, "widen_factor": 10, **kwargs})


@register_model
def wide_resnet70_16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-70-16 with SiLU; see `WideResNet`."""
    return _create(WideResNet, "wide_resnet70_16", pretrained, 3, **{"depth": 70, "widen_factor": 16, **kwargs})
