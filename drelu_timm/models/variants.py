"""Construction of the D-ReLU variant of a timm architecture, and loading of its weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import timm
from timm.models import load_pretrained, model_entrypoint, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import _model_pretrained_cfgs, _model_to_module
from torch import Tensor, nn

from ..errors import InputError, unknown
from .activations import ACTIVATIONS
from .head import add_head, classifier_names, is_unpooled
from .inference import TimmModel
from .surgery import (
    adapt_to_small_images,
    add_stem,
    height_and_width,
    paths,
    replace_activations,
    warn_of_small_images,
)
from .weights import SOURCES, check_weights, preloaded

_logger = logging.getLogger(__name__)

PLACEMENTS = ("head", "stem", "all")
RUNTIME_ARGUMENTS = ("device", "dtype", "cache_dir", "pretrained_model_args")  # they do not define the model


@dataclass(frozen=True)
class Options:
    """Arguments of a `_drelu` entrypoint in addition to the base's.

    Attributes:
        placement: "head" for a dense layer before the classifier (the paper's); "stem" for a convolution behind the
            input; "all" for every activation module (activations called as functions cannot be replaced).
        activation: "drelu", or another name in `activations.ACTIVATIONS` as a control that differs in nothing else.
        width: Units of the dense layer, or channels of the convolution.
        cap: Initial cap of D-ReLU, fixed cap of S-ReLU.
        small_images: Adapt the first convolution to images of about 32 pixels, or upsample them where there is none.
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
            raise InputError(f"width {self.width!r} is not a number of units. Use an integer of at least 1.")
        if not 0 < self.cap < float("inf"):
            raise InputError(f"cap {self.cap!r} is not a finite number above 0.")


def build(
    base: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create the D-ReLU variant of a timm architecture; called by ``timm.create_model(f"{base}_drelu", ...)``.

    ``pretrained=True`` loads the base's weights into the backbone and leaves the new layers untrained. If
    ``pretrained_cfg`` or ``pretrained_cfg_overlay`` names another source, it has the weights of the whole variant,
    or of the base if its ``architecture`` is the base. For placement "stem" timm adapts the base's pretrained first
    convolution to the channels of the new one, as it does for any ``in_chans``.

    Args:
        base: A registered timm architecture.
        pretrained: Load weights.
        pretrained_cfg: A tag of the base, or a complete cfg.
        pretrained_cfg_overlay: Entries that override the cfg.
        **kwargs: The fields of `Options`, and the base's own arguments.

    Raises:
        InputError: An unknown value, a model that does not support the placement, or weights that do not fit.
    """
    options = Options(**{field.name: kwargs.pop(field.name) for field in fields(Options) if field.name in kwargs})
    cfg = resolve_pretrained_cfg(f"{base}_drelu", pretrained_cfg, dict(pretrained_cfg_overlay or {}))
    if cfg.fixed_input_size:  # as timm does, but here it is recorded
        size = cfg.input_size[1:]
        kwargs.setdefault("img_size", size[0] if size[0] == size[1] else tuple(size))  # some models take no pair
    variant = Variant(base, cfg, options, kwargs)
    whole = pretrained and not variant.weights_are_of_base
    if pretrained:
        check_weights(variant.name if whole else base, cfg, cache_dir=kwargs.get("cache_dir"))
    model = variant.build(pretrained_base=pretrained and not whole)
    if whole:
        variant.load(model)
    elif pretrained:
        _logger.info("%s: weights of %s in the backbone, the new layers are untrained", variant.name, base)
    return model


@dataclass(frozen=True)
class Variant:
    """Definition of one D-ReLU model: a timm architecture, its resolved cfg (of the weights), and options."""

    base: str
    cfg: PretrainedCfg
    options: Options
    kwargs: Mapping[str, Any]  # the base's own arguments

    @property
    def name(self) -> str:
        """Name under which it is registered."""
        return f"{self.base}_drelu"

    @property
    def registered(self) -> PretrainedCfg:
        """The base's own cfg for the tag, which names its first convolution and its classifier."""
        default = _model_pretrained_cfgs.get(self.base, PretrainedCfg())
        return _model_pretrained_cfgs.get(f"{self.base}.{self.cfg.tag}", default)

    @property
    def weights_are_of_base(self) -> bool:
        """Whether the cfg's weights are the base's: it names the base, or it locates them where timm's own cfg does."""
        own = self.registered
        return self.cfg.architecture == self.base or all(getattr(self.cfg, key) == getattr(own, key) for key in SOURCES)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.kwargs.get("in_chans", self.cfg.input_size[0])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width for which the base is made; the cfg may be for smaller images."""
        return height_and_width(self.kwargs.get("img_size", self.registered.input_size[1:]))

    @property
    def without_classes(self) -> bool:
        """Whether the model ends with the D-ReLU, without an output layer."""
        return self.kwargs.get("num_classes", self.cfg.num_classes) == 0

    @property
    def unpooled(self) -> bool:
        """Whether the output is the base's unpooled features, without a head."""
        return self.without_classes and is_unpooled(0, self.kwargs.get("global_pool"))

    def build(self, *, pretrained_base: bool) -> TimmModel:
        """Let timm build the base, change it in place, and record this in its cfg and arguments."""
        model = self._build_base(pretrained=pretrained_base)
        first_convs = _paths_in(model, paths(self.registered.first_conv))
        if self.options.small_images:
            channels = self.options.width if self.options.placement == "stem" else self.in_chans
            adapt_to_small_images(model, first_convs, (channels, *self.image_size))
        changes = self._place(model, first_convs)
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": self.name, **changes}
        if not self.options.small_images:
            # With img_size the image is divided into patches, whose size may suit it.
            fixed = "img_size" in self.kwargs
            size = self.image_size if fixed else self.cfg.input_size[1:]
            stride = min(size) // 8 if fixed else 1
            warn_of_small_images(model, first_convs, self.registered.input_size[1:], size, stride)
        model.default_cfg = model.pretrained_cfg
        model_args = {**self.kwargs, **asdict(self.options)}
        model._model_args = {key: value for key, value in model_args.items() if key not in RUNTIME_ARGUMENTS}
        return model

    def _build_base(self, *, pretrained: bool) -> TimmModel:
        own = self.registered
        cfg = replace(self.cfg, architecture=self.base, first_conv=own.first_conv, classifier=own.classifier)
        cfg = preloaded(cfg) if pretrained else cfg
        kwargs = dict(self.kwargs)
        has_head = self.options.placement == "head" and not (kwargs.get("features_only") or self.unpooled)
        if self.without_classes and has_head:
            kwargs["num_classes"] = 1  # otherwise the model has no classifier to replace; `_place` resets it to 0
        if self.options.placement == "stem":
            kwargs["in_chans"] = self.options.width
        return model_entrypoint(self.base)(pretrained=pretrained, pretrained_cfg=cfg.to_dict(), **kwargs)

    def _place(self, model: TimmModel, first_convs: Sequence[str]) -> dict[str, Any]:
        """Insert the activation at its placement; return the resulting changes of the cfg."""
        options = self.options
        if options.placement == "stem":
            if not (first_convs and all(isinstance(model.get_submodule(name), nn.Conv2d) for name in first_convs)):
                raise self._refusal("placement 'stem' needs a convolution at the input", "first_conv")
            new = add_stem(model, first_convs, self.in_chans, options.width, options.activation, options.cap)
            model.in_chans = self.in_chans
            return {"first_conv": _one_or_all(new)}
        if options.placement == "all":
            if not replace_activations(model, (self.in_chans, *self.image_size), options.activation, options.cap):
                raise self._refusal("placement 'all' needs an activation module", "first_conv")
            return {}
        if self.kwargs.get("features_only"):
            _logger.info("%s: features_only has no classifier, so there is no D-ReLU head", self.name)
            return {}
        names = paths(self.registered.classifier)
        names = names if self.unpooled else classifier_names(model, names)
        if not names and not self.unpooled:
            raise self._refusal("placement 'head' needs a classifier layer", "classifier")
        outputs = add_head(model, names, options.width, options.activation, options.cap, unpooled=self.unpooled)
        if self.without_classes and not self.unpooled:
            model.reset_classifier(0)
        return {"classifier": _one_or_all(outputs)}

    def _refusal(self, needs: str, needed: str) -> InputError:
        """Return the error for a base without what a placement needs, with the nearest model whose cfg names it."""
        # All of a family start alike, but some models of a family have a classifier and others do not.
        family = timm.list_models(module=_model_to_module[self.base]) if needed == "first_conv" else [self.base]
        others = timm.list_models(exclude_filters=["*_drelu", "*_enc", *family])  # *_enc: encoders without a classifier
        able = [name for name in others if getattr(_model_pretrained_cfgs.get(name), needed, None)]
        nearest = get_close_matches(self.base, able, n=1, cutoff=0)[0]
        return InputError(f"{self.name}: {needs}, which {self.base} does not have. The nearest is {nearest}_drelu.")

    def load(self, model: TimmModel) -> None:
        """Load the weights of a whole variant through timm, which adapts the first convolution and the classifier.

        Raises:
            InputError: Weights that cannot be read, or that belong to another model.
        """
        loaded = preloaded(replace(self.cfg, custom_load=False))
        source = {key: getattr(loaded, key) for key in (*SOURCES, "source")}
        cfg = {**model.pretrained_cfg, **source, "custom_load": False, "label_offset": 0}
        if self.in_chans == self.cfg.input_size[0]:
            cfg["first_conv"] = None  # nothing to adapt, but timm 1.0.9 assumes 3 channels for every checkpoint
        check = _checked_features if self.kwargs.get("features_only") else _checked
        try:
            load_pretrained(model, cfg, getattr(model, "num_classes", 0), self.in_chans, check)
        except InputError:
            raise
        except Exception as error:  # every format and every damage has its own
            raise _unfit(model, f"{type(error).__name__} {error}") from error


def _one_or_all(names: Sequence[str]) -> str | tuple[str, ...]:
    return names[0] if len(names) == 1 else tuple(names)


def _paths_in(model: TimmModel, names: Sequence[str]) -> list[str]:
    """Return the paths that a base's modules have in a model, which may be timm's `features_only` model of it."""
    found = {_plain(name, model): name for name, _ in model.named_modules()}
    return [found[_plain(name)] for name in names]


def _plain(name: str, features: TimmModel | None = None) -> str:
    """Return a path without the changes of timm's `features_only` models: a module around the base, "_" for "."."""
    children = list(features._modules) if features is not None else []
    if children in (["model"], ["body"], ["graph_module"]):
        name = name.removeprefix(f"{children[0]}.")
    return name.replace("_", ".")


def _checked(state_dict: dict[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """Return the weights if their names are the model's: timm is not strict where it adapts a layer."""
    adapted = {f"{name}.{kind}" for name in paths(model.pretrained_cfg["classifier"]) for kind in ("weight", "bias")}
    different = (state_dict.keys() ^ model.state_dict().keys()) - adapted
    if model.num_classes == 0:  # an unpooled model has no head to load
        heads = tuple(f"{name}." for name in getattr(model, "drelu_heads", ()))
        different = {name for name in different if name in model.state_dict() or not name.startswith(heads)}
    if different:
        raise _unfit(model, f"{len(different)} names differ, among them {', '.join(sorted(different)[:3])}")
    return state_dict


def _checked_features(state_dict: dict[str, Tensor], features: TimmModel) -> dict[str, Tensor]:
    """Return a classifier's weights under the names that they have in its `features_only` model."""
    given = {_plain(name): tensor for name, tensor in state_dict.items()}
    missing = [name for name in features.state_dict() if _plain(name, features) not in given]
    if missing:
        raise _unfit(features, f"{len(missing)} are missing, among them {', '.join(missing[:3])}")
    return {name: given[_plain(name, features)] for name in features.state_dict()}


def _unfit(model: TimmModel, reason: str) -> InputError:
    cfg = model.pretrained_cfg
    where = cfg.get("file") or cfg.get("hf_hub_id") or cfg.get("url") or "the state_dict"
    base = cfg["architecture"].removesuffix("_drelu")
    return InputError(
        f"{cfg['architecture']}: the weights of {where} do not fit: {' '.join(reason.split())[:300]}. Create the model "
        f"with the arguments of the saved one, or use pretrained_cfg_overlay=dict(architecture={base!r}, ...) for "
        f"weights of {base}."
    )
