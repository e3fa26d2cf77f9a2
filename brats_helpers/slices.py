"""BraTS 2020 as HDF5 slices (`brats2020-slices`), put together into patients of NIfTI volumes again.

A file `volume_V_slice_S.h5` holds `image` (240, 240, 4), already normalised, and `mask` (240, 240, 3). Which channel is
which modality and which mask is which tissue stands nowhere, and public code disagrees. So the content is asked,
patient by patient, and the patients vote:

- Masks that exclude each other are tissues. Oedema (ED) has the largest share of its surface towards what is no tumour;
  of the other two, enhancing tumour (ET) has more surface towards oedema and what is no tumour than the necrotic core
  (NCR), which it encloses. Masks that lie in each other are the regions WT, TC and ET, from the outermost.
- In units of the healthy brain's spread, T1ce is where ET is brightest above ED. Of the others, T1 is where ED is
  darkest, and T2 is what goes least with T1 over the healthy brain, as fluid is dark in T1 and FLAIR and bright in T2.

Where fewer than two thirds of the patients agree, the set is refused. No content tells the geometry: axes, direction
and voxels of 1 mm are assumed to be those of BraTS 2020. Patients keep the set's numbers, not the challenge's names.
"""

import errno
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np

from brats_helpers.cases import LABELS, MODALITIES, DataError
from brats_helpers.files import part_folder, sweep, write_json
from brats_helpers.log import done, warn

_NAME = re.compile(r"volume_(\d+)_slice_(\d+)\.h5")
_AFFINE = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], float)
_VOTERS = 30  # patients, spread over the set
_AGREE = 2 / 3


