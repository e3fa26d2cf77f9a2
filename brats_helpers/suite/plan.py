"""What one command asks for: profiles, parameters, notebooks, checked before anything runs."""

import argparse
import ast
import difflib
import hashlib
import io
import json
import math
import os
import re
import shlex
import tempfile
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from brats_helpers.runs import NEEDS, ONCE, PER_FOLD, Run
from brats_helpers.suite.environment import ROOT

EXIT_CODES = {
    0: "it is finished; where --time-limit came first, it is scored all the same",
    1: "a notebook, the report or Kaggle failed, or --time-limit came before the scores",
    2: "wrong arguments; nothing ran",
    130: "stopped",
}
TRAINING_SHARE, RESERVED_SHARE = 0.7, 0.2
"""Of a time limit: what notebook 02 may train for, and what it must leave where the set-up took long."""
KAGGLE_MINUTES = 690
"""The time limit on Kaggle unless one is given; after 12 hours Kaggle ends a notebook, results and all."""
DATA_NAMES = ("phantom", "kaggle", "brats2020", "brats2021", "brats2020-slices")
"""What `--data` takes beside a folder, see `sources.find_data`."""
FILES = ("encoder_weights", "pretrained", "checkpoints")
"""Parameters that may name files."""
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class UsageError(Exception):
    """What was asked for cannot be done as asked; the message says what is wrong and what comes nearest."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `epochs: int = 20  # passes over the training slices`."""

    name: str
    type: str
    default: object
    meaning: str

    def read(self, text: str):
        """The value that `text` stands for, in the declared type, or raise `UsageError`."""
        try:
            if self.type == "bool":
                return _BOOLEANS[text.lower()]
            return {"int": int, "float": float, "str": str}[self.type](text)
        except (ValueError, KeyError):
            kind = {"int": "an int", "float": "a float", "bool": "true or false"}[self.type]
            raise UsageError(f"{self.name} takes {kind} ({self.meaning}), got {text!r}") from None


@dataclass(frozen=True)
class Notebook:
    """A notebook as it is stored: its parameters by name, and the source of its other code cells."""

    parameters: dict[str, Parameter]
    code: list[str]


@dataclass(frozen=True)
class Plan:
    """What one command asks for, checked: `values` and `keys` are of every stage, `stages` those to run.

    `sweep` holds, by the name of each combination, the values that it has instead; without a sweep one, "", of none.
    `on_kaggle` holds the arguments for `run_all.sh` there, or is empty for a run here; `time_limit` is in minutes,
    0 for none.
    """

    root: Path
    folder: Path
    profile: str
    command: str
    stages: list[str]
    values: dict[str, dict]
    given: dict[str, dict]
    keys: dict[str, str]
    prepare_only: bool
    time_limit: float
    log: Path | None
    on_kaggle: list[str]
    agreed: bool
    folds: int
    sweep: dict[str, dict]
    workers: int
    job: dict


def read_notebooks(root: Path) -> dict[str, Notebook]:
    """Every notebook of the suite below `root`, by stage."""
    return {stage: _read_notebook(root / "notebooks" / f"{stage}.ipynb") for stage in NEEDS}


def _read_notebook(path: Path) -> Notebook:
    if not path.exists():
        raise UsageError(f"{path} is not there; run from a complete checkout of the suite")
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    if len(tagged) != 1:
        raise UsageError(f"{path} has {len(tagged)} cells tagged `parameters`, and needs one")
    code = ["".join(cell["source"]) for cell in cells if cell is not tagged[0]]
    return Notebook(_declared("".join(tagged[0]["source"]), path), code)


def _declared(source: str, path: Path) -> dict[str, Parameter]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    parameters = {}
    for node in ast.parse(source).body:
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=name),
                annotation=ast.Name(id="int" | "float" | "str" | "bool" as kind),
                value=ast.expr(),
            ):
                default = ast.literal_eval(node.value)
                parameters[name] = Parameter(name, kind, default, comments.get(node.end_lineno, ""))
            case _:
                raise UsageError(f"{path}, parameters cell, line {node.lineno}: not of the form `name: type = literal`")
    return parameters


