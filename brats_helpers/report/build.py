"""Build the report of a run: `report/index.html`, with the validation and the notebooks as pages behind it.

Folds and sweep combinations are runs with reports of their own, which the page links to.

No page loads anything from a network, and its content security policy enforces that: the only script allowed is known
by its hash. Case IDs, paths and titles come from the data and go through jinja's escaping.

The viewer is our own because NiiVue's bundle is 2.9 MB of WebGL, nilearn's viewer has no keyboard, and neither toggles
prediction and reference. Three canvases over 8-bit tiles do, at a third of a megabyte per modality.
"""

import base64
import csv
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from brats_helpers.data.cases import Case
from brats_helpers.data.numbering import predicted_as, predicted_numberings
from brats_helpers.evaluation.card import model_card
from brats_helpers.evaluation.colours import write_colour_tables
from brats_helpers.files import read_json, whole_file
from brats_helpers.labels import REGIONS, STRUCTURES, DataError
from brats_helpers.log import duration, warn
from brats_helpers.report import plots
from brats_helpers.report.notebooks import notebook_body
from brats_helpers.report.review import CAUSES, Review, review
from brats_helpers.report.validation import Mark, tally, validate, write_markdown
from brats_helpers.report.validation.training_lines import best_epoch, predicted_and_measured
from brats_helpers.report.words import compared, next_steps
from brats_helpers.runs import NEEDS, ONCE, PARTS, PER_FOLD, Run
from brats_helpers.scoring.overlap import mean_dice_of_case
from brats_helpers.scoring.statistics import ENOUGH, FEWEST

_PAGES = Path(__file__).with_name("pages")
_IMAGES = {".png": "image/png", ".gif": "image/gif"}
_TERMS = {
    "BraTS": "the yearly challenge in brain-tumour segmentation; its rules and label names are used here",
    "modality": "a kind of MRI scan: FLAIR and T2 show swelling, T1 anatomy, T1ce what takes up contrast agent",
    "reference": "the outline to compare with: drawn by specialists; known exactly in simulated patients",
    "ET": "enhancing tumour, which takes up contrast agent: a region and a label",
    "NCR": "necrotic and non-enhancing core: a label",
    "ED": "oedema, the swelling around the core: a label",
    "TC": "tumour core, a region: NCR and ET",
    "WT": "whole tumour, a region: NCR, ED and ET",
    "Dice": "overlap of prediction and reference, from 0 to 1; higher is better",
    "HD95": "95th percentile of the distances between their surfaces in mm; lower is better",
    "surface Dice": "share of both surfaces within a tolerance of each other; with 1 mm voxels, a tolerance of 0.5 mm"
    " accepts only edges that coincide",
    "lesion F1": "2 TP / (2 TP + FP + FN) over separate pieces; it is low beside a high Dice where small pieces are"
    " missed or invented, and says little about NCR and ED",
    "95 % interval": "range that likely holds the mean over many such patients, for this one training",
    "lesion-wise": "every lesion counts the same; a missed or false lesion counts as 0, so stray components cost most",
    "best, median, worst": "patients ranked by the mean Dice of WT, TC and ET",
    "calibration error": "mean gap between predicted probability and observed frequency; 0 is perfect",
    "entropy": "how uncertain the network is about a voxel; 0 is certain",
}


def fresh_report(run: Run) -> Path:
    """Return the run's report, rebuilding it only if the run or one of its folds has changed."""
    reports = [(own.report, _newest(own)) for own in (run, *run.folds)]
    if all(report.exists() and report.stat().st_mtime_ns >= newest for report, newest in reports):
        return run.report
    return build_report(run, inner=fresh_report)


def _newest(run: Run) -> int:
    """When the files that a report is made from were last written, in ns."""
    paths = (run.folder / "manifest.json", run.history, run.metrics, run.folder / "sweep.csv")
    return max((path.stat().st_mtime_ns for path in paths if path.exists()), default=0)


