"""The vocabulary: modalities, label numberings, classes and regions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # before anything is installed, the command line needs the names below
    import numpy as np

MODALITIES = ("flair", "t1", "t1ce", "t2")
CLASSES = ("background", "NCR", "ED", "ET")
"""Class indices 0 to 3 by name: what networks predict and caches hold."""
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
"""The challenge's regions as sets of class indices; they overlap."""
STRUCTURES = REGIONS | {"NCR": (1,), "ED": (2,)}
"""The scored sets of class indices: the regions, and the labels NCR and ED (the label ET is a region)."""
COLOURS = {
    "background": "#8C8C8C",
    "NCR": "#009E73",
    "ED": "#56B4E9",
    "ET": "#E69F00",
    "WT": "#0072B2",
    "TC": "#CC79A7",
}
"""The colour of each class and region (Okabe and Ito's palette for colour-blind readers)."""


class DataError(Exception):
    """Something is wrong with the data on disk; the message names case and file, and says what to do."""


@dataclass(frozen=True)
class Numbering:
    """A convention for numbering the tissues in a mask.

    Attributes:
        source: the releases or tools that use it.
        classes: class index of each label number; the first number of a class is the one written.
        no_class: meaning of the label numbers that belong to no class and are read as background.
        either: two numbers, in order, of the same tissue; a mask uses only one of them.
        regions: those of `REGIONS` that the numbers distinguish.
        case_id: pattern of the case IDs known to use it; empty if there are none.
    """

    source: str
    classes: Mapping[int, int]
    no_class: Mapping[int, str] = field(default_factory=dict)
    either: tuple[int, ...] = ()
    regions: tuple[str, ...] = tuple(REGIONS)
    case_id: str = ""

    @property
    def numbers(self) -> set[int]:
        """All label numbers that a mask may hold, except background."""
        return {*self.classes, *self.no_class}

    @property
    def written(self) -> set[int]:
        """The label numbers of `classes`, without the other one of `either`."""
        return {*self.classes} - {*[label for label in self.classes if label in self.either][1:]}

    def labels_of(self, class_index: int) -> set[int]:
        """The label numbers of a class."""
        return {label for label, index in self.classes.items() if index == class_index}

    def can_hold(self, numbers: Set[int]) -> bool:
        """Whether one mask may hold all these tumour labels."""
        return numbers <= self.numbers and not (self.either and numbers >= {*self.either})

    def explain(self) -> str:
        """What each number means, such as `1 NCR, 2 ED, 3 or 4 ET`."""
        meanings = {label: CLASSES[index] for label, index in self.classes.items()} | dict(self.no_class)
        if self.either:
            kept, other = self.either
            meanings[kept] = f"or {other} {meanings[kept]}"
            del meanings[other]
        return ", ".join(f"{label} {meaning}" for label, meaning in sorted(meanings.items()))


_CAVITY = {4: "resection cavity"}
NUMBERINGS = {
    "brats2020": Numbering("BraTS 2018 to 2022", {1: 1, 2: 2, 4: 3, 3: 3}, either=(3, 4)),
    "brats2023": Numbering("BraTS 2023, and MEN, SSA and GoAT since", {1: 1, 2: 2, 3: 3, 4: 3}, either=(3, 4)),
    "msd": Numbering("Medical Segmentation Decathlon and nnU-Net", {1: 2, 2: 1, 3: 3}),
    "brats2012": Numbering("BRATS 2012 to 2016; 3 is non-enhancing core", {1: 1, 2: 2, 3: 1, 4: 3}),
    "gli2024": Numbering(
        "BraTS-GLI 2024 and 2025, after treatment", {1: 1, 2: 2, 3: 3}, _CAVITY, case_id=r"BraTS-GLI-\d+-[1-9]\d\d\b"
    ),
    "ped": Numbering(
        "BraTS-PED 2024 and 2025; 2 is non-enhancing, 3 cystic", {1: 3, 2: 1, 3: 1, 4: 2}, case_id=r"BraTS-PEDs?-"
    ),
    "met2025": Numbering("BraTS-MET", {1: 1, 2: 2, 3: 3}, _CAVITY, case_id=r"BraTS-METS?-"),
    "menrt": Numbering("BraTS-MEN-RT; 1 is the gross tumour volume", {1: 3}, regions=("WT",), case_id=r"BraTS-MEN-RT"),
}
"""What label numbers mean, by name. `brats2020` and `brats2023` both read 3 or 4 as ET, and write 4 or 3."""
KNOWN_LABELS = frozenset().union(*(table.numbers for table in NUMBERINGS.values()))
"""All tumour labels of any numbering."""
ALIASES = {"2020": "brats2020", "2023": "brats2023", "2012": "brats2012", "nnunet": "msd", "decathlon": "msd"}
USUAL = "brats2020"
"""The numbering of masks without evidence for another one."""
OTHERWISE = "If the masks are numbered in another way, name it: -p labels NAME, or --labels NAME."
NEAR = 0.02
"""Largest distance of a stored label from a whole number: the slope of a NIfTI header causes rounding."""


def check_modalities(modalities: Iterable[str]) -> None:
    """Raise `DataError` unless `modalities` are names from `MODALITIES`, none twice, at least one."""
    names = list(modalities)
    unknown = [name for name in names if name not in MODALITIES]
    if unknown or not names or len(set(names)) < len(names):
        raise DataError(
            f"modalities {', '.join(names) or 'none'}: expected one or more of {', '.join(MODALITIES)}, each once."
        )


