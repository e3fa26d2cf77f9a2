"""The plan of a command: options, profile and parameters, checked before anything runs."""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from brats_helpers.files import read_json
from brats_helpers.runs import NEEDS, ONCE, PER_FOLD
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.parameters import (
    SETTINGS,
    Notebook,
    Parameter,
    UsageError,
    join_settings,
    nearest,
    profiles,
    read_notebooks,
    read_profile,
    read_settings,
)
from brats_helpers.training.settings import NAMED_WEIGHTS

EXIT_CODES = {
    0: "finished, or scored before --time-limit was reached",
    1: "a notebook, the report or Kaggle failed, or --time-limit was reached before the scores",
    2: "wrong arguments; nothing ran",
    130: "stopped",
}
TRAINING_SHARE, RESERVED_SHARE = 0.7, 0.2
"""Shares of a time limit: the most that notebook 02 may train for, and what it must leave to the later notebooks."""
KAGGLE_MINUTES = 690
"""The default time limit on Kaggle, which ends a notebook after 12 hours and drops its results."""
DATA_NAMES = ("phantom", "kaggle", "brats2020", "brats2021", "brats2020-slices")
"""What `--data` takes besides a folder, see `sources.find_data`."""
FILES = ("encoder_weights", "pretrained", "checkpoints")
"""Parameters that may name files."""
Values = Mapping[str, Mapping[str, object]]
"""Parameters by stage and name."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command asks for, checked.

    Attributes:
        root: the checkout.
        folder: of the run.
        stages: the notebooks to run, in order.
        values: every parameter of every stage.
        given: the parameters that do not keep the notebook's own default.
        keys: for each stage, a digest of everything that determines its results.
        time_limit: minutes; 0: none.
        on_kaggle: arguments for `run_all.sh` on Kaggle; empty for a run here.
        agreed: whether `--yes` agreed to the upload.
        folds: of a cross-validation; 0: none.
        sweep: by the name of each combination, the values that it changes; without a sweep one, "", that changes none.
        workers: processes of a local cluster; 0: none.
        scheduler: address, or scheduler file, of a Dask cluster; empty: none.
    """

    root: Path
    folder: Path
    profile: str
    command: str
    stages: Sequence[str]
    values: Values
    given: Values
    keys: Mapping[str, str]
    prepare_only: bool = False
    time_limit: float = 0.0
    log: Path | None = None
    on_kaggle: Sequence[str] = ()
    agreed: bool = False
    folds: int = 0
    sweep: Mapping[str, Mapping] = field(default_factory=lambda: {"": {}})
    workers: int = 0
    scheduler: str = ""

    @property
    def has_members(self) -> bool:
        """Whether folds or a sweep are asked for, each a run of its own inside the run."""
        return bool(self.folds or any(self.sweep))

    def with_values(self, values: Mapping, *, stages: Sequence[str] = tuple(NEEDS), **fields) -> "Plan":
        """Return a copy with `values` for the parameters that the notebooks `stages` declare, and other `fields`.

        `settings` adds to what is set already.
        """
        resolved, given = dict(self.values), dict(self.given)
        for stage in stages:
            own = {key: value for key, value in values.items() if key in resolved[stage]}
            if SETTINGS in own:
                own[SETTINGS] = join_settings(resolved[stage][SETTINGS], own[SETTINGS])
            resolved[stage] = resolved[stage] | own
            given[stage] = given[stage] | own
        return replace(self, values=resolved, given=given, **fields)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="./run_all.sh",
        description="Run the notebooks in order, into runs/NAME/. Repeat the command to continue an interrupted run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--profile", metavar="NAME", help="a set of parameters, see below; default: demo")
    add(
        "--data",
        metavar="FOLDER|NAME",
        help="a folder of patients, or phantom (simulated ones), kaggle (which is brats2020), brats2021,"
        " brats2020-slices",
    )
    add("--run", metavar="NAME|FOLDER", help="folder runs/NAME, or any folder; default: the profile's name")
    add("--only", metavar="02,03", help="only these notebooks, on the results that the run already has")
    add(
        "-p",
        nargs=2,
        metavar=("KEY", "VALUE"),
        action="append",
        default=[],
        dest="pairs",
        help="a parameter, for every notebook that declares it; lists are comma-separated; repeatable",
    )
    add("--prepare-only", action="store_true", help="write the notebooks with their parameters, run none")
    add(
        "--time-limit",
        metavar="MINUTES",
        type=float,
        default=0.0,
        help="for the whole run: training ends early enough to score; a notebook still running at the limit is stopped",
    )
    add("--log", metavar="FILE", type=Path, help="append what is printed to FILE")
    add("--on", choices=["kaggle"], help="run as a private notebook on Kaggle's GPUs and fetch the results")
    add("--yes", action="store_true", help="with --on: upload without asking")
    add("--folds", metavar="N", type=int, help="N-fold cross-validation: 02 and 03 for each fold")
    add(
        "--sweep",
        nargs="+",
        metavar=("KEY", "VALUE"),
        action="append",
        default=[],
        help="02 and 03 for each of these values; repeatable: for each combination, and each fold",
    )
    add("--workers", metavar="N", type=int, default=0, help="run N folds or combinations at a time on this machine")
    add("--scheduler", metavar="ADDRESS", default="", help="run folds and combinations on this Dask cluster")
    add("--check", action="store_true", help=argparse.SUPPRESS)
    return parser


