"""Example: evaluate a model of your own, here one whose first layer hides its gradient. Runs offline in seconds."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import drelu_timm


class Round(nn.Module):
    """Rounds pixels to 17 levels: no change to digits, which have 17, but the gradient becomes zero."""

    def forward(self, images):
        return (16 * images).round() / 16


def trained_model(images, labels):
    torch.manual_seed(0)
    model = nn.Sequential(Round(), nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [B, C, H, W] in [0, 1]
labels = torch.tensor(digits.target)
model = trained_model(images[:1400], labels[:1400])
images, labels = images[1400:], labels[1400:]

result = drelu_timm.evaluate_model(model, images, labels, norm="Linf", eps=0.1)
print(result)

drelu_timm.attacks.adaptive.backward.register(Round, lambda layer, x, clamp: x)  # what attacks differentiate instead
result = drelu_timm.evaluate_model(model, images, labels, norm="Linf", eps=0.1)
print(f"With a backward pass for the rounding: worst case {100 * result.worst:.1f} %, {result.verdict}")
