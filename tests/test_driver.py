"""The driver: an evaluation has the same rows if it is stopped and resumed, in any batches, on any processes."""

import csv
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_attacks import FakeAttack, only
from launching import Launched, held_at, wait_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from drelu_timm.__main__ import main
from drelu_timm.attacks.attack import Candidates
from drelu_timm.attacks.square import Square
from drelu_timm.attacks.suites import ATTACKS, SUITES
from drelu_timm.data import images as decoded
from drelu_timm.errors import InputError
from drelu_timm.evaluation import checkpoint
from drelu_timm.evaluation.driver import Attacked, label_margin
from drelu_timm.evaluation.evaluation import evaluate_model, evaluate_sweep


@pytest.fixture
def toy():
    """A small model, images, and labels that are right for all but the first."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))
        images = torch.rand(40, 1, 8, 8)
    labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 6
    return model, images, labels


def measured(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The content of a checkpoint, by stage and example."""
    rows = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("column ")]  # noqa: SIM118 (no dict)
            columns = {name.removeprefix("column "): file.get_tensor(name).tolist() for name in names}
            for position, example in enumerate(file.get_tensor("examples").tolist()):
                key = (file.metadata()["stage"], example)
                assert key not in rows, "an example is in one file of a stage"
                rows[key] = {name: str(column[position]) for name, column in columns.items()}  # as NaN is not itself
    return rows


# Resuming


def test_an_evaluation_resumes_and_ends_with_the_same_rows(toy, tmp_path):
    arguments = {"eps": "8/255", "suite": "quick", "batch_size": 8}
    whole = evaluate_model(*toy, **arguments, state=tmp_path / "whole")
    expected = measured(tmp_path / "whole")
    files = sorted((tmp_path / "whole").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for kept in (0, 1, len(files) // 3, len(files) - 1):
        cut = tmp_path / "cut"
        cut.mkdir()
        for file in files[:kept]:
            shutil.copy(file, cut)
        (cut / f".123.{files[kept].name}.part").write_bytes(
            files[kept].read_bytes()[:100]
        )  # a killed process leaves it
        again = evaluate_model(*toy, **arguments, state=cut)
        assert measured(cut) == expected
        assert again.accuracy == whole.accuracy
        assert again.broken.by == whole.broken.by
        assert torch.equal(again.adversarial.index, whole.adversarial.index)
        assert torch.equal(again.adversarial.images, whole.adversarial.images)
        shutil.rmtree(cut)


def test_another_batch_size_measures_only_missing_examples(toy, tmp_path):
    arguments = {"eps": "8/255", "suite": "quick", "state": tmp_path}
    whole = evaluate_model(*toy, **arguments, batch_size=8)
    files = sorted(tmp_path.iterdir())
    for file in files[::3]:
        file.unlink()
    before = measured(tmp_path)
    again = evaluate_model(*toy, **arguments, batch_size=5)
    after = measured(tmp_path)
    assert {key: after[key] for key in before} == before
    assert again.broken.by == whole.broken.by


def test_measured_examples_are_not_measured_again(toy, tmp_path, monkeypatch):
    calls = []

    def search(model, batch, threat_model):
        calls.append(len(batch))
        return batch.images

    arguments = {"eps": 0.1, "suite": only(monkeypatch, {"fake": FakeAttack(search)}), "batch_size": 13}
    evaluate_model(*toy, **arguments, state=tmp_path / "state")
    assert calls == [13, 13, 13]
    (lost,) = (tmp_path / "state").glob("fake-*14.safetensors")
    lost.unlink()
    evaluate_model(*toy, **arguments, state=tmp_path / "state")
    assert calls == [13, 13, 13, 13], "the lost batch is measured again, and no other"
    assert lost.exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m, x, y: (nn.Sequential(m, nn.Identity()), x, y), "model"),
        (lambda m, x, y: (m, x * 0.99, y), "images"),
        (lambda m, x, y: (m, x, (y + 1) % 6), "images"),
    ],
)
def test_the_checkpoint_of_another_evaluation_is_refused(toy, tmp_path, change, field):
    evaluate_model(*toy, eps=0.1, state=tmp_path)
    with pytest.raises(InputError, match=f"was started with another {field} "):
        evaluate_model(*change(*toy), eps=0.1, state=tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"eps": 0.2}, r"another eps \(\[0.1\] before, \[0.2\] now\)"),
        ({"seed": 3}, r"another seed \(0 before, 3 now\)"),
        ({"suite": "paper"}, r"another suite \(quick before, paper now\)"),
        ({"search_dtype": torch.bfloat16}, r"another precision \(torch.float32 before"),
    ],
)
def test_the_checkpoint_of_other_settings_is_refused(toy, tmp_path, option, message):
    evaluate_model(*toy, eps=0.1, state=tmp_path)
    with pytest.raises(InputError, match=message):
        evaluate_model(*toy, **{"eps": 0.1, "state": tmp_path, **option})


