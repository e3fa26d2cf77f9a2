"""The command line: `python -m brats_helpers VERB ...`; `--help` lists the verbs."""

import argparse
import os
import sys
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from brats_helpers.log import done, fail, fit_terminal, warn
from brats_helpers.suite import run as suite

LABELS_HELP = (
    "how the masks are numbered: brats2020, brats2023, msd (Decathlon, nnU-Net), brats2012, gli2024, ped, met2025,"
    " menrt; default: auto, by names, numbers and anatomy"
)


def main(argv: list[str]) -> int:
    """Run the verb that `argv` names and return the exit code.

    0: success. 1: an error, or a patient that `score` or `predict` had to skip. 2: wrong arguments.
    """
    fit_terminal()
    if argv[:1] == ["run"]:
        return suite.main(argv[1:])
    options = _parser().parse_args(argv)

    from brats_helpers.labels import DataError
    from brats_helpers.runs import RunError

    try:
        return options.verb(options) or 0
    except (DataError, RunError, OSError, RuntimeError, FloatingPointError, MemoryError, ValueError) as error:
        fail(str(error))
        return 1
    except ModuleNotFoundError as error:
        activate = Path(__file__).parents[1] / ".venv" / "bin" / "activate"
        way = f"activate the suite's environment (source {activate})" if activate.exists() else "run ./run_all.sh once"
        fail(f"{error.name} is not installed in {sys.executable}: {way}, or pip install {error.name}.")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m brats_helpers", description="Brain-tumour segmentation on BraTS data.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser("run", help="run the notebooks in order, as ./run_all.sh does", add_help=False)

    for add in (_add_train, _add_check, _add_phantom, _add_predict, _add_score, _add_compare, _add_export, _add_report):
        add(verbs)
    return parser


def _verb(verbs, call: Callable, summary: str, details: str = "", *, run: bool = False) -> Callable:
    """Add the verb that `call` is named after; return its `add_argument`. `run`: its argument is a run's folder."""
    description = f"{summary[0].upper()}{summary[1:]}{details or '.'}"
    verb = verbs.add_parser(call.__name__.lstrip("_"), help=summary, description=description)
    verb.set_defaults(verb=call)
    if run:
        verb.add_argument("run", metavar="RUN", type=Path, help="the run's folder, runs/NAME")
    return verb.add_argument


def _add_fill_missing(add: Callable) -> None:
    add("--fill-missing", action="store_true", help="replace a missing modality by background")


def _add_json(add: Callable, content: str) -> None:
    add("--json", metavar="FILE", type=Path, help=f"write {content} to FILE")


def _add_train(verbs) -> None:
    details = ". This is one of the processes of torchrun or `accelerate launch`."
    _verb(verbs, _train, "train a run that notebook 02 began, in several processes", details, run=True)


def _add_check(verbs) -> None:
    details = "; nothing is written or renamed there. Exit code: 0 no errors, 1 errors, 2 it could not run."
    add = _verb(verbs, _check, "look for faults in a folder of patients", details)
    add("data", metavar="DATA", type=Path, help="a folder of patients")
    add("--modalities", metavar="LIST", help="what every patient needs; default: flair,t1,t1ce,t2")
    add("--labels", metavar="NAME", default="auto", help=LABELS_HELP)
    _add_fill_missing(add)
    _add_json(add, "every finding and the content of each file")
    add("--workers", metavar="N", type=int, default=os.cpu_count(), help="patients read at once")


def _add_phantom(verbs) -> None:
    add = _verb(verbs, _phantom, "write simulated patients")
    add("out", metavar="OUT", type=Path, help="folder for the patients' folders")
    add("--cases", metavar="N", type=int, required=True, help="how many patients")
    add("--seed", metavar="S", type=int, default=0, help="the same seed gives the same patients; default: 0")
    add(
        "--variety",
        choices=["typical", "broad"],
        default="typical",
        help="broad: more low-grade tumours, flawed images and unusual contrasts, for pretraining; default: typical",
    )


