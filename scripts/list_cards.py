"""Write the tables of the published models into README.md and model_cards/README.md: `python scripts/list_cards.py`."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from drelu_timm.files import read_json, write_text
from drelu_timm.publishing.card import Card, percent, read_card, spread
from drelu_timm.publishing.recipes import OBJECTIVES

REPOSITORY = Path(__file__).parents[1]
CARDS = REPOSITORY / "model_cards"
SHORT = ("card", "training", "images", "clean", "AutoAttack", "worst case", "verdict")
MARKS = re.compile(r"(<!-- cards -->\n).*?(<!-- /cards -->)", re.DOTALL)


def full_table() -> str:
    """Return a Markdown table per threat model, one row per card, for a file in model_cards/."""
    boards = _boards().items()
    return "\n\n".join(f"{board}:\n\n{_markdown([_cells(card, '') for card in cards])}" for board, cards in boards)


def short_table() -> str:
    """Return a Markdown table of the best sound model per threat model and of all masked models, for README.md."""
    rows = []
    for board, cards in _boards().items():
        best = next(card for card in cards if card.verdict == "sound")
        for card in cards:
            if card is best or card.verdict == "masked":
                cells = _cells(card, "model_cards/")
                rows.append({"test set, threat model": board} | {name: cells[name] for name in SHORT})
    return _markdown(rows)


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _boards() -> dict[str, list[Card]]:
    """Return the cards by threat model, from the highest mean worst case."""
    boards: dict[str, list[Card]] = {}
    for path in sorted(CARDS.glob("*/*/*.json")):
        card = read_card(read_json(path), path)
        boards.setdefault(f"{card.results.dataset_title}, {card.threat_model}", []).append(card)
    return {board: sorted(cards, key=lambda card: -mean(_worst(card))) for board, cards in boards.items()}


def _cells(card: Card, folder: str) -> dict[str, str]:
    train, point = card.config["train"], card.point
    activation = train["activation"] or ("drelu" if train["model"].endswith("_drelu") else "unchanged")
    where = " everywhere" if train["placement"] == "all" else ""
    bound = "" if card.verdict == "sound" else "≤ "
    return {
        "card": f"[{card.key}]({folder}{card.place.as_posix()}.md)",
        "model": f"{train['model'].removesuffix('_drelu')}, {activation}{where}",
        "training": OBJECTIVES[train["objective"]],
        "images": f"{card.results.n_examples:,}" + (" (preliminary)" if card.preliminary else ""),
        "clean": percent(point.clean) or "-",
        "AutoAttack": percent(card.autoattack) or "-",
        "worst case": f"**{bound}{percent(point.worst)}**",
        "mean over seeds": _spread(card),
        "verdict": card.verdict,
    }


def _worst(card: Card) -> list[float]:
    return [seed.worst for seed in card.seeds] or [card.point.worst]


def _spread(card: Card) -> str:
    """Return the mean with its standard deviation (n - 1) and the number of seeds."""
    worst = _worst(card)
    return f"{spread(worst, digits=1)} (n = {len(worst)})" if len(worst) > 1 else "-"


def write_tables() -> None:
    """Replace what is between the marks in both files."""
    for path, table in ((REPOSITORY / "README.md", short_table()), (CARDS / "README.md", full_table())):
        write_text(
            path, MARKS.sub(lambda marks, table=table: f"{marks[1]}{table}\n{marks[2]}", path.read_text("utf-8"))
        )


if __name__ == "__main__":
    write_tables()