def profiles(root: Path) -> list[str]:
    """The names of the profiles below `root`."""
    return sorted(path.stem for path in (root / "profiles").glob("*.yaml"))


def read_profile(path: Path) -> dict[str, str]:
    """A profile's values as text: a flat YAML file, `key: value  # comment`."""
    values = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not line:
            continue
        pair = re.fullmatch(r"""(\w+):\s+(["']?)(.*)\2""", line)
        if pair is None:
            raise UsageError(f"{path}, line {number}: not of the form `key: value`")
        values[pair[1]] = pair[3]
    return values


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def _arguments() -> _Arguments:
    parser = _Arguments(
        prog="./run_all.sh",
        description="Run the notebooks in order, into runs/NAME/. The same command again picks up where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--profile", metavar="NAME", help="a set of parameters, see below; default: demo")
    parser.add_argument(
        "--data",
        metavar="FOLDER|NAME",
        help="a folder of patients, or phantom (simulated ones), kaggle (which is brats2020), brats2021,"
        " brats2020-slices",
    )
    parser.add_argument(
        "--run", metavar="NAME|FOLDER", help="folder runs/NAME, or any, as on a drive; default: the profile's name"
    )
    parser.add_argument("--only", metavar="02,03", help="these notebooks alone, on what the run has so far")
    parser.add_argument(
        "-p",
        nargs=2,
        metavar=("KEY", "VALUE"),
        action="append",
        default=[],
        dest="pairs",
        help="a parameter, for every notebook that declares it; lists are comma-separated; repeatable",
    )
    parser.add_argument(
        "--prepare-only", action="store_true", help="write the notebooks with their parameters, run none"
    )
    parser.add_argument(
        "--time-limit",
        metavar="MINUTES",
        type=float,
        default=0.0,
        help="of the whole run: training ends in time to be scored, and what runs when it comes is stopped",
    )
    parser.add_argument("--log", metavar="FILE", type=Path, help="append what is printed to FILE")
    parser.add_argument(
        "--on", choices=["kaggle"], help="run it as a private notebook on Kaggle's GPUs and bring back what it leaves"
    )
    parser.add_argument("--yes", action="store_true", help="with --on: upload without asking")
    parser.add_argument("--folds", metavar="N", type=int, help="N-fold cross-validation: 02 and 03 for each fold")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar=("KEY", "VALUE"),
        action="append",
        default=[],
        help="02 and 03 for each of these values; repeatable: for each combination, and each fold",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=0,
        help="share folds and sweeps among N processes: a SLURM array where there is SLURM, else on this CPU",
    )
    parser.add_argument(
        "--job",
        nargs=2,
        metavar=("KEY", "VALUE"),
        action="append",
        default=[],
        help="what submitit asks of SLURM for each worker: timeout_min 600, gpus_per_node 1, slurm_partition gpu, ...",
    )
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    return parser


def nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"


