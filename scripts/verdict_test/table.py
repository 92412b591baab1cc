"""The test's tables: a line per model, and confusion matrices with intervals."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from .answers import Answer
from .rivals import Rivals
from .roster import Entry

TRUTHS = ("masked", "honest", "unstable", "between")


@dataclass(frozen=True)
class Row:
    """All that was measured of a model; ``quick`` and ``adaptive`` as `__main__.judge` returns them."""

    entry: Entry
    answer: Answer
    rivals: Rivals
    quick: dict[str, Any]
    adaptive: dict[str, Any]

    @property
    def is_right(self) -> bool:
        """Whether the verdict is right: an unstable model must not be "sound", between 5 and 10 points all are."""
        allowed = {"masked": ("masked",), "honest": ("sound",), "unstable": ("masked", "undecided")}
        truth = self.answer.truth
        return truth == "between" or self.quick["verdict"] in allowed[truth]


COLUMNS = (
    "model", "clean", "PGD", "true", "truth", "verdict", "right", "quick", "adaptive", "seconds",
    "AutoAttack", "its flags", "Square < PGD", "gradient check",
)  # fmt: skip


def print_rows(rows: Iterable[Row], *, with_evidence: bool) -> Iterator[Row]:
    """Print each row as it comes and yield it."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " ---: |" * 3 + " --- |" * 3 + " ---: |" * 4 + " --- |" * 3)
    for row in rows:
        print("| " + " | ".join(_cells(row)) + " |", flush=True)
        if with_evidence:
            print("\n".join(f"    {sentence}" for sentence in row.quick["evidence"]))
        yield row


def _cells(row: Row) -> list[str]:
    answer, rivals = row.answer, row.rivals
    return [
        row.entry.name,
        *(f"{100 * share:.1f}" for share in (answer.clean, answer.pgd, answer.robust)),
        answer.truth,
        row.quick["verdict"],
        "yes" if row.is_right else "**no**",
        *(f"{100 * ours['worst']:.1f}" for ours in (row.quick, row.adaptive)),
        f"{row.quick['seconds']:.1f}",
        f"{100 * rivals.autoattack:.1f}",
        *(
            "warns" if flag else ""
            for flag in (rivals.autoattack_flags, rivals.square_below_pgd, rivals.gradient_check)
        ),
    ]


def matrix(rows: Sequence[Row]) -> str:
    """Return Markdown tables: our verdicts by truth, the worst cases, and the rules of others."""
    lines = ["| truth | models | sound | undecided | masked |", "| --- | ---: | ---: | ---: | ---: |"]
    for truth in TRUTHS:
        of_truth = [row for row in rows if row.answer.truth == truth]
        words = [row.quick["verdict"] for row in of_truth]
        lines.append(
            f"| {truth} | {len(words)} | "
            + " | ".join(_counted(words, w) for w in ("sound", "undecided", "masked"))
            + " |"
        )
    decisive = [row for row in rows if row.answer.truth != "between"]
    lines += ["", f"Right: {_share(decisive, lambda row: row.is_right)}.", ""]
    lines += ["| rule | warns of masked or unstable | warns of honest |", "| --- | --- | --- |"]
    lines += [_rule(rows, name, warns) for name, warns in RULES.items()]
    lines += [
        "",
        "| worst case within 5 points of the true one | quick | adaptive | AutoAttack |",
        "| --- | --- | --- | --- |",
    ]
    for truth in ("masked", "honest"):
        of_truth = [row for row in rows if row.answer.truth == truth]
        cells = [_share(of_truth, lambda row, of=of: of(row) - row.answer.robust <= 0.05) for of in WORST_CASES]
        lines.append(f"| {truth} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


RULES: dict[str, Callable[[Row], bool]] = {
    "this verdict is not sound": lambda row: row.quick["verdict"] != "sound",
    "this verdict is masked": lambda row: row.quick["verdict"] == "masked",
    "AutoAttack's flags": lambda row: row.rivals.autoattack_flags,
    "Square alone finds more than PGD": lambda row: row.rivals.square_below_pgd,
    "rule of ART's loss_gradient_check": lambda row: row.rivals.gradient_check,
}
WORST_CASES: tuple[Callable[[Row], float], ...] = (
    lambda row: row.quick["worst"],
    lambda row: row.adaptive["worst"],
    lambda row: row.rivals.autoattack,
)


def _rule(rows: Sequence[Row], name: str, warns: Callable[[Row], bool]) -> str:
    of_trick = [row for row in rows if row.answer.truth in ("masked", "unstable")]
    honest = [row for row in rows if row.answer.truth == "honest"]
    return f"| {name} | {_share(of_trick, warns)} | {_share(honest, warns)} |"


def _counted(words: Sequence[str], word: str) -> str:
    return _interval(words.count(word), len(words)) if words.count(word) else "0"


def _share(rows: Sequence[Row], holds: Callable[[Row], bool]) -> str:
    return _interval(sum(map(holds, rows)), len(rows))


def _interval(count: int, total: int) -> str:
    if not total:
        return "-"
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return f"{count} of {total} ({100 * interval.low:.0f} to {100 * interval.high:.0f} %)"
