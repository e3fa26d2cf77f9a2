"""How the numbering of masks is found: names, numbers, anatomy."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data.cases import find_cases, survey
from brats_helpers.data.numbering import (
    Evidence,
    better_numbering,
    decide,
    examine,
    number,
    outer_shares,
    predicted_numberings,
    resolve,
    surfaces,
)
from brats_helpers.labels import DataError
from tests.conftest import write_tiny_case

# An ordinary patient, as glioma16 has them: 2 outside, 4 enhancing.
USUAL = Evidence(frozenset({1, 2, 4}), {1: 0.03, 2: 0.7, 4: 0.15}, {1: -0.1, 2: -0.2, 4: 1.6}, {1: 1.0, 2: 2.0, 4: 1.5})


def renumbered(lookup: dict[int, int]) -> Evidence:
    """The ordinary patient with other label numbers."""

    def moved(values):
        return {lookup[label]: value for label, value in values.items()}

    return Evidence(frozenset(lookup.values()), moved(USUAL.outer), moved(USUAL.gain), moved(USUAL.flair))


SWAPPED = renumbered({1: 2, 2: 1, 4: 3})
PAEDIATRIC = renumbered({1: 2, 2: 4, 4: 1})
CAVITY = Evidence(
    frozenset({1, 2, 3, 4}),
    {1: 0.1, 2: 0.7, 3: 0.2, 4: 0.3},
    {1: 0, 2: 0, 3: 1.5, 4: 0.2},
    {1: 1, 2: 2, 3: 1, 4: -1.8},
)
OLD_CORE = Evidence(
    frozenset({1, 2, 3, 4}), {1: 0, 2: 0.7, 3: 0.2, 4: 0.2}, {1: 0, 2: 0, 3: 0, 4: 1.5}, {1: 1, 2: 2, 3: 2, 4: 1}
)
SILENT = Evidence(frozenset({1, 2, 3}))
MIXED = replace(USUAL, numbers=frozenset({1, 2, 3, 4}))  # of a 3 or two among the 4 one sees nothing


@pytest.mark.parametrize(
    ("seen", "numbering"),
    [
        ([USUAL], "brats2020"),
        ([renumbered({1: 1, 2: 2, 4: 3})], "brats2023"),
        ([SILENT] * 4, "brats2023"),
        ([], "brats2020"),
        ([SWAPPED] * 3, "msd"),
        ([SWAPPED] * 9 + [SILENT], "msd"),
        ([USUAL] * 19 + [SWAPPED], "brats2020"),
        ([PAEDIATRIC] * 3, "ped"),
        ([CAVITY] * 2, "gli2024"),
        ([replace(CAVITY, numbers=frozenset({1, 2, 4}), gain={1: 0.3, 2: 0, 4: 0})] * 3, "gli2024"),
        ([renumbered({1: 1, 2: 2, 4: 3})] * 7 + [CAVITY] * 3, "gli2024"),  # most of a set has no cavity
        ([OLD_CORE], "brats2012"),
        ([USUAL] * 4 + [MIXED], "brats2020"),  # the audit refuses that one
    ],
)
def test_most_patients_decide(seen, numbering):
    verdict = decide(seen)
    assert verdict.numbering == numbering
    assert verdict.unusual == (numbering not in ("brats2020", "brats2023"))


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ([SWAPPED], r"labels 1, 2, 3 in 1 patient; label 1 borders healthy brain most in 1.*-p labels msd"),
        ([USUAL] * 2 + [SWAPPED] * 3, "brats2023 .* explains 2 of 5 patients, msd .* 3"),
        ([Evidence(frozenset({1, 2, 3, 4}))] * 4, "explains 0 of 4 patients"),
        ([Evidence(frozenset({1}))] * 3, r"Every mask examined \(3\) holds the one label 1.*labels menrt"),
    ],
)
def test_what_stays_unclear_is_refused_with_the_evidence(seen, message):
    with pytest.raises(DataError, match=message):
        decide(seen)


@pytest.mark.parametrize(
    ("one", "better"),
    [
        (USUAL, ""),
        (SWAPPED, "msd"),
        (PAEDIATRIC, "ped"),
        (SILENT, ""),
        (replace(USUAL, flair={1: 1.0, 2: 2.0, 4: -1.0}), ""),  # an ET that is dark on FLAIR is no cavity yet
        (Evidence(frozenset({1, 2}), {1: 0.7, 2: 0.1}, {1: 0, 2: 1.5}), ""),  # a low-grade tumour, for instance
    ],
)
def test_one_patient_contradicts_the_numbering_of_the_set_only_if_all_of_it_shows(one, better):
    assert better_numbering("brats2020", one) == better


def test_surfaces_of_two_voxels():
    """Two voxels side by side: one face between them, five of each towards the outside."""
    labels = np.zeros((4, 3, 3), int)
    labels[1, 1, 1], labels[2, 1, 1] = 1, 2
    assert surfaces(labels).tolist() == [[0, 5, 5], [5, 0, 1], [5, 1, 0]]
    assert outer_shares(labels) == {1: 5 / 6, 2: 5 / 6}


def test_simulated_patients_show_the_usual_numbering(tiny_patients):
    verdict = resolve(find_cases(tiny_patients))
    assert verdict.numbering == "brats2020" and not verdict.unusual


def test_real_patients_show_the_usual_numbering(real_patients):
    cases = [case for case in find_cases(real_patients, ("flair", "t1ce")) if case.seg]
    for case in cases:
        seen = examine(case)
        assert (seen.oedema, seen.enhancing(seen.oedema)) == (2, 4)


def test_a_named_numbering_holds_for_every_patient(tiny_patients):
    found, verdict = number(survey(tiny_patients), "gli2024")
    assert verdict.says == "read as gli2024 (1 NCR, 2 ED, 3 ET, 4 resection cavity), as asked"
    assert {case.numbering for case in found.cases} == {"gli2024"}


def named(folder, pattern, change=lambda labels: labels):
    """Three tiny patients under other names, with other label numbers."""
    for k in range(3):
        case = find_cases(write_tiny_case(folder, pattern.format(k), seed=k))[0]
        image = nib.load(case.seg)
        nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), case.seg)
    return survey(folder)


def test_names_that_the_anatomy_contradicts_are_refused_with_the_evidence(tmp_path):
    found = named(tmp_path, "BraTS-PED-0000{}-000", lambda labels: np.where(labels == 4, 3, labels).astype(np.uint8))
    # of the tiny patients it is what they call oedema that enhances; ped has 1 for ET
    with pytest.raises(DataError, match="names say ped .* in 3 of 3 patients label 2 enhances most.*-p labels ped"):
        resolve(found.cases)
    assert {case.numbering for case in number(found, "brats2023")[0].cases} == {"brats2023"}


def test_names_that_the_numbers_do_not_fit_give_way_with_a_warning(tmp_path):
    found, verdict = number(named(tmp_path, "BraTS-MEN-RT-000{}-1"))
    assert {case.numbering for case in found.cases} == {"brats2020"} == {verdict.numbering}
    (finding,) = found.findings[""]
    assert (finding.code, finding.severity) == ("label-numbering", "warning")
    assert "The names say menrt (1 ET), which the numbers do not fit" in finding.message


@pytest.mark.parametrize(
    "labels, numberings",
    [
        ({"predictions": "2023", "references": {"brats2020": 3}}, ["2023"]),
        ({"predictions": "auto", "references": {"brats2020": 3, "ped": 1}}, ["brats2020", "ped"]),
        ({"predictions": "auto", "references": {}}, ["gli2024"]),
    ],
)
def test_predictions_are_numbered_as_asked_else_as_the_references_else_as_the_run(labels, numberings):
    assert predicted_numberings({"labels": labels}, own="gli2024") == numberings
