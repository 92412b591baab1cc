"""Markdown of a model card, from the measured data alone."""

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from ..attacks.suites import ATTACKS
from ..formatting import escape_markdown, markdown_code, one_line_text
from ..results.plotting import verdict_at
from ..results.result import CarliniWagner, EpsResult
from .card import AUTOATTACK, PROBES, SHIPPED, Card, evaluation_name, percent, spread
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
VERDICTS = {
    "sound": "Attacks that use no gradient, or repair it, find hardly more than the white-box attacks. This is not a "
    "certificate: report the worst case, which can be lower than the accuracy under each attack.",
    "masked": "**The gradients are masked.** The white-box attacks fail because they lack a useful gradient, not "
    "because the model is robust. Only the worst case is meaningful.",
    "undecided": "It is undecided whether the gradients are masked. Use the worst case, as an upper bound.",
}
_SQUARE_FINDS = 0.002  # share of the images from which on AutoAttack warns (its check_square_sr)


def model_card(card: Card, *, source: str | None = None) -> str:
    """Return a Hugging Face model card.

    Args:
        card: Data of the model.
        source: Where `register_robust_model` finds the model: "." for the folder of the card, or "hf-hub:ORG/NAME".
            None for the card of a model that is published with this package.
    """
    sections = [
        f"---\n{yaml.safe_dump(_header(card), sort_keys=False, allow_unicode=True)}---",
        f"# {card.key}",
        _summary(card),
        "## Accuracy",
        *_accuracy(card),
        *_curve(card),
        *_seeds(card),
        "## Loading",
        _loading(card) if source is None else _loading_from(card, source),
        "## Training",
        _training(card),
        "## Intended use and limits",
        _limits(card),
        "## License and citation",
        _license(card),
        *([f"D-ReLU is due to:\n\n```bibtex\n{CITATION}\n```"] if card.has_drelu else []),
    ]
    return "\n\n".join(sections) + "\n"


