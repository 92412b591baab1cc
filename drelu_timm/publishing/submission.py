"""What RobustBench is sent: the texts of its two issue forms, AutoAttack's log, and the adversarial images.

The forms are those of https://github.com/RobustBench/robustbench/tree/master/.github/ISSUE_TEMPLATE.
"""

from collections.abc import Iterator

from ..attacks.suites import ATTACKS, SUITES
from ..results.result import Result
from .cards import licences
from .entries import architecture, model_info, told_of_data
from .measured import AUTOATTACK, Measured, percent
from .recipes import made_with

ZOO = "https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures"


def new_model(measured: Measured, repo: str | None) -> str:
    """The text of the form "New Model(s)", filled in.

    Args:
        measured: The model.
        repo: Its repository on the Hub; None where it has not been pushed.
    """
    entry = model_info(measured)
    where = f"https://huggingface.co/{repo}" if repo else "(the address of hub/ or weights/, once they are uploaded)"
    additional = f"{str(entry['additional_data']).lower()}"
    if told := told_of_data(measured):
        additional += f". {' '.join(told)}"
    return f"""\
Title: [New Model] {measured.key}

# Paper Information

- **Paper Title**: {entry["name"]}
- **Paper URL**: {entry["link"]}
- **Paper authors**: {entry["authors"]}

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {entry["architecture"]}
- **Threat Model**: {measured.norm}
- **eps**: {entry["eps"]}
- **Clean accuracy**: {entry["clean_acc"]}
- **Robust accuracy**: {percent(measured.point.worst)}
- **Additional data**: {additional}
- **Evaluation method**: {_method(measured)}
- **Checkpoint and code**: {where}, sha256 of model.safetensors {measured.weights.sha256}

# Model Zoo:

- [ ] I want to add my models to the Model Zoo (check if true)
- [x] I use an architecture that is included among those [here]({ZOO}) or in `timm`. If not, I added the link to the \
architecture implementation so that it can be added. (`{architecture(measured)}`, of timm with `import drelu_timm`)
- [ ] I agree to release my model(s) under MIT license (check if true) **OR** under a custom license, located here: \
{licences(measured)}
"""


def _method(measured: Measured) -> str:
    results = measured.results
    sentences = [
        f"AutoAttack standard: {percent(measured.autoattack)}.",
        f"Worst case, image by image, of {measured.attacks}: {percent(measured.point.worst)}.",
        f"Gradient masking: {measured.verdict}.",
        measured.sample,
        f"Attacks searched in {results.precision} and were judged in float32; {made_with(results.environment)}.",
    ]
    return " ".join(sentences)


def is_external(measured: Measured) -> bool:
    """Whether there is an evaluation to hand in beside AutoAttack's: adaptive attacks, or a worst case below its.

    Not of a copy of the board's images, as an image in the ball of the copy may be outside of the original's.
    """
    tried = measured.attacks_tried
    adaptive = any(attack in ATTACKS and ATTACKS[attack].kind == "adaptive" for attack in tried)
    return (adaptive or measured.external is not None) and not measured.is_copy


def new_evaluation(measured: Measured, images: str, without_image: int) -> str:
    """The text of the form "New external evaluation(s)", filled in.

    Args:
        measured: The model.
        images: Name of the file of adversarial images.
        without_image: How many images of the worst case are not in it, as they fell in a sweep over eps only.
    """
    missing = f"; so are {without_image} that fell in a sweep over eps only" if without_image else ""
    return f"""\
Title: [New evaluation] {measured.key}

## Target model
+ **Model identifier(s):** {measured.key}
+ **Leaderboard(s):** {measured.dataset}, {measured.threat_model}

## New evaluation
+ **Link to adversarial images:** (the address of {images}, once it is uploaded: a tensor of the size of the test set, \
in its order; images that withstood, are wrong as they are, or were not evaluated are clean{missing})
+ **Robust accuracy:** {percent(measured.point.worst)} (AutoAttack: {percent(measured.autoattack)}). {measured.sample}
+ **Author(s):** {measured.paper.authors}
+ **Description of the method used:** for every image, whatever first broke it of {measured.attacks}. Gradient \
masking: {measured.verdict}. {" ".join(measured.point.verdict.evidence)}
"""


def autoattack_log(result: Result) -> str:
    """Return what AutoAttack's own log would hold of an evaluation."""
    return "\n".join(_log(result)) + "\n"


def _log(result: Result) -> Iterator[str]:
    stages, point = SUITES["autoattack"][AUTOATTACK], result.point
    yield f"AutoAttack standard including {', '.join(stages)}; {result.norm}, eps {point.eps}"
    yield f"{result.n_examples} test images of {result.dataset_title}, seed {result.seed}"
    yield f"{made_with(result.environment)}; attacks search in {result.precision}, and are judged in float32"
    yield f"initial accuracy: {point.clean:.2%}"
    for attack, left in point.sequences[AUTOATTACK].items():
        yield f"robust accuracy after {attack.upper()}: {left:.2%}"
    yield f"robust accuracy: {point.accuracy[AUTOATTACK]:.2%}"
