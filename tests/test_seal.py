"""The seal of a result, and what is derived again from its files: every edit is refused by name, in one line."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from drelu_timm.data.readers import load_images
from drelu_timm.errors import InputError
from drelu_timm.hashing import sha256_of
from drelu_timm.results.result import read_result
from drelu_timm.results.seal import check_result

NAME = "standard-Linf-0.1"


@pytest.fixture
def run(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / "run")


@pytest.fixture(scope="module")
def test_set():
    return load_images("digits", None, "test")


def check(run, test=None):
    return check_result(read_result(run / "results" / f"{NAME}.json"), test)


def edit_json(run, change):
    path = run / "results" / f"{NAME}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_rows(run, change):
    path = run / "results" / f"{NAME}.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def edit_images(run, change):
    """Write other adversarial images, with the sha256 that the result states."""
    path = run / "results" / f"{NAME}.adversarial.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)
    edit_json(run, lambda content: content.update(adversarial_sha256=sha256_of(path)))


def test_results_as_they_were_written_are_sealed(run, test_set):
    assert check(run) and check(run, test_set)
    (sweep,) = (run / "sweeps").glob("*.json")
    assert check_result(read_result(sweep), test_set)


def test_a_moved_and_reformatted_result_keeps_its_seal(run, test_set):
    path = run / "results" / f"{NAME}.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    assert check(run.rename(run.with_name("moved")), test_set)


def test_a_result_without_files_next_to_it_is_checked_alone(run):
    for path in (run / "results").iterdir():
        if path.suffix != ".json":
            path.unlink()
    assert check(run)
    edit_json(run, lambda content: content.update(hardware="a faster machine"))
    with pytest.raises(InputError, match="its content changed after the evaluation, by its seal"):
        check(run)


def test_a_result_of_an_earlier_version_is_read_and_has_no_seal(run, test_set):
    edit_json(run, lambda content: content.pop("seal"))
    assert check(run, test_set) is False


def robust(row):
    for name in row:
        if name not in ("index", "label", "clean_prediction", "broken_by", "steps", "margin", "seed"):
            row[name] = 1
    row.update(broken_by="", steps="", seed="")


def robust_if_correct(row):
    if row["broken_by"] not in ("", "clean"):
        robust(row)


def all_robust(content):
    content["worst"] = content["clean"]
    content["accuracy"] = dict.fromkeys(content["accuracy"], content["clean"])
    content["sequences"] = {
        name: dict.fromkeys(after, content["clean"]) for name, after in content["sequences"].items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_digest="0" * 64), "its model_digest changed"),
        (lambda c: c.update(seed=7), "its settings changed"),
        (lambda c: c.update(eps="0.2"), "its settings changed"),
        (lambda c: c["settings"]["square"].update(n_queries=9), "its settings changed"),
        (lambda c: c.update(dataset_title="ImageNet"), "its content changed"),
        (lambda c: c["verdict"].update(evidence=["All is well."]), "its content changed"),
        (lambda c: c.update(clean=c["clean"] + 1 / 60), "another clean accuracy than"),
        (lambda c: c.update(worst=c["worst"] - 1 / 60), "another worst case than the rows"),
        (lambda c: c.update(worst=-0.5), "worst is -0.5. It must be a number from 0 to 1"),
        (lambda c: c["accuracy"].update(bpda=1.0), "accuracy under bpda above the clean accuracy"),
        (lambda c: c["accuracy"].update(pgd=c["worst"]), "another pgd accuracy than|its content"),
        (
            lambda c: c["accuracy"].update(autoattack=c["clean"]),
            "another accuracy under autoattack than after its last",
        ),
        (
            lambda c: c["sequences"]["autoattack"].update({"apgd-ce": 0.0}),
            "accuracies of autoattack that rise from attack to attack",
        ),
        (lambda c: c["verdict"].update(verdict="masked"), "verdict at eps 0.1 is masked, but its numbers give "),
        (lambda c: c["verdict"]["numbers"].update(hidden_low=0.3), "has hidden_low 0.3000 instead of 0.0"),
        (lambda c: c["verdict"]["numbers"].update(hidden=0.0001), "has hidden 0.0001, not a share of "),
        (lambda c: c["verdict"]["numbers"].pop("stuck_low"), "has no number stuck_low"),
        (lambda c: c["verdict"].update(numbers={}), "its content changed"),
    ],
)
def test_an_edited_result_is_refused_by_name(run, test_set, change, message):
    edit_json(run, change)
    with pytest.raises(InputError, match=message) as refused:
        check(run, test_set)
    assert "\n" not in str(refused.value)


def test_an_edited_masked_verdict_is_refused_without_a_seal_too(run):
    def soften(content):
        content["verdict"]["numbers"].update(hidden=0.0, hidden_low=0.0, hidden_high=0.0)
        content["verdict"]["verdict"] = "sound"
        del content["seal"]

    edit_json(run, soften)
    with pytest.raises(InputError, match=r"hidden_high 0\.0000 instead of"):
        check(run)


def test_rows_that_call_everything_robust_are_refused_together_with_their_result(run, test_set):
    edit_rows(run, robust_if_correct)
    with pytest.raises(InputError, match="another worst case than the rows next to it"):
        check(run, test_set)
    edit_json(run, all_robust)
    with pytest.raises(InputError, match=r"adversarial\.safetensors and the rows in standard-Linf-0\.1\.csv differ"):
        check(run, test_set)
    edit_images(run, lambda tensors: {"index": tensors["index"][:0], "images": tensors["images"][:0]})
    with pytest.raises(InputError, match=r"the \.csv file changed after the evaluation, by its seal"):
        check(run, test_set)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(margin="0.5"), r"the \.csv file changed after the evaluation"),
        (lambda row: row.update(label="3"), "another clean accuracy|other labels"),
        (
            lambda row: row.update(broken_by="square" if not row["broken_by"] else row["broken_by"]),
            "another worst case",
        ),
        (lambda row: row.update(index="0"), "does not list the test images in order"),
        (lambda row: row.update(label="x"), "is not a table of an evaluation"),
        (lambda row: row.update(label="9" * 40), "is not a table of an evaluation"),
        (lambda row: row.update(label="9" * 5000), "is not a table of an evaluation"),
    ],
)
def test_edited_rows_are_refused(run, test_set, change, message):
    edit_rows(run, change)
    with pytest.raises(InputError, match=message) as refused:
        check(run, test_set)
    assert "\n" not in str(refused.value)


def moved(images):
    return (images + 0.1 * (images < 0.5) - 0.1 * (images >= 0.5)).clamp(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"images": moved(t["images"])}, "images outside of Linf, eps 0.1"),
        (lambda t: t | {"images": t["images"] + 1}, r"pixels outside of \[0, 1\]"),
        (lambda t: t | {"images": t["images"] * torch.nan}, r"pixels outside of \[0, 1\]"),
        (lambda t: t | {"images": t["images"].double()}, "no float32 image for each example"),
        (lambda t: t | {"images": t["images"][1:]}, "no float32 image for each example"),
        (lambda t: t | {"images": t["images"].repeat(1, 2, 1, 1)}, r"has images of \[2, 8, 8\], Digits of \[1, 8, 8\]"),
        (lambda t: {name: tensor[1:] for name, tensor in t.items()}, "differ in which examples fooled the model"),
        (lambda t: t | {"index": t["index"].flip(0)}, "no ascending index"),
        (lambda t: t | {"index": t["index"].float()}, "no ascending index"),
        (lambda t: {"images": t["images"]}, "no ascending index"),
        (lambda t: {"index": t["index"]}, "no float32 image for each example"),
    ],
)
def test_edited_adversarial_images_are_refused(run, test_set, change, message):
    edit_images(run, change)
    with pytest.raises(InputError, match=message):
        check(run, test_set)


def test_adversarial_images_of_another_digest_are_refused(run):
    path = run / "results" / f"{NAME}.adversarial.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"or not what the evaluation wrote \(by its sha256\)"):
        check(run)


def test_other_test_images_are_refused(run, test_set):
    other = test_set[torch.arange(len(test_set)).flip(0)]
    with pytest.raises(InputError, match="has other labels than the test images of Digits"):
        check(run, other)
    darker = type(test_set)(test_set.images // 2 * 2, test_set.labels, test_set.classes, test_set.title)
    with pytest.raises(InputError, match=r"images outside of|the test images changed after the evaluation"):
        check(run, darker)


# Malformed files


def nodes(content, path=()):
    """Yield the path of every value in a JSON content."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from nodes(value, (*path, key))


