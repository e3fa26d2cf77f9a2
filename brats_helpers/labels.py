"""The vocabulary: modalities, label numberings, classes and regions."""

from collections.abc import Iterable

import numpy as np

MODALITIES = ("flair", "t1", "t1ce", "t2")
CLASSES = ("background", "NCR", "ED", "ET")
"""Class indices 0 to 3 by name: what networks predict and caches hold."""
LABELS = {"2020": (0, 1, 2, 4), "2023": (0, 1, 2, 3)}
"""Label numbers on disk of classes 0 to 3, by numbering (`2020`: up to BraTS 2022)."""
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
"""The challenge's regions as sets of class indices; they overlap."""
STRUCTURES = REGIONS | {"NCR": (1,), "ED": (2,)}
"""What is scored, as sets of class indices: the regions, and the labels that are no region (the label ET is one)."""


class DataError(Exception):
    """Something about the data on disk is wrong; the message says which case and file, and how to mend it."""


def check_modalities(modalities: Iterable[str]) -> None:
    """Raise `DataError` unless `modalities` are names from `MODALITIES`, none twice, at least one."""
    names = list(modalities)
    unknown = [name for name in names if name not in MODALITIES]
    if unknown or not names or len(set(names)) < len(names):
        raise DataError(
            f"modalities {', '.join(names) or 'none'}: expected one or more of {', '.join(MODALITIES)}, each once."
        )


def labels_to_classes(labels: np.ndarray) -> np.ndarray:
    """Map label numbers to class indices: 0, 1, 2 stay, 4 becomes 3.

    Enhancing tumour is label 4 up to BraTS 2022 and 3 from 2023 on; a mask may hold either.

    Args:
        labels: numbers of any dtype and shape.

    Returns:
        uint8 of the same shape, values 0 to 3 (see `CLASSES`).

    Raises:
        ValueError: a fractional or unknown label, or 3 and 4 in one mask.
    """
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise ValueError("fractional or non-finite labels; expected 0, 1, 2, 4. Was the mask resampled or rescaled?")
    if labels.size and (labels.min() < 0 or labels.max() > 4):
        raise ValueError(
            f"labels from {labels.min():g} to {labels.max():g}; expected 0, 1, 2, 4 (or 3 for 4, from BraTS 2023 on)."
        )
    classes = labels.astype(np.uint8)
    enhancing = classes == 4
    if enhancing.any():
        if (classes == 3).any():
            raise ValueError("labels 3 and 4 in one mask; enhancing tumour is 4 up to BraTS 2022 and 3 from 2023 on.")
        classes[enhancing] = 3
    return classes


def classes_to_labels(classes: np.ndarray, numbering: str = "2020") -> np.ndarray:
    """Map class indices 0 to 3 to label numbers, uint8, by a numbering of `LABELS`."""
    return np.array(LABELS[numbering], np.uint8)[classes]
