"""Published attacks: in every batch an example has the result of pyautoattack for a batch of one."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import nn

from drelu_timm.attacks.apgd import APGD, TargetedAPGD
from drelu_timm.attacks.attack import Batch
from drelu_timm.attacks.minimum_norm import CarliniWagner, TargetedFAB, shortest_move
from drelu_timm.attacks.square import Square
from drelu_timm.attacks.threat_model import ThreatModel

NORMS = {"Linf": ThreatModel.parse("Linf", "0.06"), "L2": ThreatModel.parse("L2", "0.7")}
FOR_SQUARE = {"Linf": ThreatModel.parse("Linf", "0.07"), "L2": ThreatModel.parse("L2", "1.4")}
ITERATIONS = {"n_iter": 20, "rho": 0.75}
OURS = {
    "apgd-ce": APGD(**ITERATIONS),
    "apgd-dlr": APGD("dlr", **ITERATIONS),
    "apgd-t": TargetedAPGD(n_target_classes=3, **ITERATIONS),
    "fab-t": TargetedFAB(n_iter=20, n_target_classes=3),
    "square": Square(n_queries=150),
}
THEIRS = {
    "apgd-ce": (APGDAttack, {"loss": "ce", **ITERATIONS}),
    "apgd-dlr": (APGDAttack, {"loss": "dlr", **ITERATIONS}),
    "apgd-t": (APGDAttack_targeted, {"n_target_classes": 3, **ITERATIONS}),
    "fab-t": (FABAttack_PT, {"n_iter": 20, "targeted": True, "n_target_classes": 3}),
    "square": (SquareAttack, {"n_queries": 150, "p_init": 0.8, "resc_schedule": False}),
}
by_attack = pytest.mark.parametrize("name", OURS)
by_norm = pytest.mark.parametrize("norm", NORMS)


class Recorded(nn.Module):
    """Record the images that the model is called with."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, images):
        self.asked.append((images.requires_grad, images.detach().clone()))
        return self.model(images)


