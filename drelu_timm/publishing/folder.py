"""The exported folder: what is written into it, all of it or nothing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..data.images import Images, to_float
from ..digests import sha256_of
from ..errors import InputError, one_line
from ..files import atomic_file, write_json, write_text
from ..models.weights import CONFIG, WEIGHTS
from ..results.plotting import draw_curve
from ..runs import Run
from .cards import SHIPPED, model_card
from .entries import card_record, model_info
from .measured import Measured
from .recipes import recipe
from .submission import autoattack_log, is_external, new_evaluation, new_model
from .verification import Evaluated


def write_model(folder: Path, measured: Measured, run: Run) -> None:
    """Everything but the submission: register.py, hub/, weights/, model_info/, model_cards/ and scripts/."""
    write_text(folder / "register.py", _registration(measured))
    hub, weights = folder / "hub", folder / "weights"
    for place in (hub, weights):
        place.mkdir()
    shutil.copyfile(run.model_folder / WEIGHTS, hub / WEIGHTS)
    write_json(hub / CONFIG, measured.timm)  # whose digest the card tells
    write_text(hub / "README.md", model_card(measured, source="."))
    shutil.copyfile(hub / WEIGHTS, weights / f"{measured.key}.safetensors")
    with atomic_file(weights / f"{measured.key}.pt") as beside:
        torch.save(run.load_model().state_dict(), beside)
    names = [f"{measured.key}.safetensors", f"{measured.key}.pt", f"../hub/{CONFIG}"]
    write_text(weights / "SHA256SUMS", "".join(f"{sha256_of(weights / name)}  {name}\n" for name in names))

    write_json(folder / "model_info" / f"{measured.place}.json", model_info(measured))
    cards = folder / "model_cards" / measured.place.parent
    write_json(cards / f"{measured.key}.json", card_record(measured))
    write_text(cards / f"{measured.key}.md", model_card(measured))
    if measured.weights.bytes <= SHIPPED:
        shutil.copyfile(hub / WEIGHTS, cards / f"{measured.key}.safetensors")
    if measured.curve is not None:
        curve, dataset = measured.curve, measured.results.dataset_title
        title = f"{measured.key}\n{dataset}, {measured.norm}, first {curve.n_examples:,} test images"
        draw_curve(curve.points, cards / f"{measured.key}.png", title=title)
        shutil.copyfile(cards / f"{measured.key}.png", hub / f"{measured.key}.png")
    write_text(folder / measured.recipe, recipe(measured))


def _registration(measured: Measured) -> str:
    """The file register.py, which lets timm and RobustBench load the model from the folder that it lies in."""
    named = ", ".join(f'"{word}"' for word in (measured.key, measured.dataset, measured.norm))
    return f'''\
"""Registers {measured.name} with timm, and so with RobustBench.

The source may as well be "hf-hub:ORG/NAME" or the https:// address of hub/.
"""

from pathlib import Path

from drelu_timm import register_robust_model

SHA256 = "{measured.weights.sha256}"
CONFIG_SHA256 = "{measured.config_sha256}"
SOURCE = Path(__file__).parent / "hub"
register_robust_model({named}, SOURCE, sha256=SHA256, config_sha256=CONFIG_SHA256)
'''


def write_submission(folder: Path, measured: Measured, test: Images, evaluated: Evaluated) -> None:
    """What goes to RobustBench by hand."""
    submission = folder / "submission"
    write_text(submission / "new-model.md", new_model(measured, None))
    write_text(submission / "autoattack.log", autoattack_log(measured.results))
    if is_external(measured):
        images = f"{measured.key}_adversarial.pt"
        write_text(submission / "new-external-evaluation.md", new_evaluation(measured, images, evaluated.without_image))
        whole = to_float(test.images)
        whole[evaluated.broken] = evaluated.adversarial
        with atomic_file(submission / images) as beside:
            torch.save(whole, beside)


@contextmanager
def whole_or_not_at_all(output_dir: Path) -> Iterator[Path]:
    """A new folder beside ``output_dir``, which takes its name at the end, or vanishes with an error."""
    folder = output_dir.with_name(f".{output_dir.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--output-dir {output_dir} cannot be made ({one_line(error)}); give another one") from error
    try:
        yield folder
        folder.replace(output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
