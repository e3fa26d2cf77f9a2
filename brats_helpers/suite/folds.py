"""Cross-validation: one run a fold inside the run's folder, then the scores of all patients and the folds' ensemble.

A fold is a run like any other, with its own manifest, checkpoints, executed notebooks and metrics, made by the same
notebooks; only its patients are shared out otherwise. So whatever can be done with a run can be done with a fold.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median_low
from typing import TYPE_CHECKING

import pandas as pd

from brats_helpers.data.patients import load_parts
from brats_helpers.data.splits import PARTS, check_disjoint, read_splits
from brats_helpers.files import whole_file, write_json
from brats_helpers.log import warn
from brats_helpers.runs import ONCE, PER_FOLD, Run
from brats_helpers.scoring.scores import collect, write_cases_csv
from brats_helpers.suite.workers import POLL_S, awaited, claimed

if TYPE_CHECKING:
    from brats_helpers.suite.plan import Plan


def share_out(
    plan: "Plan",
    run: Run,
    *,
    begin: Callable,
    run_stages: Callable[["Plan", Run, Sequence[str]], bool],
) -> bool:
    """Run the notebooks of each fold and combination; share the work with all processes that do the same in the folder.

    Args:
        plan: of `suite`, with folds or a sweep.
        run: its run.
        begin: notes in a run's manifest what was begun.
        run_stages: runs notebooks that are not finished; whether all are now.

    Returns:
        Whether everything is finished, by whichever process.
    """
    claims = run.folder / "claims"
    with awaited(claims, "run"):
        begin(plan, run, shared=True, expected=[*ONCE, *(PER_FOLD if "" in plan.sweep else ())])
        if not run_stages(plan, run, ONCE):
            return False
        parts = shares(run) if plan.folds else [read_splits(run.splits)]
        gathered = {name: _gathering(run, name) for name in plan.sweep} if plan.folds else {}
        for name, own in gathered.items():
            if not _finished(own, plan):  # what was gathered before is of other trainings
                made = {stage: entry for stage, entry in own.manifest["stages"].items() if stage not in PER_FOLD}
                begin(plan, own, stages=made, **({"expected": PER_FOLD} if name else {}))
                _forget(own, PER_FOLD)
        if "" not in plan.sweep:  # what an earlier cross-validation gathered here
            run.record(stages={stage: entry for stage, entry in run.manifest["stages"].items() if stage in ONCE})
            _forget(run, PER_FOLD)
        else:
            (run.folder / "sweep.csv").unlink(missing_ok=True)
    places = {name: [_place(name, k if plan.folds else None) for k in range(len(parts))] for name in plan.sweep}
    for place in sum(places.values(), []):  # scores of other parameters do not wait for their fold's turn
        with claimed(claims, place.replace("/", "-")) as held:
            if held and (run.folder / place).exists() and not _finished(Run(run.folder / place), plan):
                _forget(Run(run.folder / place), PER_FOLD[1:])
                (run.folder / "sweep.csv").unlink(missing_ok=True)
    todo = [(name, place, part) for name in places for place, part in zip(places[name], parts, strict=True)]
    while todo:
        elsewhere = []
        for name, place, part in todo:
            with claimed(claims, place.replace("/", "-")) as held:
                if not held:
                    elsewhere.append((name, place, part))
                    continue
                print(f"{place}:", flush=True)
                own = member(run, place, part)
                if not _finished(own, plan):
                    begin(plan, own, expected=PER_FOLD)
                if not run_stages(_plan_of(plan, own, name), own, PER_FOLD):
                    return False
        if len(elsewhere) == len(todo):
            time.sleep(POLL_S)
        todo = elsewhere

    with awaited(claims, "run"):
        if not all(_finished(Run(run.folder / place), plan) for place in sum(places.values(), [])):
            warn("another process trains here with other parameters: nothing is gathered or compared; start this again")
            return False
        for name, own in gathered.items():
            if _finished(own, plan):
                continue
            own_plan, members = _plan_of(plan, own, name), [Run(run.folder / place) for place in places[name]]
            how = own_plan.values[PER_FOLD[-1]]
            gather(own, members, **{key: how[key] for key in ("device", "flips", "convention", "labels")})
            made = own.manifest["stages"]
            for stage in PER_FOLD:
                seconds = round(sum(fold.manifest["stages"][stage]["seconds"] for fold in members), 1)
                entry = {"status": "finished", "key": plan.keys[stage], "seconds": seconds}
                made[stage] = entry | {"parameters": own_plan.values[stage]}
            own.record(stages=made)
        if any(plan.sweep):
            print(compare_by_validation(run, places))
    return True


def _forget(run: Run, stages: Sequence[str]) -> None:
    for stage in stages:
        run.forget(stage)


def _gathering(run: Run, name: str) -> Run:
    """The run that gathers the folds of a combination: one inside `run`, or, of no combination, `run` itself."""
    if not name:
        return run
    also = {"folds": shares(run), "unlabelled": json.loads(run.splits.read_text())["unlabelled"]}
    return member(run, _place(name, None), read_splits(run.splits) | also)


def _finished(run: Run, plan: "Plan") -> bool:
    made = run.manifest.get("stages", {})
    entries = [(made.get(stage, {}), plan.keys[stage]) for stage in PER_FOLD]
    return all(entry.get("status") == "finished" and entry["key"] == key for entry, key in entries)


def _place(name: str, fold: int | None) -> str:
    """Where in the run's folder the run of a combination and fold lies."""
    return "/".join([f"sweep/{name}"] * bool(name) + [f"folds/{fold}"] * (fold is not None))


