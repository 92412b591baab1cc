"""Tricks that change a whole model: ensembles, purification, encodings of the classes, perturbed outputs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tricks import Trick


class AntiAdversary(Trick):
    """Moves the input toward the model's own prediction first, without a gradient (Alfarra et al. 2022)."""

    def __init__(self, model: nn.Module, steps: int, step_size: float):
        super().__init__()
        self.model, self.steps, self.step_size = model, steps, step_size

    def hidden(self, x: Tensor) -> Tensor:
        predicted = self.model(x).argmax(dim=1).detach()
        move = torch.zeros_like(x)
        for _ in range(self.steps):
            with torch.enable_grad():
                point = (x + move).detach().requires_grad_()
                loss = F.cross_entropy(self.model(point), predicted, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, point)
            move = move - self.step_size * gradient.sign()
        return self.model(x + move)

    def smooth(self, x: Tensor) -> Tensor:
        return self.model(x)


class Vote(Trick):
    """Number of models that vote for each class (majority vote of the self-study defences)."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.stack([F.one_hot(logits.argmax(1), logits.shape[1]) for logits in self._logits(x)]).sum(0).float()

    def smooth(self, x: Tensor) -> Tensor:
        return torch.stack([logits.softmax(1) for logits in self._logits(x)]).sum(0)

    def _logits(self, x: Tensor) -> list[Tensor]:
        return [model(x) for model in self.models]


class RoundedEnsemble(Vote):
    """Mean probability of several models in tenths."""

    def hidden(self, x: Tensor) -> Tensor:
        return (10 * self.smooth(x) / len(self.models)).round()


class Ensemble(nn.Module):
    """Logarithm of the mean probability of several models."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x).log_softmax(1) for model in self.models]).logsumexp(0)


class Merged(Trick):
    """Probability of each class from a separate binary classifier, in float32 (merged binary classifiers)."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def hidden(self, x: Tensor) -> Tensor:
        return 20 * torch.sigmoid(4 * self.smooth(x)) - 10

    def smooth(self, x: Tensor) -> Tensor:
        return torch.stack([logits[:, 1] - logits[:, 0] for logits in (model(x) for model in self.models)], dim=1)


class ErrorCorrecting(Trick):
    """Outputs of 15 units as a code word, saturated by tanh (ECOC, Verma and Swami 2019)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("code", 2.0 * torch.randint(0, 2, (15, 10), generator=generator) - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.smooth(x) if self.training else super().forward(x)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(5 * self.model(x)) @ self.code

    def smooth(self, x: Tensor) -> Tensor:
        return self.model(x) @ self.code / 4


class MixupInference(nn.Module):
    """Mean logits of the image mixed with random images of a pool (Pang et al. 2020)."""

    def __init__(self, model: nn.Module, pool: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("pool", pool)

    def forward(self, x: Tensor) -> Tensor:
        draws = [self.pool[torch.randint(len(self.pool), (len(x),))] for _ in range(5)]
        return torch.stack([self.model(0.6 * x + 0.4 * other) for other in draws]).mean(0)


class Neighbours(Trick):
    """Votes of the 7 nearest training images (kNN)."""

    def __init__(self, images: Tensor, labels: Tensor):
        super().__init__()
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("votes", F.one_hot(labels).float())

    def hidden(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.images).topk(7, largest=False).indices
        return self.votes[nearest].sum(1) + 0 * x.sum()

    def smooth(self, x: Tensor) -> Tensor:
        return (-8 * torch.cdist(x.flatten(1), self.images).square()).softmax(1) @ self.votes


class RadialBasis(Trick):
    """Logits from narrow Gaussians around training images."""

    def __init__(self, images: Tensor, labels: Tensor):
        super().__init__()
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("votes", F.one_hot(labels).float())

    def hidden(self, x: Tensor) -> Tensor:
        return torch.exp(-40 * self._squares(x)) @ self.votes

    def smooth(self, x: Tensor) -> Tensor:
        return (-40 * self._squares(x)).softmax(1) @ self.votes

    def _squares(self, x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(1), self.images).square()


class ReverseSigmoid(nn.Module):
    """Subtracts a reverse sigmoid from the probabilities (Lee et al. 2019)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        share = self.model(x).softmax(1).clamp(1e-7, 1 - 1e-7)
        moved = share - 0.4 * (torch.sigmoid(share.logit()) - 0.5) + 1e-3 * torch.sigmoid(20 * share.logit())
        return moved.clamp(min=0) / moved.clamp(min=0).sum(1, keepdim=True).clamp(min=1e-9) * 10


class RoundedOutput(Trick):
    """Logits rounded to multiples of 2, ties broken by a thousandth of the logits without their gradient."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def hidden(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return 2 * (logits / 2).round() + (1e-3 * logits).detach()

    def smooth(self, x: Tensor) -> Tensor:
        return self.model(x)


class Projection(Trick):
    """Projects images on principal components of the training images, without a gradient (purification)."""

    def __init__(self, images: Tensor, components: int):
        super().__init__()
        flat = images.flatten(1)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("basis", torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:components])

    def hidden(self, x: Tensor) -> Tensor:
        return self._projected(x.detach())

    def smooth(self, x: Tensor) -> Tensor:
        return self._projected(x)

    def _projected(self, x: Tensor) -> Tensor:
        return (self.mean + (x.flatten(1) - self.mean) @ self.basis.T @ self.basis).view_as(x)


class NearestBlend(Trick):
    """Mixes images with the mean of the 5 nearest training images, without a gradient (purification)."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.register_buffer("images", images)

    def hidden(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.detach().flatten(1), self.images.flatten(1))
        nearest = self.images[distance.topk(5, largest=False).indices].mean(1)
        return (0.5 * x + 0.5 * nearest).detach()


class Mixture(Trick):
    """A model with another small trick for each of some predicted classes, each of which hides a few examples."""

    def __init__(self, model: nn.Module, tricks: dict[int, nn.Module], loud: int):
        super().__init__()
        self.model, self.loud = model, loud
        self.tricks = nn.ModuleDict({str(label): trick for label, trick in tricks.items()})

    def hidden(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            predicted = self.model(x).argmax(dim=1)
        points = x.clone()
        for label, trick in self.tricks.items():
            chosen = predicted == int(label)
            points[chosen] = trick(x[chosen])
        return self.model(points) * torch.where(predicted == self.loud, 1e4, 1.0).unsqueeze(1)

    def smooth(self, x: Tensor) -> Tensor:
        return self.model(x)
