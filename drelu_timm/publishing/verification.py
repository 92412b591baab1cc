"""What is verified of an exported folder before it takes its name: that its users get the model that was evaluated."""

import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.images import Images, to_float
from ..digests import sha256_of
from ..errors import InputError
from ..models.weights import WEIGHTS
from ..results.examples import read_adversarial, read_rows, read_survivors
from ..results.result import ROUNDING, Result
from .entries import check_entry, model_info
from .measured import AUTOATTACK, Measured

_BATCH = 256
_AGAIN = "delete the result and evaluate anew"


@dataclass(frozen=True)
class Check:
    """Something that was verified.

    Attributes:
        what: It.
        how: By which call or comparison.
        result: What came out; of a check that could not be made, why.
    """

    what: str
    how: str
    result: str


@dataclass(frozen=True)
class Evaluated:
    """The images that were evaluated, the first of the test set, and what the evaluation wrote down of each.

    Attributes:
        images: [N, C, H, W] floats in [0, 1].
        labels: [N].
        predictions: [N], the classes predicted for them.
        autoattack: [N], whether AutoAttack left them right.
        broken: [M], positions among these N of the images that are right and that something broke.
        adversarial: [M, C, H, W], what broke them.
        without_image: How many more were broken in a sweep over eps, which keeps no images.
    """

    images: Tensor
    labels: Tensor
    predictions: Tensor
    autoattack: Tensor
    broken: Tensor
    adversarial: Tensor
    without_image: int

    @property
    def clean(self) -> float:
        """Clean accuracy in [0, 1]."""
        return (self.predictions == self.labels).double().mean().item()


def read_evaluated(chosen: Result, further: Sequence[Result], test: Images) -> Evaluated:
    """What an evaluation wrote of every example, and the adversarial images that it and others found.

    Args:
        chosen: The evaluation.
        further: Others of the same weights in the same threat model, on its first images, or on more or fewer.
        test: All test images.

    Raises:
        InputError: Files that are cut, were changed since, do not say the same, or are of other test images.
    """
    point = chosen.point
    rows = read_rows(chosen, point.eps)
    if rows is None:
        raise InputError(f"{chosen.file.with_suffix('.csv')} is missing; {_AGAIN}")
    csv = chosen.file.with_suffix(".csv")
    n = chosen.n_examples
    if n > len(test) or not torch.equal(rows.labels, test[:n].labels):
        raise InputError(f"{csv} has other labels than the test images of {test.title}; give their place by --data-dir")
    shares, stated = rows.shares, {"clean": point.clean, **point.accuracy}
    for name, accuracy in stated.items():
        if name not in shares or abs(shares[name] - accuracy) > ROUNDING:
            raise InputError(f"{csv} has another {name} accuracy than {chosen.path}; {_AGAIN}")
    broken = _adversarial(chosen)
    left = rows.survivors.nonzero().squeeze(1).tolist()
    for file in further:
        if not file.is_sweep:
            others = _adversarial(file)
            broken |= {at: others[at] for at in left if at in others and at not in broken}
    images = to_float(test[:n].images)
    survivors = read_survivors([chosen, *further], n, point.eps)
    right = rows.predictions == rows.labels
    fallen = n if survivors is None else int(right.sum()) - int(survivors.sum())
    return Evaluated(
        images=images,
        labels=rows.labels,
        predictions=rows.predictions,
        autoattack=rows.robust[AUTOATTACK],
        broken=torch.tensor(sorted(broken), dtype=torch.int64),
        adversarial=torch.stack([broken[at] for at in sorted(broken)]) if broken else images[:0],
        without_image=fallen - len(broken),
    )


def _adversarial(result: Result) -> dict[int, Tensor]:
    """The adversarial images [C, H, W] of an evaluation, by their positions in the test set."""
    found = read_adversarial(result)
    return dict(zip(found.index.tolist(), found.images, strict=True))


