"""Findings: problems and remarks about the data, each with a severity."""

from collections.abc import Iterable
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")
"""From worst to least. Error: the patient cannot be used. Warning: it can, and the message says how. Note: a remark."""


@dataclass(frozen=True)
class Finding:
    """One problem or remark about the data.

    Attributes:
        code: a short, stable name such as `missing-modality`.
        severity: one of `SEVERITIES`.
        file: path relative to the data folder; empty if the finding concerns no single file.
        message: what was found, what was expected, and what was done or should be done.
    """

    code: str
    severity: str
    file: str
    message: str


def why_unusable(findings: Iterable[Finding]) -> str:
    """The messages of the findings that make a patient unusable; empty if none does."""
    return " ".join(finding.message for finding in findings if finding.severity == "error")
