"""Time the way from NIfTI files to batches, beside MONAI, TorchIO, nnU-Net and the usual notebook, on two cores.

All get the same simulated full-size patients (plain .nii, in the page cache) and deliver batches of 32 slices of the
same height and width, four modalities normalised as float32 with labels, drawn from all patients. The ceiling is what
a loader without any work reaches: random rows copied out of one memory map of these very slices, as float32, or as
float16 and converted; the faster of the two counts. Each tool prepares its files with two workers. The tools take
turns, so that a busy moment of the machine hits all; a loader's first batch is not counted.

The peers are optional: pip install -e '.[benchmarks]'
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "2"  # before numpy and torch start their threads

import nibabel as nib
import numpy as np
import torch

from brats_helpers.data.cache import Packed, count_classes, pack, prepare
from brats_helpers.data.cases import Case, find_cases
from brats_helpers.data.nifti import read_mask
from brats_helpers.data.phantom import make_cases
from brats_helpers.evaluation.inference import load_network, predict
from brats_helpers.labels import REGIONS
from brats_helpers.scoring.scores import score_case
from brats_helpers.training.batch import Draw
from brats_helpers.training.dataset import make_loader
from brats_helpers.training.sampler import BalancedBatches
from brats_helpers.training.slices import Slices

BATCH = 32
WORKERS = 2

Stream = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Batches of images, float32 (batch, modalities, two sides of a slice in either order), and labels, (batch, ..)."""


