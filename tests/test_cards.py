"""Cards, entries, recipes and forms: all of them follow from what was measured; the published ones too."""

import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from measurements import KEY, PUBLISHED, REPOSITORY, having, measured_of, trained
from safetensors.torch import load_file

from drelu_timm.attacks.suites import SUITES
from drelu_timm.data.datasets import DATASETS
from drelu_timm.data.images import to_float
from drelu_timm.data.readers import load_images
from drelu_timm.errors import InputError
from drelu_timm.hashing import sha256_of
from drelu_timm.publishing.cards import MEANINGS, SHIPPED, licences, model_card
from drelu_timm.publishing.entries import card_record, check_entry, model_info
from drelu_timm.publishing.measured import AUTOATTACK, from_record
from drelu_timm.publishing.recipes import recipe
from drelu_timm.publishing.submission import autoattack_log, is_external, new_evaluation, new_model
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


def test_generated_images_are_a_footnote_and_no_additional_data(measured):
    generated = trained(measured, generated_fraction=0.7)
    generated = replace(generated, config={**generated.config, "generated": {"images": 20_000_000}})
    entry = model_info(generated)
    assert entry["additional_data"] is False
    assert entry["footnote"].startswith("It uses additional 20M synthetic images in training (70% of every batch). ")
    assert "CC BY-NC-SA 4.0" in licences(generated) and "CC BY-NC-SA" not in licences(measured)
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
def test_an_entry_of_another_form_is_refused_whole(measured, spoil, message):
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
def test_fewer_examples_than_the_board_asks_for_are_called_preliminary_everywhere(
    measured, dataset, n, test_size, preliminary
):
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
def test_the_curve_is_preliminary_by_the_rule_of_the_results(measured, dataset, title, n, preliminary):
    measured = having(measured, dataset=dataset, dataset_title=title, n_examples=10_000)
    measured = replace(measured, curve=replace(measured.curve, n_examples=n), test_size=10_000)
    (above,) = [line for line in model_card(measured).splitlines() if f"the first {n:,} test images:" in line]
    assert above.startswith("Preliminary: Linf, suite" if preliminary else "Linf, suite")


# The card


def test_card_entry_and_recipe_are_made_from_the_record_alone(measured):
    read = from_record(json.loads(json.dumps(card_record(measured))), Path("card.json"))
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


def test_the_card_says_every_number_with_the_verdict_and_its_evidence(measured):
    card, results, point = model_card(measured), measured.results, measured.point
    for attack, accuracy in point.accuracy.items():
        assert f"| {attack} | {100 * accuracy:.2f} |" in card
    assert f"| **worst case** | {100 * point.worst:.2f} |" in card
    assert all(f"- {sentence}" in card for sentence in point.verdict.evidence)
    assert MEANINGS[measured.verdict] in card
    assert all(f"| {at.eps} | " in card for at in measured.curve.points)
    assert f"({KEY}.png)" in card
    assert results.hardware in card and f"torch {results.versions['torch']}" in card
    assert "Caps: mean " in card and "10.3390/math12223551" in card


@pytest.mark.parametrize(("square", "warns"), [(0.9, True), (0.9079, True), (0.9081, False), (0.91, False)])
def test_the_card_says_what_each_attack_of_autoattack_left_and_when_that_is_a_warning(measured, square, warns):
    left = {"apgd-ce": 0.93, "apgd-t": 0.92, "fab-t": 0.91, "square": square}
    card = model_card(having(measured, sequences={"autoattack": left}))
    stages = f"apgd-ce 93.00, apgd-t 92.00, fab-t 91.00, square {100 * square:.2f}"
    assert f"AutoAttack, attack by attack, in %: {stages}." in card
    assert ("AutoAttack's own check warns here" in card) == warns
    assert (f"lowers the accuracy by another {91 - 100 * square:.2f} points" in card) == warns


def test_an_attack_that_knows_no_ball_is_named_as_such(measured):
    card = model_card(having(measured, accuracy={"cw-l2": 0.9, "pgd": 0.8}))
    assert "| cw-l2 (what it finds in the ball) | 90.00 |" in card and "| pgd | 80.00 |" in card


def test_the_card_of_a_masked_model_says_that_it_is_not_robust(measured):
    card = model_card(judged(measured, "masked"))
    assert "**The gradients are masked.**" in card
    assert "- BPDA leaves 4.4 %." in card
    assert "- Not robust: the accuracy under white-box attack comes from masked gradients." in card


def test_the_card_of_a_large_model_says_what_its_weights_are_and_how_to_make_them(measured):
    large = replace(measured, weights=replace(measured.weights, bytes=SHIPPED + 1))
    card = model_card(large)
    assert f"sha256 {measured.weights.sha256} (bit-equal on the same" in card
    assert f"`scripts/digits/Linf/{KEY}.toml` states how the model, its evaluation and this card are made" in card
    assert "come with `drelu_timm`." in model_card(measured)