def verify(
    folder: Path, measured: Measured, evaluated: Evaluated, robustbench: Any, benchmark_examples: int
) -> list[Check]:
    """Load an exported folder in every way that its users will, and compare with what was evaluated.

    Args:
        folder: With register.py, hub/, weights/ and model_info/.
        measured: What it is about.
        evaluated: What the evaluation saw.
        robustbench: The package, or a sentence on why it cannot be used.
        benchmark_examples: How many test images ``robustbench.eval.benchmark`` is run on; 0 for none.

    Raises:
        InputError: The first thing that does not agree.
    """
    runpy.run_path(str(folder / "register.py"))
    model = timm.create_model(measured.name, pretrained=True).to(_device())
    checks = [
        _check_files(folder, measured),
        _check_normalisation(model),
        _check_deterministic(model, evaluated),
        _check_predictions("timm.create_model", model, evaluated),
        _check_adversarial(model, evaluated, measured),
        Check(
            "input gradients",
            "share of the examples classified right whose gradient is exactly zero, in the evaluation",
            f"{100 * measured.point.zero_gradient_share:.2f} %; gradient masking: {measured.verdict}",
        ),
    ]
    if isinstance(robustbench, str):
        return [*checks, Check("RobustBench", "robustbench.utils.load_model", f"not loaded: {robustbench}")]
    checks += _check_robustbench(robustbench, folder, measured, evaluated)
    if benchmark_examples:
        checks.append(_check_benchmark(robustbench, measured, evaluated, benchmark_examples))
    return checks


def checks_page(measured: Measured, checks: list[Check]) -> str:
    """CHECKS.md of an exported folder."""
    rows = "\n".join(f"| {check.what} | {check.how} | {check.result} |" for check in checks)
    return f"""\
# What was checked of {measured.key}

By `drelu-timm export`, of the files in this folder. {measured.sample}

| what | how | result |
| --- | --- | --- |
{rows}
"""