@dataclass
class Tools:
    """What is timed, by row of the tables.

    Attributes:
        load: how to open a stream of batches, and how many of its batches one timing takes: an even number for
            two processes, which finish two at a time.
        prepare: prepares all patients in an empty folder; gives the folder to weigh, None if it wrote nothing.
    """

    load: dict[str, tuple[Callable[[], Stream], int]] = field(default_factory=dict)
    prepare: dict[str, Callable[[Path], Path | None]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="timings per row, at least 5 (default 5)")
    parser.add_argument("--patients", metavar="N", type=int, default=6, help="simulated patients (default 6)")
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="where they are, or are put to be used again")
    parser.add_argument(
        "--eight-bits",
        metavar=("CHECKPOINT", "FOLDER"),
        nargs=2,
        type=Path,
        help="instead: what 8 bits in place of float16 would cost a trained network in Dice on the patients of FOLDER",
    )
    options = parser.parse_args()
    if options.eight_bits:
        eight_bits(*options.eight_bits)
        return
    if options.repeats < 5:
        parser.error("--repeats: at least 5")
    warnings.simplefilter("ignore")

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folders = make_cases(options.data or work / "gz", n_cases=options.patients, seed=0, workers=WORKERS)
        gzipped = [find_cases(folder)[0] for folder in folders]
        cases = [unpacked(case, work / "nii") for case in gzipped]
        packed = prepare(cases, cache_dir=work / "cache", workers=WORKERS)
        size = Slices(packed, context_slices=0, window=None).size
        results = {"machine": machine(), "repeats": options.repeats, "patients": len(cases), "size": size}
        print(f"{results['machine']}\n{len(cases)} simulated patients, slices of {size[0]} x {size[1]}")
        print(f"medians of {options.repeats} or more (lowest to highest)", flush=True)

        tools = Tools()
        ceiling(tools, cases, packed, work)
        ours(tools, cases, gzipped, packed)
        notebook_way(tools, cases, size)
        for name, add in {"monai": monai, "torchio": torchio, "nnunetv2": nnunet}.items():
            if installed(name):
                add(tools, cases, size, work)
            else:
                print(f"left out, not installed: {name} (pip install -e '.[benchmarks]')")

        loading = {row: lambda row=row: slices_per_s(*tools.load[row], size) for row in tools.load}
        fast = {row: loading.pop(row) for row in tools.load if row.startswith(("ceiling", "brats_helpers"))}
        results["slices_per_s"] = table("slices/s", fast, 9 * options.repeats, digits=0)  # a tenth of a second each
        results["slices_per_s"] |= table("slices/s, peers", loading, options.repeats, digits=0)
        sizes: dict[str, float] = {}
        preparing = {row: lambda row=row: prepare_s(row, tools, work, len(cases), sizes) for row in tools.prepare}
        results["prepare_s"] = table("preparation, s a patient", preparing, options.repeats, digits=3)
        results["prepared_mb"] = sizes
        print("\nprepared, MB a patient")
        for row, megabytes in sizes.items():
            print(f"{row:52}{megabytes:10.1f}")
        indexing = label_index(cases[0], packed[0])
        results["index_ms"] = table("label index, ms a patient", indexing, options.repeats, digits=1)
    results["targets"] = targets(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> str:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    names = ("numpy", "torch", "monai", "torchio", "nnunetv2")
    versions = ", ".join(f"{name} {version(name)}" for name in names if installed(name))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{processor}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, {versions}"


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def unpacked(case: Case, root: Path) -> Case:
    """A copy of the patient without compression, as on Kaggle."""
    folder = root / case.id
    folder.mkdir(parents=True)
    for path in (*case.images.values(), case.seg):
        (folder / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
    return find_cases(folder)[0]


def table(title: str, rows: dict[str, Callable[[], float]], repeats: int, *, digits: int) -> dict[str, dict]:
    """Time the rows in turns and print their medians."""
    values: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(repeats):
        for row, measure in rows.items():
            values[row].append(measure())
    print(f"\n{title}")
    for row, found in values.items():
        low, middle, high = (f"{value:,.{digits}f}" for value in (min(found), statistics.median(found), max(found)))
        print(f"{row:52}{middle:>10}   ({low} to {high})", flush=True)
    return {row: {"median": statistics.median(found), "all": found} for row, found in values.items()}


def slices_per_s(open_stream: Callable[[], Stream], n_batches: int, size: tuple[int, int]) -> float:
    stream = open_stream()
    images, labels = next(stream)
    if images.dtype != torch.float32 or sorted(images.shape[-2:]) != sorted(size) or images.shape[:2] != (BATCH, 4):
        raise RuntimeError(f"a batch is {images.dtype} {tuple(images.shape)}; the rows could not be compared.")
    if labels.numel() * 4 != images.numel():
        raise RuntimeError(f"labels are {tuple(labels.shape)} beside images of {tuple(images.shape)}.")
    started = time.perf_counter()
    for _ in range(n_batches):
        next(stream)
    spent = time.perf_counter() - started
    stream.close()
    return n_batches * BATCH / spent


def prepare_s(row: str, tools: Tools, work: Path, n_cases: int, sizes: dict[str, float]) -> float:
    """Seconds a patient; notes the megabytes a patient in `sizes`."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        started = time.perf_counter()
        written = tools.prepare[row](Path(folder))
        spent = time.perf_counter() - started
        if written:
            total = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
            sizes[row] = total / n_cases / 1e6
    return spent / n_cases


def ceiling(tools: Tools, cases: Sequence[Case], packed: Sequence[Packed], work: Path) -> None:
    slices = Slices(packed, context_slices=0, window=None)
    shape = (len(slices), 4, *slices.size)
    single, half = (
        np.lib.format.open_memmap(work / f"{np.dtype(dtype)}.npy", "w+", dtype, shape)
        for dtype in (np.float32, np.float16)
    )
    labels = np.lib.format.open_memmap(work / "labels.npy", "w+", np.uint8, (len(slices), *slices.size))
    for start in range(0, len(slices), BATCH):
        items = range(start, min(start + BATCH, len(slices)))
        batch = slices.__getitems__([Draw(item, slices.size) for item in items])
        place = slice(start, start + BATCH)
        single[place], half[place], labels[place] = batch.images, batch.images.half(), batch.masks

    def rows() -> Iterator[np.ndarray]:
        random = np.random.default_rng(0)
        while True:
            yield random.integers(0, len(slices), BATCH)

    def read_single() -> Stream:
        for picked in rows():
            yield torch.from_numpy(single[picked]), torch.from_numpy(labels[picked])

    def read_half() -> Stream:
        for picked in rows():
            yield torch.from_numpy(half[picked]).float(), torch.from_numpy(labels[picked])

    contents = [(np.array(case.images), np.array(case.labels)) for case in packed]

    def copy(folder: Path) -> Path:
        def one(k: int) -> None:
            for path in (*cases[k].images.values(), cases[k].seg):
                np.fromfile(path, np.uint8)
            for j, array in enumerate(contents[k]):
                array.tofile(folder / f"{k}.{j}")

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(one, range(len(cases))))
        return folder

    tools.load["ceiling: float32 memory map, rows copied"] = (read_single, 60)
    tools.load["ceiling: float16 memory map, rows converted"] = (read_half, 60)
    tools.prepare["ceiling: files read, the cache's bytes written"] = copy


def ours(tools: Tools, cases: Sequence[Case], gzipped: Sequence[Case], packed: Sequence[Packed]) -> None:
    slices = Slices(packed, context_slices=0, window=None)

    def load(workers: int) -> Stream:
        batches = BalancedBatches(slices, n=1000 * BATCH, batch_size=BATCH, foreground=-1, seed=0)
        for batch in make_loader(slices, batches, workers=workers, device=torch.device("cpu")):
            yield batch.images, batch.masks

    def pack_all(cases: Sequence[Case], folder: Path) -> Path:
        prepare(cases, cache_dir=folder, workers=WORKERS)
        return folder

    tools.load["brats_helpers"] = (lambda: load(0), 60)
    tools.load[f"brats_helpers, {WORKERS} processes"] = (lambda: load(WORKERS), 60)
    tools.prepare["brats_helpers, from .nii"] = lambda folder: pack_all(cases, folder)
    tools.prepare["brats_helpers, from .nii.gz"] = lambda folder: pack_all(gzipped, folder)


def notebook_way(tools: Tools, cases: Sequence[Case], size: tuple[int, int]) -> None:
    """A data set whose item is a slice: `get_fdata` of each file, one slice of it, z-score, cut or padded to size."""

    class OneSlice(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 155 * len(cases)

        def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
            case, z = cases[item // 155], item % 155
            planes = [nib.load(path).get_fdata()[:, :, z].T for path in case.images.values()]
            image = np.stack([(plane - plane.mean()) / (plane.std() + 1e-6) for plane in planes])
            label = nib.load(case.seg).get_fdata()[:, :, z].T
            rows, columns = (slice((240 - side) // 2, (240 + side) // 2) for side in size)
            image, label = image[:, rows, columns].astype(np.float32), label[rows, columns].astype(np.uint8)
            return torch.from_numpy(image), torch.from_numpy(label)

    tools.load["notebook way: get_fdata per slice"] = (lambda: loaded(OneSlice(), workers=0), 1)
    tools.load[f"notebook way, {WORKERS} processes"] = (lambda: loaded(OneSlice(), workers=WORKERS), 2)


def loaded(dataset: torch.utils.data.Dataset, *, workers: int, collate: Callable | None = None) -> Stream:
    """Batches of random items, without end."""
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=1000 * BATCH)
    yield from torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, sampler=sampler, num_workers=workers, collate_fn=collate
    )


def monai(tools: Tools, cases: Sequence[Case], size: tuple[int, int], work: Path) -> None:
    """Whole patients in the cache, cropped to the brain, a random slice cut from one at each draw."""
    from monai import transforms as mt
    from monai.data import CacheDataset, PersistentDataset, set_track_meta

    set_track_meta(False)  # plain tensors are faster
    files = [{**case.images, "label": case.seg} for case in cases]
    modalities, both = list(cases[0].images), ["image", "label"]
    across = size[::-1]  # MONAI keeps X, Y, Z
    steps = [
        mt.LoadImaged([*modalities, "label"]),
        mt.EnsureChannelFirstd([*modalities, "label"], channel_dim="no_channel"),
        mt.ConcatItemsd(modalities, "image"),
        mt.SelectItemsd(both),
        mt.EnsureTyped("label", dtype=torch.uint8),
        mt.CropForegroundd(both, source_key="image"),
        mt.SpatialPadd(both, (*across, 1)),
        mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        mt.RandSpatialCropd(both, (*across, 1), random_size=False),
        mt.SqueezeDimd(both, dim=-1),
    ]

    def collate(items: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([item["image"] for item in items]), torch.stack([item["label"] for item in items])

    def cached(copy_cache: bool) -> CacheDataset:
        return CacheDataset(files, steps, num_workers=WORKERS, progress=False, copy_cache=copy_cache)

    def persist(folder: Path) -> Path:
        dataset = PersistentDataset(files, steps, folder)
        for _ in torch.utils.data.DataLoader(dataset, num_workers=WORKERS, collate_fn=list):
            pass
        return folder

    default, best = cached(True), cached(False)
    persistent = PersistentDataset(files, steps, persist(work / "monai"))
    rows = {
        "CacheDataset, as it comes": (default, 0, 1),
        "CacheDataset, copy_cache=False": (best, 0, 8),
        f"CacheDataset, copy_cache=False, {WORKERS} processes": (best, WORKERS, 8),
        f"PersistentDataset, {WORKERS} processes": (persistent, WORKERS, 2),
    }
    for row, (dataset, workers, n) in rows.items():
        tools.load[f"MONAI {row}"] = (
            lambda dataset=dataset, workers=workers: loaded(dataset, workers=workers, collate=collate),
            n,
        )
    tools.prepare["MONAI CacheDataset (in memory)"] = lambda folder: cached(False) and None
    tools.prepare["MONAI PersistentDataset"] = persist


def not_zero(image: torch.Tensor) -> torch.Tensor:
    return image != 0


def torchio(tools: Tools, cases: Sequence[Case], size: tuple[int, int], work: Path) -> None:
    """A queue of 300 slices, 50 from each patient whenever it is read and normalised."""
    import torchio as tio

    def subject(case: Case) -> tio.Subject:
        images = {name: tio.ScalarImage(path) for name, path in case.images.items()}
        return tio.Subject(**images, label=tio.LabelMap(case.seg))

    dataset = tio.SubjectsDataset(list(map(subject, cases)), transform=tio.ZNormalization(masking_method=not_zero))

    def load() -> Stream:
        sampler = tio.UniformSampler((*size[::-1], 1))
        queue = tio.Queue(dataset, max_length=300, samples_per_volume=50, sampler=sampler, num_workers=WORKERS)
        while True:
            for batch in tio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0, drop_last=True):
                images = torch.cat([batch[name][tio.DATA] for name in cases[0].images], dim=1)
                yield images[..., 0], batch["label"][tio.DATA][:, 0, ..., 0]

    tools.load[f"TorchIO Queue, {WORKERS} processes"] = (load, 18)


def nnunet(tools: Tools, cases: Sequence[Case], size: tuple[int, int], work: Path) -> None:
    """nnU-Net's own fingerprint, plan, preprocessing and 2D loader, its patch set to the size of the others."""
    raw, preprocessed = work / "nnUNet_raw", work / "nnUNet_preprocessed"
    os.environ |= {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(preprocessed), "nnUNet_results": str(work)}
    folder = raw / "Dataset001_Simulated"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in cases:
        for channel, path in enumerate(case.images.values()):
            (folder / "imagesTr" / f"{case.id}_{channel:04d}.nii").symlink_to(path)
        labels = nib.Nifti1Image(read_mask(case.seg, case.numbering), nib.load(case.seg).affine)
        nib.save(labels, folder / "labelsTr" / f"{case.id}.nii")
    facts = {
        "channel_names": {str(channel): name for channel, name in enumerate(cases[0].images)},
        "labels": {"background": 0, "NCR": 1, "ED": 2, "ET": 3},
        "numTraining": len(cases),
        "file_ending": ".nii",
    }
    (folder / "dataset.json").write_text(json.dumps(facts))

    with quiet():
        from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
        from nnunetv2.experiment_planning.plan_and_preprocess_api import (
            extract_fingerprint_dataset,
            plan_experiment_dataset,
        )
        from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
        from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        extract_fingerprint_dataset(1, num_processes=WORKERS, verbose=False, show_progress_bar=False)
        plans = PlansManager(plan_experiment_dataset(1)[0])
    configuration = plans.get_configuration("2d")
    place = preprocessed / folder.name / configuration.data_identifier

    def preprocess(_: Path) -> Path:
        with quiet():
            configuration.preprocessor_class(verbose=False).run(1, "2d", plans.plans_name, WORKERS)
        return place

    preprocess(work)
    turns = (-np.pi, np.pi)  # as its trainer sets them for a 2D patch
    augmentation = nnUNetTrainer.get_training_transforms(
        size, turns, None, (0, 1), False, use_mask_for_norm=configuration.use_mask_for_norm
    )

    def load(augmented: bool, workers: int) -> Stream:
        patch = get_patch_size(size, turns, turns, turns, (0.85, 1.25)) if augmented else size
        dataset, manager = nnUNetDatasetBlosc2(str(place)), plans.get_label_manager(facts)
        transforms = augmentation if augmented else None
        loader = nnUNetDataLoader(dataset, BATCH, patch, size, manager, 0.33, transforms=transforms)
        if workers:
            loader = NonDetMultiThreadedAugmenter(loader, None, workers, num_cached=6, wait_time=0.002)
        try:
            for batch in loader:
                yield batch["data"], batch["target"][:, 0]
        finally:
            if workers:
                loader._finish()

    for workers, suffix in ((0, ""), (WORKERS, f", {WORKERS} processes")):
        tools.load[f"nnU-Net, no augmentation{suffix}"] = (lambda workers=workers: load(False, workers), 24)
    tools.load[f"nnU-Net, its augmentation, {WORKERS} processes"] = (lambda: load(True, WORKERS), 10)
    tools.prepare["nnU-Net (fingerprint and plan not counted)"] = preprocess


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a tool and its processes print off the terminal."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def label_index(case: Case, packed: Packed) -> dict[str, Callable[[], float]]:
    labels, brain = np.array(packed.labels), packed.brain
    everywhere = np.ones(packed.shape[::-1], bool)

    def get_fdata() -> None:
        volume = nib.load(case.seg).get_fdata()
        for z in range(volume.shape[2]):
            for label in (1, 2, 4):
                (volume[:, :, z] == label).sum()

    def ms(action: Callable[[], object]) -> float:
        started = time.perf_counter()
        action()
        return (time.perf_counter() - started) * 1e3

    return {
        "brats_helpers, as part of the preparation": lambda: ms(lambda: count_classes(labels, brain)),
        "brats_helpers, from the file": lambda: ms(
            lambda: count_classes(read_mask(case.seg, case.numbering).T, everywhere)
        ),
        "get_fdata, slice by slice": lambda: ms(get_fdata),
    }


def eight_bits(checkpoint: Path, root: Path) -> None:
    """Print the Dice of a network on patients as prepared, and with their z-scores rounded to 254 steps.

    Per patient and modality the steps span all but the outermost thousandth of the brain's z-scores; 0 stays 0.
    """
    network = load_network(checkpoint, device=torch.device("cpu"))
    columns = [f"{region} {bits}" for region in REGIONS for bits in ("float16", "8 bits")]
    print(f"{'Dice':24}" + "".join(f"{name:>12}" for name in columns) + f"{'step':>8}{'rms error':>11}")
    for case in find_cases(root, network.modalities):
        if case.seg is None:
            continue
        packed = pack(case)
        rounded, steps = packed.images.astype(np.float32), []
        for scores in rounded.swapaxes(0, 1):
            brain = scores != 0
            low, high = np.percentile(scores[brain], (0.05, 99.95))
            steps.append((high - low) / 254)
            scores[brain] = np.rint((scores[brain].clip(low, high) - low) / steps[-1]) * steps[-1] + low
        error = (rounded - packed.images)[packed.images != 0].std(dtype=np.float64)
        pair = (packed, replace(packed, images=rounded.astype(np.float16)))
        truth = read_mask(case.seg, case.numbering)
        soft = [predict([network], one, channels=network.modalities, flips=False) for one in pair]
        maps = [packed.to_volume(one.argmax(axis=1).astype(np.uint8)) for one in soft]
        scores = [score_case(one, truth, spacing_mm=(1.0, 1.0, 1.0), convention="brats2020") for one in maps]
        values = "".join(f"{one[region]['dice']:12.4f}" for region in REGIONS for one in scores)
        print(f"{case.id:24}{values}{max(steps):8.3f}{error:11.4f}", flush=True)


def targets(results: dict) -> dict[str, dict]:
    """Print how the figures stand to the targets."""

    def best(table: str, start: str) -> float | None:
        found = [row["median"] for name, row in results[table].items() if name.startswith(start)]
        return (max if table == "slices_per_s" else min)(found) if found else None

    speed = best("slices_per_s", "brats_helpers")
    found = {
        "slices/s: share of the ceiling": (speed, best("slices_per_s", "ceiling"), 0.7),
        "slices/s: times the notebook way": (speed, best("slices_per_s", "notebook"), 1000),
        "slices/s: times MONAI CacheDataset at its best": (speed, best("slices_per_s", "MONAI Cache"), 30),
        "slices/s: times nnU-Net without augmentation": (speed, best("slices_per_s", "nnU-Net, no"), 10),
        "preparation from .nii, s a patient": (best("prepare_s", "brats_helpers, from .nii"), 1, 0.12),
        "prepared, MB a patient": (results["prepared_mb"]["brats_helpers, from .nii"], 1, 45),
        "label index, ms a patient": (best("index_ms", "brats_helpers, as"), 1, 5),
    }
    print("\ntargets")
    reached = {}
    for name, (value, base, target) in found.items():
        if base is None:
            continue
        ratio = value / base
        met = ratio >= target if "slices" in name else ratio <= target
        reached[name] = {"reached": ratio, "target": target, "met": met}
        print(f"{name:52}{ratio:10.3g}   target {target:g}: {'met' if met else 'missed'}")
    return reached


if __name__ == "__main__":
    sys.exit(main())