def test_other_weights_are_another_model(toy, tmp_path):
    model, images, labels = toy
    evaluate_model(model, images, labels, eps=0.1, state=tmp_path)
    with torch.no_grad():
        model[1].weight[0, 0] += 1e-6
    with pytest.raises(InputError, match="another model"):
        evaluate_model(model, images, labels, eps=0.1, state=tmp_path)


def race(number, model, images, labels, state, starting, refused, outcomes):
    """Evaluate, and hold the lock until the other one was refused."""

    def waits(x):
        assert refused.wait(60)
        return model(x)

    starting.wait()
    try:
        evaluate_model(waits, images, labels, eps=0.1, suite="none", state=state)
        outcomes.put((number, os.getpid(), "done"))
    except InputError as error:
        refused.set()
        outcomes.put((number, os.getpid(), str(error)))


def test_of_two_evaluations_with_one_state_the_second_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "none", {"fake": {"fake": FakeAttack(lambda model, batch, threat_model: batch.images)}})
    model, images, labels = toy
    fork = multiprocessing.get_context("fork")
    for trial in range(20):
        starting, refused, outcomes = fork.Barrier(2), fork.Event(), fork.SimpleQueue()
        common = model, images[:2], labels[:2], tmp_path / str(trial), starting, refused, outcomes
        racers = [fork.Process(target=race, args=(number, *common)) for number in range(2)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        ended = {outcome: pid for _, pid, outcome in (outcomes.get() for _ in racers)}
        (refusal,) = ended.keys() - {"done"}
        assert f"state {tmp_path / str(trial)} is in use by process {ended['done']} on " in refusal
        assert "\n" not in refusal


def forged(path, change):
    """Change the tensors of a file of a checkpoint, and write it with a digest that is right."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    metadata["sha256"] = checkpoint._digest(metadata["stage"], tensors)
    save_file(tensors, path, metadata=metadata)


def test_a_forged_checkpoint_does_not_become_a_result(toy, tmp_path):
    arguments = {"eps": "8/255", "batch_size": 40, "state": tmp_path}
    result = evaluate_model(*toy, **arguments)
    assert 0 < result.worst < result.clean

    def breaks_all(tensors):
        tensors["column broken_at"] = torch.zeros_like(tensors["column broken_at"])
        tensors["kept"], tensors["images"] = tensors["examples"].clone(), toy[1][tensors["examples"]]

    (path,) = tmp_path.glob("apgd-ce-*")
    forged(path, breaks_all)
    with pytest.raises(InputError, match=r"adversarial images in the checkpoint do not fool the model inside the eps"):
        evaluate_model(*toy, **arguments)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(toy, tmp_path):
    arguments = {"eps": "8/255", "state": tmp_path}
    evaluate_model(*toy, **arguments)
    path = next(tmp_path.glob("apgd-ce-*"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read \(its content is not what was written, by its sha256\)"):
        evaluate_model(*toy, **arguments)


def test_a_model_that_changes_during_the_evaluation_is_refused(toy):
    model, images, labels = toy
    calls = itertools.count()

    def changes(x):
        return model(x) * (1 if next(calls) < 30 else -1)

    with pytest.raises(InputError, match=r"the model changed during the evaluation|do not fool the model"):
        evaluate_model(changes, images, labels, eps="8/255")


@pytest.fixture
def run(untrained_run):
    return untrained_run("8/255")


def images_of(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "results" / f"{name}.adversarial.safetensors")


def rows_of(run: Path, name: str) -> list[dict]:
    with (run / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def check_that_some_break(rows: list[dict]) -> None:
    """Attacks must fool the model on some correct examples and not on all, else there is nothing to compare."""
    correct = [row for row in rows if row["broken_by"] != "clean"]
    assert 0 < sum(not row["broken_by"] for row in correct) < len(correct)


def size(state: Path) -> int:
    return sum(path.stat().st_size for path in state.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("kills", "suite", "examples"), [(3, "quick", 120), pytest.param(25, "standard", 359, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_it_ends_with_the_same_rows(run, tmp_path, kills, suite, examples):
    """The command, killed by SIGKILL in passes of the model and while it writes, compared with one that was not."""
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    arguments = ["--suite", suite, "--n-examples", str(examples), "--batch-size", "8"]
    assert main(["evaluate", str(alone), *arguments]) == 0
    moment, reached = random.Random(0), tmp_path / "reached"
    state, sizes = run / "results" / f"{suite}-Linf-8_255.state", [0]
    for kill in range(kills):
        function, calls = [("os:fsync", 8), ("torch.nn:Module.__call__", 3000)][kill % 2]
        held = held_at(function, moment.randint(1, calls), reached)
        process = Launched("evaluate", str(run), *arguments, environment=held)
        wait_for(reached, process)
        process.kill()
        process.wait()
        reached.unlink()
        sizes.append(size(state))
    assert sizes == sorted(sizes), "something was lost"
    assert len(set(sizes)) > kills // 2
    assert main(["evaluate", str(run), *arguments]) == 0
    name = f"{suite}-Linf-8_255"
    check_that_some_break(rows_of(alone, name))
    assert rows_of(run, name) == rows_of(alone, name)
    after, expected = (images_of(path, name) for path in (run, alone))
    assert all(torch.equal(after[name], expected[name]) for name in ("index", "images"))
    assert not state.exists()


# Other batches and processes


def test_the_same_for_any_batch_size(toy):
    whole = evaluate_model(*toy, eps="8/255", suite="standard", batch_size=100)
    parts = evaluate_model(*toy, eps="8/255", suite="standard", batch_size=7)
    for column in whole.robust:
        assert torch.equal(whole.robust[column], parts.robust[column]), column
    assert whole.broken.by == parts.broken.by
    assert whole.broken.seed == parts.broken.seed


def test_the_same_on_two_processes(run):
    """Every row is the same up to rounding."""
    arguments = ["evaluate", str(run), "--suite", "quick", "--n-examples", "359", "--batch-size", "10"]
    alone = run.with_name("alone")
    shutil.copytree(run, alone)
    assert main([arguments[0], str(alone), *arguments[2:]]) == 0
    process = Launched(*arguments, processes=2)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads((run / "results" / "quick-Linf-8_255.json").read_text())["processes"] == 2
    assert printed.count("verdict: ") == 1
    check_that_some_break(rows_of(alone, "quick-Linf-8_255"))
    for one, two in zip(rows_of(alone, "quick-Linf-8_255"), rows_of(run, "quick-Linf-8_255"), strict=True):
        assert abs(float(one.pop("margin")) - float(two.pop("margin"))) < 1e-3
        assert one == two
    one, two = (images_of(path, "quick-Linf-8_255") for path in (alone, run))
    assert torch.equal(one["index"], two["index"])
    torch.testing.assert_close(one["images"], two["images"], rtol=0, atol=1e-5)
    suffixes = ("json", "csv", "adversarial.safetensors")
    assert {path.name for path in (run / "results").iterdir()} == {f"quick-Linf-8_255.{suffix}" for suffix in suffixes}


def test_processes_wait_long_for_each_other(tmp_path, monkeypatch):
    asked = {}

    def state(**options):
        asked.update(options)
        return SimpleNamespace(process_index=0, num_processes=1)

    monkeypatch.setattr(checkpoint, "PartialState", state)
    checkpoint.Processes(tmp_path)
    assert asked["timeout"] == timedelta(days=1)


def test_accelerate_launch_that_starts_one_process_for_many_is_named(run):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "drelu_timm"]
    done = subprocess.run([*launch, "evaluate", str(run)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: accelerate launch --num_processes starts only one process on a machine without GPUs" in done.stderr


# Several eps


RADII = [0, "1/255", "4/255", "16/255", "64/255"]


def test_a_sweep_can_only_fall_and_agrees_with_single_eps(toy):
    sweep = evaluate_sweep(*toy, eps=RADII, suite="paper")
    assert [evaluation.threat_model.written for evaluation in sweep] == [str(radius) for radius in RADII]
    assert sweep[0].worst == sweep[0].clean == 39 / 40
    for smaller, larger in itertools.pairwise(sweep):
        for attack in smaller.robust:
            assert not (larger.robust[attack] & ~smaller.robust[attack]).any(), attack
    for radius, evaluation in zip(RADII[1:], sweep[1:], strict=True):
        single = evaluate_model(*toy, eps=radius, suite="paper")
        assert abs(single.worst - evaluation.worst) <= 1 / 40
    assert sweep[-1].worst < 0.2


def test_a_larger_eps_starts_from_the_images_of_the_smaller_one(toy, monkeypatch):
    starts = []

    def search(model, batch, threat_model):
        starts.append(batch.start)
        return batch.images + threat_model.eps

    attack = {"fake": FakeAttack(search)}
    model, images, labels = toy
    evaluate_sweep(model, images / 2, labels, eps=[0.1, 0.001, 0.01], suite=only(monkeypatch, attack))
    assert starts[0] is None
    assert len(starts) == 3
    assert (starts[1] <= images.max() / 2 + 0.0011).all()
    assert not torch.equal(starts[1], starts[2][: len(starts[1])])


def test_examples_without_robustness_are_not_searched_again_at_a_larger_eps(toy, monkeypatch):
    sizes = []

    def search(model, batch, threat_model):
        sizes.append(len(batch))
        return ATTACKS["pgd"].run(model, batch, threat_model)

    evaluate_sweep(*toy, eps=["2/255", "8/255", "32/255"], suite=only(monkeypatch, {"fake": FakeAttack(search)}))
    assert sizes[0] == 39
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 39


# The model as attacks see it


def test_a_model_without_a_gradient_has_a_zero_one():
    class Cut(nn.Module):
        def forward(self, images):
            return images.detach().flatten(1)[:, :3]

    images = torch.rand(2, 1, 2, 2, requires_grad=True)
    logits = Attacked(Cut())(images)
    assert torch.equal(logits, images.flatten(1)[:, :3])
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert not gradient.any()


def test_gradients_are_finite():
    images = torch.tensor([0.0, 0.25]).view(2, 1, 1, 1).requires_grad_()
    model = Attacked(nn.Sequential(nn.Flatten(), Root()))
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert gradient.flatten().tolist() == [0, 1]


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_margin_is_that_of_the_label():
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [torch.nan, 1.0]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    margin = label_margin(logits, labels)
    assert margin[:2].tolist() == [2, -2]
    assert ((margin > 0) == torch.tensor([True, False, True, False, False])).all()
    assert margin[4] == -torch.inf


def test_bf16_finds_and_float32_judges(toy, monkeypatch):
    """An example misclassified only in bf16 is searched again in float32, and counts only if that succeeds."""
    searched = []

    def search(model, batch, threat_model):
        searched.append((model.dtype, len(batch)))
        if model.dtype == torch.bfloat16:
            return batch.images
        return ATTACKS["pgd"].run(model, batch, threat_model)

    def forward(attacked, images):
        """In bf16 the model is always wrong."""
        return attacked.model(images) * (-1 if attacked.dtype == torch.bfloat16 else 1)

    suite = only(monkeypatch, {"fake": FakeAttack(search)})
    reference = evaluate_model(*toy, eps="8/255", suite=suite)
    assert reference.accuracy["fake"] < 0.8
    searched.clear()
    monkeypatch.setattr(Attacked, "forward", forward)
    result = evaluate_model(*toy, eps="8/255", suite=suite, search_dtype=torch.bfloat16)
    assert searched == [(torch.bfloat16, 39), (torch.float32, 39)]
    assert torch.equal(result.robust["fake"], reference.robust["fake"])


def test_a_success_that_does_not_repeat_in_bf16_is_searched_again_in_float32(toy, monkeypatch):
    """Also where the success was in another batch, and the last look at the image does not show it."""
    searched = []

    def search(model, batch, threat_model):
        searched.append((model.dtype, len(batch)))
        return Candidates(batch.images, torch.ones_like(batch.labels), torch.arange(len(batch)) % 2 == 0)

    suite = only(monkeypatch, {"fake": FakeAttack(search)})
    evaluate_model(*toy, eps="8/255", suite=suite, search_dtype=torch.bfloat16)
    assert searched == [(torch.bfloat16, 39), (torch.float32, 20)]


def test_square_does_not_give_up_on_ties_in_bf16(toy, tmp_path, monkeypatch):
    def forward(attacked, images):
        """In bf16 a model of few different logits."""
        logits = attacked.model(images)
        return (8 * logits).round() / 8 if attacked.dtype == torch.bfloat16 else logits

    monkeypatch.setattr(Attacked, "forward", forward)
    suite = only(monkeypatch, {"square": Square(n_queries=60)})
    evaluate_model(*toy, eps="24/255", suite=suite, search_dtype=torch.bfloat16, state=tmp_path)
    rows = [row for (stage, _), row in measured(tmp_path).items() if stage == "square"]
    assert any(float(row["margin"]) <= 0 for row in rows)
    assert all(float(row["steps"]) == 61 for row in rows if float(row["margin"]) > 0)


def test_memory_holds_a_batch_not_the_data(toy, monkeypatch):
    """uint8 images are turned into floats batch by batch."""
    model, images, _ = toy
    pixels = (images * 255).round().byte()
    seen = []
    monkeypatch.setattr(decoded, "to_float", lambda batch: seen.append(len(batch)) or batch.float() / 255)
    result = evaluate_model(model, pixels, model(pixels.float() / 255).argmax(1), eps="1/255", batch_size=10)
    assert max(seen) == 10
    assert result.clean == 1
