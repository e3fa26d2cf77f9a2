"""One run of the suite is one folder: where each stage finds and leaves its files."""

import json
import os
import shutil
from pathlib import Path


class RunError(Exception):
    """A run's folder lacks something; the message says what, and which notebook makes it."""


class Run:
    """The folder of one run, its manifest and the places of its files.

    Args:
        folder: `runs/<name>`; made where it does not exist.
    """

    def __init__(self, folder: Path | str):
        self.folder = from_root(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = self.folder.resolve().name
        self.splits = self.folder / "splits.json"
        self.history = self.folder / "history.csv"
        self.metrics = self.folder / "metrics.json"
        self.cases_csv = self.folder / "cases.csv"
        self.checkpoints = self.folder / "checkpoints"
        self.best = self.checkpoints / "best.pt"
        self.last = self.checkpoints / "last.pt"
        self.predictions = self.folder / "predictions"
        self.figures = self.folder / "figures"
        self.notebooks = self.folder / "notebooks"
        self.report = self.folder / "report" / "index.html"

    @property
    def manifest(self) -> dict:
        """What is known of the run: parameters, versions, device, patients, seconds per stage."""
        path = self.folder / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def record(self, **entries) -> None:
        """Put `entries` into `manifest.json`, in place of entries of the same names."""
        write_json(self.folder / "manifest.json", self.manifest | entries)

    def need(self, path: Path, made_by: str) -> Path:
        """Return `path`, or raise `RunError` naming the notebook that makes it."""
        if not path.exists():
            raise RunError(f"{path} is not there. Run {made_by} first, with run_dir={self.folder}.")
        return path

    def emptied(self, folder: Path) -> Path:
        """Return one of the run's folders without what an earlier run of a notebook left in it."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def from_root(path: Path | str) -> Path:
    """A relative path as run_all.sh means it, also in Jupyter, where a notebook works in the folder notebooks/."""
    here = Path.cwd()
    return (here.parent if here.name == "notebooks" else here) / path


def write_json(path: Path, content: dict) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(part, path)