def _plan_of(plan: "Plan", run: Run, name: str) -> "Plan":
    """The plan for a run inside the run, with the values of a combination in place of its own."""
    own = plan.sweep[name] | {"run_dir": str(run.folder)}
    given = {
        stage: before | {key: value for key, value in own.items() if key in plan.values[stage]}
        for stage, before in plan.given.items()
    }
    values = {stage: before | given[stage] for stage, before in plan.values.items()}
    return replace(plan, folder=run.folder, given=given, values=values)


def shares(run: Run) -> list[dict[str, list[str]]]:
    """Each fold's train, val and test, as 00_setup shared the run's patients out."""
    content = json.loads(run.splits.read_text())
    return [{name: parts[name] for name in PARTS} for parts in content["folds"]]


def member(run: Run, name: str, parts: dict[str, list[str]]) -> Run:
    """The run `name` inside the folder of `run`, on the same prepared patients, shared out as `parts`.

    What it holds already stays, unless its patients were shared out otherwise; where they lie now is noted.
    """
    own = Run(run.folder / name)
    content = json.loads(run.splits.read_text())
    check_disjoint(parts, content.get("groups", {}))
    content.pop("folds", None)
    content |= {"unlabelled": []} | parts
    if not own.splits.exists() or json.loads(own.splits.read_text()) != content:
        patients = {part: len(content[part]) for part in (*PARTS, "unlabelled")}
        own.record(**run.manifest | {"patients": patients, "stages": {}})
        write_json(own.splits, content)
    places = {name: run.manifest[name] for name in ("asked", "data", "origin", "cache_dir") if name in run.manifest}
    if own.manifest != own.manifest | places:
        own.record(**places)
    return own


def gather(run: Run, folds: Sequence[Run], *, device: str, flips: bool, convention: str, labels: str) -> None:
    """Put together what the folds found, in the places where notebook 03 leaves its own.

    `metrics.json` and `cases.csv`: every labelled patient, scored by the network of the fold that never saw it.
    `predictions/`: those label maps, and of each unlabelled patient one by the networks of all folds averaged, under
    the middle one of the rules that the folds chose; these are packed for submission, too.

    Args:
        run: whose folds these are.
        folds: finished.
        device, flips, convention, labels: as for notebook 03.
    """
    scores, by_fold = {}, [json.loads(fold.metrics.read_text()) for fold in folds]
    leakage = sorted({case_id for metrics in by_fold for case_id in metrics["leakage"]})
    predictions = run.emptied(run.predictions)
    if leakage:  # where `score` looks for it
        write_json(predictions / "leakage.json", leakage)
    for fold, metrics in zip(folds, by_fold, strict=True):
        scores |= metrics["cases"]
        for case_id in metrics["cases"]:
            shutil.copy(fold.predictions / f"{case_id}_seg.nii.gz", predictions)

    unlabelled = json.loads(run.splits.read_text())["unlabelled"]
    if unlabelled:
        from brats_helpers.evaluation.inference import load_networks, predict_files, write_submission
        from brats_helpers.evaluation.postprocess import Rules, read_rules
        from brats_helpers.machine import choose_device

        chosen = [asdict(read_rules(fold.postprocess)) for fold in folds]
        rules = Rules(**{name: median_low(rule[name] for rule in chosen) for name in chosen[0]})
        networks = load_networks([fold.best for fold in folds], device=choose_device(device))
        how = {"flips": flips, "rules": rules, "numbering": labels}
        cases = load_parts(run)["unlabelled"]
        written = {case.id: path for case, *_, path in predict_files(networks, cases, predictions, **how)}
        write_submission(run.emptied(run.submission), written)

    metrics = collect(
        scores,
        convention=convention,
        simulated=run.manifest["simulated"],
        not_scored=dict.fromkeys(unlabelled, "unlabelled"),
        leakage=leakage,
    )
    write_cases_csv(run.cases_csv, metrics)
    write_json(run.metrics, metrics)


def compare_by_validation(run: Run, places: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Write and return `sweep.csv`: of each combination the validation Dice of its best epoch, and the mean over folds.

    The patients of the test part, or of all the folds', have no say in which combination is taken: whoever picks by
    their scores cannot report these scores any more.

    Args:
        run: whose sweep this is.
        places: by the name of a combination, the places of its folds in the run's folder.
    """
    from brats_helpers.training.loop import mean_dice

    dice = {
        name: [max(map(mean_dice, pd.read_csv(run.folder / place / "history.csv").to_dict("records"))) for place in own]
        for name, own in places.items()
    }
    table = pd.DataFrame(dice).T.rename(columns="fold {}".format)
    mean = table.mean(axis=1)
    table = table if len(table.columns) > 1 else table[[]]
    table.insert(0, "validation Dice of WT, TC and ET", mean)
    table = table.sort_values(table.columns[0], ascending=False).round(4)
    with whole_file(run.folder / "sweep.csv") as file:
        table.to_csv(file, index_label="combination")
    return table
