"""The command line: `python -m brats_helpers run | phantom | predict | score | report`."""

import argparse
import os
import sys
from pathlib import Path

from brats_helpers import suite
from brats_helpers.log import done, fail, warn


def main(argv: list[str]) -> int:
    """Run the verb that `argv` names and return the exit code: 0, 1 for an error, 2 for wrong arguments."""
    if argv[:1] == ["run"]:
        return suite.main(argv[1:])
    options = _parser().parse_args(argv)

    from brats_helpers.cases import DataError
    from brats_helpers.runs import RunError

    try:
        options.verb(options)
    except (DataError, RunError, OSError, RuntimeError) as error:
        fail(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m brats_helpers", description="Brain-tumour segmentation on BraTS data.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser("run", help="run the notebooks in order, as ./run_all.sh does", add_help=False)

    verb = verbs.add_parser("phantom", help="write simulated patients", description="Write simulated patients.")
    verb.add_argument("out", metavar="OUT", type=Path, help="folder for the patients' folders")
    verb.add_argument("--cases", metavar="N", type=int, required=True, help="how many patients")
    verb.add_argument("--seed", metavar="S", type=int, default=0, help="the same seed, the same patients; default: 0")
    verb.set_defaults(verb=_phantom)

    verb = verbs.add_parser(
        "predict",
        help="segment patients with a trained network",
        description="Segment patients with a trained network: DIR/<case>_seg.nii.gz, in each patient's own geometry.",
    )
    verb.add_argument("cases", metavar="CASE", type=Path, nargs="+", help="a patient's folder, or a folder of them")
    verb.add_argument("--checkpoint", metavar="CKPT", type=Path, required=True, help="runs/NAME/checkpoints/best.pt")
    verb.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the segmentations")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    verb.add_argument("--flips", action="store_true", help="average over mirror images too: better, and slower")
    verb.set_defaults(verb=_predict)

    verb = verbs.add_parser(
        "score",
        help="score segmentations against references",
        description="Score segmentations against references: Dice and HD95 of WT, TC and ET, per patient.",
    )
    verb.add_argument("pred_dir", metavar="PRED_DIR", type=Path, help="folder of <case>_seg.nii.gz")
    verb.add_argument("truth_dir", metavar="TRUTH_DIR", type=Path, help="folder of patients with their segmentations")
    verb.add_argument(
        "--convention", choices=("brats2020", "brats2023"), default="brats2020", help="default: brats2020"
    )
    verb.add_argument("--json", metavar="FILE", type=Path, help="write all of it, as metrics.json holds it")
    verb.set_defaults(verb=_score)

    verb = verbs.add_parser(
        "report",
        help="write a run's report again",
        description="Write report/index.html and validation.md of a run from what is in its folder now.",
    )
    verb.add_argument("run", metavar="RUN", type=Path, help="the run's folder, runs/NAME")
    verb.set_defaults(verb=_report)
    return parser


def _phantom(options: argparse.Namespace) -> None:
    from brats_helpers.phantom import make_cases

    cases = make_cases(options.out, n_cases=options.cases, seed=options.seed, workers=os.cpu_count())
    done(f"{len(cases)} simulated patients in {options.out}")


def _predict(options: argparse.Namespace) -> None:
    from brats_helpers.inference import predict_folders

    written = predict_folders(
        options.checkpoint, options.cases, options.out, device=options.device, flips=options.flips
    )
    done(f"{len(written)} segmentations in {options.out}")


def _score(options: argparse.Namespace) -> None:
    from brats_helpers.cases import REGIONS, DataError
    from brats_helpers.files import write_json
    from brats_helpers.metrics import score_folders
    from brats_helpers.phantom import is_simulated

    scores = score_folders(
        options.pred_dir,
        options.truth_dir,
        convention=options.convention,
        simulated=is_simulated(options.truth_dir),
    )
    for case, reason in scores["not_scored"].items():
        warn(f"{case} is not scored: {reason}")
    if not scores["cases"]:
        raise DataError(f"no patient of {options.truth_dir} has a prediction in {options.pred_dir}: nothing is scored.")
    rows = scores["cases"] | {
        "mean": {region: {m: v["mean"] for m, v in scores["summary"][region].items()} for region in REGIONS}
    }
    width = max(map(len, rows))
    print(f"{'':{width}}" + "".join(f"{region + ' Dice':>11}{region + ' HD95 mm':>13}" for region in REGIONS))
    for case, row in rows.items():
        figures = "".join(f"{row[region]['dice']:11.3f}{row[region]['hd95_mm']:13.2f}" for region in REGIONS)
        print(f"{case:{width}}{figures}")
    print(("simulated patients; " if scores["simulated"] else "") + scores["convention"])
    if options.json:
        write_json(options.json, scores)
        done(str(options.json))


def _report(options: argparse.Namespace) -> None:
    from brats_helpers.report import build_report
    from brats_helpers.runs import Run, RunError

    if not (options.run / "manifest.json").exists():
        raise RunError(f"{options.run} is no run: there is no manifest.json in it. Give the folder runs/NAME.")
    done(str(build_report(Run(options.run))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
