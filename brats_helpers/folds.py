"""Cross-validation: one run a fold inside the run's folder, then the scores of all patients and the folds' ensemble.

A fold is a run like any other, with its own manifest, checkpoints, executed notebooks and metrics, made by the same
notebooks; only its patients are shared out otherwise. So whatever can be done with a run can be done with a fold.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median_low

import pandas as pd

from brats_helpers.files import whole_file, write_json
from brats_helpers.metrics import collect, write_cases_csv
from brats_helpers.runs import Run
from brats_helpers.splits import PARTS, check_disjoint, load_parts


def shares(run: Run) -> list[dict[str, list[str]]]:
    """Each fold's train, val and test, as 00_setup shared the run's patients out."""
    content = json.loads(run.splits.read_text())
    return [{name: parts[name] for name in PARTS} for parts in content["folds"]]


def member(run: Run, name: str, parts: dict[str, list[str]]) -> Run:
    """The run `name` inside the folder of `run`, on the same prepared patients, shared out as `parts`.

    What it holds already stays, unless its patients were shared out otherwise.
    """
    own = Run(run.folder / name)
    check_disjoint(parts)
    content = json.loads(run.splits.read_text()) | parts | {"unlabelled": []}
    content.pop("folds", None)
    if not own.splits.exists() or json.loads(own.splits.read_text()) != content:
        patients = {part: len(parts[part]) for part in PARTS} | {"unlabelled": 0}
        own.record(**run.manifest | {"patients": patients, "stages": {}})
        write_json(own.splits, content)
    return own


def gather(run: Run, folds: Sequence[Run], *, device: str, flips: bool, convention: str, numbering: str) -> None:
    """Put together what the folds found, in the places where notebook 03 leaves its own.

    `metrics.json` and `cases.csv`: every labelled patient, scored by the network of the fold that never saw it.
    `predictions/`: those label maps, and of each unlabelled patient one by the networks of all folds averaged, under
    the middle one of the rules that the folds chose; these are packed for submission, too.

    Args:
        run: whose folds these are.
        folds: finished.
        device, flips, convention, numbering: as for notebook 03.
    """
    scores, by_fold = {}, [json.loads(fold.metrics.read_text()) for fold in folds]
    predictions = run.emptied(run.predictions)
    for fold, metrics in zip(folds, by_fold, strict=True):
        scores |= metrics["cases"]
        for case_id in metrics["cases"]:
            shutil.copy(fold.predictions / f"{case_id}_seg.nii.gz", predictions)

    unlabelled = json.loads(run.splits.read_text())["unlabelled"]
    if unlabelled:
        from brats_helpers.inference import load_networks, predict_files, write_submission
        from brats_helpers.machine import choose_device
        from brats_helpers.postprocess import Rules, read_rules

        chosen = [asdict(read_rules(fold.postprocess)) for fold in folds]
        rules = Rules(**{name: median_low(rule[name] for rule in chosen) for name in chosen[0]})
        networks = load_networks([fold.best for fold in folds], device=choose_device(device))
        how = {"flips": flips, "rules": rules, "numbering": numbering}
        cases = load_parts(run)["unlabelled"]
        written = {case.id: path for case, *_, path in predict_files(networks, cases, predictions, **how)}
        write_submission(run.emptied(run.submission), written)

    metrics = collect(
        scores,
        convention=convention,
        simulated=run.manifest["simulated"],
        not_scored=dict.fromkeys(unlabelled, "unlabelled"),
        leakage=sorted({case_id for metrics in by_fold for case_id in metrics["leakage"]}),
    )
    write_cases_csv(run.cases_csv, metrics)
    write_json(run.metrics, metrics)


def compare_by_validation(run: Run, places: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """Write and return `sweep.csv`: of each combination the validation Dice of its best epoch, and the mean over folds.

    The patients of the test part, or of all the folds', have no say in which combination is taken: whoever picks by
    their scores cannot report these scores any more.

    Args:
        run: whose sweep this is.
        places: by the name of a combination, the folders of its folds.
    """
    from brats_helpers.train import mean_dice

    dice = {
        name: [max(map(mean_dice, pd.read_csv(folder / "history.csv").to_dict("records"))) for folder in folders]
        for name, folders in places.items()
    }
    table = pd.DataFrame(dice).T.rename(columns="fold {}".format)
    table.insert(0, "validation Dice of WT, TC and ET", table.mean(axis=1))
    table = table.sort_values(table.columns[0], ascending=False).round(4)
    with whole_file(run.folder / "sweep.csv") as file:
        table.to_csv(file, index_label="combination")
    return table
