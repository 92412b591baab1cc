"""The model card of an evaluated run, from what was measured only."""

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from ..attacks.suites import ATTACKS
from ..results.plotting import verdict_at
from ..results.result import CarliniWagner, EpsResult
from .entries import architecture, generated_images, is_pretrained, told_of_data
from .measured import AUTOATTACK, PROBES, Measured, further_called, percent, spread
from .recipes import OBJECTIVES, evaluation_time, made_with, train_command, train_tables, training_time

CITATION = """\
@article{sooksatra2024dynamic,
  title   = {Dynamic-Max-Value {ReLU} Functions for Adversarially Robust Machine Learning Models},
  author  = {Sooksatra, Korn and Rivas, Pablo},
  journal = {Mathematics},
  year    = {2024},
  volume  = {12},
  number  = {22},
  pages   = {3551},
  doi     = {10.3390/math12223551}
}"""
MEANINGS = {
    "sound": "Attacks that know what could hide a gradient, or use none, find hardly more than those that follow it; "
    "that is no certificate, and a weaker attack above may still say too much: the worst case counts.",
    "masked": "**The gradients are masked.** The white-box attacks fail for want of a gradient, not for the model's "
    "robustness; only the worst case says something about it.",
    "undecided": "Whether the gradients are masked is undecided; take the worst case, and that as an upper bound.",
}
_SQUARE_FINDS = 0.002  # share of the images from which on AutoAttack warns (its check_square_sr)
SHIPPED = 1_500_000  # bytes: the weights of a larger model do not lie beside its card


def model_card(measured: Measured, *, source: str | None = None) -> str:
    """A Hugging Face model card.

    Args:
        measured: What it is about.
        source: Where `register_robust_model` finds the model: "." for the folder that the card lies in, or
            "hf-hub:ORG/NAME". None for the card of a model that comes with this package.
    """
    sections = [
        f"---\n{yaml.safe_dump(_header(measured), sort_keys=False, allow_unicode=True)}---",
        f"# {measured.key}",
        _summary(measured),
        "## Accuracy",
        _accuracy(measured),
        *([] if measured.curve is None else ["## Accuracy and radius", _curve(measured)]),
        *([] if not measured.seeds else ["## Seeds", _seeds(measured)]),
        "## Loading",
        _loading(measured) if source is None else _loading_from(measured, source),
        "## Training",
        _training(measured),
        "## Intended use and limits",
        _limits(measured),
        "## Licence and citation",
        _licence(measured),
        *([f"D-ReLU is due to:\n\n```bibtex\n{CITATION}\n```"] if _drelu(measured) else []),
    ]
    return "\n\n".join(sections) + "\n"


