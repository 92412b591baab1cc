"""Cards, entries, recipes and forms follow from the measured data; the published ones too."""

import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from measurements import KEY, PUBLISHED, REPOSITORY, having, measured_of, trained
from safetensors.torch import load_file

from drelu_timm.attacks.suites import SUITES
from drelu_timm.data.datasets import DATASETS
from drelu_timm.data.images import to_float
from drelu_timm.data.readers import load_images
from drelu_timm.errors import InputError
from drelu_timm.hashing import sha256_of
from drelu_timm.publishing.card import AUTOATTACK, SHIPPED, Paper, read_card
from drelu_timm.publishing.card_markdown import VERDICTS, model_card
from drelu_timm.publishing.leaderboard import (
    autoattack_log,
    card_record,
    check_entry,
    is_external,
    model_info,
    new_evaluation,
    new_model,
)
from drelu_timm.publishing.recipes import recipe
from drelu_timm.publishing.verification import Check, checks_page
from drelu_timm.results.result import Verdict
from drelu_timm.zoo.robust_models import robust_model_name


@pytest.fixture(scope="module")
def measured(evaluated):
    return measured_of(evaluated)


def judged(measured, verdict, **changes):
    return having(measured, verdict=Verdict(verdict, ("BPDA leaves 4.4 %.",), {}), **changes)


# The entry


def test_the_entry_has_all_fields_of_robustbench_in_its_formats(measured):
    entry = model_info(judged(measured, "sound", worst=measured.autoattack))
    check_entry(entry)
    assert entry == {
        "link": "https://example.org",
        "name": "A Title",
        "authors": "A. One, B. Two",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "digits",
        "venue": "ICLR 2026",
        "architecture": "dense_drelu",
        "eps": "0.1",
        "clean_acc": f"{100 * measured.point.clean:.2f}",
        "reported": f"{100 * measured.autoattack:.2f}",
        "autoattack_acc": f"{100 * measured.autoattack:.2f}",
        "footnote": "Preliminary: measured on the first 60 of the 359 test images of Digits. "
        "Gradient-masking verdict: sound.",
        "unreliable": False,
    }


@pytest.mark.parametrize(
    ("verdict", "worst", "external", "unreliable"),
    [
        ("sound", 0.5, None, False),
        ("sound", 0.4312, "43.12", False),
        ("undecided", 0.4312, "43.12", False),
        ("masked", 0.031, "3.10", True),
        ("masked", 0.5, "50.00", True),
    ],
)
def test_the_board_ranks_by_the_worst_case(measured, verdict, worst, external, unreliable):
    entry = model_info(judged(measured, verdict, worst=worst, accuracy={"pgd": 0.9, AUTOATTACK: 0.5}))
    check_entry(entry)
    assert (entry.get("external"), entry["unreliable"]) == (external, unreliable)
    assert (entry["reported"], entry["autoattack_acc"]) == (f"{100 * worst:.2f}", "50.00")
    assert f"verdict: {verdict}" in entry["footnote"]


def test_generated_images_are_a_footnote_not_additional_data(measured):
    generated = trained(measured, generated_fraction=0.7)
    generated = replace(generated, config={**generated.config, "generated": {"images": 20_000_000}})
    entry = model_info(generated)
    assert entry["additional_data"] is False
    assert entry["footnote"].startswith("It uses additional 20M synthetic images in training (70% of every batch). ")
    assert "CC BY-NC-SA 4.0" in generated.license_terms and "CC BY-NC-SA" not in measured.license_terms
    assert model_info(trained(measured, pretrained=True))["additional_data"] is True


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"clean_acc": "9.5"}, r"clean_acc: '9\.5' does not match"),
        ({"eps": 0.1}, r"eps: 0\.1 is not of type 'string'"),
        ({"year": 2026}, r"'year' was unexpected"),
        (
            {"autoattack_acc": None, "link": ""},
            r"acc: None is not of type 'string'.*; link: '' does not",
        ),
    ],
)
def test_an_invalid_entry_is_refused_with_all_its_errors(measured, spoil, message):
    with pytest.raises(InputError, match=message) as caught:
        check_entry({**model_info(measured), **spoil})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "n", "test_size", "preliminary"),
    [
        ("mnist", 10_000, 10_000, False),
        ("mnist", 9_999, 10_000, True),
        ("cifar10", 10_000, 10_000, False),
        ("cifar10", 1_000, 10_000, True),
        ("imagenet", 5_000, 50_000, True),  # a folder's images in an order of ours, not the board's 5,000
    ],
)
def test_results_on_fewer_examples_than_the_board_needs_are_preliminary(measured, dataset, n, test_size, preliminary):
    title = DATASETS[dataset].title if dataset in DATASETS else "a folder"
    measured = having(measured, dataset=dataset, dataset_title=title, n_examples=n)
    measured = replace(measured, test_size=test_size, curve=None)
    for text in (model_card(measured), model_info(measured)["footnote"], recipe(measured), new_model(measured, None)):
        assert ("reliminary" in text) == preliminary
    assert model_card(measured).count("preliminary") == (2 if preliminary else 0)


