"""Settings of interval bound propagation, and which other settings go with them."""

from typing import TYPE_CHECKING

from ..attacks.threat_model import ThreatModel
from ..command_line import flag
from ..errors import InputError

if TYPE_CHECKING:
    from .config import TrainConfig

IBP = {"ibp_eps": None, "ibp_clean_weight": 0.5, "ibp_ramp": 0.4, "ibp_init": False}  # the defaults of its settings


def check_ibp(config: "TrainConfig") -> None:
    """Refuse what IBP cannot use, and its settings for other objectives.

    Raises:
        InputError: The first setting that has to be left out or changed.
    """
    if config.objective != "ibp":
        given = [name for name, default in IBP.items() if getattr(config, name) != default]
        given += ["monitor"] if config.monitor == "certified" else []
        if given:
            raise InputError(f"{flag(given[0])} {getattr(config, given[0])} belongs to --objective ibp. Leave it out.")
        return
    if config.norm != "Linf":
        raise InputError(
            f"--objective ibp has bounds for Linf, not for --norm {config.norm}. Give --norm Linf and --eps."
        )
    if config.monitor == "margin":
        raise InputError("--monitor margin is not measured for --objective ibp. Use certified, pgd or loss.")
    for name in ("cutmix", "label_smoothing", "compile", "sync_bn"):
        if getattr(config, name):
            raise InputError(f"{flag(name)} does not go with --objective ibp. Leave it out.")
    if config.ibp_init and (config.pretrained or config.init_from):
        raise InputError("--ibp-init would overwrite the weights of --pretrained or --init-from. Give one of them.")
    bounded_eps(config)


def bounded_eps(config: "TrainConfig") -> float:
    """Return the radius of the bounds after the ramp, of a config with norm and eps.

    Raises:
        InputError: ``ibp_eps`` is not a radius.
    """
    assert config.norm is not None
    return ThreatModel.parse(config.norm, config.ibp_eps or config.threat_model.written).eps
