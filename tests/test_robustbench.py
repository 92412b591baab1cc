"""RobustBench after `adapt`: its benchmark, its datasets, and errors that name the cause."""

import importlib.metadata
import subprocess
import sys

import pytest
import timm
import torch
from fake_packages import install
from torch import nn
from torchvision.transforms.functional import to_pil_image

from drelu_timm import register_robust_model, save_folder
from drelu_timm.errors import InputError
from drelu_timm.robustbench import adapt

EPS = 0.01


@pytest.fixture(scope="module")
def robustbench():
    try:
        importlib.metadata.version("robustbench")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("robustbench is not installed")
    return adapt()


@pytest.fixture
def fresh():
    """Clear the cache of `adapt` before and after, so that it looks at what is installed."""
    adapt.cache_clear()
    yield
    adapt.cache_clear()


class Linear(nn.Module):
    """Linear classifier of CIFAR-shaped images, whose robust accuracy under Linf is known exactly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 32 * 32, 10)

    def forward(self, images):
        return self.layer(images.flatten(1))

    @torch.no_grad()
    def robust_radius(self, images, labels):
        """Return the Linf distance to the nearest other class, [N], for images that stay inside [0, 1]."""
        weight, logits = self.layer.weight, self(images)
        margins = logits.gather(1, labels[:, None]) - logits
        slopes = (weight[labels][:, None] - weight[None]).abs().sum(2)
        return (margins / slopes.clamp(min=1e-9)).scatter(1, labels[:, None], float("inf")).amin(1)


@pytest.fixture
def linear_task(robustbench, monkeypatch):
    """Model and seven images instead of RobustBench's CIFAR-10: two robust, four not, one misclassified."""
    model = Linear().eval()
    images = 0.1 + 0.8 * torch.rand(2000, 3, 32, 32)
    labels = model(images).argmax(1)
    radius = model.robust_radius(images, labels)
    chosen = torch.cat([radius.argsort(descending=True)[:2], radius.argsort()[:5]])
    assert radius[chosen[1]] > 1.2 * EPS > 0.5 * EPS > radius[chosen[6]]
    images, labels = images[chosen], labels[chosen].clone()
    labels[6] = (labels[6] + 1) % 10
    cifar10 = robustbench.model_zoo.enums.BenchmarkDataset.cifar_10
    monkeypatch.setitem(robustbench.data._clean_dataset_loaders, cifar10, lambda n, *_: (images[:n], labels[:n]))
    return model, images, labels


def test_robustbench_is_imported_by_adapt_only():
    code = "import sys, drelu_timm.robustbench; print([m for m in ('robustbench', 'autoattack') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_benchmark_runs_to_the_end_and_finds_the_exact_robust_accuracy(robustbench, linear_task, tmp_path, capsys):
    model, images, labels = linear_task
    log = tmp_path / "log.txt"

    clean, robust = robustbench.benchmark(
        model, n_examples=7, dataset="cifar10", threat_model="Linf", eps=EPS, log_path=str(log)
    )

    assert (clean, robust) == pytest.approx((6 / 7, 2 / 7))
    assert "robust accuracy: 28.57%" in log.read_text()
    assert "robust accuracy: 28.57%" in capsys.readouterr().out
    assert (model.robust_radius(images, labels) > EPS).tolist() == [True] * 2 + [False] * 5


def test_our_standard_suite_is_their_benchmark(robustbench, capsys):
    """RobustBench's own benchmark against `evaluate_model`, on a trained model; the seeds differ."""
    from drelu_timm.data.images import to_float
    from drelu_timm.data.readers import load_images
    from drelu_timm.evaluation.evaluation import evaluate_model

    train = load_images("digits", None, "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(to_float(train.images)), train.labels).backward()
            optimizer.step()
    model.eval()
    count, eps = 120, 0.08
    with torch.random.fork_rng():
        clean, robust = robustbench.benchmark(model, count, "digits", "Linf", eps=eps, batch_size=64)
    test = load_images("digits", None, "test")[:count]

    ours = evaluate_model(model, test.images, test.labels, eps=eps, suite="standard")

    assert ours.clean == pytest.approx(clean)
    assert 0.2 < robust < 0.8, "the model is too weak or too robust to compare"
    assert abs(ours.accuracy["autoattack"] - robust) <= 2 / count


def test_autoattack_takes_the_arguments_of_autoattack_and_finds_what_pyautoattack_finds(
    robustbench, linear_task, capsys
):
    import pyautoattack
    from autoattack import AutoAttack  # found once `adapt` was called

    model, images, labels = linear_task
    ours = AutoAttack(
        model, norm="Linf", eps=EPS, seed=0, verbose=False, version="custom", attacks_to_run=["apgd-ce"], device="cpu"
    )
    theirs = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, seed=0, version="custom", attacks=["apgd-ce"])

    adversarial = ours.run_standard_evaluation(images, labels, bs=4)

    assert torch.equal(adversarial, theirs.run_standard_evaluation(images, labels, batch_size=4)[0])
    assert not torch.equal(adversarial, images)
    assert capsys.readouterr().out == ""