def _check_files(folder: Path, measured: Measured) -> Check:
    """The sums that are written down, and the entry's form."""
    lines = (folder / "weights" / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    for name, digest in sums.items():
        if sha256_of(folder / "weights" / name) != digest:
            raise InputError(f"weights/{name} is not what its sha256 says; export again")
    if sha256_of(folder / "hub" / WEIGHTS) != measured.results.model_digest:
        raise InputError("hub/model.safetensors is not what was evaluated; export again")
    check_entry(model_info(measured))
    how = "sha256 of the weights against the evaluation's; the entry against a schema made from RobustBench's entries"
    return Check("files", how, f"equal, {len(sums)} sums written; valid")


def _check_normalisation(model: nn.Module) -> Check:
    normalize = getattr(model, "normalize", None)
    if normalize is None:
        raise InputError("the exported model has no layer `normalize`; export again")
    mean, std = (", ".join(f"{value:.4g}" for value in of.flatten().tolist()) for of in (normalize.mean, normalize.std))
    return Check("normalisation", "the first layer, so that [0, 1] images go in", f"inside: mean {mean}, std {std}")


def _check_deterministic(model: nn.Module, evaluated: Evaluated) -> Check:
    images = evaluated.images[:_BATCH]
    if not torch.equal(_logits(model, images), _logits(model, images)):
        raise InputError("the model gives other logits for the same images each time; RobustBench takes no such model")
    return Check("forward pass", f"the same {len(images)} images twice", "bit-equal logits: deterministic")


def _check_predictions(loader: str, model: nn.Module, evaluated: Evaluated) -> Check:
    """Compare what a loaded model predicts with what the evaluation saw."""
    predictions = _predictions(model, evaluated.images)
    n, equal = len(predictions), int((predictions == evaluated.predictions).sum())
    found = (predictions == evaluated.labels).double().mean().item()
    accuracy = f"clean accuracy {100 * found:.2f} % against {100 * evaluated.clean:.2f} % in the evaluation"
    if n - equal > _allowed(n):
        raise InputError(
            f"the model that {loader} loads is not the one that was evaluated ({equal} of {n} predictions equal, "
            f"{accuracy}); evaluate the run anew"
        )
    return Check(f"`{loader}`", "its predictions", f"{equal:,} of {n:,} as in the evaluation; {accuracy}")


def _check_adversarial(model: nn.Module, evaluated: Evaluated, measured: Measured) -> Check:
    """The images that go into an external evaluation: in the ball, and as strong as the worst case says."""
    images, clean = evaluated.adversarial, evaluated.images[evaluated.broken]
    threat_model = measured.threat_model
    inside = threat_model.contains(images, clean) & (images.flatten(1).amin(1) >= 0) & (images.flatten(1).amax(1) <= 1)
    if not inside.all():
        raise InputError(f"{int((~inside).sum())} adversarial images leave the ball or [0, 1]; evaluate the run anew")
    predictions = evaluated.predictions.clone()
    predictions[evaluated.broken] = _predictions(model, images)
    n, worst = len(predictions), measured.point.worst
    left = (predictions == evaluated.labels).double().mean().item()
    if abs(round((left - worst) * n) - evaluated.without_image) > _allowed(n):
        raise InputError(
            f"the adversarial images leave {100 * left:.2f} %, the evaluation {100 * worst:.2f} %; evaluate anew"
        )
    how = "their distance from the clean ones, and the accuracy on them"
    result = f"all within {threat_model} and in [0, 1]; {100 * left:.2f} %, the worst case {100 * worst:.2f} %"
    if evaluated.without_image:
        result += f": {evaluated.without_image} fell in a sweep over eps only, which keeps no images"
    return Check("adversarial images", how, result)


def _allowed(n: int) -> int:
    """How many of n predictions may turn: on other hardware rounding decides between two classes that are level."""
    return max(1, n // 1000)


def _check_robustbench(robustbench: Any, folder: Path, measured: Measured, evaluated: Evaluated) -> list[Check]:
    """RobustBench's loader, with the registered weights and with the .pt file."""
    arguments = {"dataset": measured.dataset, "threat_model": measured.norm}
    load: Callable[..., nn.Module] = robustbench.utils.load_model
    model = load(measured.key, **arguments).to(_device())
    checks = [_check_predictions("robustbench.utils.load_model", model, evaluated)]
    from_pickle = load(measured.key, **arguments, custom_checkpoint=str(folder / "weights" / f"{measured.key}.pt"))
    images = evaluated.images[:_BATCH]
    if not torch.equal(_logits(from_pickle.to(_device()), images), _logits(model, images)):
        raise InputError(f"weights/{measured.key}.pt holds other weights than model.safetensors; export again")
    checks.append(Check("state dict", "load_model(custom_checkpoint=weights/....pt)", "bit-equal logits"))
    return checks


def _check_benchmark(robustbench: Any, measured: Measured, evaluated: Evaluated, count: int) -> Check:
    """AutoAttack as RobustBench runs it, whose seed is the clock's, against ours on the same images."""
    from robustbench.eval import benchmark

    n = min(count, len(evaluated.labels))
    ours = evaluated.autoattack[:n].double().mean().item()
    model = timm.create_model(measured.name, pretrained=True)
    print(f"robustbench.eval.benchmark on {n} test images, for comparison:", flush=True)
    with _test_images(robustbench, measured.dataset, evaluated):
        clean, theirs = benchmark(
            model,
            n_examples=n,
            dataset=measured.dataset,
            threat_model=measured.norm,
            eps=measured.threat_model.eps,
            batch_size=_BATCH,
            device=_device(),
            preprocessing=nn.Identity(),  # unused: the images are there
        )
    allowed = max(2, round(0.05 * n))
    # Where gradients are masked AutoAttack's number hangs on its seed, and is not the one to go by.
    if round((ours - theirs) * n) > allowed and measured.verdict != "masked":
        raise InputError(
            f"robustbench.eval.benchmark leaves {100 * theirs:.1f} % of the first {n} test images, the evaluation's "
            f"AutoAttack {100 * ours:.1f} %, more than {allowed} images apart; evaluate the run anew"
        )
    images = "the run's own test images" if measured.is_copy else "test images"
    result = f"clean {100 * clean:.2f} %, AutoAttack {100 * theirs:.2f} % (ours on the same images: {100 * ours:.2f} %)"
    return Check(f"the first {n} {images}", "robustbench.eval.benchmark", result)


@contextmanager
def _test_images(robustbench: Any, dataset: str, evaluated: Evaluated) -> Iterator[None]:
    """Let RobustBench's loader of a dataset give the images that were evaluated, as CIFAR-10 may be another copy."""
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
