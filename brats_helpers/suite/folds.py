"""Cross-validation and sweeps: one run for each fold and combination, then the scores of all patients together.

A fold is a run like any other, with its own manifest, checkpoints, executed notebooks and metrics, made by the same
notebooks; only its patients are split differently. Whatever can be done with a run can therefore be done with a fold.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from statistics import median_low

import pandas as pd

from brats_helpers.data.patients import load_parts
from brats_helpers.data.splits import check_disjoint, read_splits
from brats_helpers.files import read_json, whole_file, whole_folder, write_json
from brats_helpers.log import fail
from brats_helpers.runs import ONCE, PARTS, PER_FOLD, Run, parts_of
from brats_helpers.scoring.overlap import mean_dice_of_epoch
from brats_helpers.scoring.rules import rule_for
from brats_helpers.scoring.scores import collect, write_cases_csv
from brats_helpers.suite.plan import Plan
from brats_helpers.suite.stages import FINISHED, OUTDATED, begin, is_finished, mark_outdated, run_stages


def run_members(plan: Plan, run: Run) -> bool:
    """Run 00 and 01, then 02 and 03 for each fold and combination; combine the scores. Return whether all finished."""
    begin(plan, run, shared=True, expected=[*ONCE, *(PER_FOLD if "" in plan.sweep else ())])
    if not run_stages(plan, run, ONCE):
        return False
    parts = shares(run) if plan.folds else [read_splits(run.splits)]
    places = _places(plan, len(parts))
    plans = [
        _plan_of(plan, member(run, place, part), plan.sweep[name])
        for name, own_places in places.items()
        for place, part in zip(own_places, parts, strict=True)
    ]
    gathered = {name: _gathering(run, name) for name in plan.sweep} if plan.folds else {}
    if not all(is_finished(plan, own, PER_FOLD) for own in [*map(_run_of, plans), *gathered.values()]):
        for own in gathered.values():
            mark_outdated(own, PER_FOLD)
    if not _run_each(plan, plans):
        return False
    for name, own in gathered.items():
        if not is_finished(plan, own, PER_FOLD):
            own_plan = _plan_of(plan, own, plan.sweep[name])
            _gather_and_record(own_plan, own, [Run(run.folder / place) for place in places[name]])
    if any(plan.sweep):
        print(compare_by_validation(run, places))
        run.record(stages={stage: entry for stage, entry in run.manifest["stages"].items() if stage in ONCE})
        for stage in PER_FOLD:  # of an earlier cross-validation without a sweep
            run.forget(stage)
    else:
        (run.folder / "sweep.csv").unlink(missing_ok=True)
    return True


def is_complete(plan: Plan, run: Run) -> bool:
    """Whether every notebook of every fold and combination has finished."""
    if not is_finished(plan, run, ONCE):
        return False
    folders = [run.folder / place for own_places in _places(plan, plan.folds or 1).values() for place in own_places]
    begun = [Run(folder) for folder in folders if folder.exists()]
    return len(begun) == len(folders) and all(is_finished(plan, own, PER_FOLD) for own in begun)


def _places(plan: Plan, n: int) -> dict[str, list[str]]:
    """For each combination, where in the run's folder its `n` runs lie."""
    places = {}
    for name in plan.sweep:
        places[name] = [_place(name, k if plan.folds else None) for k in range(n)]
    return places


def _run_of(plan: Plan) -> Run:
    return Run(plan.folder)


def _run_each(plan: Plan, plans: Sequence[Plan]) -> bool:
    """Run every fold and combination, here or on a cluster; one that fails does not stop the others."""
    if plan.workers or plan.scheduler:
        from brats_helpers.suite.cluster import run_on_cluster

        failed = run_on_cluster(plan, run_member, plans)
    else:
        failed = [own for own in plans if not run_member(own)]
    if failed:
        names = ", ".join(_run_of(own).name for own in failed)
        fail(f"{len(failed)} of {len(plans)} did not finish: {names}; this continues: {plan.command}")
    return not failed


def run_member(plan: Plan) -> bool:
    """Run the notebooks of one fold or combination; return whether all are finished."""
    run = _run_of(plan)
    print(f"{run.name}:", flush=True)
    if not is_finished(plan, run, PER_FOLD):
        begin(plan, run, expected=PER_FOLD)
    return run_stages(plan, run, PER_FOLD)


def _gathering(run: Run, name: str) -> Run:
    """The run that gathers the folds of a combination: one inside `run`, or `run` itself without a sweep."""
    if not name:
        return run
    also = {"folds": shares(run), "unlabelled": read_json(run.splits)["unlabelled"]}
    return member(run, _place(name, None), read_splits(run.splits) | also)


def _place(name: str, fold: int | None) -> str:
    """Where in the run's folder the run of a combination and fold lies."""
    return "/".join([f"sweep/{name}"] * bool(name) + [f"folds/{fold}"] * (fold is not None))


def _plan_of(plan: Plan, run: Run, values: Mapping[str, object]) -> Plan:
    """The plan for a run inside the run, with the values of its combination."""
    return plan.with_values({**values, "run_dir": str(run.folder)}, folder=run.folder, stages=PER_FOLD)


