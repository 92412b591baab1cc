"""Figures of a report: their content, what cannot be drawn, and the files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from drelu_timm.errors import InputError
from drelu_timm.reports.evaluated_runs import EvaluatedRun, Group
from drelu_timm.reports.figures import (
    draw_cap_weights,
    draw_caps,
    draw_critical_difference,
    draw_eps,
    read_caps,
)
from drelu_timm.reports.statistics import compare_methods
from drelu_timm.results import plotting
from drelu_timm.results.combined import Combined
from drelu_timm.results.result import EpsResult, Result, Verdict

GROUP = Group("mnist", "MNIST", "Linf", "0.1", False)


def point(eps="0.1", verdict="sound", worst=0.5, clean=0.9, **accuracy):
    return EpsResult(
        eps=eps,
        settings={},
        clean=clean,
        accuracy={name.replace("_", "-"): value for name, value in accuracy.items()},
        worst=worst,
        zero_gradient_share=0.0,
        cw_l2=None,
        verdict=Verdict(verdict, (), {}),
        seconds=1.0,
    )


def result(at, n_examples=1000):
    return Result(
        model="dense_drelu",
        dataset="mnist",
        dataset_title="MNIST",
        norm="Linf",
        eps=at.eps,
        suite="all",
        n_examples=n_examples,
        seed=0,
        precision="float32",
        transfer_from=None,
        model_digest="0" * 64,
        points=(at,),
        versions={},
        hardware="2 x Processor",
        git_revision=None,
    )


def run(cap_weight, at, *others, seed=0, activation="drelu"):
    train = {"model": "dense_drelu", "activation": activation, "cap_weight": cap_weight, "seed": seed}
    others = tuple(result(other, 500) for other in others)
    at = Combined("0.1", (result(at),), others)
    return EvaluatedRun(train=train, path=Path("run"), group=GROUP, combined=at, held_out=None)


RUNS = [
    run(100.0, point(pgd=0.8, bpda=0.1, worst=0.05, verdict="masked")),
    run(0.0, point(pgd=0.02, bpda=0.03, worst=0.01)),
    run(0.1, point(pgd=0.4, bpda=0.2, worst=0.1, verdict="sound")),
    run(0.1, point(pgd=0.6, worst=0.3, verdict="undecided"), seed=1),
    run(5.0, point(pgd=0.9, worst=0.9), activation="relu"),
]
CURVES = {
    "AT": [
        [
            point("0", apgd_ce=0.98, worst=0.98),
            point("8/255", apgd_ce=0.7, worst=0.6),
            point("0.1", apgd_ce=0, worst=0),
        ],
        [point("0", apgd_ce=0.96, worst=0.96), point("8/255", apgd_ce=0.5, worst=0.4)],
    ],
    "D-ReLU-0.1": [[point("0.1", apgd_ce=0.85, worst=0.01, verdict="masked"), point("0.2", "undecided", apgd_ce=0.85)]],
    "natural": [[point("0.1", pgd=0.5)]],
}
CAPS = {"dense AT": np.geomspace(1e-3, 10, 50), "dense D-ReLU-0.1": np.array([-1.0, 0, 1e-30, 0.1, 0.2, np.nan])}
SCORES = pd.DataFrame(
    np.add.outer(np.arange(10), [0.0, 0.1, 5]) * [1, -1, 1] + [0, 9, 0], columns=["AT", "TRADES-6", "D-ReLU"]
)


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_accuracy_over_the_cap_weight():
    (axes,) = draw_cap_weights(RUNS, "Dense").axes
    found = lines(axes)
    assert list(found) == ["worst case", "pgd", "bpda", "clean"]
    assert found["pgd"].get_xdata() == pytest.approx([0.01, 0.1, 100])  # 0 is one decade below the smallest
    assert found["pgd"].get_ydata() == pytest.approx([2, 50, 80])
    assert found["bpda"].get_ydata() == pytest.approx([3, 20, 10])  # the second seed was not evaluated with it
    assert found["worst case"].get_ydata() == pytest.approx([1, 20, 5])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0  sound", "0.1  undecided", "100  masked"]
    assert [text.get_text() for text in axes.texts] == ["//"]
    assert axes.get_title() == "Dense" and axes.get_ylabel() == "accuracy in %" and axes.get_ylim() == (0, 100)
    assert "cap weight" in axes.get_xlabel()
    assert found["worst case"].get_color() == "black"
    assert found["worst case"].get_linewidth() > 2 * found["pgd"].get_linewidth()


def test_a_minimum_norm_attack_is_not_drawn():
    (axes,) = draw_cap_weights([run(0.1, point(pgd=0.5, cw_l2=0.9))], "").axes
    assert list(lines(axes)) == ["worst case", "pgd", "clean"]


def test_the_verdict_is_the_worst_of_all_evaluations():
    masked = run(0.1, point(pgd=0.4), point(verdict="masked"))
    (axes,) = draw_cap_weights([masked], "").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1  masked"]


def test_bars_are_a_standard_deviation():
    (axes,) = draw_cap_weights(RUNS, "").axes
    worst, pgd = axes.collections  # bpda and clean do not vary
    for bars, deviation in ((pgd, np.std([40, 60], ddof=1)), (worst, np.std([10, 30], ddof=1))):
        lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
        assert lengths == pytest.approx([0, 2 * deviation, 0])


@pytest.mark.parametrize(("cap_weights", "breaks"), [([0.0], 1), ([0.1], 0), ([0.1, 1.0], 0), ([0.0, 1.0], 1)])
def test_any_cap_weights_are_inside_the_picture(cap_weights, breaks):
    (axes,) = draw_cap_weights([run(cap_weight, point(pgd=0.5)) for cap_weight in cap_weights], "").axes
    low, high = axes.get_xlim()
    assert all(low < x < high for x in lines(axes)["pgd"].get_xdata())
    assert len(axes.texts) == breaks
    assert len(axes.get_xticks()) == len(cap_weights)


def test_accuracy_overdraw_eps():
    (axes,) = draw_eps(CURVES, "Dense").axes
    found = lines(axes)
    assert list(found) == ["AT", "AT, worst case", "D-ReLU-0.1", "D-ReLU-0.1, worst case"]
    assert found["AT"].get_xdata() == pytest.approx([0, 8 / 255])  # the eps that both seeds have
    assert found["AT"].get_ydata() == pytest.approx([97, 60])
    assert found["AT, worst case"].get_ydata() == pytest.approx([97, 50])
    assert (found["AT"].get_linestyle(), found["AT, worst case"].get_linestyle()) == ("-", "--")
    assert found["AT"].get_color() == found["AT, worst case"].get_color() != found["D-ReLU-0.1"].get_color()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["AT (sound)", "D-ReLU-0.1 (masked)", "under APGD-CE", "worst case"]
    assert axes.get_xlabel() == "eps, in units of a [0, 1] pixel"


def test_twelve_methods_have_different_styles():
    curve = [point("0", apgd_ce=0.9), point("0.1", apgd_ce=0.5)]
    (axes,) = draw_eps({f"method {index}": [curve] for index in range(36)}, "").axes
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    looks = [(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in solid]
    assert len(looks) == 36
    assert len(set(looks[:12])) == 12
    assert len({marker for _, marker, _ in looks[:6]}) == 6  # also in gray


def test_long_names_have_room():
    names = [f"TRADES-6 + AWP + D-ReLU (stem, effective)-{index}, cap_lr 0.001, epochs 270" for index in range(9)]
    figure = draw_eps(dict.fromkeys(names, CURVES["AT"]), "")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert legend.y0 >= 0 and legend.y1 <= figure.bbox.height and legend.x1 <= figure.bbox.width
    assert legend.x0 >= axes.get_window_extent().x1
    assert axes.get_window_extent().width > 0.4 * figure.bbox.width


def test_histograms_ofdraw_caps():
    panels = draw_caps(CAPS, "Caps").axes
    assert [axes.get_title() for axes in panels] == ["dense AT\n50 caps", "dense D-ReLU-0.1\n5 caps, 40% not above 0"]
    heights = [[bar.get_height() for bar in axes.patches] for axes in panels]
    assert [sum(bars) for bars in heights] == pytest.approx([100, 100])
    assert heights[1][0] == pytest.approx(60)  # with the cap that is nearly 0
    edges = [bar.get_x() for bar in panels[0].patches]
    assert panels[0].get_xscale() == "log"
    assert 0 < edges[0] <= 1e-3 and edges[-1] <= 10 < panels[0].get_xlim()[1]
    assert panels[0].get_xlim() == panels[1].get_xlim()


@pytest.mark.parametrize("caps", [np.full(8, 100.0), np.full(8, -1.0), np.zeros(3), np.linspace(0.5, 0.6, 9)])
def test_equal_caps_have_an_axis_of_two_decades(caps):
    (axes,) = draw_caps({"model": caps}, "").axes
    low, high = axes.get_xlim()
    assert high / low == pytest.approx(100, rel=0.5)
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)


def test_empty_panels_are_hidden():
    panels = draw_caps({f"model {index}": np.ones(3) for index in range(4)}, "").axes
    assert [axes.get_visible() for axes in panels] == [True] * 4 + [False] * 2


def test_mean_ranks_and_thedraw_critical_difference():
    comparison = compare_methods(SCORES)
    figure = draw_critical_difference(comparison, "Ranks")
    (axes,) = figure.axes
    texts = {text.get_text() for text in axes.texts}
    ranks = comparison.mean_ranks
    assert f"D-ReLU ({ranks['D-ReLU']:.2f})" in texts
    assert f"CD = {comparison.critical_difference:.2g}" in texts
    low, high = axes.get_xlim()
    assert all(low < rank < high for rank in ranks.values())
    assert "10 blocks" in figure.get_supxlabel() and "critical difference 1.05" in figure.get_supxlabel()
    assert axes.get_title() == "Ranks"


def test_bars_join_methods_that_do_not_differ():
    def joined(scores):
        (axes,) = draw_critical_difference(compare_methods(scores), "").axes
        bars = [line.get_xdata() for line in axes.lines if set(line.get_ydata()) == {-1}]
        assert all(list(bar) == sorted(bar) for bar in bars)  # else the picture changes with Python's hash seed
        return [(min(bar), max(bar)) for bar in bars]

    noise = np.random.default_rng(0).permuted(np.tile([1.0, 2.0, 3.0], (30, 1)), axis=1)
    apart = pd.DataFrame(np.tile([1.0, 2.0, 3.0], (30, 1)), columns=list("abc"))
    assert joined(apart) == []
    ((low, high),) = joined(pd.DataFrame(noise, columns=list("abc")))
    assert 1 < low < high < 3


@pytest.mark.parametrize(
    ("draw", "content"),
    [
        (draw_cap_weights, RUNS),
        (draw_eps, CURVES),
        (draw_caps, CAPS),
        (draw_critical_difference, compare_methods(SCORES)),
    ],
)
def test_a_picture_is_written_atomically_and_is_always_the_same(draw, content, tmp_path, monkeypatch):
    path = tmp_path / "report" / "picture.png"
    plotting.save_figure(draw(content, "A title"), path)
    first = path.read_bytes()
    plotting.save_figure(draw(content, "A title"), path)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1350 and picture.height >= 450
        assert "Software" not in picture.info
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="matplotlib, which draws the pictures, is missing"):
        draw(content, "A title")
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("draw", "content", "message"),
    [
        (draw_cap_weights, RUNS[-1:], "No run has a D-ReLU with a cap weight, so there is nothing to draw"),
        (draw_cap_weights, [], "No run has a D-ReLU with a cap weight"),
        (
            draw_eps,
            {"natural": CURVES["natural"], "none": []},
            "No run has a curve under apgd-ce. Evaluate them with several",
        ),
        (draw_caps, {}, "No run has caps: the weights were left out"),
        (draw_caps, {"model": np.array([np.nan])}, "No run has caps"),
    ],
)
def test_nothing_to_draw_is_an_error(draw, content, message):
    with pytest.raises(InputError, match=message):
        draw(content, "")


@pytest.fixture
def run_with(tmp_path):
    def make(tensors):
        (tmp_path / "model").mkdir()
        save_file(tensors, tmp_path / "model" / "model.safetensors")
        return tmp_path

    return make


def test_all_caps_of_a_model_are_read(toy_model, run_with):
    layers = [module for name, module in toy_model.named_modules() if hasattr(module, "cap")]
    torch.nn.init.uniform_(layers[0].cap)
    assert read_caps(run_with(toy_model.state_dict())) == pytest.approx(layers[0].cap.detach().numpy())


def test_caps_of_several_layers_in_any_dtype(run_with):
    run = run_with(
        {"a.cap": torch.ones(2), "b.cap": torch.full((1,), 3.0, dtype=torch.bfloat16), "cape": torch.ones(9)}
    )
    assert sorted(read_caps(run)) == [1, 1, 3]


def test_a_model_without_caps_has_none(run_with, tmp_path):
    assert read_caps(tmp_path) is None
    assert read_caps(run_with({"fc.weight": torch.ones(2, 2)})) is None


def test_weights_cut_short_are_named(run_with):
    run = run_with({"a.cap": torch.ones(200)})
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(.*\)\. Restore it or train again"):
        read_caps(run)