@pytest.mark.parametrize("objective", ["natural", "at", "trades", "mart"])
def test_every_objective_has_a_card(measured, objective):
    assert f"# {KEY}" in model_card(trained(measured, objective=objective))


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


def test_a_copy_of_the_boards_images_is_preliminary_and_no_external_evaluation(measured):
    copy = having(measured, dataset="cifar10", dataset_title="CIFAR-10 (JPEG copy)", n_examples=10_000)
    copy = replace(copy, test_size=10_000)
    assert copy.preliminary and not is_external(copy)
    assert copy.sample == "Preliminary: measured on all 10,000 test images of CIFAR-10 (JPEG copy)."
    needed = (
        "CIFAR-10 (JPEG copy) is not what a training finds or downloads by itself: give each its folder by --data-dir."
    )
    assert f"# {needed}" in recipe(copy).splitlines() and f"- {needed}" in model_card(copy).splitlines()
    original = having(copy, dataset_title="CIFAR-10")
    assert "--data-dir" not in recipe(original) + model_card(original)
    assert is_external(original) and not original.preliminary
    folder = having(copy, dataset="imagenet", dataset_title="imagenet")
    assert folder.preliminary and not is_external(folder)


def test_what_earlier_trainings_had_is_told_too(measured):
    earlier = trained(measured, generated_fraction=0.3, pretrained=True).config
    later = replace(measured, config={**measured.config, "init_from": earlier})
    entry, card = model_info(later), model_card(later)
    assert entry["additional_data"] and "It uses additional synthetic images in training (30%" in entry["footnote"]
    assert "CC BY-NC-SA 4.0" in card and "ImageNet weights" in card and "license: cc-by-nc-sa-4.0" in card
    assert "for the last of its 2 trainings" in card


def begun_from(measured, earlier):
    return replace(measured, config={**measured.config, "init_from": earlier})


def test_a_net_begun_from_another_dataset_has_additional_data(measured):
    elsewhere = {**trained(measured, dataset="mnist").config, "dataset_title": "MNIST"}
    later = begun_from(measured, begun_from(measured, elsewhere).config)
    entry, sentence = model_info(later), "It was begun from a net trained on MNIST."
    assert entry["additional_data"] is True and entry["footnote"].startswith(f"{sentence} Preliminary: ")
    assert f"\n- {sentence}\n" in model_card(later).partition("## Training")[2]
    assert "- **Additional data**: true" in new_model(later, None)
    here = begun_from(measured, {**measured.config, "dataset_title": "Digits (JPEG copy)"})
    assert model_info(here)["additional_data"] is False and "begun from" not in model_card(here)


def test_of_folders_the_name_tells_whether_it_is_another_dataset(measured):
    photos = {**trained(measured, dataset="folder").config, "dataset_title": "photos"}
    flowers = replace(measured, config={**photos, "dataset_title": "flowers", "init_from": photos})
    assert "begun from a net trained on photos." in model_info(flowers)["footnote"]
    assert model_info(begun_from(replace(measured, config=photos), photos))["additional_data"] is False


def test_a_plain_model_has_nothing_of_d_relu_on_its_card(measured):
    plain = replace(trained(measured, model="resnet10t"), caps={})
    assert "drelu\n" not in model_card(plain).split("---")[1]
    assert "bibtex" not in model_card(plain)


def test_the_time_of_an_evaluation_that_went_on_is_said_to_be_of_its_last_part(measured):
    uninterrupted = having(measured, seconds=42.0)
    times = {name: time for name, time in measured.point.attack_seconds.items() if name != "apgd-ce"}
    resumed = having(uninterrupted, attack_seconds=times)
    for write in (recipe, model_card):
        assert re.search(r"42 s[;,]", write(uninterrupted))
        assert "42 s for its last part, as it was stopped and went on;" in write(resumed)


def test_the_log_tells_what_every_attack_of_autoattack_left(measured):
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


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_number_of_a_published_card_follows_from_its_results(path):
    record = json.loads(path.read_text())
    measured = from_record(record, path)
    assert record == json.loads(json.dumps(card_record(measured)))
    assert path.relative_to(REPOSITORY / "model_cards").with_suffix("") == measured.place
    assert path.with_suffix(".md").read_text() == model_card(measured)
    assert (REPOSITORY / measured.recipe).read_text() == recipe(measured)
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
def test_published_weights_give_the_clean_accuracy_of_the_card(path, data_folder):
    measured = from_record(json.loads(path.read_text()), path)
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
def test_weights_that_are_published_are_those_of_the_card(path):
    measured = from_record(json.loads(path.read_text()), path)
    weights = path.with_suffix(".safetensors")
    assert weights.exists() == (measured.weights.bytes <= SHIPPED)
    if weights.exists():
        assert sha256_of(weights) == measured.weights.sha256
        model = timm.create_model(robust_model_name(measured.key, measured.dataset, measured.norm), pretrained=True)
        assert len(load_file(weights)) == len(model.model.state_dict())
