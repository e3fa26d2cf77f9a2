"""What the tables of a BraTS release say about its patients: grade, earlier IDs, age, survival.

`name_mapping*.csv` gives each patient's grade and IDs in other releases; `survival_*.csv` age, survival and extent of
resection of some. The names of the columns differ between releases, so they are recognised by what they have in common.
"""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

_NONE = ("", "na", "n/a", "nan", "none", "unknown")


def read_tables(paths: Iterable[Path]) -> tuple[dict[str, dict], list[tuple[Path, str]]]:
    """Read every table of patients among `paths`; other CSV files are passed over.

    Returns:
        What is known of each ID that a table names: `grade` (HGG or LGG), `earlier_ids` (the row's other IDs), `age`
        (years), `survival_days`, `alive` (at that day), `resection`; only what is there. And what could not be read,
        as pairs of file and sentence.
    """
    known: dict[str, dict] = {}
    problems: list[tuple[Path, str]] = []
    for path in paths:
        if not re.match(r"name_mapping|survival", path.name, re.IGNORECASE):
            continue
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file, restval=""))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            problems.append((path, f"Cannot be read as a table ({error}); it is not used."))
            continue
        surplus = [[field for field in row.pop(None, ()) if field.strip()] for row in rows]
        if not any(_is_id(column) for column in (rows[0] if rows else ())):
            problems.append((path, "No column of patients' IDs, or no row; it is not used."))
            continue
        for row, more in zip(rows, surplus, strict=True):
            ids = [row[column].strip() for column in row if _is_id(column)]
            ids = [case_id for case_id in ids if case_id.lower() not in _NONE]
            facts, odd = _facts(row)
            if more:
                odd.append(f"{', '.join(more)!r} is beyond the last column")
            problems += [(path, f"{ids[0] if ids else 'a row without ID'}: {text}; it is not used.") for text in odd]
            for case_id in ids:
                others = [other for other in ids if other != case_id]
                known.setdefault(case_id, {}).update(facts | ({"earlier_ids": others} if others else {}))
    return known, problems


def _is_id(column: str) -> bool:
    """`BraTS_2019_subject_ID`, `Brats20ID`, `BraTS18ID`, `TCGA_TCIA_subject_ID`."""
    return bool(re.fullmatch(r"(brats|tcga).*id", column.strip(), re.IGNORECASE))


def _facts(row: dict[str, str]) -> tuple[dict, list[str]]:
    """The known columns of a row as values, and those that hold something else, in words."""
    facts, odd = {}, []
    for column, text in row.items():
        name, text = column.strip().lower(), text.strip()
        if text.lower() in _NONE:
            continue
        if name == "grade":
            facts["grade"] = text.upper()
        elif name.startswith(("resection", "extent_of_resection")):
            facts["resection"] = text
        elif name == "age" and _number(text) is not None:
            facts["age"] = _number(text)
        elif name.startswith("survival"):
            alive = re.fullmatch(r"alive\s*\((\d+) days? later\)", text, re.IGNORECASE)
            days = float(alive[1]) if alive else _number(text)
            if days is not None:
                facts |= {"survival_days": int(days), "alive": bool(alive)}
            else:
                odd.append(f"survival {text!r} is no number of days")
        elif name == "age":
            odd.append(f"age {text!r} is no number of years")
    return facts, odd


def _number(text: str) -> float | None:
    """A number that can be an age or a survival; None for anything else."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
