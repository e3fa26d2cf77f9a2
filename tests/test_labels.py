"""Label numberings: what each number means, in both directions."""

import numpy as np
import pytest

from brats_helpers.data.cases import Case
from brats_helpers.labels import (
    CLASSES,
    NUMBERINGS,
    REGIONS,
    DataError,
    classes_to_labels,
    find_numbering,
    labels_to_classes,
    numbering_of_id,
    numbering_of_names,
)


def test_class_and_region_names_fit():
    assert CLASSES == ("background", "NCR", "ED", "ET")
    assert REGIONS == {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


@pytest.mark.parametrize(
    ("numbering", "regions"),  # label numbers of WT, TC and ET by the organisers' tables
    [
        ("brats2020", ({1, 2, 4}, {1, 4}, {4})),
        ("brats2023", ({1, 2, 3}, {1, 3}, {3})),
        ("msd", ({1, 2, 3}, {2, 3}, {3})),
        ("brats2012", ({1, 2, 3, 4}, {1, 3, 4}, {4})),
        ("gli2024", ({1, 2, 3}, {1, 3}, {3})),
        ("ped", ({1, 2, 3, 4}, {1, 2, 3}, {1})),
        ("met2025", ({1, 2, 3}, {1, 3}, {3})),
        ("menrt", ({1}, {1}, {1})),
    ],
)
def test_numbers_of_each_region(numbering, regions):
    present = np.array(sorted(NUMBERINGS[numbering].numbers - ({3} if numbering == "brats2020" else set())))
    if numbering == "brats2023":
        present = np.array([1, 2, 3])
    classes = labels_to_classes(present, numbering)
    found = [{int(label) for label in present[np.isin(classes, members)]} for members in REGIONS.values()]
    assert tuple(found) == regions


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [([0, 1, 2, 4], [0, 1, 2, 3]), ([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 2], [0, 2]), ([0], [0]), ([4], [3])],
)
def test_usual_masks_hold_3_or_4_for_enhancing_tumour(labels, classes, dtype):
    found = labels_to_classes(np.array(labels, dtype))
    assert found.dtype == np.uint8
    assert found.tolist() == classes


def test_labels_near_whole_numbers_are_rounded():
    """As an integer header stores them, 4 / 255 apart: at most 0.008 from a whole number."""
    stored = np.rint(np.array([0, 1, 2, 4]) / (4 / 255)) * (4 / 255)
    assert labels_to_classes(stored).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="fractional"):
        labels_to_classes(np.array([0, 1.021]))


@pytest.mark.parametrize(
    ("labels", "numbering", "message"),
    [
        ([0, 1.5], "brats2020", r"fractional or non-finite labels \(1.5\)"),
        ([0, np.nan], "brats2020", "fractional or non-finite"),
        ([0, np.inf], "brats2020", "fractional or non-finite"),
        ([0, 5], "brats2020", "labels from 0 to 5; expected 1 NCR, 2 ED, 3 or 4 ET"),
        ([0, -1], "brats2020", "labels from -1 to 0"),
        ([0, 259], "brats2020", "labels from 0 to 259"),  # 3 in eight bits
        ([0, 3, 4], "brats2020", "labels 3 and 4 in one mask.*--labels NAME"),
        ([0, 4], "msd", "labels from 0 to 4; expected 1 ED, 2 NCR, 3 ET"),
        ([0, 2], "menrt", "labels from 0 to 2; expected 1 ET"),
    ],
)
def test_labels_without_meaning_are_refused(labels, numbering, message):
    with pytest.raises(ValueError, match=message):
        labels_to_classes(np.array(labels, np.float64), numbering)


@pytest.mark.parametrize("name", [*NUMBERINGS, "2020", "2023"])
def test_classes_become_labels_and_back(name):
    numbering = find_numbering(name)
    classes = np.array([[0, 1], [2, 3]], np.uint8) if numbering != "menrt" else np.array([[0, 3]], np.uint8)
    found = classes_to_labels(classes, numbering)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(labels_to_classes(found, numbering), classes)


def test_labels_to_write():
    classes = np.arange(4, dtype=np.uint8)
    assert {name: classes_to_labels(classes, name).tolist() for name in ("brats2020", "brats2023", "msd", "ped")} == {
        "brats2020": [0, 1, 2, 4],
        "brats2023": [0, 1, 2, 3],
        "msd": [0, 2, 1, 3],
        "ped": [0, 2, 4, 1],
    }
    with pytest.raises(ValueError, match="NCR, ED has no number in menrt"):
        classes_to_labels(classes, "menrt")


def test_unknown_numberings_are_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"labels 2019: expected auto or one of\n  brats2020: BraTS 2018 to 2022\n"):
        find_numbering("2019")


@pytest.mark.parametrize(
    ("case_id", "numbering"),
    [
        ("BraTS-GLI-00001-000", ""),
        ("BraTS-GLI-00001-001", ""),
        ("BraTS-GLI-02062-100", "gli2024"),
        ("BraTS-GLI-02062-101", "gli2024"),
        ("BraTS-PED-00001-000", "ped"),
        ("BraTS-MET-00001-000", "met2025"),
        ("BraTS-MEN-RT-0402-1", "menrt"),
        ("BraTS-MEN-00001-000", ""),
        ("BraTS20_Training_001", ""),
    ],
)
def test_numberings_told_by_case_ids(case_id, numbering):
    assert numbering_of_id(case_id) == numbering


def test_predictions_for_names_of_2023_are_numbered_as_in_2023():
    assert Case("BraTS-GLI-00001-000", {}).numbering == Case("BraTS-MEN-00001-000", {}).numbering == "brats2023"
    assert Case("BraTS20_Training_001", {}).numbering == Case("Site-1", {}).numbering == "brats2020"


@pytest.mark.parametrize(
    ("labels", "numbering"),
    [
        ({"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}, "msd"),
        ({"background": 0, "edema": 1, "necrosis": 2, "enhancing tumor": 3}, "msd"),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}, "msd"),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": 3}, "brats2023"),
        ({"background": 0, "NCR": 1, "ED": 2, "ET": 4}, "brats2020"),
        ({"background": 0, "NETC": 1, "SNFH": 2, "ET": 3, "RC": 4}, "gli2024"),
        ({"background": 0, "ET": 1, "NET": 2, "CC cystic": 3, "ED": 4}, "ped"),
        ({"background": 0, "tumour": 1}, ""),
        ({"background": 0, "liver": 1, "edema": 2}, ""),
    ],
)
def test_numberings_told_by_the_names_of_labels(labels, numbering):
    assert numbering_of_names(labels) == numbering