def _header(card: Card) -> dict[str, Any]:
    """Return the YAML that the Hub reads: of the robust accuracies only the worst case, named with the verdict."""
    # Not as .eval_results/ too: its entries belong to dataset repositories that are registered as benchmarks, and there
    # is none for robust accuracy (https://github.com/huggingface/hub-docs/blob/main/docs/hub/eval-results.md).
    preliminary = ", preliminary" if card.preliminary else ""
    robust = f"Robust accuracy, worst case ({card.threat_model}; gradient masking: {card.verdict}{preliminary})"
    metrics = [
        {"type": "accuracy", "name": f"Clean accuracy{preliminary}", "value": round(100 * card.point.clean, 2)},
        {"type": "accuracy", "name": robust, "value": round(100 * card.point.worst, 2)},
    ]
    drelu = ["drelu"] if card.has_drelu else []
    title = one_line_text(card.results.dataset_title)  # a line --- in it would end the header
    return {
        "license": card.license,
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "image-classification", "adversarial-robustness", "robustbench", *drelu],
        "model-index": [
            {
                "name": card.key,
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image classification"},
                        "dataset": {"type": card.dataset, "name": title, "split": "test"},
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }


def _summary(card: Card) -> str:
    config = card.config
    return escape_markdown(
        f"{card.architecture}, {card.num_parameters:,} parameters, trained on {config['dataset_title']} by "
        f"{OBJECTIVES[config['train']['objective']]}. Input: images from 0 to 1, {config['in_chans']} x "
        f"{config['img_size']} x {config['img_size']}; normalization is the first layer. Output: logits of "
        f"{config['num_classes']} classes. Threat model: {card.threat_model}. Clean accuracy on the test images below: "
        f"{percent(card.point.clean)} %; worst case over all attacks: {percent(card.point.worst)} %; gradient masking: "
        f"{card.verdict}."
    )


def _accuracy(card: Card) -> Iterator[str]:
    results, point = card.results, card.point
    yield escape_markdown(
        f"{card.sample} The worst case is the share of the images that the model classifies correctly under every "
        f"attack and {PROBES}."
    )
    attacks = {_attack_name(attack): accuracy for attack, accuracy in point.accuracy.items()}
    accuracies = {"clean": point.clean, **attacks, "**worst case**": point.worst}
    if point.certified is not None:
        accuracies["certified by interval bounds"] = point.certified
    yield _table({"attack": "---", "accuracy in %": "---:"}, ((name, percent(of)) for name, of in accuracies.items()))
    yield from _stages(point)
    if results.further:
        yield "Images on which one of these evaluations fooled the model count in the worst case too:"
        yield _list(
            f"{evaluation_name(one)}: {percent(one.worst)} % in its worst case, gradient masking: {one.verdict}"
            for one in results.further
        )
    yield f"Gradient masking: {card.verdict}. {VERDICTS[card.verdict]} The evidence:"
    yield _list(point.verdict.evidence)
    yield f"The input gradient is exactly zero for {percent(point.zero_gradient_share)} % of the correct images."
    yield _cw_l2(point.cw_l2)
    yield escape_markdown(
        f"Evaluation: suite {results.suite}, seed {results.seed}, attacks search in {results.precision}, images are "
        f"judged in float32, {evaluation_time(point)}; {made_with(results.environment)}. Settings of the attacks:"
    )
    yield _list(f"{attack}: {_settings(settings)}" for attack, settings in point.settings.items())


def _attack_name(attack: str) -> str:
    minimum_norm = attack in ATTACKS and ATTACKS[attack].minimum_norm
    return f"{attack} (minimum norm, counted within eps)" if minimum_norm else attack


def _stages(point: EpsResult) -> Iterator[str]:
    """Yield the accuracy after each attack of AutoAttack, and the warning of AutoAttack's own check of Square."""
    left = point.sequences.get(AUTOATTACK)
    if not left:
        return
    shares = ", ".join(f"{name} {percent(share)}" for name, share in left.items())
    yield escape_markdown(f"AutoAttack, attack by attack, in %: {shares}.")
    gained = min(share for name, share in left.items() if name != "square") - left["square"]
    if gained > _SQUARE_FINDS:
        yield (
            "AutoAttack's own check warns here (see its flags_doc.md): Square, which needs no gradient, lowers the "
            f"accuracy by another {percent(gained)} points, so the gradient-based attacks overestimate it."
        )


def _cw_l2(cw: CarliniWagner | None) -> str:
    if cw is None:
        return "CW-L2 was not run."
    fooled = "CW-L2 fools the model on fewer than half of the correct images"
    median = (
        fooled
        if cw.median_l2 is None
        else f"CW-L2: the median L2 distance to an adversarial image is {cw.median_l2:.3g}"
    )
    return f"{median}; the accuracy within an L2 distance of {cw.budget:.3g} is {percent(cw.accuracy_at_budget)} %."


def _curve(card: Card) -> Iterator[str]:
    if card.curve is None:
        return
    curve = card.curve
    preliminary = "Preliminary: " if card.is_preliminary(curve.n_examples) else ""
    columns = {"eps": "---:", "clean, %": "---:", "worst case, %": "---:", "gradient masking": "---"}
    yield "## Accuracy and eps"
    yield f"![Accuracy under every attack against eps]({card.key}.png)"
    yield escape_markdown(f"{preliminary}{curve.norm}, suite {curve.suite}, first {curve.n_examples:,} test images:")
    yield _table(columns, ((at.eps, percent(at.clean), percent(at.worst), verdict_at(at)) for at in curve.points))


def _seeds(card: Card) -> Iterator[str]:
    if not card.seeds:
        return
    columns = {"seed": "---:", "test images": "---:", "clean, %": "---:", "AutoAttack, %": "---:"}
    columns |= {"worst case, %": "---:", "gradient masking": "---"}
    clean, worst = [one.clean for one in card.seeds], [one.worst for one in card.seeds]
    yield "## Seeds"
    yield f"The same training with other seeds; this model has seed {card.config['train']['seed']}."
    yield _table(
        columns,
        (
            (
                one.seed,
                f"{one.n_examples:,}",
                *(percent(of) or "-" for of in (one.clean, one.autoattack, one.worst)),
                one.verdict,
            )
            for one in card.seeds
        ),
    )
    yield (
        f"Mean and standard deviation of {len(card.seeds)} seeds: clean {spread(clean)}, worst case {spread(worst)} %."
    )


def _loading(card: Card) -> str:
    """Return how to load a model that is published with this package."""
    recipe = f"`{card.recipe}` is the recipe of the training, the evaluations and this card. "
    if card.weights.bytes > SHIPPED:
        return (
            f"{recipe}The weights do not come with `drelu_timm`: model.safetensors, {card.weights.bytes:,} bytes, "
            f"sha256 {card.weights.sha256} (bit-equal on the same hardware and versions). Then:\n\n"
            + _with_timm_and_robustbench(card, "runs/.../hub")
        )
    return f"{recipe}The weights come with `drelu_timm`.\n\n{_with_timm_and_robustbench(card)}"


def _loading_from(card: Card, source: str) -> str:
    """Return how to load a model from a folder or the Hub."""
    folder = "local-dir:." if source == "." else source
    return f"""\
{_with_timm_and_robustbench(card, source)}

The model without its normalization, for images that are already normalized, as usual in timm (`local-dir:` needs a
newer timm than 1.0.9):

```python
import drelu_timm
import timm

model = timm.create_model("{folder}", pretrained=True)
```"""


def _with_timm_and_robustbench(card: Card, source: str | None = None) -> str:
    register = ""
    if source is not None:
        register = (
            f'\n\ndrelu_timm.register_robust_model(\n    "{card.key}", "{card.dataset}", "{card.norm}", "{source}",\n'
            f'    sha256="{card.weights.sha256}",\n    config_sha256="{card.config_sha256}",\n)'
        )
    return f"""\
With timm and drelu_timm:

```python
import drelu_timm
import timm{register}

model = timm.create_model("{card.name}", pretrained=True)
```

With RobustBench, which the extra `robustbench` of drelu_timm installs:

```python
import drelu_timm
from drelu_timm.robustbench import adapt{register}

robustbench = adapt()  # gives robustbench 1.1.1 what it imports
model = robustbench.utils.load_model("{card.key}", dataset="{card.dataset}", threat_model="{card.norm}")
```

Both return a Sequential of `normalize` and `model`, in eval mode, for images in [0, 1]."""


def _training(card: Card) -> str:
    config, training = card.config, card.training
    train, file = config["train"], f"{card.key}.toml"
    best = f"from epoch {training['epoch']}, the best by {train['monitor']} on held-out images"
    caps = "mean {mean:.4g}, smallest {min:.4g}, largest {max:.4g}" if card.caps else "none; the model has no D-ReLU"
    facts = [
        f"Data: {config['dataset_title']}; a part of its training images is held out to choose the best epoch.",
        *card.data_note,
        *card.other_datasets,
        *card.generated_images,
        f"Preset: {train['preset'] or 'none'}. Seed: {train['seed']}.",
        f"Epochs: {training['epochs']}; the weights are {'the last' if training['weights'] == 'last' else best}.",
        f"Caps: {caps.format(**card.caps)}.",
        f"Time: {training_time(card)} on {config['hardware']}, {training['images_per_second']:,.0f} images/s.",
        f"Versions: {made_with(config)}.",
    ]
    command = f"Trained by {markdown_code(train_command(card, file))}, with `{file}`:"
    return f"{command}\n\n```toml\n{train_tables(card)}```\n\n{_list(facts)}"


def _settings(settings: dict[str, Any]) -> str:
    words = {name: ", then ".join(value) if name == "stages" else value for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items()) or "none"


def _limits(card: Card) -> str:
    limits = [
        f"For research on adversarial robustness. Every number holds for {card.threat_model} and these images only. "
        "Robust accuracies are upper bounds: a stronger attack may exist.",
    ]
    if len(card.seeds) < 2:
        limits.append("One model with one seed: the difference between seeds can exceed that between methods.")
    if card.verdict == "masked":
        limits.append("Not robust: the accuracy under white-box attack comes from masked gradients.")
    return _list(limits)


def _license(card: Card) -> str:
    paper = card.paper
    about = ", ".join(text for text in (paper.authors, paper.title, paper.venue, paper.link) if text)
    return f"{card.license_terms} The model: {escape_markdown(about)}."


def _table(columns: dict[str, str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table; ``columns`` maps each heading to its alignment."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (columns, columns.values(), *rows))


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(item)}" for item in items)
