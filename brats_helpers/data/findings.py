"""What somebody should know about the data."""

from collections.abc import Iterable
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")
"""From worst to least: the patient cannot be used; it can, and the message says what was done; good to know."""


@dataclass(frozen=True)
class Finding:
    """One thing about the data that somebody should know.

    Attributes:
        code: a short name that stays, such as `missing-modality`.
        severity: one of `SEVERITIES`.
        file: where, relative to the data's folder; empty if it concerns no single file.
        message: a sentence: what was found, what was expected, what was or is to be done.
    """

    code: str
    severity: str
    file: str
    message: str


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether one of the findings makes the patient unusable."""
    return any(finding.severity == "error" for finding in findings)