@pytest.mark.parametrize(
    ("dataset", "title", "n", "preliminary"),
    [
        ("mnist", "MNIST", 10_000, False),
        ("mnist", "MNIST", 500, True),
        ("cifar10", "CIFAR-10", 10_000, False),
        ("cifar10", "CIFAR-10 (JPEG copy)", 10_000, True),
    ],
)
def test_the_curve_follows_the_same_rule(measured, dataset, title, n, preliminary):
    measured = having(measured, dataset=dataset, dataset_title=title, n_examples=10_000)
    measured = replace(measured, curve=replace(measured.curve, n_examples=n), test_size=10_000)
    (above,) = [line for line in model_card(measured).splitlines() if line.endswith(f"first {n:,} test images:")]
    assert above.startswith("Preliminary: Linf, suite" if preliminary else "Linf, suite")


# The card


def test_card_entry_and_recipe_are_made_from_the_record_alone(measured):
    read = read_card(json.loads(json.dumps(card_record(measured))), Path("card.json"))
    for written in (model_card, model_info, recipe):
        assert written(read) == written(measured)


def test_the_hub_reads_the_card(measured):
    card = huggingface_hub.ModelCard(model_card(measured, source="."))
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    robust = f"Robust accuracy, worst case (Linf, eps 0.1; gradient masking: {measured.verdict}, preliminary)"
    assert values == {
        "Clean accuracy, preliminary": round(100 * measured.point.clean, 2),
        robust: round(100 * measured.point.worst, 2),
    }


def test_the_card_has_every_number_with_the_verdict_and_its_evidence(measured):
    card, results, point = model_card(measured), measured.results, measured.point
    for attack, accuracy in point.accuracy.items():
        assert f"| {attack} | {100 * accuracy:.2f} |" in card
    assert f"| **worst case** | {100 * point.worst:.2f} |" in card
    assert all(f"- {sentence}" in card for sentence in point.verdict.evidence)
    assert VERDICTS[measured.verdict] in card
    assert all(f"| {at.eps} | " in card for at in measured.curve.points)
    assert f"({KEY}.png)" in card
    assert results.hardware in card and f"torch {results.versions['torch']}" in card
    assert "Caps: mean " in card and "10.3390/math12223551" in card


@pytest.mark.parametrize(("square", "warns"), [(0.9, True), (0.9079, True), (0.9081, False), (0.91, False)])
def test_the_card_has_the_accuracy_after_each_attack_of_autoattack_and_its_warning(measured, square, warns):
    left = {"apgd-ce": 0.93, "apgd-t": 0.92, "fab-t": 0.91, "square": square}
    card = model_card(having(measured, sequences={"autoattack": left}))
    stages = f"apgd-ce 93.00, apgd-t 92.00, fab-t 91.00, square {100 * square:.2f}"
    assert f"AutoAttack, attack by attack, in %: {stages}." in card
    assert ("AutoAttack's own check warns here" in card) == warns
    assert (f"lowers the accuracy by another {91 - 100 * square:.2f} points" in card) == warns


def test_the_card_marks_minimum_norm_attacks(measured):
    card = model_card(having(measured, accuracy={"cw-l2": 0.9, "pgd": 0.8}))
    assert "| cw-l2 (minimum norm, counted within eps) | 90.00 |" in card and "| pgd | 80.00 |" in card


def test_the_card_of_a_masked_model_states_that_it_is_not_robust(measured):
    card = model_card(judged(measured, "masked"))
    assert "**The gradients are masked.**" in card
    assert "- BPDA leaves 4.4 %." in card
    assert "- Not robust: the accuracy under white-box attack comes from masked gradients." in card


def test_the_card_of_a_large_model_has_the_digest_of_its_weights_and_the_recipe(measured):
    large = replace(measured, weights=replace(measured.weights, bytes=SHIPPED + 1))
    card = model_card(large)
    assert f"sha256 {measured.weights.sha256} (bit-equal on the same" in card
    assert f"`scripts/digits/Linf/{KEY}.toml` is the recipe of the training, the evaluations and this card." in card
    assert "The weights come with `drelu_timm`." in model_card(measured)


@pytest.mark.parametrize("objective", ["natural", "at", "trades", "mart"])
def test_every_objective_has_a_card(measured, objective):
    assert f"# {KEY}" in model_card(trained(measured, objective=objective))