def _add_predict(verbs) -> None:
    details = (
        ": DIR/<case>_seg.nii.gz, in each patient's own geometry. Patients that the network has seen in training are"
        " skipped, unless --allow-leakage is given. A patient with a fault is skipped, too. Exit code 1 if any was"
        " skipped."
    )
    add = _verb(verbs, _predict, "segment patients with a trained network", details)
    add("cases", metavar="CASE", type=Path, nargs="+", help="a patient's folder, or a folder of them")
    add(
        "--checkpoint",
        metavar="CKPT",
        type=Path,
        default=[],
        action="append",
        dest="checkpoints",
        help="runs/NAME/checkpoints/best.pt; given more than once: the networks' probabilities are averaged; default:"
        " the packaged network, trained on simulated patients, which does without any of the modalities",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the segmentations")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--flips", action="store_true", help="average over mirror images too: better, and slower")
    add(
        "--labels",
        metavar="NAME",
        default="auto",
        help="label numbers to write: 2020 (enhancing tumour is 4), 2023 (it is 3), msd, brats2012, gli2024, ped, ..."
        " default: auto, those of the patient's data set by its ID, else 2020",
    )
    add("--postprocess", metavar="FILE", type=Path, help="apply the rules that a run chose: runs/NAME/postprocess.json")
    add("--soft", metavar="DIR", type=Path, help="also write DIR/<case>_soft.nii.gz: each class's probability")
    add(
        "--allow-leakage",
        action="store_true",
        help="predict patients that the network has seen, too, and name them in DIR/leakage.json",
    )
    _add_fill_missing(add)


def _add_score(verbs) -> None:
    details = (
        ": Dice, HD95, surface Dice and lesion F1 of WT, TC and ET, per patient. Nothing is resampled, moved or"
        " relabelled. Exit code 1 if a patient cannot be scored because the prediction is missing, has no patient in"
        " TRUTH_DIR, lies in another grid, cannot be read, or comes from a network that had seen the patient; all"
        " others are scored. A patient without a reference is named, but is no error."
    )
    add = _verb(verbs, _score, "score segmentations against references", details)
    add("pred_dir", metavar="PRED_DIR", type=Path, help="folder of <case>_seg.nii.gz, or of one folder per patient")
    add("truth_dir", metavar="TRUTH_DIR", type=Path, help="folder of patients with their segmentations")
    add(
        "--convention",
        choices=("brats2020", "brats2023", "brats2026"),
        default="brats2020",
        help="the challenge's rules by year; default: brats2020",
    )
    add("--labels", metavar="NAME", default="auto", help=f"of both folders; {LABELS_HELP}")
    add("--truth-labels", metavar="NAME", default="auto", help="the same for the references, if theirs differ")
    add(
        "--task",
        choices=("GLI", "SSA", "PED", "MEN", "MET"),
        help="the task whose rules count; default: as in the patients' names (BraTS-MET-...), else GLI",
    )
    add(
        "--pair",
        choices=("names", "digits"),
        default="names",
        help="digits: where names differ, pair by the numbers in them: SEG-00217-000 is BraTS-MET-00217-000",
    )
    _add_json(add, "the scores, in the form of metrics.json,")
    add("--allow-leakage", action="store_true", help="also score predictions of networks that had seen the patient")


def _add_compare(verbs) -> None:
    details = ": mean of B minus A over the patients that both scored, with its 95 % bootstrap interval over patients."
    add = _verb(verbs, _compare, "compare two runs patient by patient", details)
    add("a", metavar="RUN_A", type=Path, help="a run's folder, or a file in the form of metrics.json")
    add("b", metavar="RUN_B", type=Path, help="the other one")
    _add_json(add, "the differences of every structure and metric")


def _add_export(verbs) -> None:
    details = (
        " without pickle: weights, settings, provenance, scores and model card. With --onnx, an ONNX file with a"
        " description in JSON beside it. predict --checkpoint takes all of them."
    )
    add = _verb(verbs, _export, "write a run's network as one file", details, run=True)
    add(
        "--out",
        metavar="FILE",
        type=Path,
        required=True,
        help="FILE.zip; FILE.safetensors, with the card beside it in FILE.md; or FILE.onnx with --onnx",
    )
    add("--onnx", action="store_true", help="write ONNX, for use without torch and without this suite")
    add("--half", action="store_true", help="store the weights in half precision: half the size")
    add(
        "--real",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="add scores on real patients to file and card, as benchmarks/packaged.py --json writes them",
    )


