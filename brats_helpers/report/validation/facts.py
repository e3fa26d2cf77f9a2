"""The basis of the validation's lines: the files of a run, and the marks that a line can have."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path

from brats_helpers.files import read_json
from brats_helpers.log import FAIL, OK, WARN
from brats_helpers.report.review import Review
from brats_helpers.runs import FIGURE_REGISTER, Run, parts_of


class Mark(Enum):
    """The outcome of a line, with its sign in the log's vocabulary."""

    HELD = "held"
    PARTLY = "partly"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"

    @property
    def sign(self) -> str:
        """`✅`, `⚠️` or `❌`; empty if the line does not apply."""
        return {Mark.HELD: OK, Mark.PARTLY: WARN, Mark.FAILED: FAIL}.get(self, "")


class NotDone(Exception):
    """The run has not done what a line checks; the message says what is missing."""


@dataclass(frozen=True)
class Check:
    """How one line is computed.

    Attributes:
        id: a short name that never changes, such as `split-disjoint`.
        heading: the section of the validation.
        text: what is checked, as a sentence.
        compute: returns the mark and the evidence.
    """

    id: str
    heading: str
    text: str
    compute: Callable[["RunFacts"], tuple[Mark, str]]


CHECKS: list[Check] = []
"""Every check, in the order of registration."""


def line(check_id: str, heading: str, text: str):
    """Register a function from `RunFacts` to (mark, evidence) as a line of the validation."""

    def register(compute):
        CHECKS.append(Check(check_id, heading, text, compute))
        return compute

    return register


class RunFacts:
    """The files of a run. Each is read once, on first use; a missing one raises `NotDone`."""

    def __init__(self, run: Run, review: Review):
        self.run = run
        self.reviewed = review
        self.manifest = run.manifest

    @cached_property
    def splits(self) -> dict:
        return read(self.run.splits)

    @cached_property
    def metrics(self) -> dict:
        return read(self.run.metrics)

    @cached_property
    def audit(self) -> dict:
        return read(self.run.audit)

    @cached_property
    def checks(self) -> dict:
        """`checks.json`: the checks of the notebooks."""
        return read(self.run.checks)

    @cached_property
    def folds(self) -> list[Run]:
        return self.run.folds

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """The parts that must be disjoint: train, val and test, or the test parts of the folds."""
        if self.folds:
            return {f"fold {k}": parts["test"] for k, parts in enumerate(self.splits["folds"])}
        return parts_of(self.splits)

    @property
    def tested(self) -> list[str]:
        """The patients to score: in a cross-validation, all of them."""
        return sum(self.parts.values(), []) if self.folds else self.parts["test"]

    @property
    def review(self) -> Review:
        """The review of the predictions, if it could read any."""
        if not self.reviewed.cases:
            raise NotDone(self.reviewed.problem or "no patient is scored")
        return self.reviewed

    @cached_property
    def history(self) -> list[dict[str, float]]:
        if not self.run.history.exists():
            raise NotDone("no history.csv")
        with open(self.run.history, newline="", encoding="utf-8") as file:
            return [dict(zip(row, map(float, row.values()), strict=True)) for row in csv.DictReader(file)]

    @cached_property
    def checkpoint(self) -> dict:
        """`best.pt`, its tensors mapped rather than read."""
        return load_checkpoint(self.run)

    @cached_property
    def stages(self) -> dict[str, dict]:
        """The manifests' entries of all finished notebooks; for folds, the names include the fold."""
        runs = {"": self.run} | {f" of fold {fold.folder.name}": fold for fold in self.folds}
        found = {}
        for place, run in runs.items():
            for stage, entry in run.manifest.get("stages", {}).items():
                if entry.get("status") == "finished" and "revision" in entry:
                    found[f"{stage}{place}"] = entry
        if not found:
            raise NotDone("manifest.json does not say how any notebook was run")
        return found

    @cached_property
    def unrecorded(self) -> list[str]:
        """Executed notebooks that the manifest does not describe, such as those run by hand."""
        return [stage for stage in self.code if stage not in self.stages]

    def by_fact(self, name: str) -> dict[str, list[str]]:
        """The finished notebooks, grouped by the value of one fact such as `revision`."""
        stages: dict[str, list[str]] = {}
        for stage, entry in self.stages.items():
            stages.setdefault(entry[name] or "none", []).append(stage)
        return stages

    @cached_property
    def code(self) -> dict[str, list[dict]]:
        """The code cells of each executed notebook, by stage."""
        found = {}
        for path in sorted(self.run.notebooks.glob("*.ipynb")):
            found[path.stem] = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
        if not found:
            raise NotDone("no executed notebook")
        return found

    @cached_property
    def figures(self) -> dict[str, str | None]:
        """By file name, the title stored in every figure that a notebook saved; None if the file cannot be read."""
        from brats_helpers.report.plots.style import stored_title

        registered = read(self.run.figures / FIGURE_REGISTER)
        titles = {}
        for name in sorted(registered):
            try:
                titles[name] = stored_title(self.run.figures / name)
            except OSError:
                titles[name] = None
        return titles


def read(path: Path) -> dict:
    """Read a JSON file of the run, or raise `NotDone`."""
    if not path.exists():
        raise NotDone(f"no {path.name}")
    return read_json(path)


def load_checkpoint(run: Run) -> dict:
    """Load the `best.pt` of a run on the CPU, or raise `NotDone`."""
    import torch  # takes seconds to import, and only runs with a checkpoint need it

    if not run.best.exists():
        raise NotDone("no checkpoints/best.pt")
    return torch.load(run.best, map_location="cpu", weights_only=True, mmap=True)


def mark(held: bool, otherwise: Mark = Mark.FAILED) -> Mark:
    """`HELD`, or `otherwise`."""
    return Mark.HELD if held else otherwise


def but(label: str, names: Iterable) -> str:
    """An addition to the evidence, `; label: a, b, …`; empty without names."""
    names = [str(name) for name in names]
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; {label}: {', '.join(names[:5])}{more}"
