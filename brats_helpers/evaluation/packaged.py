"""A network's scores on real patients, by the modalities they have, and messages about the packaged network."""

from collections.abc import Iterable, Mapping
from itertools import combinations

from brats_helpers.data.cases import Case
from brats_helpers.labels import MODALITIES, REGIONS, DataError

KEYS = ("patients", "n", "convention", "dice", "command", "date", "device")
"""Entries of what `benchmarks/packaged.py --json` writes, one object per folder of patients."""


def subsets(modalities: Iterable[str]) -> list[tuple[str, ...]]:
    """Every non-empty choice of some modalities, the largest first, each in the order of `labels.MODALITIES`."""
    names = _ordered(modalities)
    return [some for size in range(len(names), 0, -1) for some in combinations(names, size)]


def _ordered(modalities: Iterable[str]) -> list[str]:
    return [name for name in MODALITIES if name in modalities]


def check_scores(content: object, path: object) -> dict:
    """Return scores on real patients, or raise `DataError` if `content` of the file `path` holds none."""
    if not isinstance(content, Mapping) or (lacking := [key for key in KEYS if key not in content]):
        what = f"no {lacking[0]}" if isinstance(content, Mapping) else "no object"
        raise DataError(f"{path} holds {what}; expected the scores that benchmarks/packaged.py --json writes.")
    return {key: content[key] for key in KEYS}


def introduction(facts: Mapping) -> str:
    """Say in one line which network the package has, and how it scored on real patients.

    Args:
        facts: see `model_zip.read_facts`.
    """
    saved = facts["checkpoint"]
    line = (
        f"no --checkpoint: using the packaged network, {saved['settings']['encoder']}"
        f" trained on {len(saved['train_cases'])} simulated patients"
    )
    if not (listed := facts.get("real")):
        return f"{line}; not scored on real patients yet"
    scored = []
    for scores in listed:
        names, dice = whole_dice(scores)
        text = f"{figures_text(dice)} on {scores['n']} real patients ({scores['patients']})"
        lacks = {*saved["settings"]["modalities"]} - {*names.split(",")}
        scored.append(f"{text} who have only {names}" if lacks else text)
    return f"{line}; mean Dice {'; '.join(scored)}"


def without_lines(facts: Mapping, cases: Iterable[Case]) -> list[str]:
    """Say how the network scored on real patients with as few modalities as some of `cases` have, a line per choice."""
    lines = []
    for names in sorted({",".join(_ordered(case.images)) for case in cases if case.missing}):
        scored = [
            f"{figures_text(one['dice'][names])} on {one['n']} real patients ({one['patients']})"
            for one in facts.get("real", ())
            if names in one["dice"]
        ]
        if scored:
            lines.append(f"with only {names}: mean Dice {', and '.join(scored)}")
    return lines


def whole_dice(scores: Mapping) -> tuple[str, Mapping[str, float]]:
    """The modalities that all patients have, comma-separated, and the mean Dice by region with all of them."""
    return max(scores["dice"].items(), key=lambda item: item[0].count(","))


def figures_text(dice: Mapping[str, float]) -> str:
    """Name each region with its Dice: `WT 0.86, TC 0.76, ET 0.65`."""
    return ", ".join(f"{region} {dice[region]:.2f}" for region in REGIONS)


def real_lines(listed: Iterable[Mapping]) -> list[str]:
    """Show the scores on real patients as Markdown: a table per folder of patients, and how it was measured.

    Args:
        listed: see `KEYS`; `dice` maps modalities, comma-separated, to the mean Dice of each region.
    """
    lines = []
    for scores in listed:
        lines += ["", f"### {scores['n']} real patients, {scores['patients']}", ""]
        lines += [f"| modalities | {' | '.join(REGIONS)} | mean |", "| --- " * (len(REGIONS) + 2) + "|"]
        for names, dice in scores["dice"].items():
            figures = [dice[region] for region in REGIONS]
            cells = [f"{figure:.3f}" for figure in (*figures, sum(figures) / len(figures))]
            lines.append(f"| {names.replace(',', ', ')} | {' | '.join(cells)} |")
        rule = scores["convention"].split(":")[0]
        lines += ["", f"Mean Dice by the rule {rule}; modalities that are not named were taken as background."]
        lines += [f"Measured with `{scores['command']}` on {scores['date']}: {scores['device']}."]
    return lines