def make_plan(argv: list[str], root: Path = ROOT) -> Plan:
    """Check the arguments `argv` of `run` against the notebooks and profiles below `root`; write nothing.

    Raises:
        UsageError: an option, profile, notebook, parameter or value that does not exist, or a notebook whose
            predecessor has not finished in that run.
    """
    parser = _arguments()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings if name != "--check"]
        raise UsageError(f"unknown argument {unknown[0]}; {nearest(unknown[0], known)}")

    profile = options.profile or "demo"
    if profile not in profiles(root):
        raise UsageError(f"unknown profile {profile}; {nearest(profile, profiles(root))}")
    name = options.run or profile
    folder = _folder(name, root)
    manifest = Run(folder).manifest if folder.exists() else {}
    before = manifest.get("profile", profile)
    if options.profile is None and before != profile:
        raise UsageError(f"run {name} has the profile {before}: go on with --profile {before}, or take another --run")

    notebooks = read_notebooks(root)
    stages = list(NEEDS) if options.only is None else _picked(options.only)
    sweep = _combinations(options.sweep, notebooks)
    shared = options.folds is not None or bool(options.sweep)
    if shared:
        if options.folds is not None and options.folds < 2:
            raise UsageError(f"--folds {options.folds}: two or more")
        for option in ("only", "prepare_only", "on", "time_limit"):
            if getattr(options, option):
                raise UsageError(
                    f"--{option.replace('_', '-')} does not go with --folds and --sweep, which run 00 to 03"
                )
        stages = [*ONCE, *PER_FOLD]
    elif options.workers or options.job:
        raise UsageError("--workers and --job share out folds or a sweep: add --folds N or --sweep KEY VALUES")
    if manifest and manifest.get("shared", False) != shared:
        was = "made with --folds or --sweep" if manifest.get("shared") else "one training"
        raise UsageError(f"run {name} is {was}; go on as you began, or take another --run")
    values, given = _values(options, root, root / "profiles" / f"{profile}.yaml", folder, notebooks)
    made = {} if options.on else manifest.get("stages", {})  # there, nothing of an earlier run is left
    if options.log and not options.log.parent.is_dir():
        raise UsageError(f"--log {options.log}: there is no folder {options.log.parent}")
    if options.log and options.log.is_dir():
        raise UsageError(f"--log {options.log}: a folder, expected a file")
    if options.workers < 0:
        raise UsageError(f"--workers {options.workers}: 1 or more")
    if options.time_limit:
        if not 0 < options.time_limit < math.inf:
            raise UsageError(f"--time-limit {options.time_limit:g}: minutes, more than 0")
        share = TRAINING_SHARE * options.time_limit
        for kind in (values, given):
            kind["02_train"]["minutes"] = min(values["02_train"]["minutes"] or share, share)
    on_kaggle = []
    if options.on:
        _check_for_kaggle(options, values["00_setup"]["data"])
        on_kaggle = ["--profile", profile, "--time-limit", f"{options.time_limit or KAGGLE_MINUTES:g}"]
        for option, text in (("--data", options.data), ("--only", options.only)):
            on_kaggle += [option, text] if text else []
        on_kaggle += [word for pair in options.pairs for word in ("-p", *pair)]
    elif options.yes:
        raise UsageError("--yes agrees to the upload of --on kaggle; without that there is nothing to agree to")
    if options.prepare_only:
        for stage in stages:
            if stage in made:
                raise UsageError(f"{stage} has run in {name}, and its notebook would be lost; take another --run")
    else:
        for stage in stages:
            for need in NEEDS[stage]:
                if need not in stages and made.get(need, {}).get("status") != "finished":
                    raise UsageError(f"{stage} needs {need}, which has not finished in run {name}: add it to --only")

    keys = {}
    for stage, needs in NEEDS.items():
        parameters = {key: value for key, value in values[stage].items() if key != "run_dir"}
        content = json.dumps([parameters, notebooks[stage].code, [keys[need] for need in needs]], sort_keys=True)
        asked = stage in stages or stage not in made
        keys[stage] = hashlib.sha256(content.encode()).hexdigest()[:16] if asked else made[stage]["key"]
    command = shlex.join([parser.prog, *(word for word in argv if word != "--check")])
    return Plan(
        root,
        folder,
        profile,
        command,
        stages,
        values,
        given,
        keys,
        options.prepare_only,
        options.time_limit,
        options.log,
        on_kaggle,
        options.yes,
        options.folds or 0,
        sweep,
        options.workers,
        {key: int(value) if value.isdigit() else value for key, value in options.job},
    )