def assemble(folder: Path, out: Path) -> str:
    """Write each patient's volumes, (X, Y, slice), into `out/volume_V/`; those that are there already stay.

    Background becomes exactly 0; images are float32 and otherwise as they are, labels 0, 1, 2 and 4. Patients with a
    slice that is missing or cannot be read are left out with a line each. `out/channels.json` keeps the vote.

    Args:
        folder: with the HDF5 files, at any depth.
        out: made where it does not exist.

    Returns:
        What the patients' content says of the channels, in one line.

    Raises:
        DataError: no such slices, h5py is missing, the patients disagree, or the disk is full.
    """
    if find_spec("h5py") is None:
        raise DataError(f"{folder} holds HDF5 slices, which h5py reads: pip install h5py, then run again.")
    patients, kept = _patients(folder), out / "channels.json"
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if not kept.exists():
        print(f"{len(patients)} patients of slices are put together in {out}", flush=True)
        write_json(kept, _vote(folder, patients))
    vote = json.loads(kept.read_text())

    def put(number: int) -> bool:
        if (out / f"volume_{number:03}").exists():
            return True
        try:
            _write(*_read(patients[number]), vote, out / f"volume_{number:03}")
        except DataError as error:
            warn(f"left out: volume {number}: {error}")
            return False
        return True

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            whole = sum(pool.map(put, sorted(patients)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"the disk of {out} is full. Make room or choose another data_dir, then run again.") from error
    if not whole:
        raise DataError(f"no patient below {folder} has all its slices.")
    done(f"{whole} of {len(patients)} patients put together")
    return vote["says"]


def _patients(folder: Path) -> dict[int, dict[int, Path]]:
    """Files by patient and slice."""
    patients: dict[int, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.rglob("*.h5")):
        if match := _NAME.fullmatch(path.name):
            patients[int(match[1])].setdefault(int(match[2]), path)
    if not patients:
        raise DataError(f"no volume_V_slice_S.h5 below {folder}, as brats2020-slices has them.")
    return patients


def _read(slices: dict[int, Path]) -> tuple[np.ndarray, np.ndarray]:
    """A patient's images, float32 (X, Y, slices, 4), background exactly 0, and masks, bool (X, Y, slices, 3)."""
    import h5py

    if gaps := sorted(set(range(max(slices) + 1)) - set(slices)):
        raise DataError(f"slice {gaps[0]} is missing ({len(slices)} files of {max(slices) + 1}); fetch the set again.")
    images, masks = [], []
    for number in range(len(slices)):
        try:
            with h5py.File(slices[number]) as file:
                image, mask = file["image"][:].astype(np.float32), file["mask"][:]
        except (OSError, KeyError) as error:
            raise DataError(f"{slices[number]} cannot be read ({error}); fetch it again.") from error
        expected = (*(images[0] if images else image).shape[:2], 4)
        if image.shape != expected or mask.shape != (*expected[:2], 3):
            raise DataError(
                f"{slices[number]} has an image of {image.shape} and a mask of {mask.shape}; expected {expected} and"
                f" {(*expected[:2], 3)}, as the patient's other slices."
            )
        images.append(image - image[0, 0])  # the brain never reaches the corner, so this is the background
        masks.append(mask != 0)
    return np.stack(images, axis=2), np.stack(masks, axis=2)


# --- what is which -----------------------------------------------------------------------------------------------


def _vote(folder: Path, patients: dict[int, dict[int, Path]]) -> dict:
    """What most of up to 30 patients say of the masks, and then, the masks settled, of the channels."""
    numbers = sorted(patients)

    def voters() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in numbers[:: -(-len(numbers) // _VOTERS)]:
            try:
                images, masks = _read(patients[number])
            except DataError:
                continue  # said when its turn comes
            if masks.any(axis=(0, 1, 2)).all():  # all three tissues
                yield images, masks

    tissues = Counter(mask_order(masks) for _, masks in voters())
    if not tissues:
        raise DataError(f"no patient below {folder} is whole and has all three tissues: nothing tells what is which.")
    kind, order = _settled(tissues, f"the masks below {folder}")
    modalities = Counter(channel_order(images, to_labels(masks, kind, order)) for images, masks in voters())
    channels = _settled(modalities, f"the channels below {folder}")
    names = ("NCR", "ED", "ET") if kind == "tissues" else ("WT", "TC", "ET")
    says = f"{_said('masks', order, names, tissues)}; {_said('channels', channels, MODALITIES, modalities)}"
    says += "; geometry as of BraTS 2020, which nothing in the set proves"
    return {"masks": [kind, list(order)], "channels": list(channels), "says": says}


def _said(what: str, places: Sequence[int], names: Sequence[str], votes: Counter) -> str:
    in_order = ", ".join(name for _, name in sorted(zip(places, names, strict=True)))
    return f"{what} are {in_order}, as {max(votes.values())} of {votes.total()} patients show"


def _settled(votes: Counter, what: str):
    """What most said, or raise `DataError`."""
    (most, n), *others = votes.most_common()
    if n < _AGREE * votes.total():
        raise DataError(
            f"the patients disagree on the order of {what}: {most} say {n}, {others[0][0]} {others[0][1]} of"
            f" {votes.total()}; expected two thirds. Take the same patients as volumes: --data brats2020."
        )
    return most


def mask_order(masks: np.ndarray) -> tuple[str, tuple[int, int, int]]:
    """Which mask is which, by where they lie.

    Args:
        masks: bool (X, Y, slices, 3), none empty.

    Returns:
        `tissues` and the masks of NCR, ED and ET; or `regions` and those of WT, TC and ET.

    Raises:
        DataError: masks that overlap and do not lie in each other.
    """
    if (masks.sum(axis=3) > 1).any():
        outer, middle, inner = order = tuple(int(place) for place in np.argsort(-masks.sum(axis=(0, 1, 2))))
        if (masks[..., inner] & ~masks[..., middle]).any() or (masks[..., middle] & ~masks[..., outer]).any():
            raise DataError("its masks overlap and do not lie in each other; expected tissues or regions.")
        return "regions", order
    faces = _faces(masks @ np.arange(1, 4, dtype=np.uint8))
    others = faces * (1 - np.eye(4, dtype=int))
    ed = int(np.argmax(others[1:, 0] / others[1:].sum(axis=1)))
    outwards = others[1:, 0] + others[1:, ed + 1]
    ncr, et = sorted({0, 1, 2} - {ed}, key=lambda place: outwards[place])
    return "tissues", (ncr, ed, et)


def _faces(labels: np.ndarray) -> np.ndarray:
    """How many faces voxels of each two labels of 0 to 3 share, int64 (4, 4), symmetric."""
    pairs = np.zeros(16, np.int64)
    for axis in range(3):
        along = np.moveaxis(labels, axis, 0)
        pairs += np.bincount((4 * along[:-1] + along[1:]).ravel(), minlength=16)
    return pairs.reshape(4, 4) + pairs.reshape(4, 4).T


def to_labels(masks: np.ndarray, kind: str, order: Sequence[int]) -> np.ndarray:
    """Masks as labels 0, 1, 2, 4, uint8 (X, Y, slices). See `mask_order`."""
    ncr, ed, et = LABELS["2020"][1:]
    drawn = (ncr, ed, et) if kind == "tissues" else (ed, ncr, et)  # each region over the one around it
    labels = np.zeros(masks.shape[:3], np.uint8)
    for place, label in zip(order, drawn, strict=True):
        labels[masks[..., place]] = label
    return labels


def channel_order(images: np.ndarray, labels: np.ndarray) -> tuple[int, ...]:
    """The channels of `cases.MODALITIES`, by how bright healthy brain and tissues are.

    Args:
        images: (X, Y, slices, 4), background 0.
        labels: (X, Y, slices), with 2 (ED) and 4 (ET) present.
    """
    healthy = images[(images != 0).any(axis=3) & (labels == 0)]
    ed, et = ((images[labels == label].mean(axis=0) - healthy.mean(axis=0)) / healthy.std(axis=0) for label in (2, 4))
    t1ce = int(np.argmax(et - ed))
    t1 = min({0, 1, 2, 3} - {t1ce}, key=lambda place: ed[place])
    alike = np.corrcoef(healthy.T)[t1]
    t2, flair = sorted({0, 1, 2, 3} - {t1ce, t1}, key=lambda place: alike[place])
    found = {"flair": flair, "t1": t1, "t1ce": t1ce, "t2": t2}
    return tuple(found[name] for name in MODALITIES)


def _write(images: np.ndarray, masks: np.ndarray, vote: dict, folder: Path) -> None:
    """The patient's files, all of them or none."""
    volumes = {name: images[..., place] for name, place in zip(MODALITIES, vote["channels"], strict=True)}
    volumes["seg"] = to_labels(masks, *vote["masks"])
    with part_folder(folder.parent) as part:
        for name, volume in volumes.items():
            nib.save(nib.Nifti1Image(volume, _AFFINE), part / f"{folder.name}_{name}.nii.gz")
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.exists():  # else another run was faster
                raise
