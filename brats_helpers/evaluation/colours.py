"""Label colour tables for ITK-SNAP and 3D Slicer, in the colours of the report."""

from collections.abc import Iterable
from pathlib import Path

from brats_helpers.files import whole_file
from brats_helpers.labels import CLASSES, COLOURS, NUMBERINGS, find_numbering

ITK_SNAP, SLICER = "labels.itksnap.txt", "labels.slicer.ctbl"


def write_colour_tables(folder: Path, numberings: Iterable[str]) -> None:
    """Write both tables into `folder`; with several numberings a pair for each, as in `labels.ped.itksnap.txt`.

    Args:
        folder: beside the label maps.
        numberings: of those label maps, names of `labels.NUMBERINGS` or aliases.
    """
    names = sorted(set(map(find_numbering, numberings)))
    for name in names:
        for file_name, lines in ((ITK_SNAP, _itk_snap(name)), (SLICER, _slicer(name))):
            if len(names) > 1:
                file_name = file_name.replace("labels", f"labels.{name}")
            with whole_file(folder / file_name) as file:
                file.write("\n".join(lines) + "\n")


def _itk_snap(numbering: str) -> list[str]:
    lines = ["# ITK-SnAP Label Description File", "# IDX  R  G  B  A  VIS MESH  LABEL", '0 0 0 0 0 0 0 "Clear Label"']
    return lines + [f'{number} {colour} 1 1 1 "{name}"' for number, name, colour in _rows(numbering)]


def _slicer(numbering: str) -> list[str]:
    lines = ["# Color table for 3D Slicer: number, name, red, green, blue, opacity", "0 background 0 0 0 0"]
    return lines + [f"{number} {name} {colour} 255" for number, name, colour in _rows(numbering)]


def _rows(numbering: str) -> list[tuple[int, str, str]]:
    """Number, class and colour (red, green and blue, 0 to 255) of each label."""
    rows = []
    for number, index in sorted(NUMBERINGS[numbering].classes.items()):
        name = CLASSES[index]
        rows.append((number, name, " ".join(map(str, bytes.fromhex(COLOURS[name].removeprefix("#"))))))
    return rows