def _header(measured: Measured) -> dict[str, Any]:
    """The YAML that the Hub reads; no accuracy under attack but the worst case, with the verdict in its name."""
    preliminary = ", preliminary" if measured.preliminary else ""
    robust = f"Robust accuracy, worst case ({measured.threat_model}; gradient masking: {measured.verdict}{preliminary})"
    metrics = [
        {"type": "accuracy", "name": f"Clean accuracy{preliminary}", "value": _number(measured.point.clean)},
        {"type": "accuracy", "name": robust, "value": _number(measured.point.worst)},
    ]
    return {
        "license": _licence_name(measured),
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "image-classification", "adversarial-robustness", "robustbench", *_drelu(measured)],
        "model-index": [
            {
                "name": measured.key,
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image classification"},
                        "dataset": {"type": measured.dataset, "name": measured.results.dataset_title, "split": "test"},
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }


def _number(accuracy: float) -> float:
    return round(100 * accuracy, 2)


def _summary(measured: Measured) -> str:
    config = measured.config
    images = f"{config['in_chans']} x {config['img_size']} x {config['img_size']}"
    return (
        f"{architecture(measured)}, {measured.num_parameters:,} parameters, trained on {config['dataset_title']} by "
        f"{OBJECTIVES[config['train']['objective']]}. It takes images in [0, 1], {images}, and gives the logits of "
        f"{config['num_classes']} classes; normalisation is its first layer. Threat model: {measured.threat_model}. "
        f"On this test set it classifies {percent(measured.point.clean)} % right, and "
        f"{percent(measured.point.worst)} % under every attack tried; gradient masking: {measured.verdict}."
    )


def _accuracy(measured: Measured) -> str:
    results, point = measured.results, measured.point
    attacks = {_called(attack): accuracy for attack, accuracy in point.accuracy.items()}
    rows = {"clean": point.clean, **attacks, "**worst case**": point.worst}
    table = "\n".join(f"| {attack} | {percent(accuracy)} |" for attack, accuracy in rows.items())
    paragraphs = [
        f"{measured.sample} The worst case is the share of the images that the model classifies right under every "
        f"attack, {PROBES} among them.",
        f"| attack | accuracy in % |\n| --- | ---: |\n{table}",
        *_stages(point),
        *_further(measured),
        f"Gradient masking: {measured.verdict}. {MEANINGS[measured.verdict]} The evidence:",
        _list(point.verdict.evidence),
        f"The input gradient is exactly zero for {percent(point.zero_gradient_share)} % of the images classified "
        "right.",
        _cw_l2(point.cw_l2),
        f"Evaluation: suite {results.suite}, seed {results.seed}, attacks search in {results.precision} and "
        f"are judged in float32, {evaluation_time(point)}; {made_with(results.environment)}. The attacks' settings:",
        _list(f"{attack}: {_settings(settings)}" for attack, settings in point.settings.items()),
    ]
    return "\n\n".join(paragraphs)


def _called(attack: str) -> str:
    """An attack's name, of one that knows no ball with what was done about that."""
    minimum_norm = attack in ATTACKS and ATTACKS[attack].minimum_norm
    return f"{attack} (what it finds in the ball)" if minimum_norm else attack


def _stages(point: EpsResult) -> Iterator[str]:
    """What AutoAttack left after each of its attacks, and what its own check of Square says of that."""
    left = point.sequences.get(AUTOATTACK)
    if not left:
        return
    shares = ", ".join(f"{name} {percent(share)}" for name, share in left.items())
    yield f"AutoAttack, attack by attack, in %: {shares}."
    gained = min(share for name, share in left.items() if name != "square") - left["square"]
    if gained > _SQUARE_FINDS:
        yield (
            "AutoAttack's own check warns here (see its flags_doc.md): Square, which needs no gradient, lowers the "
            f"accuracy by another {percent(gained)} points, so that the attacks that follow the gradient overstate it."
        )


def _further(measured: Measured) -> Iterator[str]:
    """What other evaluations contribute to the worst case."""
    if measured.results.further:
        yield "The worst case counts, beside this evaluation, every image that one of these broke:"
        yield _list(
            f"{further_called(one)}: {percent(one.worst)} % of them in its worst case, gradient masking: {one.verdict}"
            for one in measured.results.further
        )


def _cw_l2(cw: CarliniWagner | None) -> str:
    """A sentence on what CW needs, beside its robust accuracy in the threat model."""
    if cw is None:
        return "CW-L2 was not run."
    median = "is out of its reach" if cw.median_l2 is None else f"is {cw.median_l2:.3g}"
    accuracy = percent(cw.accuracy_at_budget)
    return (
        f"CW-L2: the median L2 distance to an adversarial image {median}; "
        f"the accuracy within an L2 distance of {cw.budget:.3g} is {accuracy} %."
    )


def _curve(measured: Measured) -> str:
    assert measured.curve is not None
    curve = measured.curve
    rows = "\n".join(
        f"| {at.eps} | {percent(at.clean)} | {percent(at.worst)} | {verdict_at(at)} |" for at in curve.points
    )
    return "\n\n".join(
        [
            f"![Accuracy under every attack against eps]({measured.key}.png)",
            f"{'Preliminary: ' if measured.is_preliminary(curve.n_examples) else ''}{curve.norm}, suite "
            f"{curve.suite}, the first {curve.n_examples:,} test images:",
            f"| eps | clean, % | worst case, % | gradient masking |\n| ---: | ---: | ---: | --- |\n{rows}",
        ]
    )


def _seeds(measured: Measured) -> str:
    rows = "\n".join(
        f"| {seed.seed} | {seed.n_examples:,} | {percent(seed.clean)} | {percent(seed.autoattack) or '-'} | "
        f"{percent(seed.worst)} | {seed.verdict} |"
        for seed in measured.seeds
    )
    spreads = []
    for name, values in {
        "clean": [seed.clean for seed in measured.seeds],
        "worst case": [seed.worst for seed in measured.seeds],
    }.items():
        spreads.append(f"{name} {spread(values)}")
    return (
        "The same training with other seeds; this model is that of seed "
        f"{measured.config['train']['seed']}.\n\n"
        "| seed | test images | clean, % | AutoAttack, % | worst case, % | gradient masking |\n"
        f"| ---: | ---: | ---: | ---: | ---: | --- |\n{rows}\n\n"
        f"Mean and standard deviation over {len(measured.seeds)} seeds: {', '.join(spreads)} %."
    )


def _loading(measured: Measured) -> str:
    """Of a model that comes with this package, or whose card does."""
    recipe = f"`{measured.recipe}` states how the model, its evaluation and this card are made. "
    if measured.weights.bytes > SHIPPED:
        return (
            f"{recipe}Its weights do not come with `drelu_timm`: model.safetensors, {measured.weights.bytes:,} bytes, "
            f"sha256 {measured.weights.sha256} (bit-equal on the same hardware and versions). Then:\n\n"
            + _with_timm_and_robustbench(measured, "runs/.../hub")
        )
    return f"{recipe}Its weights come with `drelu_timm`.\n\n{_with_timm_and_robustbench(measured)}"


def _loading_from(measured: Measured, source: str) -> str:
    """Of a model in a folder or on the Hub."""
    folder = "local-dir:." if source == "." else source
    return f"""\
{_with_timm_and_robustbench(measured, source)}

The network alone, for images that are normalised already, as is usual in timm (`local-dir:` takes a newer timm than
1.0.9):

```python
import drelu_timm
import timm

model = timm.create_model("{folder}", pretrained=True)
```"""


def _with_timm_and_robustbench(measured: Measured, source: str | None = None) -> str:
    key, dataset, norm = measured.key, measured.dataset, measured.norm
    register = ""
    if source is not None:
        register = (
            f'\n\ndrelu_timm.register_robust_model(\n    "{key}", "{dataset}", "{norm}", "{source}",\n'
            f'    sha256="{measured.weights.sha256}",\n    config_sha256="{measured.config_sha256}",\n)'
        )
    return f"""\
With timm, where drelu_timm is installed:

```python
import drelu_timm
import timm{register}

model = timm.create_model("{measured.name}", pretrained=True)
```

With RobustBench, where drelu_timm is installed with its extra `robustbench`:

```python
import drelu_timm
from drelu_timm.robustbench import adapt{register}

robustbench = adapt()  # gives robustbench 1.1.1 what it imports
model = robustbench.utils.load_model("{key}", dataset="{dataset}", threat_model="{norm}")
```

Both give a Sequential of `normalize` and `model`, in eval mode, for images in [0, 1]."""


def _training(measured: Measured) -> str:
    config, training = measured.config, measured.training
    kept = training["epoch"]
    facts = [
        f"Data: {config['dataset_title']}; a part of its training images is held out to choose the epoch by.",
        *measured.images_needed,
        *told_of_data(measured),
        f"Preset: {config['train']['preset'] or 'none'}. Seed: {config['train']['seed']}.",
        f"Epochs: {training['epochs']}; the weights are those of "
        + (
            "the last."
            if training["weights"] == "last"
            else f"epoch {kept}, the best by {config['train']['monitor']} on held-out images."
        ),
        "Caps: "
        + (
            "mean {mean:.4g}, smallest {min:.4g}, largest {max:.4g}.".format(**measured.caps)
            if measured.caps
            else "none; there is no D-ReLU in it."
        ),
        f"Time: {training_time(measured)} on {config['hardware']}, {training['images_per_second']:,.0f} images/s.",
        f"Versions: {made_with(config)}.",
    ]
    file = f"{measured.key}.toml"
    return "\n\n".join(
        [
            f"Trained by `{train_command(measured, file)}`, where `{file}` holds",
            f"```toml\n{train_tables(measured)}```",
            _list(facts),
        ]
    )


def _settings(settings: dict[str, Any]) -> str:
    said = {name: ", then ".join(value) if name == "stages" else value for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in said.items()) or "none"


def _limits(measured: Measured) -> str:
    limits = [
        f"For research on adversarial robustness. Every number holds for {measured.threat_model} and these images "
        "only; it is an upper bound, as a stronger attack may yet be found.",
    ]
    if len(measured.seeds) < 2:
        limits.append("One model of one seed: seeds can differ by more than methods do.")
    if measured.verdict == "masked":
        limits.append("Not robust: the accuracy under white-box attack comes from masked gradients.")
    return _list(limits)


def licences(measured: Measured) -> str:
    """Under which licence the weights are, and whose else's holds for them."""
    sentences = ["MIT."]
    if is_pretrained(measured):
        sentences.append("It was trained on from timm's ImageNet weights, whose own licence holds for it too.")
    if generated_images(measured):
        sentences.append(
            "It was trained with generated images; those of EDM, and EDM's models, are licensed CC BY-NC-SA 4.0, which "
            "binds what is made from them to non-commercial use and the same licence."
        )
    return " ".join(sentences)


def _licence(measured: Measured) -> str:
    paper = measured.paper
    about = ", ".join(text for text in (paper.authors, paper.title, paper.venue, paper.link) if text)
    return f"{licences(measured)} The model: {about}."


def _licence_name(measured: Measured) -> str:
    """As the Hub spells it: the strictest that may hold."""
    if generated_images(measured):
        return "cc-by-nc-sa-4.0"
    return "other" if is_pretrained(measured) else "mit"


def _drelu(measured: Measured) -> list[str]:
    """The tag of models of this project's architectures; none for others."""
    return ["drelu"] if measured.config["train"]["model"].endswith("_drelu") else []


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