def shares(run: Run) -> list[dict[str, list[str]]]:
    """Return each fold's train, val and test patients, as 00_setup split them."""
    return list(map(parts_of, read_json(run.splits)["folds"]))


def member(run: Run, name: str, parts: Mapping[str, list[str]]) -> Run:
    """Return the run `name` inside the folder of `run`, on the same prepared patients, split as `parts`.

    Its results are kept, but become outdated if its patients were split differently.
    """
    own = Run(run.folder / name)
    content = read_json(run.splits)
    check_disjoint(parts, content.get("groups", {}))
    content.pop("folds", None)
    content |= {"unlabelled": []} | parts
    if read_json(own.splits, None) != content:
        patients = {part: len(content[part]) for part in (*PARTS, "unlabelled")}
        made = own.manifest.get("stages", {})
        outdated = {stage: entry | {"status": OUTDATED} for stage, entry in made.items()}
        own.record(**run.manifest | {"patients": patients, "stages": outdated})
        write_json(own.splits, content)
    places = {name: run.manifest[name] for name in ("asked", "data", "origin", "cache_dir") if name in run.manifest}
    if own.manifest != own.manifest | places:
        own.record(**places)
    return own


def _gather_and_record(plan: Plan, run: Run, members: Sequence[Run]) -> None:
    begin(plan, run, **({} if run.expected != list(ONCE) else {"expected": PER_FOLD}))
    how = plan.values[PER_FOLD[-1]]
    gather(run, members, **{key: how[key] for key in ("device", "flips", "convention", "labels")})
    made = run.manifest.get("stages", {})
    for stage in PER_FOLD:
        seconds = sum(own.manifest["stages"][stage]["seconds"] for own in members)
        made[stage] = {
            "status": FINISHED,
            "key": plan.keys[stage],
            "seconds": round(seconds, 1),
            "parameters": plan.values[stage],
        }
    run.record(stages=made)


def gather(run: Run, folds: Sequence[Run], *, device: str, flips: bool, convention: str, labels: str) -> None:
    """Combine the results of the folds in the files that notebook 03 writes for a single run.

    `metrics.json` and `cases.csv`: every labelled patient, scored by the network of the fold that never saw it.
    `predictions/`: those label maps. Each unlabelled patient gets one from the averaged networks of all folds and the
    median of the rules that the folds chose; these are also packed for submission.

    Args:
        run: the cross-validation.
        folds: its finished folds.
        device, flips, convention, labels: as in notebook 03.
    """
    scores, filled, by_fold = {}, {}, [read_json(fold.metrics) for fold in folds]
    leakage = sorted({case_id for metrics in by_fold for case_id in metrics["leakage"]})
    unlabelled = read_json(run.splits)["unlabelled"]
    with whole_folder(run.predictions) as predictions:
        if leakage:  # where `score` looks for it
            write_json(predictions / "leakage.json", leakage)
        for fold, metrics in zip(folds, by_fold, strict=True):
            scores |= metrics["cases"]
            filled |= metrics.get("filled", {})
            for case_id in metrics["cases"]:
                shutil.copy(fold.predictions / f"{case_id}_seg.nii.gz", predictions)
        if unlabelled:
            from brats_helpers.evaluation.inference import load_networks, predict_files, write_submission
            from brats_helpers.evaluation.postprocess import Rules, read_rules
            from brats_helpers.machine import choose_device

            chosen = [asdict(read_rules(fold.postprocess)) for fold in folds]
            rules = Rules(**{name: median_low(map(itemgetter(name), chosen)) for name in chosen[0]})
            networks = load_networks([fold.best for fold in folds], device=choose_device(device))
            how = {"flips": flips, "rules": rules, "numbering": labels}
            cases = load_parts(run)["unlabelled"]
            written = {case.id: path for case, *_, path in predict_files(networks, cases, predictions, **how)}
            write_submission(run.emptied(run.submission), written)

    metrics = collect(
        scores,
        convention=rule_for(convention, cases=scores).name,
        simulated=run.manifest["simulated"],
        not_scored=dict.fromkeys(unlabelled, "unlabelled"),
        leakage=leakage,
    )
    metrics |= {"labels": {"predictions": labels}, "filled": filled}
    write_cases_csv(run.cases_csv, metrics)
    write_json(run.metrics, metrics)


def compare_by_validation(run: Run, places: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Write and return `sweep.csv`: for each combination the validation Dice of its best epoch, averaged over folds.

    Test patients must not decide: scores that were used to choose a combination are too optimistic to report for it.

    Args:
        run: the sweep.
        places: by the name of a combination, the folders of its folds inside the run's folder.
    """
    dice = {}
    for name, own_places in places.items():
        histories = [pd.read_csv(run.folder / place / "history.csv").to_dict("records") for place in own_places]
        dice[name] = [max(map(mean_dice_of_epoch, history)) for history in histories]
    table = pd.DataFrame(dice).T.rename(columns="fold {}".format)
    mean = table.mean(axis=1)
    table = table if len(table.columns) > 1 else table[[]]
    table.insert(0, "validation Dice of WT, TC and ET", mean)
    table = table.sort_values(table.columns[0], ascending=False).round(4)
    with whole_file(run.folder / "sweep.csv") as file:
        table.to_csv(file, index_label="combination")
    return table