def build_report(run: Run, *, inner: Callable[[Run], Path] | None = None) -> Path:
    """Build the report of a run from what its folder holds so far. Empty sections say what is missing.

    Args:
        run: any run, including a fold of a cross-validation or a combination of a sweep.
        inner: builds the reports of its folds and combinations; by default this function.

    Returns:
        `report/index.html` of the run. `validation.md` and the figures that no notebook draws are written as well.
    """
    newest = _newest(run)
    manifest, metrics = run.manifest, read_json(run.metrics, {})
    start = manifest.get("encoder_weights")
    simulated = bool(metrics.get("simulated", manifest.get("simulated", False)))
    reviewed = review(run, metrics)
    _draw(run, metrics, reviewed, simulated=simulated)
    lines = validate(run, reviewed)
    best, failed = _best(run), len({failure.case for failure in reviewed.failures})
    write_markdown(run.folder / "validation.md", run.name, lines, simulated=simulated)
    _write_card(run)
    if run.predictions.exists():
        write_colour_tables(run.folder, predicted_numberings(metrics, own=manifest.get("labels")))

    pages = _templates()
    run.report.parent.mkdir(parents=True, exist_ok=True)
    common = {"name": run.name, "simulated": simulated}
    notebooks = sorted(run.notebooks.glob("*.ipynb"))
    for path in notebooks:
        body, highlighting = notebook_body(path, [view.name for view in run.figures.glob(f"{path.stem[:2]}_*.html")])
        page = pages.get_template("notebook.html")
        page = page.render(page=path.stem, body=body, highlighting=highlighting, **common)
        _write(run.report.parent / f"{path.stem}.html", page)

    by_heading = [(heading, list(own)) for heading, own in groupby(lines.values(), attrgetter("heading"))]
    page = pages.get_template("validation.html").render(headings=by_heading, tally=tally(lines), **common)
    _write(run.report.parent / "validation.html", page)

    script = (_PAGES / "report.js").read_text("utf-8")
    page = pages.get_template("index.html").render(
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        pages=[path.stem for path in notebooks],
        tally=tally(lines),
        doubts=[line for line in lines.values() if line.mark in (Mark.PARTLY, Mark.FAILED)],
        colours=plots.COLOURS,
        figures=_figures(run),
        missing={stage: _missing(run, stage, manifest.get("stages", {})) for stage in NEEDS},
        metrics=metrics,
        structures=[name for name in STRUCTURES if name in metrics.get("summary", {})],
        regions=list(REGIONS),
        enough=ENOUGH,
        fewest=FEWEST,
        terms=_TERMS,
        best=best,
        against=compared(metrics),
        steps=next_steps(metrics, best=best, failed=failed, parts=bool(run.folds), start=start),
        stopped=lines["training-stopped"],
        farthest=_farthest(metrics),
        patients=_patients(run, metrics),
        viewer=_viewer(run, metrics, reviewed),
        answers=read_json(run.answers, {}),
        folds=_folds(run, inner or build_report),
        sweep=_sweep(run, inner or build_report),
        outer=(run.folder.parent.parent / "manifest.json").exists() and run.expected == list(PER_FOLD),
        review=reviewed,
        causes=CAUSES,
        audit=_audit(run, manifest),
        shared_out=_shared_out(run),
        manifest=manifest,
        compared=predicted_and_measured(manifest),
        duration=duration,
        about={
            key: value
            for key, value in manifest.items()
            if key not in ("stages", "versions", "preflight", "asked") and value not in ({}, [])
        },
        **common,
    )
    _write(run.report, page)
    os.utime(run.report, ns=(newest, newest))  # files that arrive during the build are newer, see `fresh_report`
    return run.report


