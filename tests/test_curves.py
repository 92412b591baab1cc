"""The plot of a sweep: its content, and that it is written atomically."""

import pytest
from PIL import Image

from drelu_timm.errors import InputError
from drelu_timm.results import plotting
from drelu_timm.results.plotting import _curve, draw_curve
from drelu_timm.results.result import EpsResult, Verdict

EPS = {"0": "sound", "2/255": "undecided", "0.1": "masked"}
ATTACKS = ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "noise", "bpda", "bpda-soft", "bpda-apgd", "twin"]
ATTACKS += ["annealing"]


def curve(attacks=ATTACKS):
    return [
        EpsResult(
            eps=eps,
            settings={},
            clean=0.9,
            accuracy={attack: 0.9 - 0.02 * index * step for index, attack in enumerate(attacks)},
            worst=0.9 - 0.3 * step,
            zero_gradient_share=0.0,
            cw_l2=None,
            verdict=Verdict(verdict, (), {}),
            seconds=1.0,
        )
        for step, (eps, verdict) in enumerate(EPS.items())
    ]


def test_every_attack_has_its_line_and_every_eps_its_verdict():
    (axes,) = _curve(curve(), "Digits").axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["worst case", *ATTACKS, "clean"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert list(lines["bpda"].get_xdata()) == pytest.approx([0, 2 / 255, 0.1])
    assert list(lines["bpda"].get_ydata()) == pytest.approx([90, 76, 62])
    assert list(lines["worst case"].get_ydata()) == pytest.approx([90, 60, 30])
    assert axes.get_ylim() == (0, 100)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"{eps}  {word if eps != '0' else '-'}" for eps, word in EPS.items()
    ]
    assert axes.get_title() == "Digits"


def test_lines_are_distinct():
    (axes,) = _curve(curve([f"attack {index}" for index in range(24)]), "").axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker(), line.get_linewidth()) for line in axes.lines}
    assert len(looks) == 26
    widths = {line.get_label(): line.get_linewidth() for line in axes.lines}
    assert widths.pop("worst case") > max(widths.values())


def test_the_plot_replaces_the_old_one_atomically(tmp_path):
    path = tmp_path / "sweeps" / "quick.png"
    for attacks in (ATTACKS, ATTACKS[:3]):
        draw_curve(curve(attacks), path, title="Digits")
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.size == (1350, 750)
            assert len(picture.convert("RGB").getcolors(10**6)) > 50
        assert list(path.parent.iterdir()) == [path]


def test_a_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"matplotlib, .* is missing; pip install 'drelu-timm\[report\]'"):
        draw_curve(curve(), tmp_path / "curve.png", title="")
    assert not any(tmp_path.iterdir())
