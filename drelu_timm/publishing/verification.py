"""Checks of an exported folder before it gets its name: it must give its users the model that was evaluated."""

import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.images import Images, to_float
from ..errors import InputError
from ..formatting import escape_markdown
from ..hashing import sha256_of
from ..models.weights import WEIGHTS
from ..results.examples import Adversarial, read_adversarial, read_rows, read_survivors
from ..results.result import Result
from ..results.seal import check_result
from .card import AUTOATTACK, Card
from .leaderboard import check_entry, model_info

_BATCH = 256


@dataclass(frozen=True)
class Check:
    """A check: what was checked, by which call or comparison, and its result or why it could not be made."""

    what: str
    how: str
    result: str


@dataclass(frozen=True)
class EvaluatedImages:
    """The evaluated images, the first N of the test set, with what the evaluations recorded for each.

    Attributes:
        test: All test images.
        predictions: int64 [N], predicted classes of the clean images.
        autoattack: bool [N], whether the model stayed robust under AutoAttack.
        adversarial: The adversarial images of each evaluation by its file, the chosen one first.
        without_image: Number of images that fooled the model only in a sweep over eps, which stores no images.
        sealed: Whether every evaluation has a seal; see `results.seal`.
    """

    test: Images
    predictions: Tensor
    autoattack: Tensor
    adversarial: dict[Path, Adversarial]
    without_image: int
    sealed: bool

    @cached_property
    def images(self) -> Tensor:
        """Clean images, float32 [N, C, H, W] in [0, 1]."""
        return to_float(self.test.images[: len(self.predictions)])

    @property
    def labels(self) -> Tensor:
        """Labels, int64 [N]."""
        return self.test.labels[: len(self.predictions)]

    @property
    def clean(self) -> float:
        """Clean accuracy in [0, 1]."""
        return (self.predictions == self.labels).double().mean().item()

    @cached_property
    def worst(self) -> Tensor:
        """Images [N, C, H, W] with the first adversarial image in the place of each one that has any."""
        images = self.images.clone()
        for found in reversed(self.adversarial.values()):
            within = found.index < len(images)
            images[found.index[within]] = found.images[within]
        return images


def read_evaluated(evaluations: Sequence[Result], test: Images) -> EvaluatedImages:
    """Read rows and adversarial images of evaluations, and check them against each other and the test images.

    Args:
        evaluations: Evaluations of the same weights in the same threat model on the first test images, on how many may
            differ; the chosen one first.
        test: All test images.

    Raises:
        InputError: Files are missing, cannot be read, or contradict each other, their seals or the test images.
    """
    sealed = [check_result(one, test) for one in evaluations]
    chosen, eps = evaluations[0], evaluations[0].point.eps
    rows, survivors = read_rows(chosen, eps), read_survivors(evaluations, chosen.n_examples, eps)
    if rows is None or survivors is None or AUTOATTACK not in rows.robust:
        csv = chosen.file.with_suffix(".csv")
        raise InputError(f"{csv} is missing or has no column {AUTOATTACK}. Delete the result and evaluate again.")
    adversarial = {one.file: read_adversarial(one) for one in evaluations if not one.is_sweep}
    fooled = (rows.predictions == rows.labels) & ~survivors
    for found in adversarial.values():
        fooled[found.index[found.index < len(fooled)]] = False
    return EvaluatedImages(test, rows.predictions, rows.robust[AUTOATTACK], adversarial, int(fooled.sum()), all(sealed))


