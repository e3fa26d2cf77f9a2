"""BraTS 2020 as HDF5 slices (`brats2020-slices`), put together into patients of NIfTI volumes again.

A file `volume_V_slice_S.h5` holds `image` (240, 240, 4), already normalised, and `mask` (240, 240, 3). Which channel is
which modality and which mask is which tissue stands nowhere, and public code disagrees. So the content is asked,
patient by patient, and the patients vote:

- Masks that exclude each other are tissues. Oedema (ED) has the largest share of its surface towards what is no tumour;
  of the other two, enhancing tumour (ET) has more surface towards oedema and what is no tumour than the necrotic core
  (NCR), which it encloses. Masks that lie in each other are the regions WT, TC and ET, from the outermost.
- In units of the healthy brain's spread, T1ce is where ET is brightest above ED. Of the others, T1 is where ED is
  darkest, and T2 is what goes least with T1 over the healthy brain, as fluid is dark in T1 and FLAIR and bright in T2.

Patients who lack a tissue have no vote. Where fewer than two thirds agree, the set is refused. No content tells the
geometry: axes, direction and voxels of 1 mm are assumed to be those of BraTS 2020. Patients keep the set's numbers, not
the challenge's names.
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np

from brats_helpers.data.layouts import walk
from brats_helpers.files import part_folder, sweep, write_json
from brats_helpers.labels import MODALITIES, DataError, classes_to_labels
from brats_helpers.log import done, warn

NAME = re.compile(r"volume_(\d+)_slice_(\d+)\.h5")
_AFFINE = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], float)
_VOTERS = 30  # patients, spread over the set
_AGREE = 2 / 3
_RULES = 1  # raised when the rules change, so that what older ones made is made anew
_WORKERS = 4  # at most; each holds a patient, 0.2 GB


def need_h5py() -> None:
    """Raise `DataError` where HDF5 cannot be read."""
    if find_spec("h5py") is None:
        raise DataError("HDF5 slices are read by h5py, which is not installed: pip install h5py, then run again.")


def assemble(folder: Path, data_dir: Path) -> tuple[Path, str]:
    """Write each patient's volumes, (X, Y, slice), into `volume_V/` of a folder in `data_dir`.

    The folder is of these very files: when one changes, or the rules do, another is made. It can be killed and started
    again at any moment. Background becomes exactly 0; images are float32 and otherwise as they are, labels 0, 1, 2, 4.
    Patients that cannot be put together are left out with a line each. `channels.json` there keeps the vote.

    Args:
        folder: with the HDF5 files, at any depth.
        data_dir: made where it does not exist.

    Returns:
        The folder, and in one line what the patients show of the channels and what is assumed.

    Raises:
        DataError: no such slices, h5py is missing, two files for one slice, the patients disagree, or no room.
    """
    patients, digest = _patients(folder)
    need_h5py()
    out = data_dir / f"volumes-{digest}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        if not (out / "channels.json").exists():
            print(f"{len(patients)} patients of slices are put together in {out}", flush=True)
            write_json(out / "channels.json", _vote(folder, patients))
        vote = json.loads((out / "channels.json").read_text())
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _WORKERS)) as pool:
            problems = list(pool.map(lambda item: _put(*item, vote, out), sorted(patients.items())))
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error}). Make room or choose another data_dir.") from error
    for volume, problem in zip(sorted(patients), problems, strict=True):
        if problem:
            warn(f"left out: volume {volume}: {problem}")
    whole = problems.count("")
    if not whole:
        raise DataError(f"no patient below {folder} could be put together, see above.")
    done(f"{whole} of {len(patients)} patients put together from their slices")
    return out, vote["says"]


def _patients(folder: Path) -> tuple[dict[int, list[Path]], str]:
    """The slices of each patient in order, empty where some are missing; and what stands for names, sizes and dates."""
    found: dict[int, dict[int, Path]] = defaultdict(dict)
    digest = hashlib.sha256(str(_RULES).encode())
    for path in walk(folder):
        if match := NAME.fullmatch(path.name):
            volume, number = int(match[1]), int(match[2])
            if other := found[volume].get(number):
                raise DataError(f"{other} and {path} are of the same slice, or of two patients; keep one of them.")
            found[volume][number] = path
            facts = path.stat()
            digest.update(f"{path.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    if not found:
        raise DataError(f"no volume_V_slice_S.h5 below {folder}, as brats2020-slices has them.")
    # What most patients have is what a patient has: one that ends early would else pass as whole.
    ((expected, _),) = Counter(tuple(sorted(slices)) for slices in found.values()).most_common(1)
    return {
        volume: [slices[number] for number in expected] if sorted(slices) == [*expected] else []
        for volume, slices in found.items()
    }, digest.hexdigest()[:8]


def _put(volume: int, slices: list[Path], vote: dict, out: Path) -> str:
    """Write one patient unless it is there; return why that is impossible, or nothing."""
    folder = out / f"volume_{volume:03}"
    if folder.exists():
        return ""
    try:
        images, masks = _read(slices)
        kind, order = vote["masks"]
        if masks.any() and mask_kind(masks) not in (kind, "either"):
            raise DataError(f"its masks are no {kind}, as those of the others are.")
    except DataError as error:
        return str(error)
    volumes = {name: images[..., place] for name, place in zip(MODALITIES, vote["channels"], strict=True)}
    volumes["seg"] = to_labels(masks, kind, order)
    with part_folder(out) as part:
        for name, content in volumes.items():
            nib.save(nib.Nifti1Image(content, _AFFINE), part / f"{folder.name}_{name}.nii.gz")
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.exists():  # else another run was faster
                raise
    return ""


def _read(slices: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """A patient's images, float32 (X, Y, slices, 4), background exactly 0, and masks, bool (X, Y, slices, 3)."""
    import h5py

    if not slices:
        raise DataError("it has not the same slices as most of the others; fetch the set again.")
    images = masks = None
    for z, path in enumerate(slices):
        try:
            with h5py.File(path) as file:
                image, mask = file["image"][()].astype(np.float32), file["mask"][()]
        except Exception as error:  # h5py has many for a damaged file
            raise DataError(f"{path} cannot be read ({error}); fetch it again.") from error
        if images is None and image.ndim == 3:
            images = np.empty((*image.shape[:2], len(slices), 4), np.float32)
            masks = np.empty((*image.shape[:2], len(slices), 3), bool)
        if images is None or image.shape != images[:, :, 0].shape or mask.shape != masks[:, :, 0].shape:
            raise DataError(
                f"{path} has an image of {image.shape} and a mask of {mask.shape}; expected (X, Y, 4) and (X, Y, 3),"
                " the same in all of a patient's slices."
            )
        image[:, :, np.isnan(image).all(axis=(0, 1))] = 0  # of an empty slice, by a deviation of 0
        if not np.isfinite(image).all():
            raise DataError(f"{path} has values that are no numbers; fetch it again.")
        images[:, :, z] = image - image[0, 0]  # the brain never reaches the corner, so this is the background
        masks[:, :, z] = mask != 0
    return images, masks


