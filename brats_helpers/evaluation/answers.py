"""Answers from experiments: decided only if patients and seeds agree and every arm has learnt something."""

from collections.abc import Mapping, Sequence

from brats_helpers.evaluation.experiments import MEAN
from brats_helpers.files import read_json, write_json
from brats_helpers.runs import Run
from brats_helpers.scoring.statistics import ENOUGH_PAIRS, compare, holm, interval_text, sign_flip_p

FLOOR = 0.3
"""Mean validation Dice of WT, TC and ET below which a network has not learnt enough to be compared."""
MARGIN = 0.03
"""Smallest difference of mean Dice that counts: short trainings with different seeds may differ as much."""
LEVEL = 0.05
"""Level of significance."""


def answers(metrics: Mapping[str, Mapping]) -> list[str]:
    """Compare every other arm with the first, patient by patient; return one sentence for each.

    A difference is decided if both arms passed `FLOOR`, there are `ENOUGH_PAIRS` patients, the mean difference is at
    least `MARGIN` and has the same sign for every seed, and the p value of the sign-flip test over patients, with
    Holm's correction for all comparisons, is below `LEVEL`.

    Args:
        metrics: by name, scores of the same validation patients, as `Bench.try_out` gives them.
    """
    first, *others = metrics
    if not others:
        return [f"Not part of this run: there is nothing to compare {first} with."]
    corrected = dict(zip(others, holm([_p(metrics[first], metrics[other]) for other in others]), strict=True))
    sentences = []
    for other, p in corrected.items():
        result = compare(metrics[first], metrics[other])
        change = result["differences"][MEAN]["dice"]
        interval = interval_text(change["ci95"], result["n"], "+.3f")
        figures = f"{_mean(metrics[other]):.3f} against {_mean(metrics[first]):.3f}, {change['mean_difference']:+.3f}"
        patients = f"{result['n']} {'simulated ' * result['simulated']}patient{'s' * (result['n'] > 1)} to compare on"
        holms = f" after Holm's correction for {len(others)} comparisons" if len(others) > 1 else ""
        sentences.append(
            f"{other} against {first}: {_verdict(first, other, metrics, result, p)}. Mean Dice of WT, TC and ET"
            f" {figures} ({interval}), {patients}, p = {p:.3f}{holms}."
        )
    return sentences


def _verdict(first: str, other: str, metrics: Mapping[str, Mapping], result: Mapping, p: float) -> str:
    unlearnt = [name for name in (first, other) if _mean(metrics[name]) < FLOOR]
    if unlearnt:
        return f"{' and '.join(unlearnt)} did not learn in the time given (a mean Dice below {FLOOR:g})"
    if result["n"] < ENOUGH_PAIRS:
        return f"not decided by this run, which has fewer than {ENOUGH_PAIRS} patients to compare on"
    difference = result["differences"][MEAN]["dice"]["mean_difference"]
    pairs = zip(metrics[first].get("seeds", ()), metrics[other].get("seeds", ()), strict=True)
    agree = all((b - a) * difference > 0 for a, b in pairs)
    if p >= LEVEL or abs(difference) < MARGIN or not agree:
        return "not decided by this run"
    return "better" if difference > 0 else "worse"


def _p(a: Mapping, b: Mapping) -> float:
    shared = sorted(a["cases"].keys() & b["cases"].keys())
    return sign_flip_p([b["cases"][case][MEAN]["dice"] - a["cases"][case][MEAN]["dice"] for case in shared])


def _mean(metrics: Mapping) -> float:
    return metrics["summary"][MEAN]["dice"]["mean"]


def keep_answers(run: Run, name: str, metrics: Mapping[str, Mapping], *, besides: Sequence[str] = ()) -> None:
    """Print the `answers` and the sentences `besides`, and save them in `answers.json` by the figure's name."""
    sentences = [*answers(metrics), *besides]
    write_json(run.answers, read_json(run.answers, {}) | {name: sentences})
    print(*sentences, sep="\n")