def _add_report(verbs) -> None:
    details = ": report/index.html and validation.md, from the files that its folder holds now."
    _verb(verbs, _report, "write a run's report again", details, run=True)


def _train(options: argparse.Namespace) -> None:
    from brats_helpers.runs import Run, RunError
    from brats_helpers.training.launch import train_run

    if not options.run.is_dir():
        raise RunError(f"{options.run} is no folder. Give the folder of a run that notebook 02 began, runs/NAME.")
    train_run(Run(options.run))


def _check(options: argparse.Namespace) -> int:
    from brats_helpers.data.audit import audit, excluded, rows
    from brats_helpers.data.cases import Finding, survey
    from brats_helpers.data.numbering import number
    from brats_helpers.files import write_json
    from brats_helpers.labels import MODALITIES, DataError

    try:
        modalities = options.modalities.split(",") if options.modalities else MODALITIES
        found = survey(options.data, modalities, fill_missing=options.fill_missing)
        if not found.cases:
            raise DataError(found.nothing())
        try:
            found = number(found, options.labels)[0]
        except DataError as error:
            if options.labels != "auto":
                raise
            found.findings.setdefault("", []).append(Finding("label-numbering", "error", "", str(error)))
        report = audit(found, found.cases, workers=max(1, options.workers), cache_dir=None)
        if options.json:
            write_json(options.json, report)
    except (DataError, OSError) as error:
        fail(str(error))
        return 2
    say = {"error": fail, "warning": warn, "note": print}
    summary = report["summary"]
    for (severity, code), listed in groupby(rows(report, each=3), key=itemgetter("severity", "code")):
        say[severity](f"{severity} {code}: {summary['codes'][code]:,}")
        for row in listed:
            print("   " + ": ".join(text for text in (row["file"] or row["patient"], row["message"]) if text))
    worst = summary["worst"]
    line = (
        f"{summary['patients']:,} patients: {worst['error']:,} with errors, {worst['warning']:,} with warnings,"
        f" {worst['note']:,} with notes, {worst['clean']:,} without findings"
    )
    (fail if worst["error"] else done)(line)
    unclear = any(finding["severity"] == "error" for finding in report["summary"]["findings"])
    return 1 if excluded(report) or unclear else 0


def _phantom(options: argparse.Namespace) -> None:
    from brats_helpers.data.phantom import make_cases

    how = {"n_cases": options.cases, "seed": options.seed, "variety": options.variety}
    cases = make_cases(options.out, workers=os.cpu_count(), **how)
    done(f"{len(cases)} simulated patients in {options.out}")


def _predict(options: argparse.Namespace) -> int:
    from brats_helpers.evaluation.inference import predict_folders
    from brats_helpers.evaluation.postprocess import NO_RULES, read_rules

    written, skipped = predict_folders(
        options.checkpoints,
        options.cases,
        options.out,
        device=options.device,
        flips=options.flips,
        rules=read_rules(options.postprocess) if options.postprocess else NO_RULES,
        numbering=options.labels,
        soft_dir=options.soft,
        allow_leakage=options.allow_leakage,
        fill_missing=options.fill_missing,
    )
    done(f"{len(written)} segmentations in {options.out}")
    if skipped:
        warn(f"{len(skipped)} skipped: {', '.join(skipped)}")
    return int(bool(skipped))


def _score(options: argparse.Namespace) -> int:
    from brats_helpers.data.phantom import is_simulated
    from brats_helpers.evaluation.folders import score_folders
    from brats_helpers.evaluation.labelling import label_notes
    from brats_helpers.files import write_json
    from brats_helpers.labels import DataError
    from brats_helpers.scoring.scores import scores_table

    scores = score_folders(
        options.pred_dir,
        options.truth_dir,
        convention=options.convention,
        simulated=is_simulated(options.truth_dir),
        allow_leakage=options.allow_leakage,
        task=options.task,
        labels=options.labels,
        truth_labels=options.truth_labels,
        by_digits=options.pair == "digits",
    )
    if options.json:
        write_json(options.json, scores)
    for note in label_notes(scores["labels"]):
        warn(note)
    for case, name in scores.get("paired", {}).items():
        done(f"{case} is paired with {name}")
    for case, reason in scores["not_scored"].items():
        warn(f"{case} is not scored: {reason}")
    if not scores["cases"]:
        raise DataError(
            f"nothing to score: no patient of {options.truth_dir} has a usable prediction in {options.pred_dir}."
        )
    if scores["leakage"]:
        warn(f"the network had seen {', '.join(scores['leakage'])}: these figures say nothing about new patients")
    unlabelled = [reason for reason in scores["not_scored"].values() if reason.startswith(("unlabelled", "extra"))]
    n, total = len(scores["cases"]), len(scores["cases"] | scores["not_scored"]) - len(unlabelled)
    print(scores_table(scores))
    if n < total:
        warn(f"only {n} of {total} patients are scored: the others are not in the mean")
    print(("simulated patients; " if scores["simulated"] else "") + scores["convention"])
    if options.json:
        done(str(options.json))
    return int(any(not reason.startswith("unlabelled") for reason in scores["not_scored"].values()))


