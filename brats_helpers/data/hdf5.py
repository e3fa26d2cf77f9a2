"""Reassemble BraTS 2020 volumes from HDF5 slices (`brats2020-slices`).

A file `volume_V_slice_S.h5` holds `image` (240, 240, 4), already normalised, and `mask` (240, 240, 3). The files do not
say which channel is which modality or which mask is which tissue, and public code disagrees. So the suite infers
it from the images of each patient, and the patients vote, by the rules of `numbering`:

- Masks that exclude each other are tissues. Oedema (ED) has the largest share of its surface towards healthy brain. Of
  the other two, enhancing tumour (ET) has more surface towards oedema and healthy brain than the necrotic core (NCR),
  which it encloses. Nested masks are the regions WT, TC and ET, from the outermost.
- T1ce is the channel in which ET is brightest compared with ED, both as z-scores of the healthy brain. Of the other
  channels, T1 is the one in which ED is darkest, and T2 the one that correlates least with T1 over the healthy brain:
  fluid is dark on T1 and FLAIR, and bright on T2.

Patients who lack a tissue have no vote. If fewer than two thirds agree, the set is refused. The files hold no geometry:
axes, direction and voxels of 1 mm are assumed to be those of BraTS 2020. Patients keep the set's numbers instead of the
challenge's names.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np

from brats_helpers.data.numbering import outer_shares, settled, spread, surfaces, z_scores
from brats_helpers.data.walk import walk
from brats_helpers.files import part_folder, read_json, sweep, write_json
from brats_helpers.labels import MODALITIES, DataError, classes_to_labels
from brats_helpers.log import done, warn

NAME = re.compile(r"volume_(\d+)_slice_(\d+)\.h5")
_AFFINE = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], float)
_RULES = 1  # raise it when the rules change: older volumes are then made again
_WORKERS = 4  # at most; each holds a patient, 0.2 GB
_WAY_OUT = "Use the same patients as volumes: --data brats2020."


def need_h5py() -> None:
    """Raise `DataError` if h5py is not installed."""
    if find_spec("h5py") is None:
        raise DataError("HDF5 slices are read by h5py, which is not installed: pip install h5py, then run again.")


def assemble(folder: Path, data_dir: Path) -> tuple[Path, str]:
    """Write each patient's volumes, shape (X, Y, slice), into `volume_V/` of a folder in `data_dir`.

    The folder's name depends on the files and the rules: if either changes, another folder is made. A killed run can be
    started again at any moment. Background becomes exactly 0, other voxels stay as they are, in float32; labels are 0,
    1, 2, 4. Patients that cannot be reassembled are left out, with a warning. The folder's `channels.json` keeps the
    vote.

    Args:
        folder: holds the HDF5 files, at any depth.
        data_dir: created if it does not exist.

    Returns:
        The folder, and a sentence on what the patients show about the channels and what is assumed.

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
            print(f"reassembling {len(patients)} patients from slices in {out}", flush=True)
            write_json(out / "channels.json", _vote(folder, patients))
        vote = read_json(out / "channels.json")
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _WORKERS)) as pool:
            problems = list(pool.map(lambda item: _put(*item, vote, out), sorted(patients.items())))
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error}). Make room or choose another data_dir.") from error
    for volume, problem in zip(sorted(patients), problems, strict=True):
        if problem:
            warn(f"left out: volume {volume}: {problem}")
    whole = problems.count("")
    if not whole:
        raise DataError(f"no patient below {folder} could be reassembled, see above.")
    done(f"{whole} of {len(patients)} patients reassembled from their slices")
    return out, vote["says"]