def replaced(content, path, value):
    """Return a JSON text with another value, as text, at a path."""
    content = json.loads(json.dumps(content))
    *folders, last = path
    inside = content
    for key in folders:
        inside = inside[key]
    inside[last] = "HERE"
    return json.dumps(content).replace('"HERE"', value)


DEEP = "[" * 5_000 + "]" * 5_000
VALUES = ["null", '"x"', "-1", "1e999", "9" * 400, "[]", "{}", "true", "NaN", "0.3", '"\\ud800"', DEEP]


@pytest.mark.parametrize("folder", ["results", "sweeps"])
def test_a_value_of_another_type_anywhere_in_a_result_is_one_line_or_is_allowed(run, folder):
    path = next(file for file in sorted((run / folder).glob("*.json")))
    content, accepted, messages = json.loads(path.read_text()), [], []
    for number, node in enumerate(nodes(content)):
        for value in VALUES[number % 3 :: 3]:
            path.write_text(replaced(content, node, value))
            try:
                check_result(read_result(path))
                accepted.append((node, value, path.read_text()))
            except InputError as error:
                messages.append(str(error))
    assert [(node, value) for node, value, text in accepted if json.loads(text) != content] == []
    assert len(messages) > 300
    assert [one for one in messages if "\n" in one or str(path.with_suffix("")) not in one] == []


@pytest.mark.parametrize("suffix", [".json", ".csv", ".adversarial.safetensors"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xff\xfe" + content,
        lambda content: b"\0" * 100,
        lambda content: DEEP.encode(),
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    ],
)
def test_a_file_of_other_bytes_is_one_line(run, suffix, spoil):
    path = run / "results" / f"{NAME}{suffix}"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=NAME) as refused:
        check(run)
    assert "\n" not in str(refused.value)
