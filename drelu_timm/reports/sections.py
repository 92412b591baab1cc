"""What a report says beside its tables and statistics: figures, how it was measured and from what."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..formatting import written
from .averages import Average, Lines, families
from .figures import draw_balancers, draw_caps, draw_eps, read_caps
from .formats import Section
from .outcomes import Outcome, Training
from .paper import net_name
from .reading import Outcomes
from .tables import slug

# What the names of groups and trainings say already.
_SAID = {"dataset", "model", "objective", "beta", "activation", "placement", "cap_weight", "cap_penalty"}


def opening(outcomes: Outcomes, groups: Sequence[Lines]) -> Section:
    """What a reader has to know before the first table."""
    runs = {outcome.run for outcome in outcomes.found}
    shown = [one for lines in groups for one in lines.shown]
    masked, undecided = (
        "; ".join(dict.fromkeys(f"{net_name(one.first.net)}, {one.training}" for one in shown if is_so(one)))
        for is_so in (lambda one: one.masked, lambda one: one.undecided)
    )
    text = ["The worst case is the robust accuracy: the share of the test images that nothing broke."]
    if masked:
        text.append(
            "The accuracy of a masked row under gradient attacks is not robustness: the net hides its gradients, so "
            f"that these attacks fail where others succeed. Masked: {masked}."
        )
    else:
        text.append("No row of the main tables is masked, as far as the probes for masking can tell.")
    if undecided:
        text.append(f"Of these rows the probes show neither that they are masked nor that they are not: {undecided}.")
    if len(groups) > 1:
        listed = "; ".join(str(lines.group) for lines in groups)
        text.append(f"These {len(groups)} groups cannot be compared with one another and are kept apart: {listed}.")
    return Section(
        f"What {_count(len(runs), 'run')} {'withstand' if len(runs) > 1 else 'withstands'}", "\n\n".join(text)
    )


def figures(lines: Lines, folder: Path, outcomes: Outcomes) -> list[Section]:
    """Accuracy over balancers, and the learned caps; what cannot be drawn is said.

    Args:
        lines: The group.
        folder: For the pictures.
        outcomes: Weights that cannot be read are noted down here.
    """
    group, sections = lines.group, []
    for family in families(lines.all):
        if len(family) > 1:
            name = f"{net_name(family[0].first.net)}, {family[0].method}: {group}"
            runs = [outcome for one in family for outcome in one.outcomes]
            sections.append(_drawn(f"Balancers: {name}", folder, draw_balancers, runs, _about_balancers(family)))
    for net, shown in lines.by_net.items():
        name = f"{net_name(net)}, {group}"
        if caps := _caps(shown, outcomes):
            sections.append(_drawn(f"Learned caps: {name}", folder, draw_caps, caps))
    return sections


def _about_balancers(family: Sequence[Average]) -> str:
    """What the runs of a figure are, in a paragraph."""
    seeds = ", ".join(f"{written(one.first.cap_weight)} {len(one.outcomes)}" for one in family)
    images = " or ".join(str(count) for count in sorted({count for one in family for count in one.n_examples}))
    return (
        f"On the first {images} test images; seeds by balancer: {seeds}. A line breaks off where an attack was not "
        "run. CW_L2, which knows no ball, is in the tables only."
    )


def over_eps(groups: Iterable[Lines], folder: Path) -> list[Section]:
    """Accuracy over eps, a figure a net: those with generated images beside those without, as in the paper.

    A figure for each suite and number of images, as only curves of the same ones can be averaged and compared.
    """
    kinds: dict[tuple[str, str, str, int], dict[str, dict[Path, Outcome]]] = {}
    for lines in groups:
        group = lines.group
        for one in lines.shown:
            name = f"{net_name(one.first.net)}, {group.title}, {group.norm}"
            training = one.training + (" + generated images" if group.generated else "")
            for outcome in one.outcomes:
                if sweep := outcome.sweep:
                    kind = (name, group.dataset, sweep.suite, sweep.n_examples)
                    kinds.setdefault(kind, {}).setdefault(training, {})[outcome.run] = outcome  # once, of several radii
    names = [name for name, *_ in kinds]
    sections = []
    for (name, _, suite, images), of_kind in kinds.items():
        title = f"Over eps: {name}" + (f", suite {suite} on {images} images" if names.count(name) > 1 else "")
        seeds = ", ".join(f"{training} {len(outcomes)}" for training, outcomes in of_kind.items())
        text = (
            f"The rows of the main tables at other radii too, under the suite {suite}, on the first {images} test "
            f"images. Seeds: {seeds}."
        )
        curves = {training: [one.curve for one in outcomes.values()] for training, outcomes in of_kind.items()}
        sections.append(_drawn(title, folder, draw_eps, curves, text))
    return sections


def trainings(groups: Iterable[Lines]) -> Section:
    """How the nets were trained, by the flags of train: what is the same in all rows as text, the rest a row each."""
    lines_of_groups = [(str(lines.group), one) for lines in groups for one in lines.all]
    settings = [_settings(one.first) for _, one in lines_of_groups]
    same = [text for text in settings[0] if all(text in others for others in settings)]
    table = pd.DataFrame(
        {
            "Group": group,
            "Model": net_name(one.first.net),
            "Training": one.training,
            "Settings": ", ".join(text for text in of_it if text not in same),
            "Begins with": "; ".join(f"{start.method}: {', '.join(_settings(start))}" for start in one.first.starts),
        }
        for (group, one), of_it in zip(lines_of_groups, settings, strict=True)
    )
    text = (
        f"The same in all rows: {', '.join(same)}. What the paper says of its own trainings is in the presets "
        "paper-drelu, paper-at and paper-trades of train."
    )
    return Section("How the nets were trained", text, table)


def _settings(training: Training) -> list[str]:
    """What a training was set to, beside what its names say, but for flags without a value or without an effect."""
    idle = set() if training.train.get("schedule") == "onecycle" else {"warmup"}
    idle |= set() if training.activation == "drelu" else {"cap", "cap_lr"}
    named = ((name, value) for name, value in training.own_flags.items() if name not in idle | _SAID)
    return [
        f"{name} {value if isinstance(value, str) else written(value)}"
        for name, value in named
        if value not in (None, 0, "", [], "no")
    ]


def attacks(groups: Iterable[Lines]) -> Section:
    """How each attack was set, by group and number of lines where they differ."""
    rows: dict[tuple[str, str, str], dict[str, None]] = {}
    for lines in groups:
        for one in lines.all:
            for outcome in one.outcomes:
                for attack, settings in outcome.at.tried:
                    key = (str(lines.group), attack, settings)
                    rows.setdefault(key, {})[f"{one.first.net} {one.training}"] = None
    table = pd.DataFrame(
        [(group, attack, settings or "none", len(named)) for (group, attack, settings), named in rows.items()],
        columns=["Group", "Attack", "Settings", "Rows"],
    ).sort_values(["Group", "Attack", "Settings"])
    several = table[table.duplicated(["Group", "Attack"], keep=False)]
    text = "An attack's own settings; what it returns is brought into the ball and judged by the net itself."
    if len(several):
        names = ", ".join(dict.fromkeys(several["Attack"]))
        text += f" Not all rows were attacked alike by {names}: their accuracies under it cannot be compared."
    return Section("How the attacks were set", text, table.reset_index(drop=True).astype(str))


def origin(outcomes: Outcomes, groups: Sequence[Lines], files: Iterable[str]) -> list[Section]:
    """What the report was made from, what was noted on the way, and the files beside it."""
    found = outcomes.found
    evaluations = {result.path: result for outcome in found for result in outcome.at.all}
    results = {path for path, result in evaluations.items() if not result.is_sweep}
    sweeps = ({*evaluations} - results) | {outcome.sweep.path for outcome in found if outcome.sweep}
    measured = dict.fromkeys(line for outcome in found for line in outcome.measured_with)
    runs = len({outcome.run for outcome in found})
    counts = f"{_count(runs, 'run')}, {_count(len(results), 'result file')} and {_count(len(sweeps), 'sweep')} over eps"
    made_from = [
        f"{counts}; nothing was measured anew. numbers.json names the files that every accuracy comes from.",
        *(f"Measured with: {line}." for line in measured),
    ]
    notes = [*outcomes.notes, *(note for lines in groups for note in _uneven(lines))]
    sections = [Section("Made from", "\n\n".join(made_from))]
    if notes:
        sections.append(Section("Notes", "\n\n".join(notes)))
    if outcomes.broken:
        sections.append(Section("Broken files, left out", "\n\n".join(outcomes.broken)))
    return [*sections, Section("Files", "\n\n".join(files))]


def _uneven(lines: Lines) -> list[str]:
    """Seeds that some lines lack, and other numbers of test images than the rest."""
    lacking: dict[str, list[str]] = {}
    for one in lines.all:
        if missing := ", ".join(str(seed) for seed in lines.seeds if seed not in one.seeds):
            lacking.setdefault(missing, []).append(f"{net_name(one.first.net)} {one.training}")
    notes = [
        f"{lines.group}: seed {missing}, which other rows have, is missing of {'; '.join(named)}."
        for missing, named in lacking.items()
    ]
    images = sorted({count for one in lines.all for count in one.n_examples})
    if len(images) > 1:
        notes.append(f"{lines.group}: not all rows have as many test images: {', '.join(map(str, images))}.")
    return notes


def _caps(shown: Iterable[Average], outcomes: Outcomes) -> dict[str, np.ndarray]:
    """The caps of all seeds of each line that has any."""
    caps: dict[str, list[np.ndarray]] = {}
    for one in shown:
        for outcome in one.outcomes if one.first.cap_weight is not None else ():
            try:
                learned = read_caps(outcome.run)
            except InputError as error:
                outcomes.skip(error)
                continue
            if learned is not None:
                caps.setdefault(one.training, []).append(learned)
    return {training: np.concatenate(of_seeds) for training, of_seeds in caps.items()}


def _drawn(title: str, folder: Path, draw: Callable[..., None], what: object, text: str = "") -> Section:
    picture = folder / f"{slug(title)}.png"
    try:
        draw(what, picture, title=title)
    except InputError as error:
        return Section(title, f"Not drawn: {error}.")
    return Section(title, text, picture=picture)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
