"""Write model_cards/reproduction.md from the result files next to it.

    python scripts/reproduction.py                     the page, its numbers and its figures
    python scripts/reproduction.py --topic mnist RUNS  first copy the results of these runs

model_cards/reproduction/<topic>/runs/ has what a report reads of every run: config.json, the log of the kept and the
last epoch, and the evaluations with their rows per example (the oldest without). `drelu-timm report` makes tables and
statistics of such a folder. The template is scripts/reproduction/reproduction.md.j2. It contains no measured number: it
asks for each by model, training and attack.
"""

import csv
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from scipy.stats import f, ttest_ind

from drelu_timm.errors import InputError
from drelu_timm.files import read_json, write_json, write_text
from drelu_timm.formatting import escape_markdown, written
from drelu_timm.models.variants import Options
from drelu_timm.publishing.evaluations import without_paths
from drelu_timm.report import markdown_table
from drelu_timm.reports.evaluated_runs import EvaluatedRun, read_evaluated_runs
from drelu_timm.reports.figures import draw_cap_weights, draw_eps
from drelu_timm.reports.methods import HELD_OUT, Method, methods_of
from drelu_timm.reports.paper import PRINTED_STATISTICS, paper_scores, pgd_and_weaker, read_paper
from drelu_timm.reports.statistics import compare_methods
from drelu_timm.reports.tables import against_paper, all_rows, at_most, paper_table
from drelu_timm.results.plotting import save_figure
from drelu_timm.results.result import read_result

HERE = Path(__file__).parent
TEMPLATE = HERE / "reproduction" / "reproduction.md.j2"
FOLDER = HERE.parent / "model_cards" / "reproduction"
_TABLES = {"paper": paper_table, "against_paper": against_paper, "all": all_rows}
_NOT_READ = ("steps", "margin", "seed")  # columns of the rows per example that no report reads


@dataclass(frozen=True)
class Arguments:
    """Write model_cards/reproduction.md, its numbers and its figures from result files."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories whose results are copied first."""
    topic: str = "mnist"
    """Folder of model_cards/reproduction/ that they are copied to."""


def main(arguments: Arguments) -> None:
    """Copy results, and write the page, its numbers and its figures."""
    if arguments.runs:
        copy_results(arguments.runs, arguments.topic)
    write_json(FOLDER / "numbers.json", {topic: Topic(topic).numbers() for topic in topics()})
    for name, figure in figures():
        save_figure(figure, FOLDER / f"{name}.png")
    write_text(FOLDER.with_suffix(".md"), page())
    print(FOLDER.with_suffix(".md"))


def copy_results(paths: Iterable[Path], topic: str) -> None:
    """Copy what a report reads of some runs, without weights and without paths and commands of this machine.

    Raises:
        InputError: Result files that cannot be used, or two runs with one name; then nothing is copied.
    """
    runs = read_evaluated_runs(paths)
    if runs.broken:
        raise InputError("; ".join(runs.broken))
    used: dict[Path, set[Path]] = {}
    for run in runs.found:
        results = [*run.combined.all, *([run.sweep] if run.sweep else [])]
        used.setdefault(run.path, set()).update(result.file for result in results)
    if clashing := [name for name, count in Counter(path.name for path in used).items() if count > 1]:
        raise InputError(f"Several runs are called {', '.join(clashing)}. Copy each from a folder of another name.")
    for path, files in used.items():
        folder = FOLDER / topic / "runs" / path.name
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier copy, which may have other evaluations
        write_json(folder / "config.json", without_paths(read_json(path / "config.json")))
        if (path / "log.jsonl").is_file():
            write_text(folder / "log.jsonl", _short_log((path / "log.jsonl").read_text(encoding="utf-8")))
        for file in files:
            copy = folder / file.relative_to(path)
            write_json(copy, read_result(file).published().to_json())
            if file.with_suffix(".csv").is_file():
                write_text(copy.with_suffix(".csv"), _short_rows(file.with_suffix(".csv").read_text(encoding="utf-8")))


def _short_log(text: str) -> str:
    """Return the lines of the epoch that was kept and of the last epoch."""
    lines = text.splitlines()
    epochs = [json.loads(line) for line in lines]
    kept = {epochs[-1]["epoch"], epochs[-1]["best_epoch"]}
    return "".join(f"{line}\n" for line, epoch in zip(lines, epochs, strict=True) if epoch["epoch"] in kept)


def _short_rows(text: str) -> str:
    """Return the rows per example without the columns that no report reads."""
    rows = list(csv.reader(text.splitlines()))
    columns = [column for column, name in enumerate(rows[0]) if name not in _NOT_READ]
    return "".join(f"{','.join(row[column] for column in columns)}\n" for row in rows)


# What the template can ask for


