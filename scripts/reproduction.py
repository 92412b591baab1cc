"""model_cards/reproduction.md, from the result files beside it.

    python scripts/reproduction.py                     all reports and the text anew, from what is there
    python scripts/reproduction.py --topic mnist RUNS  takes over the results of these runs first

model_cards/reproduction/<topic>/runs/ holds, of every run, config.json, log.jsonl and the evaluations that a report
reads (of the oldest without their rows an example); model_cards/reproduction/<topic>/report/ is what `drelu-timm
report` makes of them. The text is scripts/reproduction/reproduction.md.j2: whatever accuracy it says, it asks for by
net, training and attack.
"""

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pandas as pd
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from scipy.stats import f, ttest_ind

from drelu_timm.errors import InputError
from drelu_timm.files import read_json, write_json, write_text
from drelu_timm.flags import ReportConfig
from drelu_timm.publishing.evaluations import without_paths
from drelu_timm.report import report
from drelu_timm.reports.averages import Average, lines_of
from drelu_timm.reports.outcomes import Outcome
from drelu_timm.reports.paper import beside_pgd, paper_scores, read_paper
from drelu_timm.reports.reading import read_outcomes
from drelu_timm.reports.statistics import compare_methods
from drelu_timm.results.plotting import save_figure
from drelu_timm.results.result import read_result

HERE = Path(__file__).parent
TEXT = HERE / "reproduction" / "reproduction.md.j2"
FOLDER = HERE.parent / "model_cards" / "reproduction"


@dataclass(frozen=True)
class Arguments:
    """Write model_cards/reproduction.md, its reports and its pictures from result files."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories whose results are taken over first."""
    topic: str = "mnist"
    """What they belong to: a folder of model_cards/reproduction/."""


def take_over(runs: tuple[Path, ...], topic: str) -> None:
    """Copy what a report reads of some runs, their rows an example too, without weights and what one machine knows.

    Raises:
        InputError: Result files that cannot be used, or two runs of one name; then nothing is copied.
    """
    outcomes = read_outcomes(runs)
    if outcomes.broken:
        raise InputError("; ".join(outcomes.broken))
    used: dict[Path, dict[Path, None]] = {}
    for outcome in outcomes.found:
        used.setdefault(outcome.run, {}).update(dict.fromkeys(_result_files(outcome)))
    if clashing := [name for name, count in Counter(run.name for run in used).items() if count > 1]:
        raise InputError(f"several runs are called {', '.join(clashing)}; take each over from a folder of another name")
    for run, files in used.items():
        folder = FOLDER / topic / "runs" / run.name
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier take-over, whose evaluations may have been others
        write_json(folder / "config.json", without_paths(read_json(run / "config.json")))
        for file in files:
            write_json(folder / file.relative_to(run), read_result(file).published().to_json())
        for file in (run / "log.jsonl", *(file.with_suffix(".csv") for file in files)):
            if file.is_file():
                shutil.copyfile(file, folder / file.relative_to(run))


def _result_files(outcome: Outcome) -> Iterator[Path]:
    yield from (result.file for result in outcome.at.all)
    if outcome.sweep is not None:
        yield outcome.sweep.file


def topics() -> list[str]:
    """Every folder that has runs."""
    return sorted(path.parent.name for path in FOLDER.glob("*/runs"))


def make_report(topic: str, output_dir: Path | None = None) -> Path:
    """`drelu-timm report` of a topic's runs; returns its folder."""
    output_dir = output_dir or FOLDER / topic / "report"
    report(ReportConfig(runs=(FOLDER / topic / "runs",), output_dir=output_dir, against_paper=True))
    return output_dir