def structure(markdown: str) -> list[str]:
    """Return the Markdown elements of a text, without the text in them."""
    body = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    elements = []
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        children = [child.type for child in token.children or [] if not child.type.startswith("text")]
        elements.append(" ".join([token.type, token.tag, *children]))
    return elements


HOSTILE = """<script>alert(1)</script>

---
# heading
| a | b |
| - | - |
``` `x` *b* [l](u) ![i](u)
- item
> q
&lt; \\ <!-- """


def test_texts_from_elsewhere_stay_text(measured):
    def having_texts(text):
        paper = Paper(text, text, "https://example.org", text)
        card = trained(replace(measured, paper=paper), preset=text, monitor=text)
        card = replace(card, config={**card.config, "dataset_title": text, "hardware": text})
        versions, settings = {text: text}, {"pgd": {text: text}}
        card = having(card, dataset_title=text, hardware=text, suite=text, versions=versions, settings=settings)
        return having(card, verdict=Verdict("sound", (text, text), {}))

    plain, hostile = having_texts("text"), having_texts(HOSTILE)
    checks = [[Check(text, text, text)] for text in ("text", HOSTILE)]
    assert structure(checks_page(hostile, checks[1])) == structure(checks_page(plain, checks[0]))
    for write in (model_card, lambda card: new_model(card, None), lambda card: new_evaluation(card, "images.pt", 1)):
        assert structure(write(hostile)) == structure(write(plain))
    _, header, _ = model_card(hostile).split("---\n", 2)
    assert yaml.safe_load(header)["model-index"][0]["results"][0]["dataset"]["name"] == " ".join(HOSTILE.split())
    assert len(autoattack_log(hostile.results).splitlines()) == len(autoattack_log(plain.results).splitlines())


# RobustBench's forms


def test_the_forms_are_filled_in(measured):
    form = new_model(measured, "ORG/NAME")
    for line in (
        "Title: [New Model] Tester2026Cards_dense",
        "- **Paper Title**: A Title",
        "- **Architecture**: dense_drelu",
        "- **Threat Model**: Linf",
        "- **eps**: 0.1",
        f"- **Clean accuracy**: {100 * measured.point.clean:.2f}",
        f"- **Robust accuracy**: {100 * measured.point.worst:.2f}",
        "- **Additional data**: false",
    ):
        assert line in form.splitlines()
    assert f"https://huggingface.co/ORG/NAME, sha256 of model.safetensors {measured.weights.sha256}" in form
    assert is_external(measured)
    evaluation = new_evaluation(measured, "images.pt", 0)
    assert f"+ **Model identifier(s):** {KEY}" in evaluation.splitlines()
    assert "images.pt" in evaluation and f"{100 * measured.point.worst:.2f} (AutoAttack: " in evaluation


def test_results_on_a_copy_of_the_boards_images_are_preliminary_and_not_submitted(measured):
    copy = having(measured, dataset="cifar10", dataset_title="CIFAR-10 (JPEG copy)", n_examples=10_000)
    copy = replace(copy, test_size=10_000)
    assert copy.preliminary and not is_external(copy)
    assert copy.sample == "Preliminary: measured on all 10,000 test images of CIFAR-10 (JPEG copy)."
    needed = "CIFAR-10 (JPEG copy) is neither found nor downloaded by default. Pass its folder: --data-dir."
    assert f"# {needed}" in recipe(copy).splitlines() and f"- {needed}" in model_card(copy).splitlines()
    original = having(copy, dataset_title="CIFAR-10")
    assert "--data-dir" not in recipe(original) + model_card(original)
    assert is_external(original) and not original.preliminary
    folder = having(copy, dataset="imagenet", dataset_title="imagenet")
    assert folder.preliminary and not is_external(folder)


def test_data_of_earlier_trainings_are_on_the_card(measured):
    earlier = trained(measured, generated_fraction=0.3, pretrained=True).config
    later = replace(measured, config={**measured.config, "init_from": earlier})
    entry, card = model_info(later), model_card(later)
    assert entry["additional_data"] and "It uses additional synthetic images in training (30%" in entry["footnote"]
    assert "CC BY-NC-SA 4.0" in card and "ImageNet weights" in card and "license: cc-by-nc-sa-4.0" in card
    assert "for the last of its 2 trainings" in card


def initialized_from(measured, earlier):
    return replace(measured, config={**measured.config, "init_from": earlier})


def test_a_model_initialized_from_another_dataset_has_additional_data(measured):
    elsewhere = {**trained(measured, dataset="mnist").config, "dataset_title": "MNIST"}
    later = initialized_from(measured, initialized_from(measured, elsewhere).config)
    entry, sentence = model_info(later), "It was initialized from a model trained on MNIST."
    assert entry["additional_data"] is True and entry["footnote"].startswith(f"{sentence} Preliminary: ")
    assert f"\n- {sentence}\n" in model_card(later).partition("## Training")[2]
    assert "- **Additional data**: true" in new_model(later, None)
    here = initialized_from(measured, {**measured.config, "dataset_title": "Digits (JPEG copy)"})
    assert model_info(here)["additional_data"] is False and "initialized from" not in model_card(here)


