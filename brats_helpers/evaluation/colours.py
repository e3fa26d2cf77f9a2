"""Label colour tables for ITK-SNAP and 3D Slicer, in the colours of the report."""

from pathlib import Path

from brats_helpers.files import whole_file
from brats_helpers.labels import CLASSES, COLOURS, NUMBERINGS, find_numbering

ITK_SNAP, SLICER = "labels.itksnap.txt", "labels.slicer.ctbl"


def write_colour_tables(folder: Path, numbering: str) -> None:
    """Write both tables into `folder`.

    Args:
        folder: beside the label maps.
        numbering: of those label maps, a name of `labels.NUMBERINGS` or an alias.
    """
    snap = ["# ITK-SnAP Label Description File", "# IDX  R  G  B  A  VIS MESH  LABEL", '0 0 0 0 0 0 0 "Clear Label"']
    slicer = ["# Color table for 3D Slicer: number, name, red, green, blue, opacity", "0 background 0 0 0 0"]
    for number, index in sorted(NUMBERINGS[find_numbering(numbering)].classes.items()):
        name = CLASSES[index]
        red, green, blue = bytes.fromhex(COLOURS[name].removeprefix("#"))
        snap.append(f'{number} {red} {green} {blue} 1 1 1 "{name}"')
        slicer.append(f"{number} {name} {red} {green} {blue} 255")
    for file_name, lines in ((ITK_SNAP, snap), (SLICER, slicer)):
        with whole_file(folder / file_name) as file:
            file.write("\n".join(lines) + "\n")
