"""What a training is called, by the flags of its config.json: its net, its method, its settings."""

from collections.abc import Sequence
from typing import Any

from ..spelling import written

Flags = dict[str, Any]

# Where a file lies, and what the seed changes: all else that a run was trained with is one setting.
_NOT_SETTINGS = ("seed", "data_dir", "init_from", "preset")
_LAYER = "_drelu"  # what an added layer adds to an architecture's name


def net_of(flags: Flags) -> str:
    """The architecture, without what the added layer adds to its name and without timm's tag of weights."""
    return _architecture(flags).removesuffix(_LAYER)


def activation_of(flags: Flags) -> str:
    """What stands in the added layer; "relu" for a net without one."""
    return (flags["activation"] or "drelu") if _has_layer(flags) else "relu"


def placement_of(flags: Flags) -> str:
    """Where the added layer stands; "head" for a net without one."""
    return flags["placement"] or "head"


def method_of(flags: Flags) -> str:
    """Objective and activation without the balancer: "AT", "TRADES-6", "D-ReLU", "AT + D-ReLU", "natural", ..."""
    return " + ".join(filter(None, [_objective(flags), _activation(flags)])) or "natural"


def settings_of(flags: Flags) -> Flags:
    """The flags but for those that change no setting, an added layer's defaults filled in, every number a float."""
    settings = {name: _as_float(value) for name, value in flags.items() if name not in _NOT_SETTINGS}
    if _has_layer(flags):
        settings |= {"placement": placement_of(flags), "activation": activation_of(flags)}
    return settings


def settings_of_all(trainings: Sequence[Flags]) -> Flags:
    """`settings_of` a training and, as "init_from ...", of those that it went on from, the one before it first."""
    train, *starts = trainings
    if not starts:
        return settings_of(train) | {"init_from": "none"}
    started = {f"init_from {name}": value for name, value in settings_of_all(starts).items()}
    return settings_of(train) | {"init_from": "a run"} | started


def _architecture(flags: Flags) -> str:
    return flags["model"].partition(".")[0]


def _has_layer(flags: Flags) -> bool:
    return _architecture(flags).endswith(_LAYER)


def _objective(flags: Flags) -> str:
    objective, beta = flags["objective"], written(flags["beta"])
    names = {"natural": "", "at": "AT", "trades": f"TRADES-{beta}", "mart": f"MART-{beta}"}
    return names[objective] + (" + AWP" if flags["awp_gamma"] else "")


def _activation(flags: Flags) -> str:
    names = {"relu": "", "drelu": "D-ReLU", "srelu": "S-ReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU"}
    activation, placement = activation_of(flags), placement_of(flags)
    name = names.get(activation, activation)
    details = [] if placement == "head" or not name else [placement]
    if activation == "drelu" and flags["cap_penalty"] != "squared":
        details.append(flags["cap_penalty"])
    return f"{name} ({', '.join(details)})" if details else name


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
