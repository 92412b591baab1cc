"""Certified accuracy of a user's model: a lower bound of its accuracy under every attack, by interval bounds.

The bounds are computed for a float64 copy of the model. The float32 model that attacks see differs from it by rounding
alone, so a margin has to be larger than that.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from ..attacks.attack import Batch
from ..attacks.threat_model import ThreatModel
from ..data.images import as_float
from ..errors import one_line
from ..models.intervals import bounds, certified
from .checkpoint import Measurement
from .driver import Driver
from .functions import FunctionModel
from .user_model import UserModel

STAGE = "certified"
_ROUNDING = 1e-4  # of the image's largest logit; float32 models are seen to differ from float64 by 1e-6
_SAMPLE = 2  # images


def certify(driver: Driver, correct: Tensor) -> tuple[list[Tensor], str]:
    """Return for each of the driver's threat models on which examples [N] no attack can fool the model.

    Args:
        driver: With a `UserModel`.
        correct: [N], which examples are classified correctly; only these are examined.

    Returns:
        The examples by threat model, and an empty sentence; or no examples, and the reason.
    """
    model = driver.model
    assert isinstance(model, UserModel)
    if driver.threat_models[0].norm != "Linf":
        return [], f"Not certified: interval bounds are for Linf, not for {driver.threat_models[0].norm}."
    copy, reason = _in_float64(model, driver.images[:_SAMPLE])
    if copy is None:
        return [], f"Not certified: {reason}"
    driver.measure(STAGE, correct, partial(_measure, copy, driver.threat_models))
    return [driver.column(STAGE, threat_model.written) == 1 for threat_model in driver.threat_models], ""


def _measure(model: nn.Module, threat_models: Sequence[ThreatModel], examples: Tensor, batch: Batch) -> Measurement:
    images = batch.images.double()
    columns = {one.written: certified(model, images, batch.labels, one.eps, _ROUNDING) for one in threat_models}
    return Measurement.of(examples, columns)


def _in_float64(model: UserModel, images: Tensor) -> tuple[nn.Module | None, str]:
    """Return a copy of a model in float64 whose interval bounds are known and mean something; else None and why not."""
    if isinstance(model.model, FunctionModel):
        return None, "the model is a function, whose weights cannot be copied to float64."
    if model.dtype != torch.float32:
        return None, f"the model computes in {str(model.dtype).removeprefix('torch.')}, whose rounding is not bounded."
    sample = as_float(images).to(model.device)
    try:
        copy = deepcopy(model.model).double()
        with torch.no_grad():
            first, again = (bounds(copy, sample.double(), 0.0).value for _ in range(2))
            logits = model(sample)
    except Exception as error:  # a user's model may raise anything where its input is not a plain tensor
        return None, one_line(error)
    if not torch.equal(first, again):
        return None, "the model returns other logits every time."
    if not torch.allclose(first.float(), logits, rtol=_ROUNDING, atol=_ROUNDING * float(logits.abs().max())):
        return None, "a copy of the model in float64 returns other logits."
    return copy, ""