def test_a_state_path_is_refused_before_the_attack(robustbench, linear_task, tmp_path):
    model, _, _ = linear_task
    with pytest.raises(InputError, match=r"state_path='.*aa\.json'.* cannot resume .* Leave it out"):
        robustbench.benchmark(model, 7, "cifar10", "Linf", eps=EPS, aa_state_path=tmp_path / "aa.json")
    assert not (tmp_path / "aa.json").exists()


def test_our_datasets_are_added_to_robustbenchs_enumeration(robustbench):
    from robustbench.model_zoo.enums import BenchmarkDataset

    assert BenchmarkDataset("digits") is BenchmarkDataset("digits")
    assert (BenchmarkDataset("mnist").name, BenchmarkDataset("mnist").value) == ("mnist", "mnist")
    listed = [dataset.value for dataset in BenchmarkDataset]
    assert listed[:3] == ["cifar10", "cifar100", "imagenet"]
    assert {"digits", "mnist", "tiny_imagenet"} <= {*listed} and len(listed) == len({*listed})
    with pytest.raises(ValueError, match="'cifar1O' is not a valid BenchmarkDataset"):
        BenchmarkDataset("cifar1O")


def test_benchmark_finds_the_images_of_our_datasets(robustbench):
    from robustbench.model_zoo.enums import BenchmarkDataset

    from drelu_timm.data.readers import load_images

    images, labels = robustbench.data.load_clean_dataset(BenchmarkDataset("digits"), 50, "data", None)
    test = load_images("digits", None, "test")
    assert torch.equal(images, test.images[:50] / 255)
    assert torch.equal(labels, test.labels[:50])


def test_images_are_preprocessed_for_a_registered_model(robustbench, tmp_path):
    save_folder(timm.create_model("resnet10t", num_classes=3), tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").unlink()  # they are not needed
    register_robust_model("Tester2026Preprocessing", "imagenet", "Linf", tmp_path / "hub")
    enums = robustbench.model_zoo.enums
    board = enums.BenchmarkDataset.imagenet, enums.ThreatModel.Linf
    image = to_pil_image(torch.rand(3, 260, 300, generator=torch.Generator().manual_seed(0)))

    found = robustbench.data.get_preprocessing(*board, "Tester2026Preprocessing", None)(image)

    assert found.shape == (3, 176, 176)
    assert torch.equal(found, robustbench.data.get_timm_model_preprocessing("resnet10t")(image))


def test_the_real_autoattack_is_preferred(robustbench, monkeypatch, tmp_path, fresh):
    (tmp_path / "autoattack.py").write_text("class AutoAttack: real = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "autoattack")
    monkeypatch.delitem(sys.modules, "autoattack.state")

    adapt()

    from autoattack import AutoAttack

    assert AutoAttack.real


def test_the_stale_copy_from_torchattacks_is_named(monkeypatch, tmp_path, fresh):
    stale = b"def load_model(): ..."
    install(tmp_path, "torchattacks", files={"robustbench/utils.py": stale})
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(
        InputError,
        match=r"torchattacks has overwritten robustbench .* pip uninstall .*torchattacks robustbench && .*pip",
    ):
        adapt()


def test_torchattacks_next_to_the_real_robustbench_is_accepted(robustbench, monkeypatch, tmp_path, fresh):
    install(tmp_path, "torchattacks", files={"robustbench/utils.py": b"def load_model(): ..."})
    (tmp_path / "robustbench" / "utils.py").write_text("# the real one, installed afterwards")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert adapt() is robustbench


def test_missing_robustbench_names_the_extra(monkeypatch, tmp_path, fresh):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"robustbench is not installed; .*pip install .*'drelu-timm\[robustbench\]'"):
        adapt()


def test_missing_pkg_resources_names_the_version_of_setuptools(monkeypatch, tmp_path, fresh):
    install(tmp_path, "robustbench")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    with pytest.raises(
        InputError, match=r"pkg_resources is not found \(setuptools is missing\); .*pip install .*setuptools"
    ):
        adapt()


def test_an_import_error_of_robustbench_is_reported(monkeypatch, tmp_path, fresh):
    install(tmp_path, "robustbench")
    install(tmp_path, "torchattacks")
    (tmp_path / "pkg_resources.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(InputError, match=r"robustbench cannot be imported .* uninstall .*robustbench && .* install"):
        adapt()