def _templates() -> Environment:
    pages = Environment(loader=FileSystemLoader(_PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"plain": _plain, "number": _number, "interval": _interval, "code": _code}
    pages.tests["match"] = str.startswith
    return pages


def _write_card(run: Run) -> None:
    """Write `model_card.md` for a run that has a network."""
    try:
        card = model_card(run)
    except (DataError, KeyError) as error:  # no network yet, or a damaged one, which the validation names
        if run.best.exists():
            warn(f"no model card: {error}")
        return
    _write(run.folder / "model_card.md", card)


def _write(path: Path, page: str) -> None:
    with whole_file(path) as file:
        file.write(page)


def _missing(run: Run, stage: str, stages: Mapping[str, Mapping]) -> str:
    """What the report says about an unfinished stage; empty for a finished one."""
    status = stages.get(stage, {}).get("status")
    left = {"00_setup": run.splits, "02_train": run.history, "03_evaluate": run.metrics}.get(stage)
    if status == "outdated" or (stage == "03_evaluate" and run.outdated):
        return f"{stage} is out of date: this section shows results of an earlier network or split. Run it again."
    by_hand = left.exists() if left else any(run.figures.glob(f"{stage[:2]}_*"))
    if status == "finished" or (status is None and by_hand):
        return ""
    if stage not in run.expected:
        once, each = ", ".join(ONCE), ", ".join(PER_FOLD)
        shared = f"a cross-validation or sweep runs {once} once and {each} for each training"
        return f"{stage} does not belong to this run: {shared}."
    if status is None:
        how = run.command(stage[:2]) if stages else "its notebook"
        how = run.manifest["command"] if run.manifest.get("shared") else how
        return f"{stage} has not run yet: run {how} to fill this section."
    return f"{stage} is not finished ({status}): this section shows what it has written so far."


def _draw(run: Run, metrics: Mapping, reviewed: Review, *, simulated: bool) -> None:
    """Draw the figures that no notebook draws: volumes, and the folds together."""
    figures, cases = {}, metrics.get("cases", {})
    if any("volume_ml" in scores.get("WT", {}) for scores in cases.values()):
        figures["03_volumes"] = plots.volume_agreement(metrics, simulated=simulated)
    if folds := _scored_folds(run):
        scored = {f"fold {own.folder.name}": own for own in folds if own.history.exists() and own.metrics.exists()}
        if scored:
            histories = {name: pd.read_csv(own.history) for name, own in scored.items()}
            by_fold = {name: read_json(own.metrics) for name, own in scored.items()}
            headline = f"{len(scored)} of {len(read_json(run.splits)['folds'])} folds"
            figures["02_folds"] = plots.comparison(histories, by_fold, headline=headline, simulated=simulated)
        if cases:
            figures["03_scores"] = plots.score_distributions(metrics, simulated=simulated)
            figures["03_patients"] = plots.patient_dice(metrics, simulated=simulated)
        if known := {case_id: cases[case_id] for case_id in reviewed.cases}:
            shown = metrics | {"cases": known}
            how = {"modality": _shown_first(reviewed.cases[next(iter(known))]), "simulated": simulated}
            figures["03_overlays"] = plots.overlays([*reviewed.cases.values()], run.predictions, shown, **how)
    for name, figure in figures.items():
        plots.save_figure(figure, run.figures / f"{name}.png")


def _shown_first(case: Case) -> str:
    """The modality to show first: T1ce if the patient has it."""
    return "t1ce" if "t1ce" in case.images else next(iter(case.images))


def _folds(run: Run, inner: Callable[[Run], Path]) -> list[dict]:
    """A row for each fold of a cross-validation, with a link to its report."""
    rows = []
    for own in _scored_folds(run):
        manifest, summary, best = own.manifest, read_json(own.metrics, {}).get("summary", {}), _best(own)
        rows.append(
            {
                "name": own.folder.name,
                "link": _link(run, own.folder, inner),
                "patients": manifest["patients"],
                "best": best.get("epoch"),
                "validation": best.get("dice"),
                "dice": {region: summary.get(region, {}).get("dice", {}).get("mean") for region in REGIONS},
                "seconds": sum(entry.get("seconds") or 0 for entry in manifest["stages"].values()),
            }
        )
    return rows


def _best(run: Run) -> dict:
    """The best epoch of the training, its mean validation Dice, and how many epochs there are; empty without any."""
    history = pd.read_csv(run.history).to_dict("records") if run.history.exists() else []
    return dict(zip(("epoch", "dice"), best_epoch(history), strict=True), epochs=len(history)) if history else {}


def _sweep(run: Run, inner: Callable[[Run], Path]) -> dict:
    """The rows of `sweep.csv`, each with a link to the report of its combination."""
    if not (path := run.folder / "sweep.csv").exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    rows = [(name, _link(run, run.folder / "sweep" / name, inner), list(map(float, dice))) for name, *dice in rows]
    return {"head": head, "rows": rows}


def _link(run: Run, folder: Path, inner: Callable[[Run], Path]) -> str | None:
    """The link from the report of `run` to that of the run in `folder`, which `inner` builds; None if that fails."""
    if not (folder / "manifest.json").exists():
        return None
    try:
        return quote(f"../{inner(Run(folder)).relative_to(run.folder).as_posix()}")
    except Exception as error:  # still running elsewhere, or a full disk: this report is built all the same
        warn(f"the report of {folder} failed: {error}")
        return None


def _scored_folds(run: Run) -> list[Run]:
    """The folds whose scores are those of `run`; none if a later sweep replaced them."""
    return run.folds if "03_evaluate" in run.expected else []


def _shared_out(run: Run) -> dict[str, list[str]]:
    """The patients of each part; in a cross-validation, of each fold's test part."""
    splits = read_json(run.splits, {})
    parts = {part: splits.get(part, []) for part in PARTS}
    if _scored_folds(run):
        parts = {f"tested by fold {k}": fold["test"] for k, fold in enumerate(splits["folds"])}
    return {part: ids for part, ids in (parts | {"unlabelled": splits.get("unlabelled", [])}).items() if ids}


def _figures(run: Run) -> dict[str, dict[str, str]]:
    """Every image of the run by name: a data URI, and the title stored in the file.

    The validation names those that cannot be read.
    """
    from PIL import Image

    figures = {}
    for path in sorted(run.figures.glob("*")):
        if path.suffix in _IMAGES:
            try:
                with Image.open(path) as image:
                    title = image.info.get("Title") or image.info.get("comment", b"").decode() or path.stem
            except OSError:
                continue
            figures[path.name] = {"src": _data_uri(path.read_bytes(), _IMAGES[path.suffix]), "title": title}
    return figures


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _patients(run: Run, metrics: Mapping) -> list[dict]:
    """The scored patients, the lowest mean Dice first."""
    cases = metrics.get("cases", {})
    return [
        {
            "id": case_id,
            "scores": scores,
            "file": f"{quote(case_id)}_seg.nii.gz" if (run.predictions / f"{case_id}_seg.nii.gz").exists() else None,
        }
        for case_id, scores in sorted(cases.items(), key=lambda item: mean_dice_of_case(item[1]))
    ]


def _farthest(metrics: Mapping) -> dict:
    """The largest HD95 of any region, with its patient and region; empty without any."""
    found = [
        (scores[region]["hd95_mm"], case_id, region)
        for case_id, scores in metrics.get("cases", {}).items()
        for region in REGIONS
        if math.isfinite(scores.get(region, {}).get("hd95_mm") or math.nan)
    ]
    return dict(zip(("mm", "id", "region"), max(found), strict=True)) if found else {}


def _viewer(run: Run, metrics: Mapping, reviewed: Review) -> dict:
    """What the page's viewer draws: the worst, the median and the best patient, and the regions."""
    patients = []
    ranks = plots.best_median_worst(metrics["cases"]) if reviewed.cases else {}
    for rank, case_id in reversed(ranks.items()):
        if case_id not in reviewed.cases:
            continue
        case = reviewed.cases[case_id]
        tiles = plots.viewer_tiles(case, run.predictions / f"{case_id}_seg.nii.gz", predicted_as(case, metrics))
        dice = ", ".join(f"{region} {_number(metrics['cases'][case_id][region]['dice'], 2)}" for region in REGIONS)
        tiles["images"] = {name: _data_uri(content, "image/webp") for name, content in tiles["images"].items()}
        tiles["labels"] = _data_uri(tiles["labels"], "image/png")
        names = {name: plots.PRINTED[name] for name in case.images}
        about = {"id": case_id, "rank": rank, "dice": dice, "modality": _shown_first(case), "printed": names}
        patients.append(about | tiles)
    regions = [
        {
            "name": name,
            "classes": list(classes),
            "colour": plots.COLOURS[name],
            "rgb": list(bytes.fromhex(plots.COLOURS[name].removeprefix("#"))),
        }
        for name, classes in REGIONS.items()
    ]
    return {"patients": patients, "regions": regions}


def _audit(run: Run, manifest: Mapping) -> dict:
    """The audit's findings as rows, and how many patients were found, read and left out."""
    audit = read_json(run.audit, {})
    rows = [
        {"case": case_id, **finding}
        for case_id, case in audit.get("cases", {}).items()
        for finding in case.get("findings", ())
    ]
    read = audit.get("summary", {}).get("read", 0)
    return {
        "patients": len(audit.get("cases", {})),
        "read": read,
        "findings": rows,
        "excluded": manifest.get("excluded", {}),
    }


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval(ends: list[float] | None, digits: int = 3) -> str:
    return f"{_number(ends[0], digits)} to {_number(ends[1], digits)}" if ends else "–"


def _code(text: str) -> Markup:
    """Text in which words in backticks are code, which is not broken at a line's end."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _plain(value) -> str:
    """Any value of a JSON file as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)