def make_plan(argv: list[str], root: Path = ROOT) -> Plan:
    """Check the arguments `argv` of `run` against the notebooks and profiles below `root`; write nothing.

    Raises:
        UsageError: an option, profile, notebook, parameter or value that does not exist, or a notebook whose
            predecessor has not finished in that run.
    """
    options = _options(argv)
    profile = options.profile or "demo"
    if profile not in profiles(root):
        raise UsageError(f"unknown profile {profile}; {nearest(profile, profiles(root))}")
    name = options.run or profile
    folder = _folder(name, root)
    try:
        manifest = read_json(folder / "manifest.json", {})
    except ValueError as error:
        raise UsageError(str(error)) from None
    notebooks = read_notebooks(root)
    sweep = _combinations(options.sweep, notebooks)
    has_members = options.folds is not None or bool(options.sweep)
    _check_options(options, has_members=has_members)
    _check_run(options, manifest, name=name, has_members=has_members)

    given = _given(options, root, root / "profiles" / f"{profile}.yaml", folder, notebooks)
    values = {stage: notebook.defaults | given[stage] for stage, notebook in notebooks.items()}
    plan = Plan(
        root=root,
        folder=folder,
        profile=profile,
        command=shlex.join(["./run_all.sh", *(word for word in argv if word != "--check")]),
        stages=[*ONCE, *PER_FOLD] if has_members else _picked(options.only),
        values=values,
        given=given,
        keys={},
        prepare_only=options.prepare_only,
        time_limit=options.time_limit,
        log=options.log,
        on_kaggle=_for_kaggle(options, profile, values["00_setup"]["data"]) if options.on else (),
        agreed=options.yes,
        folds=options.folds or 0,
        sweep=sweep,
        workers=options.workers,
        scheduler=options.scheduler,
    )
    if options.time_limit:
        share = TRAINING_SHARE * options.time_limit
        minutes = min(values["02_train"]["minutes"] or share, share)
        plan = plan.with_values({"minutes": minutes}, stages=["02_train"])
    made = {} if options.on else manifest.get("stages", {})  # Kaggle starts from an empty folder
    _check_order(plan, made, name)
    return replace(plan, keys=_keys(plan, notebooks, made))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = dict.fromkeys(re.findall(r"--?\w[\w-]*", parser.format_usage()))
        raise UsageError(f"unknown argument {unknown[0]}; {nearest(unknown[0], known)}")
    return options


def _check_options(options: argparse.Namespace, *, has_members: bool) -> None:
    """Refuse what the options alone show to be wrong."""
    if has_members:
        if options.folds is not None and options.folds < 2:
            raise UsageError(f"--folds {options.folds}: expected 2 or more")
        for option in ("only", "prepare_only", "on", "time_limit"):
            if getattr(options, option):
                name = option.replace("_", "-")
                raise UsageError(f"--{name} cannot be combined with --folds or --sweep, which run notebooks 00 to 03")
    elif options.workers or options.scheduler:
        raise UsageError("--workers and --scheduler distribute folds or a sweep: add --folds N or --sweep KEY VALUES")
    if options.workers < 0:
        raise UsageError(f"--workers {options.workers}: expected 1 or more")
    if options.workers and options.scheduler:
        raise UsageError("--workers starts a cluster and --scheduler uses another one: give one of the two")
    if options.time_limit and not 0 < options.time_limit < math.inf:
        raise UsageError(f"--time-limit {options.time_limit:g}: expected minutes, more than 0")
    if options.log and not options.log.parent.is_dir():
        raise UsageError(f"--log {options.log}: there is no folder {options.log.parent}")
    if options.log and options.log.is_dir():
        raise UsageError(f"--log {options.log}: a folder, expected a file")
    if options.on and options.prepare_only:
        raise UsageError("--prepare-only prepares notebooks here; without it, --on kaggle runs them there")
    if options.yes and not options.on:
        raise UsageError("--yes agrees to the upload of --on kaggle; without that there is nothing to agree to")


