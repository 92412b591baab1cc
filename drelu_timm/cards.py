"""The model card of an evaluated run, from the run's files only."""

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from .entries import Measured, percent

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
VERDICTS = {
    "sound": "Attacks that know of the caps, or use no gradient, find hardly more than those that follow it: the "
    "accuracies above can be taken at their word.",
    "masked": "**The gradients are masked.** The white-box attacks fail for want of a gradient, not for the model's "
    "robustness; only the worst case says something about it.",
    "undecided": "Whether the gradients are masked is undecided; take the worst case, and that as an upper bound.",
}


def model_card(measured: Measured, checks: Sequence[str]) -> str:
    """README.md of the exported folder: a Hugging Face model card.

    Args:
        measured: What it is about.
        checks: Sentences on what was checked of the folder.
    """
    sections = [
        f"---\n{yaml.safe_dump(_header(measured), sort_keys=False, allow_unicode=True)}---",
        f"# {measured.key}",
        _summary(measured),
        "## Accuracy",
        _accuracy(measured),
        "## Loading",
        _loading(measured),
        "## Training",
        _training(measured),
        "## Intended use and limits",
        _limits(measured),
        "## Checked",
        _list(checks),
        "## Licence and citation",
        _licence(measured),
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _header(measured: Measured) -> dict[str, Any]:
    """The YAML that the Hub reads; no accuracy under attack but the worst case, with the verdict in its name."""
    results = measured.results
    preliminary = ", preliminary" if results["n_examples"] < measured.test_size else ""
    robust = f"Robust accuracy, worst case ({measured.threat_model}; gradient masking: {measured.verdict}{preliminary})"
    metrics = [
        {"type": "accuracy", "name": f"Clean accuracy{preliminary}", "value": _number(results["clean"])},
        {"type": "accuracy", "name": robust, "value": _number(results["worst"])},
    ]
    return {
        "license": "mit",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "image-classification", "adversarial-robustness", "robustbench", "drelu"],
        "model-index": [
            {
                "name": measured.key,
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image classification"},
                        "dataset": {"type": measured.dataset, "name": results["dataset_title"], "split": "test"},
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }


def _number(accuracy: float) -> float:
    return round(100 * accuracy, 2)


def _summary(measured: Measured) -> str:
    config, train = measured.config, measured.config["train"]
    objective = {"natural": "natural training", "at": "adversarial training", "trades": "TRADES"}[train["objective"]]
    images = f"{config['in_chans']} x {config['img_size']} x {config['img_size']}"
    return (
        f"{train['model']} ({measured.num_parameters:,} parameters), trained on {config['dataset_title']} by "
        f"{objective}. It takes images in [0, 1], {images}, and gives the logits of {config['num_classes']} classes. "
        f"Threat model: {measured.threat_model}."
    )


def _accuracy(measured: Measured) -> str:
    results = measured.results
    rows = {"clean": results["clean"], **results["accuracy"], "**worst case**": results["worst"]}
    rows["zero input gradients"] = results["zero_gradient_share"]
    table = "\n".join(f"| {attack} | {percent(accuracy)} |" for attack, accuracy in rows.items())
    paragraphs = [
        f"{measured.sample} The worst case is the share of the images that the model classifies right under every "
        "attack; zero input gradients, the share of those classified right whose gradient is exactly zero.",
        f"| attack | accuracy in % |\n| --- | ---: |\n{table}",
        f"Gradient masking: {measured.verdict}. {VERDICTS[measured.verdict]} The evidence:",
        _list(results["verdict"]["evidence"]),
        _cw_l2(results.get("cw_l2")),
        f"Evaluation: suite {results['suite']}, seed {results['seed']}; {_made_with(results)}. The attacks' settings:",
        _list(f"{attack}: {_settings(settings)}" for attack, settings in results["settings"].items()),
    ]
    return "\n\n".join(paragraphs)


def _cw_l2(cw: dict[str, Any] | None) -> str:
    """A sentence on what CW needs, beside its robust accuracy in the threat model."""
    if cw is None:
        return "CW-L2 was not run."
    median = "is out of its reach" if cw["median_l2"] is None else f"is {cw['median_l2']:.3g}"
    accuracy = percent(cw["accuracy_at_budget"])
    return (
        f"CW-L2: the median L2 distance to an adversarial image {median}; "
        f"the accuracy within an L2 distance of {cw['budget']:.3g} is {accuracy} %."
    )


def _loading(measured: Measured) -> str:
    key, dataset, norm = measured.key, measured.dataset, measured.threat_model.norm
    return f"""\
With timm (`pip install drelu-timm`), from this folder:

```python
import register  # register.py, beside this file
import timm

model = timm.create_model("{measured.name}", pretrained=True)
```

With RobustBench (`pip install "drelu-timm[robustbench]"`):

```python
import register
from drelu_timm.robustbench import adapt

robustbench = adapt()  # gives robustbench 1.1.1 what it imports
model = robustbench.utils.load_model("{key}", dataset="{dataset}", threat_model="{norm}")
```

Both give a Sequential of `normalize` and `model`, in eval mode, for images in [0, 1]. The network alone, for images
that are normalised already, as is usual in timm (tried with timm 1.0.31; timm 1.0.9 cannot):

```python
import drelu_timm
import timm

model = timm.create_model("local-dir:.", pretrained=True)
```"""


def _training(measured: Measured) -> str:
    config = measured.config
    caps = "There is no D-ReLU in it."
    if measured.caps:
        caps = "Its caps after training: mean {mean:.4g}, smallest {min:.4g}, largest {max:.4g}.".format(
            **measured.caps
        )
    return "\n\n".join(
        [
            f"```bash\n{_command(config['train'])}\n```",
            f"One run. {caps} Trained with {_made_with(config)}.",
        ]
    )


def _command(train: dict[str, Any]) -> str:
    """The command that repeats a training, every setting of it spelled out."""
    flags = [
        shlex.join([f"--{name.replace('_', '-')}", *_arguments(value)])
        for name, value in train.items()
        if value is not None and value is not False and value != []
    ]
    return " \\\n    ".join(["drelu-timm train", *flags])


def _arguments(value: Any) -> list[str]:
    """What follows a flag: nothing, a value, or several."""
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _made_with(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    revision = environment.get("git_revision")
    return f"{versions}" + (f" (revision {revision})" if revision else "") + f" on {environment['hardware']}"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "none"


def _limits(measured: Measured) -> str:
    limits = [
        f"For research on adversarial robustness. Every number holds for {measured.threat_model} and these images "
        "only; it is an upper bound, as a stronger attack may yet be found.",
        "One model of one seed: seeds can differ by more than methods do.",
    ]
    if measured.verdict == "masked":
        limits.append("Not robust: the accuracy under white-box attack comes from masked gradients.")
    return _list(limits)


def _licence(measured: Measured) -> str:
    paper = measured.paper
    about = ", ".join(text for text in (paper.authors, paper.title, paper.venue, paper.link) if text)
    sentences = ["MIT."]
    if measured.config["train"].get("pretrained"):
        sentences.append("It was trained on from timm's ImageNet weights, whose own licence holds for it too.")
    sentences.append(f"The model: {about}." if about else "No paper about it is named.")
    sentences.append("The activation is that of:")
    return " ".join(sentences)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