def find_numbering(name: str) -> str:
    """Return the key of `NUMBERINGS` for a name or an alias, or raise `DataError`."""
    known = ALIASES.get(str(name).lower(), str(name).lower())
    if known not in NUMBERINGS:
        listed = "\n".join(f"  {key}: {numbering.source}" for key, numbering in NUMBERINGS.items())
        raise DataError(f"labels {name}: expected auto or one of\n{listed}")
    return known


def usual_numbering(case_id: str) -> str:
    """The numbering to assume without other evidence: 2023's for names such as `BraTS-GLI-00001-000`, else 2020's.

    Both are read in the same way, so the difference matters only for writing.
    """
    return "brats2023" if re.match(r"BraTS-[a-z]+-", case_id, re.IGNORECASE) else USUAL


def numbering_of_id(case_id: str) -> str:
    """The numbering that a case ID implies (`BraTS-PED-00001-000`: `ped`), or an empty string."""
    for name, numbering in NUMBERINGS.items():
        if numbering.case_id and re.match(numbering.case_id, case_id, re.IGNORECASE):
            return name
    return ""


_TISSUES = (  # words in data sets' names of labels; the first match counts
    ("cavity", r"cavity|resection|\brc\b"),
    ("NCR", r"non.?enh|necro|cyst|\bncr\b|\bnetc?\b"),
    ("ED", r"edema|flair|\bed\b|snfh"),
    ("WT", r"whole|\bwt\b"),
    ("TC", r"core|\btc\b"),
    ("ET", r"enhanc|\bet\b"),
)


def numbering_of_names(labels: Mapping) -> str:
    """The numbering of a data set with named labels, or an empty string if no known one fits.

    Args:
        labels: as in `dataset.json`: name by number (`{"1": "edema"}`, the Decathlon's), number by name, or numbers of
            each region by its name (nnU-Net's).
    """
    members: dict[str, set[int]] = {}
    for key, value in labels.items():
        name, numbers = (value, int(key)) if isinstance(value, str) else (key, value)
        numbers = numbers if isinstance(numbers, list) else [numbers]
        tissue = next((tissue for tissue, words in _TISSUES if re.search(words, str(name), re.IGNORECASE)), None)
        if tissue:
            members.setdefault(tissue, set()).update(map(int, numbers))
        elif any(numbers):  # all but the background
            return ""
    if "WT" in members:
        core, enhancing = members.get("TC", set()), members.get("ET", set())
        members |= {"ED": members["WT"] - core, "NCR": core - enhancing}
    classes = {label: CLASSES.index(tissue) for tissue in CLASSES[1:] for label in members.get(tissue, ())}
    for name, table in NUMBERINGS.items():
        known = {label: index for label, index in table.classes.items() if label in table.written}
        if known == classes and members.get("cavity", set()) == {*table.no_class}:
            return name
    return ""


def whole_labels(labels: np.ndarray) -> np.ndarray:
    """Round stored labels to whole numbers, of the same shape; integers are returned as they are.

    Raises:
        ValueError: a label is not finite, or farther than `NEAR` from a whole number.
    """
    if labels.dtype.kind != "f":
        return labels
    import numpy as np

    nearest = np.rint(labels)
    with np.errstate(invalid="ignore"):
        near = np.abs(labels - nearest) <= NEAR  # false for NaN and infinity
    if not near.all():
        some = ", ".join(f"{label:g}" for label in np.unique(labels[~near])[:3])
        raise ValueError(f"fractional or non-finite labels ({some}). Was the mask resampled or rescaled?")
    return nearest


def labels_to_classes(labels: np.ndarray, numbering: str = USUAL) -> np.ndarray:
    """Map label numbers to class indices.

    Args:
        labels: numbers of any dtype and shape; floats within `NEAR` of a whole number count as that number.
        numbering: key of `NUMBERINGS`. Numbers without a class become background.

    Returns:
        uint8 of the same shape, values 0 to 3 (see `CLASSES`).

    Raises:
        ValueError: a fractional or unknown label, or two numbers for enhancing tumour in one mask.
    """
    numbering = find_numbering(numbering)
    table, whole = NUMBERINGS[numbering], whole_labels(labels)
    expected = f"expected {table.explain()} ({numbering}: {table.source})"
    if whole.size and (whole.min() < 0 or whole.max() > max(table.numbers)):
        raise ValueError(f"labels from {whole.min():g} to {whole.max():g}; {expected}. {OTHERWISE}")
    if table.either and all((whole == label).any() for label in table.either):
        both = " and ".join(map(str, table.either))
        raise ValueError(f"labels {both} in one mask; {numbering} uses one of them, for ET. {OTHERWISE}")
    classes = whole.astype("uint8")
    for label in table.numbers:
        if (index := table.classes.get(label, 0)) != label:
            classes[whole == label] = index
    return classes


def classes_to_labels(classes: np.ndarray, numbering: str = USUAL) -> np.ndarray:
    """Map class indices 0 to 3 to label numbers, uint8, of the same shape.

    Raises:
        ValueError: a class that has no number in `numbering`.
    """
    numbering = find_numbering(numbering)
    table = NUMBERINGS[numbering]
    numbers = {index: label for label, index in reversed(table.classes.items())} | {0: 0}
    missing = {index for index in range(len(CLASSES)) if index not in numbers and (classes == index).any()}
    if missing:
        names = ", ".join(CLASSES[index] for index in sorted(missing))
        raise ValueError(f"{names} has no number in {numbering} ({table.explain()}). Choose another numbering.")
    import numpy as np

    return np.array([numbers.get(index, 0) for index in range(len(CLASSES))], np.uint8)[classes]
