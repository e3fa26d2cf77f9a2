"""Patients compared with each other: orientation, voxel size, and how much of the field is not 0."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from operator import itemgetter
from statistics import median

import numpy as np

from brats_helpers.data.checks import times
from brats_helpers.data.findings import Finding
from brats_helpers.data.nifti import spacing_in_lps

_USUAL_MM = (1.0, 1.0, 1.0)  # of BraTS
_SAME_SPACING = 0.05  # largest relative difference of two voxel sides that count as equal
_ENOUGH = 4  # patients from which one differs
_FACTOR = 2  # a filled share that differs from the median by more than this factor is unusual


def compare_patients(entries: Mapping[str, Mapping], *, unstripped: Collection[str]) -> Iterator[tuple[str, Finding]]:
    """Find the patients that differ from the others, or from what networks for BraTS expect.

    Args:
        entries: by case ID what the audit knows, with `files` as `checks.check_case` returns them.
        unstripped: IDs of patients already reported as not skull-stripped.

    Returns:
        Pairs of case ID and finding.
    """
    images = {case_id: found for case_id, entry in entries.items() if (found := _images(entry["files"]))}
    if images:
        yield from _orientations(images)
        yield from _spacings(images)
        yield from _shares({case_id: found for case_id, found in images.items() if case_id not in unstripped})


def _images(files: Mapping[str, dict]) -> list[dict]:
    """What is known of a patient's modalities that could be read."""
    return [facts for kind, facts in files.items() if kind != "seg" and "filled" in facts]


def _orientations(images: Mapping[str, list[dict]]) -> Iterator[tuple[str, Finding]]:
    stored = {case_id: found[0]["orientation"] for case_id, found in images.items()}
    usual = Counter(stored.values()).most_common(1)[0][0]
    for case_id, codes in stored.items():
        if codes != usual:
            text = f"Axes run {codes}, those of most patients {usual}; all are turned to LPS on reading, and back."
            yield case_id, Finding("orientation", "note", images[case_id][0]["file"], text)


def _spacings(images: Mapping[str, list[dict]]) -> Iterator[tuple[str, Finding]]:
    sides = {case_id: spacing_in_lps(found[0]["affine"]) for case_id, found in images.items()}
    usual = Counter(tuple(np.round(side, 2).tolist()) for side in sides.values()).most_common(1)[0][0]
    for case_id, side in sides.items():
        other = next((wanted for wanted in (usual, _USUAL_MM) if not _same(side, wanted)), None)
        if other:
            whose = "most patients have" if other == usual else "BraTS has"
            text = (
                f"Voxels of {times(np.round(side, 3))} mm, {whose} {times(other)} mm. A network sees the brain at"
                " another size than it was trained on; `predict` resamples, training does not."
            )
            yield case_id, Finding("spacing", "warning", images[case_id][0]["file"], text)


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return np.allclose(one, other, rtol=_SAME_SPACING, atol=0)


def _shares(images: Mapping[str, list[dict]]) -> Iterator[tuple[str, Finding]]:
    shares = {case_id: max(map(itemgetter("filled"), found)) for case_id, found in images.items()}
    if len(shares) < _ENOUGH:
        return
    usual = median(shares.values())
    for case_id, share in shares.items():
        if not usual / _FACTOR <= share <= usual * _FACTOR:
            text = (
                f"{share:.0%} of the field is not 0, against {usual:.0%} in the median patient. Is the skull stripped,"
                " and is this the whole brain?"
            )
            yield case_id, Finding("filled-share", "warning", images[case_id][0]["file"], text)