def _compare(options: argparse.Namespace) -> None:
    from brats_helpers.files import write_json
    from brats_helpers.labels import REGIONS
    from brats_helpers.scoring.statistics import ENOUGH_PAIRS, compare

    metrics = [_read_metrics(path) for path in (options.a, options.b)]
    result = compare(*metrics)
    for path, other, only in ((options.a, options.b, "only_a"), (options.b, options.a, "only_b")):
        if result[only]:
            warn(f"left out, because {other} has no score for them: {', '.join(result[only])} of {path}")
    if result["n"] < ENOUGH_PAIRS:
        warn(f"only {result['n']} patients in both: with so few, even a gain in every patient may be chance")
    print(f"{options.b} minus {options.a}, {result['n']} patients: mean and 95 % interval")
    print(f"{'':4}{'Dice':^28}{'HD95 mm':^32}".rstrip())
    for region in REGIONS:
        row = [result["differences"][region][metric] for metric in ("dice", "hd95_mm")]
        dice, hd95 = map(_difference, row)
        print(f"{region:4}{dice:^28}{hd95:^32}".rstrip())
    print(("simulated patients; " if result["simulated"] else "") + result["convention"])
    if options.json:
        write_json(options.json, result)
        done(str(options.json))


def _read_metrics(path: Path) -> dict:
    """Read the metrics of a run's folder or file, in the form of metrics.json."""
    from brats_helpers.files import read_json
    from brats_helpers.labels import REGIONS, DataError

    file = path / "metrics.json" if path.is_dir() else path
    try:
        metrics = read_json(file)
        for scores in metrics["cases"].values():
            _ = [scores[region][metric] for region in REGIONS for metric in ("dice", "hd95_mm")]
        _ = [metrics[key] for key in ("convention", "rule", "simulated")]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} holds no metrics ({error}). Run 03_evaluate first, or score --json.") from error
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{file} is not in the form of metrics.json ({what}). Run 03_evaluate first, or score --json."
        ) from error
    if metrics.get("leakage"):
        warn(f"{path}: its network had seen {', '.join(metrics['leakage'])}")
    return metrics


def _difference(found: dict) -> str:
    """Show a mean difference and its interval, or a dash if the rule counts no patient."""
    from brats_helpers.scoring.statistics import interval_text

    if not found["n"]:
        return "-"
    return f"{found['mean_difference']:+.3f} ({interval_text(found['ci95'], found['n'], '+.3f')})"


def _export(options: argparse.Namespace) -> None:
    from brats_helpers.evaluation.export import export_model, export_onnx
    from brats_helpers.labels import DataError

    run = _existing_run(options.run)
    if not options.onnx:
        path = export_model(run, options.out, half=options.half, real=options.real)
    elif options.half or options.real:
        raise DataError("--half and --real go with FILE.zip or FILE.safetensors, not with --onnx.")
    else:
        path = export_onnx(run, options.out)
    done(f"{path}, {path.stat().st_size / 1e6:.1f} MB")


def _existing_run(folder: Path):
    from brats_helpers.runs import Run, RunError

    if not (folder / "manifest.json").exists():
        raise RunError(f"{folder} is no run: there is no manifest.json in it. Give the folder runs/NAME.")
    return Run(folder)


def _report(options: argparse.Namespace) -> None:
    from brats_helpers.report.build import build_report

    done(str(build_report(_existing_run(options.run))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