def text() -> str:
    """The Markdown, with every number from the result files."""
    said: set[str] = set()
    environment = Environment(
        loader=FileSystemLoader(TEXT.parent), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = environment.get_template(TEXT.name)
    topics_by_name = {topic.replace("-", "_"): Topic(topic, said) for topic in topics()}
    of_the_paper = (papers, papers_statistics, papers_signs, papers_largest_gap, papers_same_clean, critical_f)
    return template.render(**topics_by_name, faithful=Faithful(), **{each.__name__: each for each in of_the_paper})


def papers(net: str, training: str, column: str, table: int = 1) -> str:
    """An accuracy that the paper prints, in percent; table 1 is MNIST, 2 CIFAR-10."""
    printed = read_paper()
    of = (printed["table"] == table) & (printed["net"] == net) & (printed["training"] == training)
    (accuracy,) = printed[of & (printed["column"] == column)]["accuracy"]
    return f"{accuracy:.1f}"


def papers_signs(attack: str, of: str) -> str:
    """In how many of the paper's rows a weaker attack leaves less than PGD: "33 of 36".

    Args:
        attack: "fgsm" or "square".
        of: "D-ReLU" or "others".
    """
    rows = _signs(attack, of)
    return f"{(rows['other'] < rows['pgd']).sum()} of {len(rows)}"


def papers_largest_gap(attack: str) -> str:
    """By how many points a weaker attack leaves less than PGD of a D-ReLU net, at most."""
    rows = _signs(attack, "D-ReLU")
    return f"{(rows['pgd'] - rows['other']).max():.0f}"


def papers_same_clean(of: str) -> str:
    """In how many rows the tables of Square print the clean accuracy that the others do."""
    clean = read_paper().query("column == 'clean'")
    square = clean[clean["table"].isin([5, 9])].assign(generated=lambda rows: rows["table"] == 9)
    others = clean[~clean["table"].isin([5, 9])].assign(generated=lambda rows: rows["table"] > 5)
    both = square.merge(others, on=["method", "dataset", "net", "generated"])
    both = both[(both["method"] == "D-ReLU") == (of == "D-ReLU")]
    return f"{(both['accuracy_x'] == both['accuracy_y']).sum()} of {len(both)}"


def _signs(attack: str, of: str) -> pd.DataFrame:
    rows = beside_pgd(attack)
    return rows[(rows["method"] == "D-ReLU") == (of == "D-ReLU")]


def draw_signs(path: Path) -> None:
    """The paper's accuracies under FGSM and Square against those under PGD, a point a trained net."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, attack in zip(figure.subplots(1, 2, sharey=True), ("fgsm", "square"), strict=True):
        axes.plot([0, 100], [0, 100], color="grey", linewidth=1, zorder=1)
        axes.fill_between([0, 100], [0, 100], color="0.94", zorder=0)
        for of, look in (
            ("others", {"marker": "o", "color": "#0072B2"}),
            ("D-ReLU", {"marker": "v", "color": "#D55E00"}),
        ):
            rows = _signs(attack, of)
            label = "D-ReLU" if of == "D-ReLU" else "adversarial training and TRADES"
            axes.scatter(rows["pgd"], rows["other"], s=28, alpha=0.75, label=label, zorder=2, **look)
        name = "FGSM: one step of the gradient" if attack == "fgsm" else "Square: no gradient at all"
        axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", title=name, xlabel="accuracy under PGD, in %")
        axes.text(97, 3, "the weaker attack breaks more", ha="right", va="bottom", color="0.35")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy under the weaker attack, in %")
    figure.axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle("The paper's own tables, one point per row")
    save_figure(figure, path)


def critical_f(alpha: float, methods: int, blocks: int) -> str:
    """The critical value of F_F."""
    return f"{f.ppf(1 - alpha, methods - 1, (methods - 1) * (blocks - 1)):.2f}"


def papers_statistics(table: int, field: str) -> str:
    """A figure of `compare_methods` over a table of the paper."""
    return f"{getattr(compare_methods(paper_scores(table)), field):.2f}"


class Faithful:
    """The run with the paper's optimiser, from its result file, which has no report."""

    def __init__(self):
        self.result = read_json(FOLDER / "faithful" / "run" / "results" / "adaptive-Linf-0.1.json")

    def __call__(self, column: str) -> str:
        """An accuracy, or the share of zero gradients, in percent."""
        result = self.result
        return f"{100 * {**result, **result['accuracy']}[column]:.1f}"


class Topic:
    """What the text asks for: ``mnist("dense", "D-ReLU-100", "pgd")``.

    Args:
        name: A folder of model_cards/reproduction/.
        said: Sentences of captions that stand on the page; those of this topic's tables are added.
    """

    def __init__(self, name: str, said: set[str]):
        self.said = said
        self.folder = f"reproduction/{name}/report"
        groups = read_outcomes([FOLDER / name / "runs"]).groups()
        self.lines = [line for group, outcomes in groups.items() for line in lines_of(group, outcomes).all]

    def __call__(self, net: str, training: str, column: str) -> str:
        """A mean over seeds in percent, with its standard deviation where there are several."""
        mean = self.line(net, training).mean(column)
        if mean is None:
            raise KeyError(f"{training} has no {column}")
        return f"{mean.mean:.1f}" + ("" if mean.std is None else f" ± {mean.std:.1f}")

    def difference(self, net: str, training: str, other: str) -> str:
        """Of two trainings' worst cases, in percentage points, with Welch's 95 % interval over seeds."""
        first, second = (
            [100 * outcome.at.worst for outcome in self.line(net, each).outcomes] for each in (training, other)
        )
        low, high = ttest_ind(first, second, equal_var=False).confidence_interval()
        return f"{fmean(first) - fmean(second):+.1f} ({low:+.1f} to {high:+.1f})"

    def zero_gradients(self, net: str, training: str) -> str:
        """Share of the images classified right whose input gradient is zero, in percent, a mean over seeds."""
        return f"{100 * fmean(outcome.at.zero_gradient_share for outcome in self.line(net, training).outcomes):.1f}"

    def line(self, net: str, training: str) -> Average:
        """The runs of a net and a training, as the tables call it."""
        found = [line for line in self.lines if (line.first.net, line.training) == (net, training)]
        if len(found) != 1:
            there = ", ".join(f"{line.first.net} {line.training}" for line in self.lines)
            raise KeyError(f"{len(found)} lines are {net} {training}, among {there}")
        return found[0]

    def table(self, name: str) -> str:
        """A table of the report, without its heading, and what its caption says that none before it has said."""
        text = (FOLDER.parent / self.folder / "tables" / f"{name}.md").read_text(encoding="utf-8")
        _, cells, caption = text.split("\n\n", 2)
        paragraphs = (re.split(r"(?<=\.) (?=[A-Z≤])", paragraph) for paragraph in caption.strip().split("\n\n"))
        new = [[sentence for sentence in sentences if sentence not in self.said] for sentences in paragraphs]
        self.said.update(sentence for sentences in new for sentence in sentences)
        return "\n\n".join([cells, *(" ".join(sentences) for sentences in new if sentences)])


def main(arguments: Arguments) -> None:
    """Take over, report, write."""
    if arguments.runs:
        take_over(arguments.runs, arguments.topic)
    for topic in topics():
        make_report(topic)
    draw_signs(FOLDER / "papers-signs.png")
    write_text(FOLDER.with_suffix(".md"), text())
    print(FOLDER.with_suffix(".md"))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except InputError as error:
        sys.exit(f"error: {error}")
