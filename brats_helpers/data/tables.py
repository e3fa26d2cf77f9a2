"""What the tables of a BraTS release say about its patients: grade, earlier IDs, age, survival.

Mapping tables give each patient's grade and IDs in other releases (`name_mapping.csv`, `BraTS21-17_Mapping.xlsx`);
`survival_*.csv` give age, survival and extent of resection of some. Releases name their columns differently, so columns
are recognised by what these names have in common.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

ENDINGS = (".csv", ".tsv", ".xlsx", ".xls")
_SEPARATORS = ",;\t|"
_NONE = ("", "na", "n/a", "nan", "none", "unknown")


def read_tables(paths: Iterable[Path]) -> tuple[dict[str, dict], list[tuple[Path, str]]]:
    """Read every table of patients among `paths`; files with other names are passed over.

    Returns:
        What is known of each ID that a table names: `grade` (HGG or LGG), `earlier_ids` (the row's other IDs), `age`
        (years), `survival_days`, `alive` (at that day), `resection`; each only where it is given. And what could not be
        read, as pairs of file and sentence.
    """
    known: dict[str, dict] = {}
    problems: list[tuple[Path, str]] = []
    for path in paths:
        if not re.search(r"mapping|survival", path.name, re.IGNORECASE):
            continue
        if path.suffix.lower() == ".xls":
            problems.append((path, "The old Excel format is not read: save it as CSV or .xlsx."))
            continue
        try:
            table, surplus = _read(path)
        except ImportError:
            problems.append((path, "Not read, as that needs openpyxl: pip install openpyxl, or save it as CSV."))
            continue
        except Exception as error:  # of pandas, openpyxl or zipfile, in many classes
            problems.append((path, f"Cannot be read as a table ({error}); it is not used."))
            continue
        columns = [column for column in table if _is_id(column)]
        if not columns or table.empty:
            problems.append((path, "No column of patients' IDs, or no row; it is not used."))
            continue
        problems += [(path, f"{', '.join(fields)!r} is beyond the last column; it is not used.") for fields in surplus]
        for _, row in table.iterrows():
            ids = [row[column] for column in columns if row[column].lower() not in _NONE]
            facts, odd = _facts(row)
            problems += [(path, f"{ids[0] if ids else 'a row without ID'}: {text}; it is not used.") for text in odd]
            for case_id in ids:
                others = [other for other in ids if other != case_id]
                known.setdefault(case_id, {}).update(facts | ({"earlier_ids": others} if others else {}))
    return known, problems


def _read(path: Path) -> tuple[pd.DataFrame, list[list[str]]]:
    """The cells of a table as stripped text, and the fields of its rows that lie beyond the last column."""
    surplus: list[list[str]] = []

    def cut(fields: list[str]) -> list[str]:
        more = [field.strip() for field in fields[width:] if field.strip()]
        if more:
            surplus.append(more)
        return fields[:width]

    as_text = {"dtype": str, "keep_default_na": False}
    if path.suffix.lower() == ".xlsx":
        table = pd.concat(pd.read_excel(path, sheet_name=None, **as_text).values())
    else:
        header = path.read_text("utf-8-sig").partition("\n")[0]
        separator = max(_SEPARATORS, key=header.count)  # the comma in a table of one column
        csv = as_text | {"encoding": "utf-8-sig", "engine": "python", "sep": separator}
        width = len(pd.read_csv(path, nrows=0, **csv).columns)
        table = pd.read_csv(path, index_col=False, on_bad_lines=cut, **csv)
    table = table.fillna("").map(str.strip)
    return table.rename(columns=lambda name: str(name).strip()), surplus


def _is_id(column: str) -> bool:
    """`BraTS_2019_subject_ID`, `Brats20ID`, `TCGA_TCIA_subject_ID`, `BraTS2021`."""
    return bool(re.fullmatch(r"(brats|tcga).*id|brats[\s_-]*(20)?\d\d", column, re.IGNORECASE))


def _facts(row: pd.Series) -> tuple[dict, list[str]]:
    """The known columns of a row as values, and sentences about those that hold something else."""
    facts, odd = {}, []
    for column, text in row.items():
        name = column.lower()
        if text.lower() in _NONE:
            continue
        if name == "grade":
            facts["grade"] = text.upper()
        elif name.startswith(("resection", "extent_of_resection")):
            facts["resection"] = text
        elif name == "age":
            if (years := _number(text)) is None:
                odd.append(f"age {text!r} is not a number of years")
            else:
                facts["age"] = years
        elif name.startswith("survival"):
            alive = re.fullmatch(r"alive\s*\((\d+) days? later\)", text, re.IGNORECASE)
            days = _number(alive[1] if alive else text)
            if days is None:
                odd.append(f"survival {text!r} is not a number of days")
            else:
                facts |= {"survival_days": int(days), "alive": bool(alive)}
    return facts, odd


def _number(text: str) -> float | None:
    """A number that can be an age or a survival; None for anything else."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