def page() -> str:
    """Return the Markdown page, with every number from the result files."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template(TEMPLATE.name)
    shown: set[str] = set()
    by_name = {topic.replace("-", "_"): Topic(topic, shown) for topic in topics()}
    return template.render(**by_name, paper=Paper())


def topics() -> list[str]:
    """Return the folders that have runs."""
    return sorted(path.parent.name for path in FOLDER.glob("*/runs"))


class Topic:
    """Runs of one section: ``mnist("dense", "D-ReLU-100", "pgd")`` is an accuracy.

    Args:
        name: Folder of model_cards/reproduction/.
        shown: Sentences of captions that are on the page already; this topic's tables add theirs.
    """

    def __init__(self, name: str, shown: set[str] | None = None):
        self.shown = set() if shown is None else shown
        runs = read_evaluated_runs([FOLDER / name / "runs"])
        if runs.broken:
            raise InputError("; ".join(runs.broken))
        ((group, of_group),) = runs.groups().items()
        self.group = methods_of(group, of_group)

    def __call__(self, model: str, training: str, column: str) -> str:
        """Return a mean over seeds in percent, with its standard deviation if there are several."""
        mean = self.method(model, training).mean(column)
        if mean is None:
            raise KeyError(f"{training} has no {column}")
        return f"{mean.mean:.1f}" + ("" if mean.std is None else f" ± {mean.std:.1f}")

    def worst(self, model: str, training: str) -> str:
        """Return the worst case in percent, with "≤" if it is an upper bound."""
        method = self.method(model, training)
        mean = method.mean("worst")
        assert mean is not None
        return at_most(mean.at_most, method.verdict) + self(model, training, "worst")

    def difference(self, model: str, training: str, other: str) -> str:
        """Return by how many points two worst cases differ, with Welch's 95 % interval over seeds."""
        first, second = (
            [100 * run.combined.worst for run in self.method(model, each).runs] for each in (training, other)
        )
        low, high = ttest_ind(first, second, equal_var=False).confidence_interval()
        return f"{fmean(first) - fmean(second):+.1f} ({low:+.1f} to {high:+.1f})"

    def zero_gradients(self, model: str, training: str) -> str:
        """Return the share of correctly classified images with an input gradient of zero, in percent."""
        return f"{100 * fmean(run.combined.zero_gradient_share for run in self.method(model, training).runs):.1f}"

    def verdict(self, model: str, training: str) -> str:
        """Return the verdict of a method."""
        return self.method(model, training).verdict

    @property
    def images(self) -> str:
        """Numbers of test images, such as "1,000"."""
        return self._distinct(f"{run.combined.n_examples:,}" for run in self._runs())

    @property
    def n_seeds(self) -> int:
        """Number of different seeds."""
        return len(self.group.seeds)

    def setting(self, name: str, *, drelu: bool | None = None) -> str:
        """Return the different values of a training setting, of runs with or without D-ReLU, or of all."""
        chosen = [run for run in self._runs() if drelu is None or (run.activation == "drelu") == drelu]
        return self._distinct(_setting(run, name) for run in chosen)

    def start(self, objective: str) -> str:
        """Return what the runs with an objective start from."""
        of_objective = [run for run in self._runs() if run.train["objective"] == objective]
        return self._distinct("natural training" if run.start else "random weights" for run in of_objective)

    def _runs(self) -> Iterator[EvaluatedRun]:
        return (run for method in self.group.all for run in method.runs)

    @staticmethod
    def _distinct(values: Iterable[str]) -> str:
        return " or ".join(dict.fromkeys(values)) or "-"

    def method(self, model: str, training: str) -> Method:
        """Return the runs of a model and a training, by its name in tables."""
        found = [method for method in self.group.all if (method.architecture, method.training) == (model, training)]
        if len(found) != 1:
            known = ", ".join(f"{method.architecture} {method.training}" for method in self.group.all)
            raise KeyError(f"{len(found)} methods are {model} {training}, among {known}")
        return found[0]

    def table(self, kind: str) -> str:
        """Return a table of a report, and the sentences of its caption that are not on the page yet.

        Args:
            kind: "paper", "against_paper" or "all".
        """
        table = _TABLES[kind](self.group)
        assert table is not None
        paragraphs = [re.split(r"(?<=\.) (?=[A-Z≤])", paragraph) for paragraph in table.caption.split("\n\n")]
        new = [[sentence for sentence in sentences if sentence not in self.shown] for sentences in paragraphs]
        self.shown.update(sentence for sentences in new for sentence in sentences)
        caption = [escape_markdown(" ".join(sentences)) for sentences in new if sentences]
        return "\n\n".join([markdown_table(table.cells), *caption])

    def numbers(self) -> dict[str, Any]:
        """Return every mean accuracy and its standard deviation, in percent, by method and column."""
        return {
            f"{method.architecture} {method.training}": {
                column: [round(value, 4) for value in (mean.mean, mean.std) if value is not None]
                for column in (HELD_OUT, "clean", *sorted(_measured(method)), "worst")
                if (mean := method.mean(column))
            }
            for method in self.group.all
        }


