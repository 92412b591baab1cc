"""The published models as a table: `python scripts/list_cards.py`, from model_cards/."""

import json
from pathlib import Path
from statistics import mean

from drelu_timm.publishing.measured import Measured, from_record, percent, spread
from drelu_timm.publishing.recipes import OBJECTIVES

CARDS = Path(__file__).parents[1] / "model_cards"
HEAD = "| card | net | trained | images | clean | AutoAttack | worst of all | its mean over seeds | verdict |"
RULE = "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |"


def table() -> str:
    """Markdown; a heading for every board, a row a card, by the mean of their worst cases."""
    boards: dict[str, list[Measured]] = {}
    for path in sorted(CARDS.glob("*/*/*.json")):
        measured = from_record(json.loads(path.read_text()))
        boards.setdefault(f"{measured.results['dataset_title']}, {measured.threat_model}", []).append(measured)
    return "\n\n".join(
        "\n".join([f"{board}:", "", HEAD, RULE, *map(_row, sorted(cards, key=lambda card: -mean(_worst(card))))])
        for board, cards in boards.items()
    )


def _row(card: Measured) -> str:
    train, results = card.config["train"], card.results
    activation = train["activation"] or ("drelu" if train["model"].endswith("_drelu") else "as it is")
    where = " everywhere" if train["placement"] == "all" else ""
    cells = [
        f"[{card.key}](model_cards/{card.place.as_posix()}.md)",
        f"{train['model'].removesuffix('_drelu')}, {activation}{where}",
        OBJECTIVES[train["objective"]],
        f"{results['n_examples']:,}" + (" (preliminary)" if card.preliminary else ""),
        *(percent(value) or "-" for value in (results["clean"], card.autoattack)),
        f"**{percent(results['worst'])}**",
        _spread(card),
        card.verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _worst(card: Measured) -> list[float]:
    return [seed.worst for seed in card.seeds] or [card.results["worst"]]


def _spread(card: Measured) -> str:
    """The mean with its standard deviation (n - 1), and of how many."""
    worst = _worst(card)
    return f"{spread(worst, digits=1)} (n = {len(worst)})" if len(worst) > 1 else "-"


if __name__ == "__main__":
    print(table())
