"""Read file names: the case ID, and whether the file is a modality or a segmentation."""

import re
from dataclasses import dataclass
from pathlib import Path

from brats_helpers.labels import MODALITIES

NIFTI = (".nii", ".nii.gz")
MODALITY_WORDS = {name: name for name in MODALITIES} | {
    "t1n": "t1",
    "t1w": "t1",
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t2w": "t2",
    "t2f": "flair",
    "t1wce": "t1ce",
    "t1wgd": "t1ce",
    "t2flair": "flair",
}
"""The modality that each word in a name stands for. A modality's usual word comes first, then that of BraTS 2023."""
_MAP_WORDS = {"seg", "segm", "segmentation", "label", "labels", "labelmap", "ot", "gtv", "gt", "groundtruth"}
_TUMOUR_WORDS = {"tumor", "tumour", "lesion", "tumormask", "tumourmask"}
_PROCESSING_WORDS = {"brain", "final"}  # in the names of the scans to use, as FeTS and MedPerf write them
_OTHER_MAP = re.compile(
    r"(^|[_\-. ])(pred|soft|prob|skull|head|brain|bet|parenchyma|tissue|white|gr[ae]y|wm|gm|csf|ventric)", re.IGNORECASE
)
_WORD = re.compile(r"[^_\-. ]+")
_SEGMENTATION_FOLDER = re.compile(
    r"(labels?|masks?|seg|segs|segmentations?|gt|ground[ _-]?truth|annotations?)(tr|ts|va|val)?", re.IGNORECASE
)


@dataclass(frozen=True)
class Name:
    """What was read from a file's name.

    Attributes:
        case_id: the part before the ending, or the folder's name if that part is empty.
        ending: the words for the modality or segmentation, lower case, such as `t1n`.
        kind: a modality, `seg`, or None if the name says neither.
        processed: whether a word such as `brain` marks the version to use.
        doubtful: whether the file may be a brain mask, such as `brain_seg`.
    """

    case_id: str
    ending: str
    kind: str | None
    processed: bool = False
    doubtful: bool = False


def recognise(path: Path) -> Name:
    """Split `BraTS20_Training_001_t1ce.nii` into its case ID, its ending and the ending's meaning.

    If the folder is itself named like a file, such as `BraTS2021_00000_flair.nii`, the folder's name counts.
    """
    if is_nifti(path.parent):
        path = path.parent
    stem = stem_of(path)
    starts = [match.start() for match in _WORD.finditer(stem)]
    words = _WORD.findall(stem.lower())
    end = len(words)
    while end > 1 and words[end - 1] in _PROCESSING_WORDS:
        end -= 1
    kind, used = _kind(words[:end])
    if kind is None:
        return Name(stem, words[-1] if words else "", None)
    start = end - used
    before = [stem[:at][-1:] for at in starts]  # the separator before each word
    while start and words[start - 1] in _PROCESSING_WORDS and before[start - 1] in ("", before[end - used]):
        start -= 1
    case_id = stem[: starts[start]].rstrip("_-. ") or path.parent.name
    processing = words[start : end - used] + words[end:]
    doubtful = kind == "seg" and "brain" in processing and not _TUMOUR_WORDS.intersection(words[end - used : end])
    ending = stem[starts[end - used] : starts[end - 1] + len(words[end - 1])].lower()
    return Name(case_id, ending, kind, bool(processing), doubtful)


def _kind(words: list[str]) -> tuple[str | None, int]:
    """The meaning of the last words, and how many words it takes."""
    last, previous = ["", "", *words][:-3:-1]
    if last in MODALITY_WORDS:
        return MODALITY_WORDS[last], 1
    if previous + last in MODALITY_WORDS:  # T1-Gd, t1_ce
        return MODALITY_WORDS[previous + last], 2
    if last in _MAP_WORDS | _TUMOUR_WORDS | {"mask"}:
        if previous in _TUMOUR_WORDS | {"seg"}:
            return "seg", 2
        if last != "mask" and (previous in _PROCESSING_WORDS or not is_other_map(previous)):
            return "seg", 1
    return None, 0


def is_other_map(text: str) -> bool:
    """Whether a part of a name says that the file is a prediction or a map of something other than a tumour."""
    return bool(_OTHER_MAP.search(text))


def is_nifti(path: Path) -> bool:
    """Whether the name ends in `.nii` or `.nii.gz`, in upper or lower case."""
    return path.name.lower().endswith(NIFTI)


def is_segmentation_folder(path: Path) -> bool:
    """Whether a folder's name says that it holds segmentations, such as `labelsTr`."""
    return bool(_SEGMENTATION_FOLDER.fullmatch(path.name))


def stem_of(path: Path) -> str:
    """The name without `.nii` or `.nii.gz`, in upper or lower case."""
    return path.name[: len(path.name.lower().removesuffix(".gz").removesuffix(".nii"))]


def named_like(path: Path, modality: str) -> Path:
    """The path of another modality of the patient whose file `path` is, named in the same manner."""
    if is_nifti(path.parent):
        path = path.parent
    ending, stem = recognise(path).ending, stem_of(path)
    words = [word for word, meaning in MODALITY_WORDS.items() if meaning == modality]  # the old name first
    start = stem.lower().rfind(ending)
    word = words[ending not in MODALITIES]
    return path.with_name(path.name[:start] + word + path.name[start + len(ending) :])