def _measured(method: Method) -> set[str]:
    return {attack for run in method.runs for attack in run.combined.accuracy}


def _setting(run: EvaluatedRun, name: str) -> str:
    value = run.train.get(name)
    if name == "cap":
        return written(Options.cap if value is None else value)
    if name == "n_train":
        return "all" if value is None else f"the first {value:,}"
    return "no" if value is None else written(value)


class Paper:
    """What the paper prints, and what follows from it."""

    printed = PRINTED_STATISTICS

    def __call__(self, model: str, training: str, column: str, table: int = 1) -> str:
        """Return a printed accuracy in percent; table 1 is MNIST, 2 CIFAR-10."""
        printed = read_paper()
        of = (printed["table"] == table) & (printed["model"] == model) & (printed["training"] == training)
        (accuracy,) = printed[of & (printed["column"] == column)]["accuracy"]
        return f"{accuracy:.1f}"

    def weaker_below_pgd(self, attack: str, of: str) -> str:
        """Return in how many rows the accuracy under a weaker attack is below that under PGD: "33 of 36".

        Args:
            attack: "fgsm" or "square".
            of: "D-ReLU" or "others".
        """
        rows = _pgd_and_weaker(attack, of)
        return f"{(rows['weaker'] < rows['pgd']).sum()} of {len(rows)}"

    def largest_gap(self, attack: str) -> str:
        """Return by how many points a weaker attack is below PGD with D-ReLU, at most."""
        rows = _pgd_and_weaker(attack, "D-ReLU")
        return f"{(rows['pgd'] - rows['weaker']).max():.0f}"

    def same_clean(self, of: str) -> str:
        """Return in how many rows the tables of Square print the clean accuracy of the other tables."""
        clean = read_paper().query("column == 'clean'")
        square = clean[clean["table"].isin([5, 9])].assign(generated=lambda rows: rows["table"] == 9)
        others = clean[~clean["table"].isin([5, 9])].assign(generated=lambda rows: rows["table"] > 5)
        both = square.merge(others, on=["method", "dataset", "model", "generated"])
        both = both[(both["method"] == "D-ReLU") == (of == "D-ReLU")]
        return f"{(both['accuracy_x'] == both['accuracy_y']).sum()} of {len(both)}"

    def statistic(self, table: int, name: str) -> str:
        """Return a statistic of `compare_methods` over a table."""
        return f"{getattr(compare_methods(paper_scores(table)), name):.2f}"

    def critical_f(self, alpha: float, methods: int, blocks: int) -> str:
        """Return the critical value of F_F."""
        return f"{f.ppf(1 - alpha, methods - 1, (methods - 1) * (blocks - 1)):.2f}"


def _pgd_and_weaker(attack: str, of: str) -> pd.DataFrame:
    rows = pgd_and_weaker(attack)
    return rows[(rows["method"] == "D-ReLU") == (of == "D-ReLU")]


# Figures


def figures() -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of every picture of the page."""
    yield "papers-signs", draw_signs()
    curves = {
        method.training: [run.curve for run in method.runs if run.curve] for method in Topic("on-top").group.shown
    }
    yield "over-eps", draw_eps(curves, "Dense, MNIST, Linf: accuracy over eps")
    for name, topic, model in (
        ("cap-weights-mnist", "mnist-balancers", "Dense, MNIST"),
        ("cap-weights-cifar10", "placement", "Shallow CNN, CIFAR-10, D-ReLU before the output"),
    ):
        runs = [run for method in Topic(topic).group.all if method.first.placement == "head" for run in method.runs]
        yield name, draw_cap_weights(runs, f"{model}: accuracy over the cap weight")


def draw_signs() -> Figure:
    """Draw the paper's accuracies under FGSM and Square against those under PGD, one point per trained model."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, attack in zip(figure.subplots(1, 2, sharey=True), ("fgsm", "square"), strict=True):
        axes.plot([0, 100], [0, 100], color="grey", linewidth=1, zorder=1)
        axes.fill_between([0, 100], [0, 100], color="0.94", zorder=0)
        for of, label, style in (
            ("others", "adversarial training and TRADES", {"marker": "o", "color": "#0072B2"}),
            ("D-ReLU", "D-ReLU", {"marker": "v", "color": "#D55E00"}),
        ):
            rows = _pgd_and_weaker(attack, of)
            axes.scatter(rows["pgd"], rows["weaker"], s=28, alpha=0.75, label=label, zorder=2, **style)
        name = "FGSM: one step of the gradient" if attack == "fgsm" else "Square: no gradient"
        axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", title=name, xlabel="accuracy under PGD, in %")
        axes.text(97, 3, "the weaker attack fools\nthe model more often", ha="right", va="bottom", color="0.35")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy under the weaker attack, in %")
    figure.axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle("The paper's own tables, one point per row")
    return figure


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except InputError as error:
        sys.exit(f"error: {error}")
