"""The colour tables name each label number once, in the report's colours."""

from brats_helpers.evaluation.colours import ITK_SNAP, SLICER, write_colour_tables
from brats_helpers.report.plots import COLOURS


def test_every_label_of_the_numbering_has_its_name_and_colour(tmp_path):
    write_colour_tables(tmp_path, "ped")  # 1 is enhancing tumour, 2 and 3 are core, 4 is oedema
    rows = [line.split() for line in (tmp_path / ITK_SNAP).read_text().splitlines() if not line.startswith("#")]
    assert [(row[0], row[-1]) for row in rows[1:]] == [("1", '"ET"'), ("2", '"NCR"'), ("3", '"NCR"'), ("4", '"ED"')]
    assert bytes(int(value) for value in rows[1][1:4]).hex().upper() == COLOURS["ET"].removeprefix("#")
    rows = [line.split() for line in (tmp_path / SLICER).read_text().splitlines() if not line.startswith("#")]
    assert rows[4] == ["4", "ED", *(str(value) for value in bytes.fromhex(COLOURS["ED"].removeprefix("#"))), "255"]