def verify(
    folder: Path, card: Card, evaluated: EvaluatedImages, robustbench: Any, benchmark_examples: int
) -> list[Check]:
    """Load an exported folder in every way that its users will, and compare it with the evaluation.

    Args:
        folder: Contains register.py, hub/, weights/ and model_info/.
        card: Data of the model.
        evaluated: Images and results of the evaluation.
        robustbench: The package, or a sentence on why it cannot be used.
        benchmark_examples: Number of test images for ``robustbench.eval.benchmark``; 0 leaves it out.

    Raises:
        InputError: The first check that fails.
    """
    runpy.run_path(str(folder / "register.py"))
    model = timm.create_model(card.name, pretrained=True).to(_device())
    checks = [
        _check_files(folder, card),
        _check_normalization(model),
        _check_deterministic(model, evaluated),
        _check_predictions("timm.create_model", model, evaluated),
        _check_adversarial(model, evaluated, card),
        Check(
            "result files",
            "accuracies, worst case and verdict derived again; seal of every file, which is not a signature",
            f"equal; {'unbroken' if evaluated.sealed else 'without a seal, from an earlier version'}",
        ),
        Check(
            "input gradients",
            "share of the correct images whose gradient is exactly zero, in the evaluation",
            f"{100 * card.point.zero_gradient_share:.2f} %; gradient masking: {card.verdict}",
        ),
    ]
    if isinstance(robustbench, str):
        return [*checks, Check("RobustBench", "robustbench.utils.load_model", f"not loaded: {robustbench}")]
    checks += _check_robustbench(robustbench, folder, card, evaluated)
    if benchmark_examples:
        checks.append(_check_benchmark(robustbench, card, evaluated, benchmark_examples))
    return checks


def checks_page(card: Card, checks: list[Check]) -> str:
    """Return the text of CHECKS.md."""
    cells = [[escape_markdown(cell) for cell in astuple(check)] for check in checks]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"""\
# Checks of {card.key}

Made by `drelu-timm export` on the files in this folder. {escape_markdown(card.sample)}

| what | how | result |
| --- | --- | --- |
{rows}
"""