def _patients(folder: Path) -> tuple[dict[int, list[Path]], str]:
    """The slices of each patient in order, empty if some are missing; and a digest of names, sizes and dates."""
    found: dict[int, dict[int, Path]] = defaultdict(dict)
    digest = hashlib.sha256(str(_RULES).encode())
    for path in walk(folder):
        if match := NAME.fullmatch(path.name):
            volume, number = int(match[1]), int(match[2])
            if other := found[volume].get(number):
                raise DataError(f"{other} and {path} hold the same slice, or belong to two patients; keep one of them.")
            found[volume][number] = path
            facts = path.stat()
            digest.update(f"{path.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    if not found:
        raise DataError(f"no volume_V_slice_S.h5 below {folder}, as brats2020-slices has them.")
    # A patient is complete if it has the slices that most have; one that ends early would else pass.
    ((expected, _),) = Counter(tuple(sorted(slices)) for slices in found.values()).most_common(1)
    patients = {}
    for volume, slices in found.items():
        complete = slices.keys() == {*expected}
        patients[volume] = [slices[number] for number in expected] if complete else []
    return patients, digest.hexdigest()[:8]


def _put(volume: int, slices: list[Path], vote: dict, out: Path) -> str:
    """Write one patient if it is not there yet; return why that is impossible, or an empty string."""
    folder = out / f"volume_{volume:03}"
    if folder.exists():
        return ""
    try:
        images, masks = _read(slices)
        kind, order = vote["masks"]
        if masks.any() and mask_kind(masks) not in (kind, "either"):
            raise DataError(f"its masks are not {kind}, unlike those of the other patients.")
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
            if not folder.exists():  # otherwise another run was faster
                raise
    return ""


def _read(slices: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """A patient's images, float32 (X, Y, slices, 4), background exactly 0, and masks, bool (X, Y, slices, 3)."""
    import h5py

    if not slices:
        raise DataError("it does not have the same slices as most of the others; fetch the set again.")
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
        image[:, :, np.isnan(image).all(axis=(0, 1))] = 0  # an empty slice, divided by a deviation of 0
        if not np.isfinite(image).all():
            raise DataError(f"{path} holds NaN or infinity; fetch it again.")
        images[:, :, z] = image - image[0, 0]  # the brain never reaches the corner, so this is the background
        masks[:, :, z] = mask != 0
    return images, masks


def _vote(folder: Path, patients: dict[int, list[Path]]) -> dict:
    """Let the patients vote on the masks and then, the masks settled, on the channels."""
    seen, silent = [], []
    for number in spread(sorted(patients), 30):
        try:
            images, masks = _read(patients[number])
            seen.append((*mask_order(masks), *brightness(images, masks)))
        except DataError as error:
            silent.append(f"volume {number}: {error}")
    if not seen:
        raise DataError(f"no patient below {folder} shows which channel is which. {silent[0]} Or use --data brats2020.")
    tissues = Counter((kind, order) for kind, order, *_ in seen)
    kind, order = settled(tissues, f"the masks below {folder}", _WAY_OUT)
    ed, et = (order[1], order[2]) if kind == "tissues" else (order[0], order[2])
    modalities = Counter(channel_order(parts[ed], parts[et], alike) for _, _, parts, alike in seen)
    channels = settled(modalities, f"the channels below {folder}", _WAY_OUT)
    names = ("NCR", "ED", "ET") if kind == "tissues" else ("WT", "TC", "ET")
    says = (
        f"{_said('masks', order, names, tissues)}; {_said('channels', channels, MODALITIES, modalities)}; assumed: axes"
        " and voxels of BraTS 2020, and one scale of brightness in all slices of a patient"
    )
    return {"masks": [kind, list(order)], "channels": list(channels), "says": says}


def _said(what: str, places: Sequence[int], names: Sequence[str], votes: Counter) -> str:
    in_order = ", ".join(name for _, name in sorted(zip(places, names, strict=True)))
    return f"{what} are {in_order}, as {max(votes.values())} of {votes.total()} patients show"


def mask_kind(masks: np.ndarray) -> str:
    """Tell whether masks, bool (X, Y, slices, 3), are `tissues`, which exclude each other, or nested `regions`.

    `either` if fewer than two are present. Raises `DataError` for anything else.
    """
    if masks.any(axis=(0, 1, 2)).sum() < 2:
        return "either"
    if not (masks.sum(axis=3) > 1).any():
        return "tissues"
    outer, middle, inner = _by_size(masks)
    if (masks[..., inner] & ~masks[..., middle]).any() or (masks[..., middle] & ~masks[..., outer]).any():
        raise DataError("its masks overlap without being nested; expected tissues or regions.")
    return "regions"


def _by_size(masks: np.ndarray) -> list[int]:
    return np.argsort(-masks.sum(axis=(0, 1, 2)), kind="stable").tolist()


def _parts(masks: np.ndarray) -> np.ndarray:
    """Masks without those nested in them, bool, the same shape. Raises `DataError` if one is then empty."""
    parts = masks.copy()
    if mask_kind(masks) == "regions":
        outer, middle, inner = _by_size(masks)
        parts[..., outer] &= ~masks[..., middle]
        parts[..., middle] &= ~masks[..., inner]
    if not parts.any(axis=(0, 1, 2)).all():
        raise DataError("not all three tissues are present.")
    return parts


def mask_order(masks: np.ndarray) -> tuple[str, tuple[int, ...]]:
    """Identify masks by their position.

    Args:
        masks: bool (X, Y, slices, 3).

    Returns:
        `tissues` and the indices of NCR, ED and ET; or `regions` and those of WT, TC and ET.

    Raises:
        DataError: masks that overlap without being nested, or a tissue that is missing.
    """
    parts = _parts(masks)
    if mask_kind(masks) == "regions":
        return "regions", tuple(_by_size(masks))
    labels = parts @ np.arange(1, 4, dtype=np.uint8)
    faces, outer = surfaces(labels), outer_shares(labels)
    ed = max(outer, key=outer.get)
    ncr, et = sorted({1, 2, 3} - {ed}, key=lambda label: faces[label, 0] + faces[label, ed])
    return "tissues", (ncr - 1, ed - 1, et - 1)


def to_labels(masks: np.ndarray, kind: str, order: Sequence[int]) -> np.ndarray:
    """Masks as labels 0, 1, 2, 4, uint8 (X, Y, slices). See `mask_order`."""
    drawn = (1, 2, 3) if kind == "tissues" else (2, 1, 3)  # each region over the one around it
    classes = np.zeros(masks.shape[:3], np.uint8)
    for place, index in zip(order, drawn, strict=True):
        classes[masks[..., place]] = index
    return classes_to_labels(classes)


def brightness(images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure how bright the tissues are in each channel, and how the channels correlate.

    Args:
        images: (X, Y, slices, 4), background 0.
        masks: bool (X, Y, slices, 3), tissues or regions.

    Returns:
        The mean of each mask, without those nested in it, in each channel, as z-scores of the healthy brain, (3, 4);
        and the correlation of the channels over the healthy brain, (4, 4).

    Raises:
        DataError: a tissue is missing, or a channel is the same everywhere.
    """
    parts = _parts(masks)
    healthy = images[(images != 0).any(axis=3) & ~masks.any(axis=3)]
    tissues = {place: images[parts[..., place]] for place in range(3)}
    if not len(healthy) or not healthy.std(axis=0).all():
        raise DataError("a channel is the same everywhere.")
    scores = z_scores(healthy, tissues)
    return np.stack([scores[place] for place in range(3)]), np.corrcoef(healthy.T)


def channel_order(ed: np.ndarray, et: np.ndarray, alike: np.ndarray) -> tuple[int, ...]:
    """The channel of each of `MODALITIES`; `ed` and `et` are rows, and `alike` the correlation, of `brightness`."""
    t1ce = int(np.argmax(et - ed))
    t1 = min({0, 1, 2, 3} - {t1ce}, key=lambda place: ed[place])
    t2, flair = sorted({0, 1, 2, 3} - {t1ce, t1}, key=lambda place: alike[t1][place])
    found = {"flair": flair, "t1": t1, "t1ce": t1ce, "t2": t2}
    return tuple(found[name] for name in MODALITIES)