def _folder(name: str, root: Path) -> Path:
    if "/" in name:  # a typing error, or a drive that is not mounted, must not make folders
        folder = Path(name).resolve()
        if not folder.parent.is_dir():
            raise UsageError(f"--run {name}: there is no folder {folder.parent}; make it, or mount its drive, first")
        return folder
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f"--run {name!r}: the name of a folder in runs/, of letters, digits, '.', '_' and '-', or a path with '/'"
        )
    return (root if os.access(root, os.W_OK) else Path.cwd()) / "runs" / name


def _check_for_kaggle(options, data: str) -> None:
    if options.prepare_only:
        raise UsageError("--prepare-only prepares notebooks here; without it, --on kaggle runs them there")
    if data not in DATA_NAMES:
        raise UsageError(f"--on kaggle has Kaggle's data sets and simulated patients: --data kaggle, not {data}")
    for key, text in options.pairs:
        if key.endswith("_dir") or (key in FILES and not {*text.split(",")} <= {"", "imagenet", "none", "auto"}):
            raise UsageError(f"-p {key}: a place on this machine, which --on kaggle does not reach")


def _picked(only: str) -> list[str]:
    names = {name: stage for stage in NEEDS for name in (stage[:2], stage)}
    for word in only.split(","):
        if word not in names:
            raise UsageError(f"--only: unknown notebook {word!r}; {nearest(word, names)}")
    picked = {names[word] for word in only.split(",")}
    return [stage for stage in NEEDS if stage in picked]


def _combinations(swept: list[list[str]], notebooks: dict[str, Notebook]) -> dict[str, dict]:
    """Each combination of the values of `--sweep`, by its name; one without a value where nothing is swept."""
    declared = {name: p for stage in PER_FOLD for name, p in notebooks[stage].parameters.items()}
    combinations: dict[str, dict] = {"": {}}
    for key, *texts in swept:
        if key not in declared or key == "run_dir":
            raise UsageError(f"--sweep {key}: no parameter of {' or '.join(PER_FOLD)}; {nearest(key, declared)}")
        if not texts:
            raise UsageError(f"--sweep {key}: say which values")
        combinations = {
            f"{name};{key}={text}".lstrip(";").replace("/", "_"): values | {key: declared[key].read(_path(key, text))}
            for name, values in combinations.items()
            for text in texts
        }
    return combinations


def _values(options, root: Path, profile: Path, folder: Path, notebooks: dict[str, Notebook]) -> tuple[dict, dict]:
    """Each notebook's parameters as resolved, and those of them that are not its own defaults."""
    # A suite that is attached, as on Kaggle, is read-only; what can be made again does not go to Kaggle's results.
    home = root if os.access(root, os.W_OK) else Path(tempfile.gettempdir())
    asked = read_profile(profile)
    declared = {name for notebook in notebooks.values() for name in notebook.parameters}
    for key in asked:
        if key not in declared:
            raise UsageError(f"{profile}: no notebook has a parameter {key}; {nearest(key, sorted(declared))}")
    by_option = [[key, str(value)] for key in ("data", "folds") if (value := getattr(options, key)) is not None]
    for key, text in options.pairs + by_option:
        if key not in declared:
            raise UsageError(f"-p {key}: no notebook has that parameter; {nearest(key, sorted(declared))}")
        if key == "run_dir":
            raise UsageError("-p run_dir: say --run NAME")
        # Notebooks run from another folder than the caller's, and nbval runs them from yet another.
        asked[key] = _data(text) if key == "data" else _path(key, text)
    given = {}
    for stage, notebook in notebooks.items():
        own = notebook.parameters
        folders = {name: str(home / p.default) for name, p in own.items() if name.endswith("_dir")}
        read = {key: own[key].read(text) for key, text in asked.items() if key in own}
        given[stage] = folders | read | {"run_dir": str(folder)}
    values = {
        stage: {name: parameter.default for name, parameter in notebook.parameters.items()} | given[stage]
        for stage, notebook in notebooks.items()
    }
    return values, given


def _path(key: str, text: str) -> str:
    """Folders, and files that are there, as absolute paths."""
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
    lines = [_arguments().format_help(), "exit codes:"]
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
    return "\n".join(lines)