@pytest.fixture(scope="module")
def examples():
    """Return a model that classifies four kinds of 3x10x10 images, images, and their labels.

    The model is smooth: in a linear one FAB's steps can end on the boundary, and rounding determines the side.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(4, 3, 2, 2, generator=generator).sign()
    kinds = 0.5 + 0.1 * signs.repeat_interleave(5, 2).repeat_interleave(5, 3)
    labels = torch.arange(16) % 4
    images = (kinds[labels] + 0.1 * torch.randn(16, 3, 10, 10, generator=generator)).clamp(0, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(128, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    assert (model(images).argmax(dim=1) == labels).all()
    return model, images, labels


SEEDS = [1000 + 7 * i for i in range(16)]


def ball(name, norm):
    """Return a radius at which the attack fools the model on some examples but not on all."""
    return (FOR_SQUARE if name == "square" else NORMS)[norm]


def ours(name, examples, threat_model, part=slice(None), start=None, **changed):
    model, images, labels = examples
    batch = Batch(images[part], labels[part], SEEDS[part], start)
    return replace(OURS[name], **changed).run(model, batch, threat_model)


def alone(name, examples, threat_model):
    """Return the result of pyautoattack for each example in a batch of one."""
    model, images, labels = examples
    attack_class, own = THEIRS[name]
    common = {"norm": threat_model.norm, "eps": threat_model.eps, "device": torch.device("cpu"), **own}
    with torch.random.fork_rng():
        found = [
            attack_class(model, seed=seed, **common).perturb(images[i : i + 1], labels[i : i + 1])
            for i, seed in enumerate(SEEDS)
        ]
    return torch.cat(found)


def broken(examples, found):
    model, _, labels = examples
    return model(found).argmax(dim=1) != labels


@pytest.mark.filterwarnings("ignore:.*zero gradient")
@by_norm
@by_attack
def test_an_example_has_the_result_of_pyautoattack_for_a_batch_of_one(name, norm, examples):
    _, images, _ = examples
    threat_model = ball(name, norm)
    theirs = alone(name, examples, threat_model)
    found = ours(name, examples, threat_model).images
    fallen = broken(examples, theirs)
    assert 3 < fallen.sum() < 15, "the test has nothing to tell apart"
    assert torch.equal(broken(examples, found), fallen)
    assert threat_model.contains(found, images).all()
    if name == "square":  # the others keep the last or the nearest success, not the first
        torch.testing.assert_close(found[fallen], theirs[fallen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [[5, 11], [1] * 16])
@by_norm
@by_attack
def test_results_do_not_depend_on_the_batch(name, norm, sizes, examples):
    threat_model = ball(name, norm)
    whole = ours(name, examples, threat_model)
    rows = torch.arange(16).split(sizes)
    parts = [ours(name, examples, threat_model, slice(int(row[0]), int(row[-1]) + 1)) for row in rows]
    found = torch.cat([part.images for part in parts])
    fallen = broken(examples, whole.images)
    assert torch.equal(broken(examples, found), fallen)
    assert torch.equal(torch.cat([part.steps for part in parts]), whole.steps)
    torch.testing.assert_close(found[fallen], whole.images[fallen], atol=1e-4, rtol=0)


@by_norm
@by_attack
def test_steps_count_the_models_passes(name, norm, examples):
    model, images, labels = examples
    threat_model = ball(name, norm)
    whole = ours(name, examples, threat_model)
    fallen = broken(examples, whole.images)
    for i in range(0, 16, 2):
        recorded = Recorded(model)
        ours(name, (recorded, images, labels), threat_model, slice(i, i + 1))
        asked = [with_gradient for with_gradient, _ in recorded.asked]
        assert whole.steps[i] == (len(asked) if name == "square" else sum(asked))
    everything = {"apgd-ce": 21, "apgd-dlr": 21, "apgd-t": 63, "fab-t": 60, "square": 151}[name]
    assert (whole.steps[~fallen] == everything).all()
    assert torch.equal(whole.succeeded, fallen)
    assert whole.steps[fallen].min() >= 1
    assert whole.steps[fallen].max() < everything


@by_attack
def test_the_callers_random_state_and_warnings_are_unchanged(name, examples, recwarn):
    state = torch.get_rng_state()
    found = ours(name, examples, ball(name, "Linf"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not recwarn.list
    assert not found.images.requires_grad and torch.is_grad_enabled()


@by_norm
@by_attack
def test_weights_in_another_memory_format(name, norm, examples):
    model, images, labels = examples
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found, same = (ours(name, (net, images, labels), ball(name, norm)).images for net in (strided, model))
    assert torch.equal(broken(examples, found), broken(examples, same))


# APGD


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
@by_norm
def test_robust_examples_return_the_point_with_the_largest_loss(norm, loss, examples):
    model, images, labels = examples
    weak = ThreatModel.parse(norm, NORMS[norm].eps / 4)
    found = ours("apgd-ce", examples, weak, loss=loss).images
    left = ~broken(examples, found)
    assert left.sum() > 10
    losses = nn.functional.cross_entropy(model(found), labels, reduction="none")
    assert (losses > nn.functional.cross_entropy(model(images), labels, reduction="none"))[left].all()


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
@by_norm
def test_a_given_start_replaces_the_random_one(name, norm, examples):
    model, images, _ = examples
    threat_model = NORMS[norm]
    recorded = Recorded(model)
    start = threat_model.random_start(images, torch.Generator().manual_seed(5))
    ours(name, (recorded, *examples[1:]), threat_model, start=start)
    first = next(asked for with_gradient, asked in recorded.asked if with_gradient)
    assert torch.equal(first, start)
    breaking = ours("apgd-ce", examples, threat_model).images
    again = ours(name, examples, threat_model, start=breaking)
    fallen = broken(examples, breaking)
    assert (again.steps[fallen] == 1).all()
    assert torch.equal(again.images[fallen], breaking[fallen])


def test_each_target_class_has_its_own_start(examples):
    model, images, _ = examples
    recorded = Recorded(model)
    weak = ThreatModel.parse("Linf", "0.001")
    ours("apgd-t", (recorded, *examples[1:]), weak)
    starts = [asked for with_gradient, asked in recorded.asked if with_gradient][::21]
    assert len(starts) == 3 and starts[0].shape == images.shape
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


def test_starts_stay_with_their_examples_when_others_are_misclassified(examples):
    model, images, labels = examples
    found = ours("apgd-t", examples, NORMS["Linf"]).images
    survivor = int((~broken(examples, found)).nonzero()[-1])
    assert broken(examples, found)[:survivor].any()

    def last_start(part):
        recorded = Recorded(model)
        ours("apgd-t", (recorded, images, labels), NORMS["Linf"], part)
        return [asked for with_gradient, asked in recorded.asked if with_gradient][::21][2]

    (alone,) = last_start(slice(survivor, survivor + 1))
    assert any(torch.equal(start, alone) for start in last_start(slice(None)))


# FAB


@by_norm
def test_fab_visits_the_points_of_pyautoattack(norm, examples):
    model, images, labels = examples
    tiny = ThreatModel.parse(norm, NORMS[norm].eps / 100)  # so that no example is misclassified
    walks = []
    for run in (
        lambda model: ours("fab-t", (model, images, labels), tiny, n_iter=6),
        lambda model: FABAttack_PT(
            model, norm=tiny.norm, eps=tiny.eps, n_iter=6, targeted=True, n_target_classes=3, device=torch.device("cpu")
        ).perturb(images, labels),
    ):
        recorded = Recorded(model)
        with torch.random.fork_rng():
            run(recorded)
        walks.append(torch.stack([asked for with_gradient, asked in recorded.asked if with_gradient]))
    assert walks[0].shape == (18, *images.shape)
    torch.testing.assert_close(*walks, atol=1e-4, rtol=0)
    assert (walks[0][5] - images).abs().max() > 0.01


def reference_move(point, normal, offset, norm):
    """Project by bisection in float64."""
    point, normal = point.double(), normal.double()
    missing = offset.double() - normal @ point
    direction = missing.sign() * normal
    room = torch.where(direction > 0, 1 - point, point)
    pace = normal.abs() if norm == "L2" else torch.ones_like(normal)
    low, high = 0.0, 1e15
    for _ in range(150):
        middle = (low + high) / 2
        way = (normal.abs() * torch.minimum(middle * pace, room)).sum()
        low, high = (middle, high) if way < missing.abs() else (low, middle)
    return direction.sign() * torch.minimum(low * pace, room)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    distance=st.sampled_from([0.0, 1e-3, 1e-2, 0.3, 1.0, 10.0]),
    at_faces=st.floats(0, 1),
    zeros=st.floats(0, 1),
)
def test_projection_is_exact(norm, seed, size, scale, distance, at_faces, zeros):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(3, size, generator=generator)
    points = torch.where(torch.rand(3, size, generator=generator) < at_faces, points.round(), points)
    normals = scale * torch.randn(3, size, generator=generator)
    normals[torch.rand(3, size, generator=generator) < zeros] = 0
    away = distance * torch.randn(3, generator=generator) * normals.abs().sum(dim=1)
    offsets = (normals * points).sum(dim=1) + away
    moves = shortest_move(points, normals, offsets, norm)
    assert moves.isfinite().all()
    assert ((points + moves >= -1e-6) & (points + moves <= 1 + 1e-6)).all()
    assert not moves[normals == 0].any()
    expected = torch.stack([reference_move(*row, norm) for row in zip(points, normals, offsets, strict=True)])
    landed, best = (((points + move) * normals.double()).sum(dim=1) for move in (moves, expected))
    torch.testing.assert_close(landed, best, atol=1e-5 * scale * size, rtol=0)
    order = float("inf") if norm == "Linf" else 2
    assert (moves.double().norm(order, dim=1) <= expected.norm(order, dim=1) + 1e-3).all()


@pytest.mark.parametrize(("norm", "published"), [("Linf", projection_linf), ("L2", projection_l2)])
def test_projection_equals_pyautoattacks(norm, published):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 300, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    normals = torch.randn(200, 300, generator=generator)
    normals[:, ::7] = 0
    offsets = (normals * torch.rand(200, 300, generator=generator)).sum(dim=1)
    offsets[:20] = 1e3  # no point of the box reaches it
    ours = shortest_move(points, normals, offsets, norm)
    torch.testing.assert_close(ours, published(points, normals, offsets), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_of_degenerate_rows(norm):
    points = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    normals = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1e-30, 0.0], [1e30, 0.0]])
    offsets = torch.tensor([1.0, 1.0, -5.0, 3.0, 1e-31, 0.0])
    moves = shortest_move(points, normals, offsets, norm)
    assert torch.equal(moves[:4], torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.5, 0.0]]))
    assert moves.isfinite().all()


# Square


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 3), (3, 4, 4), (1, 5, 5), (1, 14, 14), (2, 6, 9), (1, 9, 6)])
@by_norm
def test_square_takes_images_of_any_size(shape, norm):
    threat_model = FOR_SQUARE[norm]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, *shape, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3)).requires_grad_(False)
    labels = model(images).argmax(dim=1)
    found = Square(n_queries=30).run(model, Batch(images, labels, range(5)), threat_model)
    assert threat_model.contains(found.images, images).all()
    assert (found.images != images).flatten(1).any(dim=1).all()


@by_norm
def test_square_makes_the_moves_of_pyautoattack(norm, examples):
    model, images, labels = examples
    threat_model = FOR_SQUARE[norm]
    found = ours("square", examples, threat_model)
    published = SquareAttack(model, norm=norm, eps=threat_model.eps, n_queries=150, p_init=0.8, resc_schedule=False)
    published.init_hyperparam(images)
    for i in range(6):
        with torch.random.fork_rng():
            torch.manual_seed(SEEDS[i])
            queries, theirs = published.attack_single_run(images[i : i + 1], labels[i : i + 1])
        assert found.steps[i] == queries
        torch.testing.assert_close(found.images[i : i + 1], theirs, atol=1e-5, rtol=0)


@by_norm
def test_more_queries_continue_from_fewer(norm, examples):
    few, many = (ours("square", examples, FOR_SQUARE[norm], n_queries=count) for count in (60, 620))
    fallen = broken(examples, few.images)
    assert 0 < fallen.sum() < 16
    assert torch.equal(many.images[fallen], few.images[fallen])
    assert torch.equal(many.steps[fallen], few.steps[fallen])
    assert (many.steps[~fallen] > 61).all()


@by_norm
def test_square_continues_if_the_label_is_first_of_two_equal_logits(norm, examples):
    model, images, _ = examples
    coarse = nn.Sequential(model, Coarse())
    labels = coarse(images).argmax(dim=1)
    found = ours("square", (coarse, images, labels), FOR_SQUARE[norm])
    wrong = coarse(found.images).argmax(dim=1) != labels
    assert 0 < wrong.sum() < 16
    assert torch.equal(found.steps < 151, wrong)
    assert torch.equal(found.succeeded, wrong)
    assert (coarse(found.images).topk(2).values.diff(dim=1)[~wrong] == 0).any(), "no tie to tell anything"


class Coarse(nn.Module):
    def forward(self, logits):
        return (logits / 4).round()


# Carlini and Wagner


def test_carlini_wagner_reports_no_steps(examples):
    model, images, labels = examples
    attack = CarliniWagner(steps=20, binary_search_steps=2)
    found = attack.run(model, Batch(images, labels, SEEDS), NORMS["L2"])
    assert found.steps is None and found.images.shape == images.shape
