"""Create every published model whose weights come with the installed package, with the network blocked."""

import socket
from pathlib import Path

import timm

import drelu_timm


def refuse(*args, **kwargs):
    raise AssertionError("the network was used")


socket.socket.connect = socket.getaddrinfo = refuse
cards = Path(drelu_timm.__file__).parent / "model_cards"
weights = sorted(cards.glob("*/*/*.safetensors"))
assert weights, f"no weights in {cards}"
for path in weights:
    *_, dataset, threat_model, file = path.parts
    name = f"{Path(file).stem}_{dataset}_{threat_model}".lower().replace("-", "_")
    model = timm.create_model(name, pretrained=True)
    print(name, sum(parameter.numel() for parameter in model.parameters()), "parameters")
