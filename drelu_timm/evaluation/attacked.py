"""A model as attacks see it, and what tells whether they broke it."""

import torch
from torch import Tensor, nn

from ..attacks.attack import margin


class Attacked(nn.Module):
    """A model as attacks see it: float32 logits that hang on the image, with finite gradients.

    Args:
        model: Takes images [B, C, H, W], gives logits [B, K]; it may compute them without a gradient, which is 0 then.
            One that people bring is called through `UserModel`.
        dtype: What it computes in, by autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        differentiated = images.requires_grad and torch.is_grad_enabled()
        if differentiated:
            images = _FiniteGradient.apply(images)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images)
        if differentiated and not logits.requires_grad:
            logits = logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)
        return logits.float()


class _FiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return images.clone()  # not a view: the model may write into what it is given

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.nan_to_num(0, 0, 0)


def label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, float32 [B]; at most 0 where the model is wrong.

    Minus infinity where a logit is not finite.
    """
    logits = logits.float()
    value = -margin(labels)(logits)
    right = value.clamp(min=torch.finfo(torch.float32).tiny)  # of two equal logits argmax takes the first
    value = value.clamp(max=0).where(logits.argmax(dim=1) != labels, right)
    return value.where(logits.isfinite().all(dim=1), -torch.inf)
