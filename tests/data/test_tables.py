"""Tables of patients: what is read, and what is reported as not read."""

import sys
import zipfile

import pandas as pd
import pytest

from brats_helpers.data.tables import read_tables


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


def test_fields_beyond_the_last_column_are_reported_and_empty_ones_are_not(tmp_path):
    text = "Grade,BraTS_2020_subject_ID\nHGG,A,\nLGG,B, ,lost\nlgg , C\n"
    known, problems = read_tables([write(tmp_path, "name_mapping.csv", text)])
    assert {case_id: facts["grade"] for case_id, facts in known.items()} == {"A": "HGG", "B": "LGG", "C": "LGG"}
    assert [text for _, text in problems] == ["'lost' is beyond the last column; it is not used."]


def test_text_stays_text(tmp_path):
    """No number, date or missing value is guessed: `007` stays, and `NA` is nobody."""
    text = "BraTS2020_ID,BraTS_2018_subject_ID\n007,1e5\n2001-02-03,NA\n"
    known, problems = read_tables([write(tmp_path, "name_mapping.csv", text)])
    assert known == {"007": {"earlier_ids": ["1e5"]}, "1e5": {"earlier_ids": ["007"]}, "2001-02-03": {}}
    assert not problems


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "Grade,BraTS_2020_subject_ID\n"], ids=["empty", "no IDs", "no row"])
def test_a_table_without_patients_is_reported(tmp_path, text):
    path = write(tmp_path, "name_mapping.csv", text)
    known, ((reported, _),) = read_tables([path, write(tmp_path, "other.csv", "a,b\n1,2\n")])
    assert known == {} and reported == path


def test_excel_tables_are_read_with_openpyxl(tmp_path):
    pytest.importorskip("openpyxl")
    path = tmp_path / "BraTS21-17_Mapping.xlsx"
    rows = {"BraTS2021": ["BraTS2021_00001", "BraTS2021_00002"], "BraTS2020": ["BraTS20_Training_009", None]}
    pd.DataFrame(rows).to_excel(path, index=False)
    known, problems = read_tables([path])
    assert known["BraTS2021_00001"] == {"earlier_ids": ["BraTS20_Training_009"]}
    assert known["BraTS20_Training_009"] == {"earlier_ids": ["BraTS2021_00001"]}
    assert known["BraTS2021_00002"] == {} and not problems


def test_excel_tables_are_reported_as_unread_without_openpyxl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    path = tmp_path / "BraTS21-17_Mapping.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    known, ((reported, text),) = read_tables([path])
    assert known == {} and reported == path and "openpyxl" in text


def test_a_file_that_is_no_excel_table_is_reported(tmp_path):
    path = write(tmp_path, "name_mapping.xlsx", "no archive")
    known, ((reported, _),) = read_tables([path])
    assert known == {} and reported == path


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_fields_may_be_separated_as_other_countries_and_tools_do(tmp_path, separator, ending):
    rows = [
        ("BraTS_2019_subject_ID", "Grade", "BraTS_2020_subject_ID"),
        ("B19_7", "HGG", "B20_3"),
        ("NA", "LGG", "B20_4"),
    ]
    path = tmp_path / f"name_mapping.{ending}"
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    known, problems = read_tables([path])
    assert known["B20_3"] == {"grade": "HGG", "earlier_ids": ["B19_7"]} and known["B20_4"] == {"grade": "LGG"}
    assert not problems


def test_the_old_excel_format_is_reported_as_unread(tmp_path):
    path = tmp_path / "name_mapping.xls"
    path.write_bytes(b"\xd0\xcf\x11\xe0")
    assert read_tables([path]) == ({}, [(path, "The old Excel format is not read: save it as CSV or .xlsx.")])