def test_folders_of_images_are_distinguished_by_name(measured):
    photos = {**trained(measured, dataset="folder").config, "dataset_title": "photos"}
    flowers = replace(measured, config={**photos, "dataset_title": "flowers", "init_from": photos})
    assert "initialized from a model trained on photos." in model_info(flowers)["footnote"]
    assert model_info(initialized_from(replace(measured, config=photos), photos))["additional_data"] is False


def test_the_card_of_a_plain_model_does_not_mention_d_relu(measured):
    plain = replace(trained(measured, model="resnet10t"), caps={})
    assert "drelu\n" not in model_card(plain).split("---")[1]
    assert "bibtex" not in model_card(plain)


def test_the_time_of_a_resumed_evaluation_is_marked(measured):
    uninterrupted = having(measured, seconds=42.0)
    times = {name: time for name, time in measured.point.attack_seconds.items() if name != "apgd-ce"}
    resumed = having(uninterrupted, attack_seconds=times)
    for write in (recipe, model_card):
        assert re.search(r"42 s[;,]", write(uninterrupted))
        assert "42 s since it was resumed;" in write(resumed)


def test_the_log_has_the_accuracy_after_each_attack_of_autoattack(measured):
    lines = autoattack_log(measured.results).splitlines()
    assert f"initial accuracy: {measured.point.clean:.2%}" in lines
    left = measured.point.sequences[AUTOATTACK]
    assert list(left) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert all(f"robust accuracy after {attack.upper()}: {share:.2%}" in lines for attack, share in left.items())
    assert lines[-1] == f"robust accuracy: {measured.autoattack:.2%}"
    assert AUTOATTACK in SUITES["standard"]


# What is published


def test_there_are_published_cards():
    assert PUBLISHED


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*", text)


def test_a_published_card_and_recipe_are_up_to_date():
    """One of them by its text, so that a reworded sentence does not change all."""
    path = PUBLISHED[-1]
    card = read_card(json.loads(path.read_text()), path)
    assert path.with_suffix(".md").read_text() == model_card(card)
    assert (REPOSITORY / card.recipe).read_text() == recipe(card)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_number_of_a_published_card_follows_from_its_results(path):
    record = json.loads(path.read_text())
    measured = read_card(record, path)
    assert record == json.loads(json.dumps(card_record(measured)))
    assert path.relative_to(REPOSITORY / "model_cards").with_suffix("") == measured.place
    written = {path.with_suffix(".md"): model_card(measured), REPOSITORY / measured.recipe: recipe(measured)}
    for file, text in written.items():
        assert numbers(file.read_text()) == numbers(text)
    assert path.with_suffix(".png").exists() == (measured.curve is not None)
    check_entry(model_info(measured))
    assert measured.results.model_digest == measured.weights.sha256
    assert "dirty" not in f"{measured.config['git_revision']} {measured.results.git_revision}"
    point = measured.point
    assert point.worst <= min(point.accuracy.values()) <= point.clean
    if measured.seeds:
        (own,) = (seed for seed in measured.seeds if seed.seed == measured.config["train"]["seed"])
        assert (own.clean, own.worst, own.model_digest) == (point.clean, point.worst, measured.weights.sha256)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_weights_have_the_clean_accuracy_of_the_card(path, data_folder):
    measured = read_card(json.loads(path.read_text()), path)
    if not path.with_suffix(".safetensors").exists():
        pytest.skip(f"{measured.key} is published without its weights")
    folder = {"mnist": "MNIST", "cifar10": "cifar10-jpeg"}[measured.dataset]
    root = data_folder(folder) if measured.dataset == "mnist" else data_folder(folder) / folder
    test = load_images(measured.dataset, root, "test")[: measured.results.n_examples]
    model = timm.create_model(measured.name, pretrained=True)
    with torch.no_grad():
        right = torch.cat([model(to_float(batch)).argmax(1) for batch in test.images.split(500)]) == test.labels
    assert right.double().mean().item() == pytest.approx(measured.point.clean, abs=1e-3)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_weights_have_the_digest_of_the_card(path):
    measured = read_card(json.loads(path.read_text()), path)
    weights = path.with_suffix(".safetensors")
    assert weights.exists() == (measured.weights.bytes <= SHIPPED)
    if weights.exists():
        assert sha256_of(weights) == measured.weights.sha256
        model = timm.create_model(robust_model_name(measured.key, measured.dataset, measured.norm), pretrained=True)
        assert len(load_file(weights)) == len(model.model.state_dict())