def _check_run(options: argparse.Namespace, manifest: dict, *, name: str, has_members: bool) -> None:
    """Refuse to continue a run under another profile, or a single training as folds or a sweep and vice versa."""
    before = manifest.get("profile", options.profile or "demo")
    if options.profile is None and before != "demo":
        raise UsageError(
            f"run {name} has the profile {before}: continue with --profile {before}, or choose another --run"
        )
    if manifest and manifest.get("shared", False) != has_members:
        was = "made with --folds or --sweep" if manifest.get("shared") else "a single training"
        raise UsageError(f"run {name} is {was}; continue as you began, or choose another --run")


def _check_order(plan: Plan, made: Mapping[str, Mapping], name: str) -> None:
    """Refuse a notebook whose predecessor has not finished, and preparing one that has run."""
    for stage in plan.stages:
        if plan.prepare_only and stage in made:
            raise UsageError(f"{stage} has run in {name}, and its notebook would be lost; choose another --run")
        for need in NEEDS[stage]:
            finished = need in plan.stages or made.get(need, {}).get("status") == "finished"
            if not (finished or plan.prepare_only):
                raise UsageError(f"{stage} needs {need}, which has not finished in run {name}: add it to --only")


def _keys(plan: Plan, notebooks: Mapping[str, Notebook], made: Mapping[str, Mapping]) -> dict[str, str]:
    """Digest of each stage's parameters, code and predecessors; one that is not to run keeps the key that it has."""
    keys: dict[str, str] = {}
    for stage, needs in NEEDS.items():
        if stage not in plan.stages and stage in made:
            keys[stage] = made[stage]["key"]
            continue
        parameters = {key: value for key, value in plan.values[stage].items() if key != "run_dir"}
        content = json.dumps([parameters, notebooks[stage].code, [keys[need] for need in needs]], sort_keys=True)
        keys[stage] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return keys


def _folder(name: str, root: Path) -> Path:
    if "/" in name:  # a mistyped path, or a drive that is not mounted, must not create folders
        folder = Path(name).resolve()
        if not folder.parent.is_dir():
            raise UsageError(f"--run {name}: there is no folder {folder.parent}; make it, or mount its drive, first")
        return folder
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f"--run {name!r}: expected the name of a folder in runs/ (letters, digits, '.', '_', '-'), or a path"
            " with '/'"
        )
    return (root if os.access(root, os.W_OK) else Path.cwd()) / "runs" / name


def _for_kaggle(options: argparse.Namespace, profile: str, data: str) -> list[str]:
    """The arguments of `run_all.sh` on Kaggle; parameters that point to files of this machine are refused."""
    if data not in DATA_NAMES:
        raise UsageError(f"--on kaggle has Kaggle's data sets and simulated patients: --data kaggle, not {data}")
    for key, text in options.pairs:
        if key.endswith("_dir") or (key in FILES and not {*text.split(",")} <= {"", "auto", *NAMED_WEIGHTS}):
            raise UsageError(f"-p {key}: a place on this machine, which --on kaggle does not reach")
    arguments = ["--profile", profile, "--time-limit", f"{options.time_limit or KAGGLE_MINUTES:g}"]
    for option, text in (("--data", options.data), ("--only", options.only)):
        arguments += [option, text] if text else []
    for pair in options.pairs:
        arguments += ["-p", *pair]
    return arguments


def _picked(only: str | None) -> list[str]:
    if only is None:
        return list(NEEDS)
    names = {stage[:2]: stage for stage in NEEDS} | {stage: stage for stage in NEEDS}
    for word in only.split(","):
        if word not in names:
            raise UsageError(f"--only: unknown notebook {word!r}; {nearest(word, names)}")
    picked = {names[word] for word in only.split(",")}
    return [stage for stage in NEEDS if stage in picked]


def _combinations(swept: list[list[str]], notebooks: Mapping[str, Notebook]) -> dict[str, dict]:
    """Each combination of the values of `--sweep`, by its name; without a sweep, one that changes nothing."""
    train, evaluate = (notebooks[stage].parameters for stage in PER_FOLD)
    further = notebooks[PER_FOLD[0]].further
    combinations: dict[str, dict] = {"": {}}
    for key, *texts in swept:
        if key in evaluate and key not in train:
            raise UsageError(
                f"--sweep {key}: only 03_evaluate has it, and a sweep ranks by the validation Dice of the training,"
                f" which {key} does not change. Sweep a parameter of 02_train, and set this one with -p {key} VALUE"
            )
        if key not in {**train, **further} or key in ("run_dir", SETTINGS):
            raise UsageError(f"--sweep {key}: no parameter of 02_train; {nearest(key, [*train, *further])}")
        if not texts:
            raise UsageError(f"--sweep {key}: give its values")
        read = {text: _swept(key, text, train) for text in texts}
        combinations = {
            f"{name};{key}={text}".lstrip(";").replace("/", "_"): _with(values, read[text])
            for name, values in combinations.items()
            for text in read
        }
    return combinations


