"""Reload a run's patients."""

import json
from pathlib import Path

from brats_helpers.data.audit import examine
from brats_helpers.data.cache import Packed, prepare
from brats_helpers.data.cases import Case, survey
from brats_helpers.data.sources import find_data
from brats_helpers.data.splits import read_splits
from brats_helpers.labels import DataError
from brats_helpers.runs import Run


class ChangedError(DataError):
    """The patients are no longer those that were split."""


def load_parts(run: Run) -> dict[str, list[Case]]:
    """The run's patients as 00_setup split them: lists of cases under `train`, `val`, `test` and `unlabelled`.

    Raises:
        RunError: 00_setup has not run.
        ChangedError: the patients are no longer those that were split.
        DataError: they are not to be had.
    """
    content = json.loads(run.need(run.splits, "00_setup").read_text())
    parts = read_splits(run.splits) | {"unlabelled": content["unlabelled"]}
    manifest, before = run.manifest, content.get("contents", {})
    root = manifest["data"]
    if not Path(root).is_dir() and "asked" in manifest:  # a mount of a machine that was given back
        root = find_data(**manifest["asked"]).root
    found = survey(root, manifest["modalities"])
    cases = {case.id: case for case in found.complete(skip_incomplete=True)}
    read = [case for case in cases.values() if before.get(case.id)]
    now = dict.fromkeys(cases) | {
        case_id: facts["content"]
        for case_id, facts in examine(found, read, workers=1, cache_dir=Path(manifest["cache_dir"])).items()
    }
    for what, ids in {
        "is gone": before.keys() - now.keys(),
        "is new": now.keys() - before.keys(),
        "has other voxels": {case_id for case_id in before.keys() & now.keys() if before[case_id] != now[case_id]},
    }.items():
        if ids:
            raise ChangedError(
                f"{manifest['data']} changed since {run.splits} was written: {min(ids)} {what}. Run 00_setup again."
            )
    return {name: [cases[case_id] for case_id in ids] for name, ids in parts.items()}


def load_prepared(run: Run, part: str) -> list[Packed]:
    """The prepared scans of one part of the run's patients; what 00_setup prepared is opened, not made again."""
    return prepare(load_parts(run)[part], cache_dir=Path(run.manifest["cache_dir"]), workers=1)
