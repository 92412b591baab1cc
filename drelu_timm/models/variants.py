"""How a D-ReLU variant of a timm architecture is built, and where its weights come from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

import timm
from timm.models import load_pretrained, load_state_dict, model_entrypoint, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import _model_pretrained_cfgs, _model_to_module
from torch import Tensor, nn

from ..errors import InputError, unknown
from .activations import ACTIVATIONS
from .head import add_head, classifier_names, is_unpooled
from .nets import height_and_width
from .small_images import adapt_to_small_images, warn_of_small_images
from .surgery import TimmModel, add_stem, paths, replace_activations
from .weights import check_weights

_logger = logging.getLogger(__name__)

PLACEMENTS = ("head", "stem", "all")
SOURCES = (
    "url",
    "file",
    "state_dict",
    "hf_hub_id",
    "hf_hub_filename",
)  # the fields of a cfg that say where weights lie
RUNTIME_ARGUMENTS = ("device", "dtype", "cache_dir", "pretrained_model_args")  # not part of what a model is


@dataclass(frozen=True)
class Options:
    """What a `_drelu` entrypoint takes beside the base's own arguments.

    Attributes:
        placement: "head", a dense layer before the classifier (the paper's); "stem", a convolution behind the input;
            "all", in the place of every activation module (functional activations are out of reach).
        activation: "drelu", or "pact", "srelu", "relu", "relu6", "silu", "gelu", "prelu", "pssilu" in the same place,
            so that controls differ in nothing else.
        width: Units of the dense layer, or channels of the convolution.
        cap: Initial cap of D-ReLU, fixed cap of S-ReLU.
        small_images: A first convolution for images of some 32 pixels; where the family has none, upsampling.
    """

    placement: str = "head"
    activation: str = "drelu"
    width: int = 128
    cap: float = 100.0
    small_images: bool = False

    def __post_init__(self):
        if self.placement not in PLACEMENTS:
            raise unknown("placement", self.placement, PLACEMENTS)
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if not isinstance(self.width, int) or self.width < 1:
            raise InputError(f"width {self.width!r} is no number of units; give a whole number of at least 1")
        if not 0 < self.cap < float("inf"):
            raise InputError(f"cap {self.cap!r} is no cap; give a number above 0")


def build(
    base: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    placement: str = Options.placement,
    activation: str = Options.activation,
    width: int = Options.width,
    cap: float = Options.cap,
    small_images: bool = Options.small_images,
    **kwargs: Any,
) -> nn.Module:
    """The D-ReLU variant of a timm architecture; what ``timm.create_model(f"{base}_drelu", ...)`` calls.

    With ``pretrained=True`` the base's weights go into the backbone and the new layers stay fresh, unless
    ``pretrained_cfg`` or ``pretrained_cfg_overlay`` names another source: its weights are those of the whole variant
    (or, if it says ``architecture=<base>``, of the base). For placement "stem" timm fits the base's pretrained first
    convolution to the new one's channels as it does for any ``in_chans``.

    Args:
        base: A registered timm architecture.
        pretrained: Load weights.
        pretrained_cfg: A tag of the base, or a whole cfg.
        pretrained_cfg_overlay: Entries that replace those of the cfg.
        placement: See `Options`, as for the next four.
        activation: See `Options`.
        width: See `Options`.
        cap: See `Options`.
        small_images: See `Options`.
        **kwargs: The base's own arguments.

    Raises:
        InputError: An unknown value, a model that cannot take the placement, or weights that do not fit.
    """
    options = Options(placement, activation, width, cap, small_images)
    cfg = resolve_pretrained_cfg(f"{base}_drelu", pretrained_cfg, dict(pretrained_cfg_overlay or {}))
    if cfg.fixed_input_size:
        kwargs.setdefault("img_size", _image_size(cfg))  # as timm would, but recorded
    variant = Variant(base, cfg, options, kwargs)
    whole = pretrained and not variant.weights_are_of_base
    if pretrained:
        check_weights(variant.name if whole else base, cfg, cache_dir=kwargs.get("cache_dir"))
    model = variant.build(pretrained_base=pretrained and not whole)
    if whole:
        variant.load(model)
    elif pretrained:
        _logger.info("%s: weights of %s in the backbone, the new layers are fresh", variant.name, base)
    return model


def _image_size(cfg: PretrainedCfg) -> int | tuple[int, int]:
    """A cfg's image size, as one number if it is square: some of timm's models take no pair."""
    height, width = cfg.input_size[1:]
    return height if height == width else (height, width)


@dataclass(frozen=True)
class Variant:
    """All that defines one D-ReLU model.

    Attributes:
        base: The timm architecture.
        cfg: Its cfg, resolved; describes the weights.
        options: What is changed.
        kwargs: The base's own arguments.
    """

    base: str
    cfg: PretrainedCfg
    options: Options
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name that it is registered under."""
        return f"{self.base}_drelu"

    @property
    def registered(self) -> PretrainedCfg:
        """The base's own cfg for the tag, which knows its first convolution and its classifier."""
        default = _model_pretrained_cfgs.get(self.base, PretrainedCfg())
        return _model_pretrained_cfgs.get(f"{self.base}.{self.cfg.tag}", default)

    @property
    def weights_are_of_base(self) -> bool:
        """Whether the cfg's weights are the base's: it says so, or they lie where timm has the base's."""
        registered = self.registered
        return self.cfg.architecture == self.base or all(
            getattr(self.cfg, key) == getattr(registered, key) for key in SOURCES
        )

    @property
    def features_only(self) -> bool:
        """Whether timm gives the feature maps instead of a classifier."""
        return bool(self.kwargs.get("features_only"))

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.kwargs.get("in_chans", self.cfg.input_size[0])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the base is made for; not that of the cfg, which may tell of smaller images."""
        return height_and_width(self.kwargs.get("img_size", self.registered.input_size[1:]))

    @property
    def without_classes(self) -> bool:
        """Whether the output is to be the D-ReLU's, with no output layer behind it."""
        return self.kwargs.get("num_classes", self.cfg.num_classes) == 0

    @property
    def unpooled(self) -> bool:
        """Whether the output is to be the base's unpooled features, with no head behind them."""
        return self.without_classes and is_unpooled(0, self.kwargs.get("global_pool"))

    def build(self, *, pretrained_base: bool) -> TimmModel:
        """The base, built by timm, then changed in place; its cfg and its arguments say so."""
        model = self._build_base(pretrained=pretrained_base)
        first_convs = _in_features_net(model, paths(self.registered.first_conv))
        if self.options.small_images:
            channels = self.options.width if self.options.placement == "stem" else self.in_chans
            adapt_to_small_images(model, first_convs, (channels, *self.image_size))
        changes = self._place(model, first_convs)
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": self.name, **changes}
        if not self.options.small_images:
            self._warn_of_small_images(model, first_convs)
        model.default_cfg = model.pretrained_cfg
        model_args = {**self.kwargs, **asdict(self.options)}
        model._model_args = {key: value for key, value in model_args.items() if key not in RUNTIME_ARGUMENTS}
        return model

    def _warn_of_small_images(self, model: TimmModel, first_convs: Sequence[str]) -> None:
        if "img_size" in self.kwargs:  # divided into patches of a size that may suit it
            size = self.image_size
            stride = min(size) // 8
        else:
            size, stride = self.cfg.input_size[1:], 1
        warn_of_small_images(model, first_convs, self.registered.input_size[1:], size, stride)

    def _build_base(self, *, pretrained: bool) -> TimmModel:
        registered = self.registered
        cfg = replace(
            self.cfg, architecture=self.base, first_conv=registered.first_conv, classifier=registered.classifier
        )
        kwargs = dict(self.kwargs)
        if self.options.placement == "head" and self.without_classes and not (self.features_only or self.unpooled):
            kwargs["num_classes"] = 1  # or there is no classifier to replace; `_place` goes back to 0
        if self.options.placement == "stem":
            kwargs["in_chans"] = self.options.width
        return model_entrypoint(self.base)(pretrained=pretrained, pretrained_cfg=cfg.to_dict(), **kwargs)

    def _place(self, model: TimmModel, first_convs: Sequence[str]) -> dict[str, Any]:
        """Put the activation where it belongs; returns what that changes in the cfg."""
        options = self.options
        if options.placement == "stem":
            if not (first_convs and all(isinstance(model.get_submodule(name), nn.Conv2d) for name in first_convs)):
                raise self._refusal("placement 'stem' needs a convolution at the input, and it has none", "first_conv")
            new = add_stem(model, first_convs, self.in_chans, options.width, options.activation, options.cap)
            model.in_chans = self.in_chans
            return {"first_conv": _one_or_all(new)}
        if options.placement == "all":
            if not replace_activations(model, (self.in_chans, *self.image_size), options.activation, options.cap):
                raise self._refusal("placement 'all' finds no activation module to replace", "first_conv")
            return {}
        if self.features_only:
            _logger.info("%s: features_only has no classifier, so there is no D-ReLU head", self.name)
            return {}
        names = (
            paths(self.registered.classifier) if self.unpooled else classifier_names(model, self.registered.classifier)
        )
        if not names and not self.unpooled:
            raise self._refusal("it classifies nothing, there is no classifier layer to put the head at", "classifier")
        outputs = add_head(model, names, options.width, options.activation, options.cap, unpooled=self.unpooled)
        if self.without_classes and not self.unpooled:
            model.reset_classifier(0)
        return {"classifier": _one_or_all(outputs)}

    def _refusal(self, reason: str, needed: str) -> InputError:
        """The error for a model that cannot take a placement, with the nearest whose cfg names what is needed."""
        # A whole family begins alike, but within one there are models with and without a classifier.
        family = timm.list_models(module=_model_to_module[self.base]) if needed == "first_conv" else [self.base]
        others = timm.list_models(exclude_filters=["*_drelu", *family])
        able = [name for name in others if getattr(_model_pretrained_cfgs.get(name), needed, None)]
        able = [name for name in able if not name.endswith("_enc")]  # timm's name for what classifies nothing
        nearest = get_close_matches(self.base, able, n=1, cutoff=0)[0]
        return InputError(f"{self.name}: {reason}; the nearest model that works is {nearest}_drelu")

    def load(self, model: TimmModel) -> None:
        """Load the weights of a whole variant through timm, which fits the first convolution and the classifier.

        Raises:
            InputError: Nothing to read there, or weights of another model.
        """
        source = {key: getattr(self.cfg, key) for key in (*SOURCES, "source")}
        cfg = {**model.pretrained_cfg, **source, "custom_load": False, "label_offset": 0}
        if self.in_chans == self.cfg.input_size[0]:
            cfg["first_conv"] = None  # nothing to fit, but timm 1.0.9 takes every checkpoint to have 3 channels
        fit = _checked_features if self.features_only else _checked
        try:
            if self.cfg.file and self.cfg.source != "local-dir":
                cfg["state_dict"] = load_state_dict(self.cfg.file, weights_only=True)  # 1.0.9 would unpickle anything
            load_pretrained(model, cfg, getattr(model, "num_classes", 0), self.in_chans, fit)
        except InputError:
            raise
        except Exception as error:  # each reader and each kind of damage has its own
            raise _unfit(model, f"{type(error).__name__} {error}") from error


def _one_or_all(names: Sequence[str]) -> str | tuple[str, ...]:
    return names[0] if len(names) == 1 else tuple(names)


def _in_features_net(model: TimmModel, names: Sequence[str]) -> list[str]:
    """The paths that modules of a timm model have in its `features_only` net, or in itself."""
    there = {_plain(name, model): name for name, _ in model.named_modules()}
    return [there[_plain(name)] for name in names]


def _plain(name: str, net: TimmModel | None = None) -> str:
    """A path without what timm's `features_only` nets add: a module that holds the base, "_" where they flatten."""
    children = list(net._modules) if net is not None else []
    if children in (["model"], ["body"], ["graph_module"]):
        name = name.removeprefix(f"{children[0]}.")
    return name.replace("_", ".")


def _checked(state_dict: dict[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """The weights, if all of a classifier's are there and no others: where timm adapts, it is no longer strict."""
    adapted = {f"{name}.{kind}" for name in paths(model.pretrained_cfg["classifier"]) for kind in ("weight", "bias")}
    different = (state_dict.keys() ^ model.state_dict().keys()) - adapted
    if model.num_classes == 0:  # an unpooled model has no head to load
        heads = tuple(f"{name}." for name in getattr(model, "drelu_heads", ()))
        different = {name for name in different if name in model.state_dict() or not name.startswith(heads)}
    if different:
        raise _unfit(model, f"{len(different)} names differ, among them {', '.join(sorted(different)[:3])}")
    return state_dict


def _checked_features(state_dict: dict[str, Tensor], net: TimmModel) -> dict[str, Tensor]:
    """The weights of a classifier under the names that they have in its `features_only` net."""
    given = {_plain(name): tensor for name, tensor in state_dict.items()}
    missing = [name for name in net.state_dict() if _plain(name, net) not in given]
    if missing:
        raise _unfit(net, f"{len(missing)} are missing, among them {', '.join(missing[:3])}")
    return {name: given[_plain(name, net)] for name in net.state_dict()}


def _unfit(model: TimmModel, reason: str) -> InputError:
    cfg = model.pretrained_cfg
    where = cfg.get("file") or cfg.get("hf_hub_id") or cfg.get("url") or "the state_dict"
    base = cfg["architecture"].removesuffix("_drelu")
    return InputError(
        f"{cfg['architecture']}: the weights of {where} do not fit: {' '.join(reason.split())[:300]}; create it with "
        f"the arguments they were saved with, or say pretrained_cfg_overlay=dict(architecture={base!r}, ...) if they "
        f"are {base}'s"
    )
