"""One run of the suite is one folder: where each stage finds and leaves its files."""

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from brats_helpers.files import file_digest, read_json, write_json

NEEDS = {
    "00_setup": (),
    "01_explore": ("00_setup",),
    "02_train": ("00_setup",),
    "03_evaluate": ("02_train",),
    "04_advanced": ("02_train",),
}
"""The notebooks in their order, each with those whose files it reads."""
ONCE = ("00_setup", "01_explore")
PER_FOLD = ("02_train", "03_evaluate")
"""With `--folds` or `--sweep`: what runs once, and what for each fold and each combination of values."""
PARTS = ("train", "val", "test")
"""The parts of a split."""
FIGURE_REGISTER = "figures.json"
"""Beside the figures of a run: the names of the saved ones, so that a lost one is noticed."""
NO_PATIENT = "no patient"
"""In the title of a drawn figure, which shows neither simulated nor real patients."""


def parts_of(split: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Train, val and test of the content of `splits.json` or of one of its folds, without what else it holds."""
    return {name: split[name] for name in PARTS}


class RunError(Exception):
    """Something is missing from a run's folder; the message says what, and which notebook makes it."""


class Run:
    """The folder of one run, its manifest and the paths of its files.

    Args:
        folder: `runs/<name>`; created if it does not exist.
    """

    def __init__(self, folder: Path | str):
        self.folder = from_root(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = _name(self.folder.resolve())
        self.audit = self.folder / "audit.json"
        self.checks = self.folder / "checks.json"
        self.splits = self.folder / "splits.json"
        self.history = self.folder / "history.csv"
        self.metrics = self.folder / "metrics.json"
        self.cases_csv = self.folder / "cases.csv"
        self.checkpoints = self.folder / "checkpoints"
        self.best = self.checkpoints / "best.pt"
        self.last = self.checkpoints / "last.pt"
        self.predictions = self.folder / "predictions"
        self.postprocess = self.folder / "postprocess.json"
        self.soft = self.folder / "soft"
        self.submission = self.folder / "submission"
        self.answers = self.folder / "answers.json"
        self.figures = self.folder / "figures"
        self.notebooks = self.folder / "notebooks"
        self.report = self.folder / "report" / "index.html"

    def command(self, stage: str, **parameters: str) -> str:
        """The command that runs one notebook of this run, with its data and profile, and with other parameters.

        Args:
            stage: number of the notebook, such as `04`.
            parameters: in place of those that the run's own command gives.
        """
        folder = self.folder.resolve()
        name = self.name if folder.parent.name == "runs" else str(folder)
        words = iter(shlex.split(self.manifest.get("command", shlex.join(["./run_all.sh", "--run", name]))))
        kept: list[str] = []
        for word in words:
            if word == "--only":
                next(words)
            elif word.startswith("--only="):
                continue
            elif word == "-p":
                pair = [next(words), next(words)]
                kept += [] if pair[0] in parameters else [word, *pair]
            else:
                kept.append(word)
        kept += ["--only", stage]
        for pair in parameters.items():
            kept += ["-p", *pair]
        return shlex.join(kept)

    @property
    def folds(self) -> list["Run"]:
        """The runs of the folds inside this one that have begun with the present split."""
        parts = read_json(self.splits, {}).get("folds", ())
        begun = []
        for k, part in enumerate(parts):
            place = self.folder / "folds" / str(k) / "splits.json"
            if part.items() <= read_json(place, {}).items():
                begun.append(Run(place.parent))
        return begun

    @property
    def expected(self) -> list[str]:
        """The notebooks that belong to this run: all of them, except in cross-validations and sweeps."""
        return self.manifest.get("expected", list(NEEDS))

    @property
    def manifest(self) -> dict:
        """The facts about the run: parameters, versions, device, patients, seconds per stage."""
        return read_json(self.folder / "manifest.json", {})

    def record(self, **entries) -> None:
        """Write `entries` to `manifest.json`, replacing those of the same names."""
        write_json(self.folder / "manifest.json", self.manifest | entries)

    def record_checks(self, stage: str, checks: Mapping[str, tuple[bool, str]]) -> None:
        """Write the checks of notebook `stage` to `checks.json`: for each, whether it held and what was seen."""
        outcomes = {check: {"held": bool(held), "seen": str(seen)} for check, (held, seen) in checks.items()}
        write_json(self.checks, read_json(self.checks, {}) | {stage: outcomes})

    def identify(self, checkpoints: Iterable[Path]) -> dict[str, str]:
        """Return a digest of each checkpoint by its path from the run's folder, for `networks` in `metrics.json`."""
        return {os.path.relpath(path, self.folder): file_digest(path) for path in checkpoints}

    @property
    def outdated(self) -> bool:
        """Whether `metrics.json` scores a network that the run's checkpoint no longer holds.

        This happens if notebook 02 ran again after notebook 03, in the suite or by hand.
        """
        networks = read_json(self.metrics, {}).get("networks", {})
        own = [(self.folder / name, digest) for name, digest in networks.items() if not name.startswith("..")]
        return any(path.exists() and file_digest(path) != digest for path, digest in own)

    def need(self, path: Path, made_by: str) -> Path:
        """Return `path`, or raise `RunError` naming the notebook that makes it."""
        if not path.exists():
            raise RunError(f"{path} is missing. Run {made_by} first, with run_dir={self.folder}.")
        return path

    def emptied(self, folder: Path) -> Path:
        """Return one of the run's folders, emptied of what an earlier run of a notebook wrote there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def results_of(self, stage: str) -> dict[Path, int]:
        """Return the files that notebook `stage` made for people to look at, with their modification times in ns."""
        paths = [*self.figures.glob(f"{stage[:2]}_*"), self.notebooks / f"{stage}.ipynb"]
        if stage == "03_evaluate":
            paths += [self.metrics, self.cases_csv, self.postprocess, self.submission.with_suffix(".zip")]
        if stage == "04_advanced":
            paths.append(self.answers)
        return {path: path.stat().st_mtime_ns for path in paths if path.exists()}

    def forget(self, stage: str, written: Mapping[Path, int] | None = None) -> None:
        """Remove the results of notebook `stage`; checkpoints stay, because a training may continue from them.

        Args:
            stage: name of the notebook.
            written: an earlier result of `results_of`: only files that are unchanged since then are removed.
        """
        gone = [path for path, at in self.results_of(stage).items() if written is None or written.get(path) == at]
        for path in gone:
            path.unlink()
        register = self.figures / FIGURE_REGISTER
        names = {path.name for path in gone}
        if names and register.exists():
            write_json(register, {name: title for name, title in read_json(register).items() if name not in names})


def _name(folder: Path) -> str:
    """The folder's name; for a fold or a combination, preceded by the name of the run that it is in."""
    kinds = {"folds": "fold ", "sweep": ""}
    if folder.parent.name in kinds:
        return f"{_name(folder.parent.parent)}, {kinds[folder.parent.name]}{folder.name}"
    return folder.name


def from_root(path: Path | str) -> Path:
    """Resolve a relative path as run_all.sh does, also in Jupyter, where a notebook runs in the folder notebooks/."""
    here = Path.cwd()
    return (here.parent if here.name == "notebooks" else here) / path
