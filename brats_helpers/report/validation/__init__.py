"""The validation of a run: one line for each property, computed from the run's files, with its evidence.

The lines are in the modules `..._lines`. A new line is a function there, decorated with `facts.line` under an ID that
never changes.
"""

import html
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from brats_helpers.files import whole_file
from brats_helpers.report.review import Review
from brats_helpers.report.validation import data_lines, record_lines, score_lines, training_lines  # noqa: F401, registers the lines
from brats_helpers.report.validation.facts import CHECKS, Mark, NotDone, RunFacts
from brats_helpers.runs import Run

__all__ = ["Line", "Mark", "tally", "validate", "write_markdown"]
HEADINGS = (
    "Data set integration",
    "Data pipeline",
    "Model architecture",
    "Training loop",
    "Evaluation metrics",
    "Visualisation",
    "Code quality",
    "Documentation",
)
"""The sections, in order."""


@dataclass(frozen=True)
class Line:
    """One line: its stable ID, its section, what was checked, the outcome and the evidence."""

    id: str
    heading: str
    check: str
    mark: Mark
    evidence: str


def validate(run: Run, review: Review) -> dict[str, Line]:
    """Compute every line of a run's validation.

    Args:
        run: in any state.
        review: of its predictions, see `review.review`.

    Returns:
        The lines by ID, in the order of `HEADINGS`.
    """
    facts = RunFacts(run, review)
    lines = {}
    for check in sorted(CHECKS, key=lambda check: HEADINGS.index(check.heading)):
        try:
            mark, evidence = check.compute(facts)
        except NotDone as reason:
            mark, evidence = Mark.NOT_APPLICABLE, str(reason)
        except KeyError as key:
            mark, evidence = Mark.NOT_APPLICABLE, f"the run's files have no entry {key}"
        except Exception as error:  # a broken file fails its own lines and no others
            mark, evidence = Mark.FAILED, f"could not be checked: {type(error).__name__}: {error}"
        lines[check.id] = Line(check.id, check.heading, check.text, mark, evidence)
    return lines


def tally(lines: dict[str, Line]) -> str:
    """Count the lines by mark. There is no total, because the lines are not equally important."""
    counts = Counter(line.mark for line in lines.values())
    return ", ".join(f"{mark.sign} {counts[mark]} {mark.value}".strip() for mark in Mark)


def write_markdown(path: Path, name: str, lines: dict[str, Line], *, simulated: bool) -> None:
    """Write the lines as `validation.md`: a table under each heading."""
    patients = " (simulated patients)" if simulated else ""
    text = [f"# Checks of run {_literal(name)}{patients}", "", f"{tally(lines)}.", ""]
    text.append("Every line was computed from the run's own files. There is no total score.")
    for heading in HEADINGS:
        own = [line for line in lines.values() if line.heading == heading]
        if not own:
            continue
        text += ["", f"## {heading}", "", "| held? | check | evidence | ID |", "| --- | --- | --- | --- |"]
        for line in own:
            outcome = line.mark.sign or line.mark.value
            text.append(f"| {outcome} | {_literal(line.check)} | {_literal(line.evidence)} | {line.id} |")
    with whole_file(path) as file:
        file.write("\n".join(text) + "\n")


def _literal(text: str) -> str:
    """Escape text so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