def _check_files(folder: Path, card: Card) -> Check:
    lines = (folder / "weights" / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    for name, digest in sums.items():
        if sha256_of(folder / "weights" / name) != digest:
            raise InputError(f"weights/{name} does not match its sha256. Export again.")
    if sha256_of(folder / "hub" / WEIGHTS) != card.results.model_digest:
        raise InputError("hub/model.safetensors does not contain the evaluated weights. Export again.")
    check_entry(model_info(card))
    how = "sha256 of the weights against the evaluation's; the entry against a schema made from RobustBench's entries"
    return Check("files", how, f"equal, {len(sums)} sums written; valid")


def _check_normalization(model: nn.Module) -> Check:
    normalize = getattr(model, "normalize", None)
    if normalize is None:
        raise InputError("The exported model has no layer `normalize`. Export again.")
    mean, std = (", ".join(f"{value:.4g}" for value in of.flatten().tolist()) for of in (normalize.mean, normalize.std))
    return Check("normalization", "is the first layer, for images in [0, 1]", f"mean {mean}, std {std}")


def _check_deterministic(model: nn.Module, evaluated: EvaluatedImages) -> Check:
    images = evaluated.images[:_BATCH]
    if not torch.equal(_logits(model, images), _logits(model, images)):
        raise InputError("The model returns different logits for the same images. RobustBench refuses such models.")
    return Check("forward pass", f"the same {len(images)} images twice", "bit-equal logits: deterministic")


def _check_predictions(loader: str, model: nn.Module, evaluated: EvaluatedImages) -> Check:
    predictions = _predictions(model, evaluated.images)
    n, equal = len(predictions), int((predictions == evaluated.predictions).sum())
    found = (predictions == evaluated.labels).double().mean().item()
    accuracy = f"clean accuracy {100 * found:.2f} %, in the evaluation {100 * evaluated.clean:.2f} %"
    if n - equal > _tolerance(n):
        raise InputError(
            f"{loader} loads a model other than the evaluated one ({equal} of {n} predictions are equal, {accuracy}). "
            "Evaluate the run again."
        )
    return Check(loader, "its predictions", f"{equal:,} of {n:,} as in the evaluation; {accuracy}")


def _check_adversarial(model: nn.Module, evaluated: EvaluatedImages, card: Card) -> Check:
    """Check that the adversarial images of every evaluation fool the model, and give the worst case together."""
    for path, found in evaluated.adversarial.items():
        robust = found.index[_predictions(model, found.images) == evaluated.test.labels[found.index]]
        if len(robust) > _tolerance(len(found.index)):
            raise InputError(
                f"{len(robust)} of the {len(found.index)} adversarial images of {path} do not fool the model (example "
                f"{robust[0]} first). Evaluate the run again."
            )
    n, worst = len(evaluated.predictions), card.point.worst
    left = (_predictions(model, evaluated.worst) == evaluated.labels).double().mean().item()
    if abs(round((left - worst) * n) - evaluated.without_image) > _tolerance(n):
        raise InputError(
            f"The accuracy on the adversarial images is {100 * left:.2f} %, in the evaluation {100 * worst:.2f} %. "
            "Evaluate the run again."
        )
    result = f"all within {card.threat_model} and in [0, 1]; {100 * left:.2f} %, the worst case {100 * worst:.2f} %"
    if evaluated.without_image:
        result += f"; {evaluated.without_image} found only in a sweep over eps, which stores no images"
    return Check("adversarial images", "distance from the clean images, and accuracy", result)


def _tolerance(n: int) -> int:
    """Return how many of n predictions may differ: between two equal logits, rounding on other hardware decides."""
    return max(1, n // 1000)


def _check_robustbench(robustbench: Any, folder: Path, card: Card, evaluated: EvaluatedImages) -> list[Check]:
    """Check RobustBench's loader, with the registered weights and with the .pt file."""
    arguments = {"dataset": card.dataset, "threat_model": card.norm}
    load: Callable[..., nn.Module] = robustbench.utils.load_model
    model = load(card.key, **arguments).to(_device())
    checks = [_check_predictions("robustbench.utils.load_model", model, evaluated)]
    from_pickle = load(card.key, **arguments, custom_checkpoint=str(folder / "weights" / f"{card.key}.pt"))
    images = evaluated.images[:_BATCH]
    if not torch.equal(_logits(from_pickle.to(_device()), images), _logits(model, images)):
        raise InputError(f"weights/{card.key}.pt contains other weights than model.safetensors. Export again.")
    return [*checks, Check("state dict", "load_model(custom_checkpoint=weights/....pt)", "bit-equal logits")]


def _check_benchmark(robustbench: Any, card: Card, evaluated: EvaluatedImages, count: int) -> Check:
    """Compare AutoAttack as RobustBench runs it, with a seed from the clock, with ours on the same images."""
    from robustbench.eval import benchmark

    n = min(count, len(evaluated.labels))
    ours = evaluated.autoattack[:n].double().mean().item()
    model = timm.create_model(card.name, pretrained=True)
    print(f"robustbench.eval.benchmark on {n} test images, for comparison:", flush=True)
    with _test_images(robustbench, card.dataset, evaluated):
        clean, theirs = benchmark(
            model,
            n_examples=n,
            dataset=card.dataset,
            threat_model=card.norm,
            eps=card.threat_model.eps,
            batch_size=_BATCH,
            device=_device(),
            preprocessing=nn.Identity(),  # unused: the images are passed by _test_images
        )
    allowed = max(2, round(0.05 * n))
    # If gradients are masked, AutoAttack's accuracy depends on its seed, and the worst case is what counts.
    if round((ours - theirs) * n) > allowed and card.verdict != "masked":
        raise InputError(
            f"robustbench.eval.benchmark leaves {100 * theirs:.1f} % of the first {n} test images, AutoAttack in the "
            f"evaluation {100 * ours:.1f} %. They may differ by {allowed} images. Evaluate the run again."
        )
    images = "the run's own test images" if card.is_copy else "test images"
    result = f"clean {100 * clean:.2f} %, AutoAttack {100 * theirs:.2f} % (ours on the same images: {100 * ours:.2f} %)"
    return Check(f"the first {n} {images}", "robustbench.eval.benchmark", result)


@contextmanager
def _test_images(robustbench: Any, dataset: str, evaluated: EvaluatedImages) -> Iterator[None]:
    """Let RobustBench's loader of a dataset return the evaluated images, as CIFAR-10 may be another copy."""
    loaders, key = robustbench.data._clean_dataset_loaders, robustbench.model_zoo.enums.BenchmarkDataset(dataset)
    before = loaders[key]
    loaders[key] = lambda n, data_dir, preprocessing: (evaluated.images[:n], evaluated.labels[:n])
    try:
        yield
    finally:
        loaders[key] = before


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    batches = tqdm(images.split(_BATCH), desc="verifying", unit="batch", leave=False, disable=None)
    return torch.cat([model(batch.to(_device())).cpu() for batch in batches])


def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    return _logits(model, images).argmax(1)
