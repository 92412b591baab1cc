"""Print a table of the published models from model_cards/: `python scripts/list_cards.py`."""

from pathlib import Path
from statistics import mean

from drelu_timm.files import read_json
from drelu_timm.publishing.card import Card, percent, read_card, spread
from drelu_timm.publishing.recipes import OBJECTIVES

CARDS = Path(__file__).parents[1] / "model_cards"
HEAD = "| card | net | trained | images | clean | AutoAttack | worst of all | its mean over seeds | verdict |"
RULE = "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |"


def table() -> str:
    """Return a Markdown table per threat model, one row per card, sorted by the mean worst case."""
    boards: dict[str, list[Card]] = {}
    for path in sorted(CARDS.glob("*/*/*.json")):
        measured = read_card(read_json(path), path)
        boards.setdefault(f"{measured.results.dataset_title}, {measured.threat_model}", []).append(measured)
    return "\n\n".join(
        "\n".join([f"{board}:", "", HEAD, RULE, *map(_row, sorted(cards, key=lambda card: -mean(_worst(card))))])
        for board, cards in boards.items()
    )


def _row(card: Card) -> str:
    train, point = card.config["train"], card.point
    activation = train["activation"] or ("drelu" if train["model"].endswith("_drelu") else "unchanged")
    where = " everywhere" if train["placement"] == "all" else ""
    cells = [
        f"[{card.key}](model_cards/{card.place.as_posix()}.md)",
        f"{train['model'].removesuffix('_drelu')}, {activation}{where}",
        OBJECTIVES[train["objective"]],
        f"{card.results.n_examples:,}" + (" (preliminary)" if card.preliminary else ""),
        *(percent(value) or "-" for value in (point.clean, card.autoattack)),
        f"**{percent(point.worst)}**",
        _spread(card),
        card.verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _worst(card: Card) -> list[float]:
    return [seed.worst for seed in card.seeds] or [card.point.worst]


def _spread(card: Card) -> str:
    """Return the mean with its standard deviation (n - 1) and the number of seeds."""
    worst = _worst(card)
    return f"{spread(worst, digits=1)} (n = {len(worst)})" if len(worst) > 1 else "-"


if __name__ == "__main__":
    print(table())