def _swept(key: str, text: str, declared: Mapping[str, Parameter]) -> dict[str, object]:
    """One value of a sweep, as the parameter that carries it."""
    if key in declared:
        return {key: declared[key].read(_path(key, text))}
    read_settings(f"{key}={text}")
    return {SETTINGS: f"{key}={text}"}


def _with(values: Mapping[str, object], more: Mapping[str, object]) -> dict[str, object]:
    """The values of a combination and those of another swept parameter."""
    both = SETTINGS in values and SETTINGS in more
    return {**values, **more} | ({SETTINGS: join_settings(values[SETTINGS], more[SETTINGS])} if both else {})


def _given(
    options: argparse.Namespace, root: Path, profile: Path, folder: Path, notebooks: Mapping[str, Notebook]
) -> dict[str, dict]:
    """Each notebook's parameters, except for those that keep its own default."""
    declared = {name for notebook in notebooks.values() for name in (*notebook.parameters, *notebook.further)}
    asked: dict[str, str] = {}
    for key, text in read_profile(profile).items():
        if key not in declared:
            raise UsageError(f"{profile}: no notebook has a parameter {key}; {nearest(key, sorted(declared))}")
        asked |= read_settings(text) if key == SETTINGS else {key: text}
    by_option = [[key, str(value)] for key in ("data", "folds") if (value := getattr(options, key)) is not None]
    for key, text in options.pairs + by_option:
        if key not in declared:
            raise UsageError(f"-p {key}: no notebook has that parameter; {nearest(key, sorted(declared))}")
        if key == "run_dir":
            raise UsageError("-p run_dir: use --run NAME")
        # Notebooks run in another folder than the caller's, and nbval runs them in yet another.
        value = _data(text) if key == "data" else _path(key, text)
        asked |= read_settings(text) if key == SETTINGS else {key: value}
    # An attached suite, as on Kaggle, is read-only, and what can be made again does not belong in Kaggle's results.
    home = root if os.access(root, os.W_OK) else Path(tempfile.gettempdir())
    given = {}
    for stage, notebook in notebooks.items():
        own = notebook.parameters
        folders = {name: str(home / p.default) for name, p in own.items() if name.endswith("_dir")}
        read = {key: own[key].read(text) for key, text in asked.items() if key in own}
        if further := {key: text for key, text in asked.items() if key in notebook.further}:
            read[SETTINGS] = join_settings(*(f"{key}={value}" for key, value in further.items()))
        given[stage] = folders | read | {"run_dir": str(folder)}
    return given


def _path(key: str, text: str) -> str:
    """Return folders, and files that exist, as absolute paths."""
    if key.endswith("_dir"):
        return str(Path(text).resolve())
    if key in FILES:
        return ",".join(str(Path(name).resolve()) if Path(name).is_file() else name for name in text.split(","))
    return text


def _data(text: str) -> str:
    if text in DATA_NAMES:
        return text
    if not Path(text).is_dir():
        raise UsageError(f"--data {text}: no such folder; {nearest(text, ('PATH of a folder', *DATA_NAMES))}")
    return str(Path(text).resolve())


def help_text(root: Path = ROOT) -> str:
    """`--help`: options, exit codes, profiles, and the parameters of every notebook as its cell declares them."""
    lines = [_parser().format_help(), "exit codes:"]
    lines += [f"  {code:<5} {meaning}" for code, meaning in EXIT_CODES.items()]
    lines += ["", "profiles (profiles/NAME.yaml):"]
    for name in profiles(root):
        first = (root / "profiles" / f"{name}.yaml").read_text("utf-8").partition("\n")[0]
        lines.append(f"  {name:<12} {first.lstrip('# ')}")
    lines += ["", "parameters (-p KEY VALUE), with the notebooks' defaults:"]
    for stage, notebook in read_notebooks(root).items():
        lines.append(f"  {stage}")
        for p in notebook.parameters.values():
            lines.append(f"    {p.name:<18} {p.type:<6} {str(p.default) or '(empty)':<26}  {p.meaning}")
        if notebook.further:
            lines.append(f"  {stage}, settings (-p KEY VALUE, or several together: -p settings 'ema=0.9, warm_up=0.1')")
        for name, d in notebook.further.items():
            lines.append(f"    {name:<25} {d.text:<26}  {d.meaning}")
    return "\n".join(lines)
