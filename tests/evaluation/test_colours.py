"""The colour tables name each label number once, in the report's colours."""

from brats_helpers.evaluation.colours import ITK_SNAP, SLICER, write_colour_tables
from brats_helpers.report.plots import COLOURS


def rows(path):
    return [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]


def test_every_label_of_the_numbering_has_its_name_and_colour(tmp_path):
    write_colour_tables(tmp_path, ["ped"])  # 1 is enhancing tumour, 2 and 3 are core, 4 is oedema
    snap = rows(tmp_path / ITK_SNAP)
    assert [(row[0], row[-1]) for row in snap[1:]] == [("1", '"ET"'), ("2", '"NCR"'), ("3", '"NCR"'), ("4", '"ED"')]
    assert bytes(int(value) for value in snap[1][1:4]).hex().upper() == COLOURS["ET"].removeprefix("#")
    slicer = rows(tmp_path / SLICER)
    assert slicer[4] == ["4", "ED", *(str(value) for value in bytes.fromhex(COLOURS["ED"].removeprefix("#"))), "255"]


def test_label_maps_of_two_numberings_have_tables_by_name(tmp_path):
    write_colour_tables(tmp_path, ["brats2020", "ped", "2020"])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"labels.{name}.{viewer}" for name in ("brats2020", "ped") for viewer in ("itksnap.txt", "slicer.ctbl")
    }
    assert rows(tmp_path / "labels.brats2020.slicer.ctbl")[-1][:2] == ["4", "ET"]