def _vote(folder: Path, patients: dict[int, list[Path]]) -> dict:
    """What most of up to 30 patients say of the masks, and then, the masks settled, of the channels."""
    numbers, seen, silent = sorted(patients), [], []
    for number in numbers[:: -(-len(numbers) // _VOTERS)]:
        try:
            images, masks = _read(patients[number])
            seen.append((*mask_order(masks), *brightness(images, masks)))
        except DataError as error:
            silent.append(f"volume {number}: {error}")
    if not seen:
        raise DataError(f"no patient below {folder} tells what is which. {silent[0]} Or take --data brats2020.")
    tissues = Counter((kind, order) for kind, order, *_ in seen)
    kind, order = _settled(tissues, f"the masks below {folder}")
    ed, et = (order[1], order[2]) if kind == "tissues" else (order[0], order[2])
    modalities = Counter(channel_order(parts[ed], parts[et], alike) for _, _, parts, alike in seen)
    channels = _settled(modalities, f"the channels below {folder}")
    names = ("NCR", "ED", "ET") if kind == "tissues" else ("WT", "TC", "ET")
    says = (
        f"{_said('masks', order, names, tissues)}; {_said('channels', channels, MODALITIES, modalities)}; assumed: axes"
        " and voxels of BraTS 2020, and one scale of brightness in all slices of a patient"
    )
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


def mask_kind(masks: np.ndarray) -> str:
    """`tissues` where masks, bool (X, Y, slices, 3), exclude each other, `regions` where each lies in the next larger.

    `either` where fewer than two are there. Raises `DataError` for anything else.
    """
    if masks.any(axis=(0, 1, 2)).sum() < 2:
        return "either"
    if not (masks.sum(axis=3) > 1).any():
        return "tissues"
    outer, middle, inner = _by_size(masks)
    if (masks[..., inner] & ~masks[..., middle]).any() or (masks[..., middle] & ~masks[..., outer]).any():
        raise DataError("its masks overlap and do not lie in each other; expected tissues or regions.")
    return "regions"


def _by_size(masks: np.ndarray) -> list[int]:
    return np.argsort(-masks.sum(axis=(0, 1, 2)), kind="stable").tolist()


def _parts(masks: np.ndarray) -> np.ndarray:
    """Masks without what lies in them, bool as they are, or raise `DataError` where one is empty then."""
    parts = masks.copy()
    if mask_kind(masks) == "regions":
        outer, middle, inner = _by_size(masks)
        parts[..., outer] &= ~masks[..., middle]
        parts[..., middle] &= ~masks[..., inner]
    if not parts.any(axis=(0, 1, 2)).all():
        raise DataError("not all three tissues are there.")
    return parts


def mask_order(masks: np.ndarray) -> tuple[str, tuple[int, ...]]:
    """Which mask is which, by where they lie.

    Args:
        masks: bool (X, Y, slices, 3).

    Returns:
        `tissues` and the masks of NCR, ED and ET; or `regions` and those of WT, TC and ET.

    Raises:
        DataError: masks that overlap and do not lie in each other, or a tissue that is missing.
    """
    parts = _parts(masks)
    if mask_kind(masks) == "regions":
        return "regions", tuple(_by_size(masks))
    faces = _faces(parts @ np.arange(1, 4, dtype=np.uint8)) * (1 - np.eye(4, dtype=int))
    ed = int(np.argmax(faces[1:, 0] / faces[1:].sum(axis=1)))
    outwards = faces[1:, 0] + faces[1:, ed + 1]
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
    drawn = (1, 2, 3) if kind == "tissues" else (2, 1, 3)  # each region over the one around it
    classes = np.zeros(masks.shape[:3], np.uint8)
    for place, index in zip(order, drawn, strict=True):
        classes[masks[..., place]] = index
    return classes_to_labels(classes)


def brightness(images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How bright the tissues are, and how much the channels go together.

    Args:
        images: (X, Y, slices, 4), background 0.
        masks: bool (X, Y, slices, 3), of tissues or regions.

    Returns:
        The mean of each mask, without what lies in it, in each channel, as z-scores of the healthy brain, (3, 4); and
        the channels' correlation over the healthy brain, (4, 4).

    Raises:
        DataError: a tissue is missing, or a channel is the same everywhere.
    """
    parts = _parts(masks)
    healthy = images[(images != 0).any(axis=3) & ~masks.any(axis=3)]
    if not len(healthy) or not healthy.std(axis=0).all():
        raise DataError("a channel is the same everywhere.")
    means = np.stack([images[parts[..., place]].mean(axis=0) for place in range(3)])
    return (means - healthy.mean(axis=0)) / healthy.std(axis=0), np.corrcoef(healthy.T)


def channel_order(ed: np.ndarray, et: np.ndarray, alike: np.ndarray) -> tuple[int, ...]:
    """The channels of `cases.MODALITIES`, by how bright ED and ET are in each and how they correlate: `brightness`."""
    t1ce = int(np.argmax(et - ed))
    t1 = min({0, 1, 2, 3} - {t1ce}, key=lambda place: ed[place])
    t2, flair = sorted({0, 1, 2, 3} - {t1ce, t1}, key=lambda place: alike[t1][place])
    found = {"flair": flair, "t1": t1, "t1ce": t1ce, "t2": t2}
    return tuple(found[name] for name in MODALITIES)
