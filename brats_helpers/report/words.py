"""The first screen of a report in words: what the scores compare with, and what to do next."""

from collections.abc import Mapping
from os.path import commonprefix
from typing import NamedTuple

from brats_helpers.labels import REGIONS
from brats_helpers.scoring.statistics import ENOUGH


class Published(NamedTuple):
    """Published scores of a data set: where they are from, and the mean Dice of WT, TC and ET."""

    source: str
    dice: tuple[float, float, float]


PUBLISHED = {
    "BraTS20_": Published(
        "nnU-Net, which won BraTS 2020 (Isensee et al. 2021), on that challenge's hidden test patients",
        (0.8895, 0.8506, 0.8203),
    ),
}
"""By the beginning of the patients' names."""


def compared(metrics: Mapping) -> str:
    """Say what the scores of `metrics.json` compare with; "" without scores."""
    if not metrics.get("cases"):
        return ""
    return " ".join(filter(None, (_packaged(metrics), _published(metrics))))


def _packaged(metrics: Mapping) -> str:
    """How the packaged network scored on the same patients; "" if it did not."""
    if not metrics.get("packaged"):
        return ""
    scores = ", ".join(f"{region} {value:.3f}" for region, value in metrics["packaged"].items() if value is not None)
    ahead = _ahead(metrics)
    verdict = f": better than this run's network in {', '.join(ahead)}" * bool(ahead)
    return (
        "The packaged network, which comes with the suite and learned from simulated patients alone, has a mean Dice of"
        f" {scores} on the same patients{verdict}."
    )


def _ahead(metrics: Mapping) -> list[str]:
    """The regions in which the packaged network has the higher mean Dice."""
    own, other = metrics.get("summary", {}), metrics.get("packaged") or {}
    means = {region: own.get(region, {}).get("dice", {}).get("mean") for region in other}
    return [region for region, mean in means.items() if None not in (mean, other[region]) and mean < other[region]]


def _published(metrics: Mapping) -> str:
    if metrics.get("simulated"):
        return "These patients are simulated, so no published score is comparable: only runs on the same patients are."
    beginning = commonprefix([*metrics["cases"]])
    own = [published for name, published in PUBLISHED.items() if beginning.startswith(name)]
    if not own or not str(metrics.get("convention", "")).startswith("brats2020"):
        return (
            "No published score is comparable: it would need the same data set and rule. Runs on the same patients are."
        )
    scores = ", ".join(f"{region} {dice:.3f}" for region, dice in zip(REGIONS, own[0].dice, strict=True))
    return f"Published for comparison: {scores} by {own[0].source}. Other patients, so only an indication."


def next_steps(metrics: Mapping, *, best: Mapping, failed: int, parts: bool, start: str | None = None) -> list[str]:
    """Say what to do next, the most important first.

    Args:
        metrics: content of `metrics.json`, {} if nothing has been scored.
        best: `epoch`, the best one, and `epochs`, all of them; {} without a training.
        failed: number of patients whose segmentation failed.
        parts: whether the run consists of folds or combinations, which have reports of their own.
        start: the weights that the training started from.
    """
    if not metrics.get("cases"):
        first = "Run the notebooks up to 03, which scores the network: `./run_all.sh` with the same `--run`."
        return [] if parts else [first]
    steps = []
    if metrics.get("leakage"):
        steps.append("Score patients that the network has not seen: the scores above are not valid.")
    if failed:
        steps.append(f"Look at the patients under Failures ({failed}): the table says what kind of error each has.")
    if best and best["epoch"] == best["epochs"]:
        steps.append(
            "Train longer (`-p epochs`, `-p minutes`): the last epoch was the best, so the network was still learning."
        )
    if len(_ahead(metrics)) == len(REGIONS) and start != "simulated" and not metrics.get("simulated"):
        steps.append(
            "Start from the packaged network, which scores higher: `-p encoder_weights simulated -p encoder auto`."
        )
    if len(metrics["cases"]) < ENOUGH and not parts:
        steps.append(
            "Test more patients (`-p split TRAIN,VAL,TEST`) or cross-validate (`--folds 5`), each with a new `--run`:"
            " so few say little about others."
        )
    if metrics.get("simulated"):
        steps.append("Use real patients: `--data FOLDER`, or `--data kaggle --profile small`.")
    elif not metrics.get("packaged"):
        steps.append("Compare with the packaged network, which needs no training: `python -m brats_helpers predict`.")
    return steps
