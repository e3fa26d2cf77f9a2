"""Figures of one patient's scans."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from brats_helpers.boxes import bounding_box
from brats_helpers.data.cache import normalise
from brats_helpers.data.cases import Case
from brats_helpers.data.nifti import read_mask, spacing_mm
from brats_helpers.files import whole_file
from brats_helpers.labels import CLASSES
from brats_helpers.report.plots.style import (
    COLOURS,
    DASHES,
    PERCENTILES,
    PRINTED,
    WIDTH,
    class_legend,
    named,
    overlay,
    panels,
    register,
    show,
    styled,
    title,
)

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}


@dataclass
class Scan:
    """A patient turned so that the axes run right to left, front to back, feet to head.

    Attributes:
        volumes: by modality, shape (X, Y, Z), intensities as stored.
        mask: class indices of the same shape, or None.
        spacing_mm: voxel size along X, Y, Z.
    """

    volumes: dict[str, np.ndarray]
    mask: np.ndarray | None
    spacing_mm: tuple[float, ...]

    @functools.cached_property
    def box(self) -> list[slice]:
        """The brain's box along X, Y, Z."""
        return around(self.brain)

    @functools.cached_property
    def focus(self) -> np.ndarray:
        """Tumour, bool (X, Y, Z); without a mask, or with an empty one, the brain."""
        tumour = None if self.mask is None else self.mask > 0
        return tumour if tumour is not None and tumour.any() else self.brain

    @property
    def brain(self) -> np.ndarray:
        """Where the first modality that is not empty is not 0, bool (X, Y, Z)."""
        filled = (volume != 0 for volume in self.volumes.values())
        return next((brain for brain in filled if brain.any()), np.ones(self.shape, bool))

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along X, Y, Z."""
        return next(iter(self.volumes.values())).shape

    def window(self, modality: str) -> tuple[float, float]:
        """Darkest and brightest intensity shown."""
        volume = self.volumes[modality]
        brain = volume[volume != 0]
        return tuple(np.percentile(brain, PERCENTILES)) if brain.size else (0.0, 1.0)

    def cut(self, volume: np.ndarray, plane: str, at: int, box: Sequence[slice] | None = None) -> np.ndarray:
        """One slice of a volume within the box, as an image: rows down, columns to the right."""
        axis = PLANES[plane]
        within = list(box or self.box)
        within[axis] = at
        image = volume[tuple(within)].T
        return image if plane == "axial" else image[::-1]

    def aspect(self, plane: str) -> float:
        """Height of a voxel over its width."""
        across, down = [size for axis, size in enumerate(self.spacing_mm) if axis != PLANES[plane]]
        return down / across


def around(inside: np.ndarray) -> list[slice]:
    """The box of the true voxels with a margin of up to four voxels; the whole volume if none is true."""
    if not inside.any():
        return [slice(0, n) for n in inside.shape]
    sides = zip(bounding_box(inside), inside.shape, strict=True)
    return [slice(max(side.start - 4, 0), min(side.stop + 4, n)) for side, n in sides]


def load_scan(case: Case, modalities: Sequence[str]) -> Scan:
    volumes = {}
    for name in modalities:
        image = case.read(name)[1]
        volumes[name], spacing = upright(image)
    mask = upright(nib.Nifti1Image(read_mask(case.seg, case.numbering), image.affine))[0] if case.seg else None
    return Scan(volumes, mask, spacing)


def upright(image: nib.Nifti1Image) -> tuple[np.ndarray, tuple[float, ...]]:
    """Voxels with axes towards left, posterior, superior (BraTS files lie so already), and their size in mm."""
    wanted = nib.orientations.axcodes2ornt("LPS")
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    return np.asanyarray(turned.dataobj), spacing_mm(turned)


def intensities(case: Case) -> str:
    low, high = PERCENTILES
    seg = "" if case.seg else " · no segmentation"
    return f"intensity in arbitrary units, percentiles {low} to {high} of the brain · patient's right on the left{seg}"


@styled
def modalities(case: Case, *, simulated: bool) -> Figure:
    """Every modality of a case on the axial slice with most tumour, without and with the segmentation."""
    scan = load_scan(case, tuple(case.images))
    at = fullest(scan.focus, PLANES["axial"])
    names = list(case.images)
    rows = 1 if scan.mask is None or len(names) <= 2 else 2
    columns = len(names) if scan.mask is None or rows == 2 else 2 * len(names)
    figure, axes = panels(rows, columns, scan.cut(scan.focus, "axial", at).shape, scan.mask is not None)
    for place, ax in enumerate(axes.flat):
        name, marked = names[place % len(names)], place >= len(names)
        image = scan.cut(scan.volumes[name], "axial", at)
        heading = PRINTED[name] + ", segmentation" * marked
        show(ax, image, scan.window(name), heading, scan.aspect("axial"))
        if marked:
            overlay(ax, scan.cut(scan.mask, "axial", at))
    if scan.mask is not None:
        class_legend(figure)
    printed = ", ".join(PRINTED[name] for name in names)
    title(figure, f"{case.id} · {printed} · axial slice {at}", intensities(case), simulated)
    return figure


@styled
def montage(case: Case, modality: str, *, count: int = 12, simulated: bool) -> Figure:
    """Axial slices of one modality from the lowest to the highest with tumour (or brain), with the segmentation.

    Args:
        count: slices shown at most, evenly spread.
    """
    scan = load_scan(case, [modality])
    filled = np.flatnonzero(scan.focus.any(axis=(0, 1)))
    picks = np.unique(np.linspace(filled[0], filled[-1], count).round().astype(int))
    columns = min(4, len(picks))
    shape = scan.cut(scan.focus, "axial", 0).shape
    figure, axes = panels(-(-len(picks) // columns), columns, shape, scan.mask is not None)
    for ax, at in zip(axes.flat, picks, strict=False):
        image = scan.cut(scan.volumes[modality], "axial", at)
        show(ax, image, scan.window(modality), f"slice {at}", scan.aspect("axial"))
        if scan.mask is not None:
            overlay(ax, scan.cut(scan.mask, "axial", at))
    if scan.mask is not None:
        class_legend(figure)
    headline = f"{case.id} · {PRINTED[modality]} · axial slices {picks[0]} to {picks[-1]}"
    title(figure, headline, intensities(case), simulated)
    return figure


def gif(case: Case, path: Path, *, modality: str, step: int = 2, simulated: bool) -> Path:
    """Write an animation through the axial slices with brain, the segmentation beside the plain image.

    Args:
        path: of the GIF, a megabyte or so.
        step: distance of the slices shown.
    """
    import imageio.v3 as imageio
    from PIL import Image, ImageDraw, ImageFont

    scan = load_scan(case, [modality])
    low, high = scan.window(modality)
    colours = np.array([to_rgb(COLOURS[name]) for name in CLASSES])
    name = case.id + " · simulated" * simulated
    font = ImageFont.load_default(11)
    frames = []
    for at in range(scan.box[2].start, scan.box[2].stop, step):
        image = scan.cut(scan.volumes[modality], "axial", at)
        grey = np.round(np.clip((image - low) / (high - low), 0, 1) * 31) / 31  # few grey levels keep the file small
        plain = np.repeat(grey[..., None], 3, axis=2)
        marked = plain.copy()
        if scan.mask is not None:
            classes = scan.cut(scan.mask, "axial", at)
            marked[classes > 0] = 0.5 * plain[classes > 0] + 0.5 * colours[classes[classes > 0]]
        frame = np.pad(np.hstack([plain, marked]), ((34, 0), (0, 0), (0, 0)))
        picture = Image.fromarray(np.round(frame * 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        draw.text((4, 2), name, "white", font)
        draw.text((4, 17), f"{PRINTED[modality]} · axial slice {at}", "white", font)
        frames.append(np.asarray(picture))
    how = {"duration": 100, "loop": 0, "comment": f"{name} · {PRINTED[modality]} · axial slices".encode()}
    with whole_file(path, "wb") as file:
        imageio.imwrite(file, frames, extension=".gif", **how)
    register(path)
    return path


@styled
def planes(case: Case, modality: str, *, simulated: bool) -> Figure:
    """Sagittal, coronal and axial plane through the tumour's centre by nilearn, without and with the segmentation."""
    from nilearn import plotting

    image, mask, centre, window = nilearn_input(case, modality)
    figure = plt.figure(figsize=(WIDTH, 4 if mask is None else 7.5), layout="none")
    look = {
        "cut_coords": centre, "radiological": True, "colorbar": False, "black_bg": True,
        "vmin": window[0], "vmax": window[1],
    }  # fmt: skip
    top = (0, 0.04, 1, 0.82) if mask is None else (0, 0.48, 1, 0.435)
    plotting.plot_anat(image, figure=figure, axes=top, **look)
    if mask is not None:
        display = plotting.plot_anat(image, figure=figure, axes=(0, 0.05, 1, 0.42), draw_cross=False, **look)
        colours = ListedColormap([COLOURS[name] for name in CLASSES[1:]])
        display.add_overlay(mask, threshold=0.5, cmap=colours, vmin=1, vmax=3, transparency=0.6)
        class_legend(figure)
    x, y, z = (f"{value:.0f}" for value in centre)
    headline = f"{case.id} · {PRINTED[modality]} · three planes through x = {x}, y = {y}, z = {z} mm"
    title(figure, headline, intensities(case), simulated)
    return figure


def fullest(volume: np.ndarray, axis: int) -> int:
    """Index along `axis` of the slice with the most true voxels."""
    return int(volume.sum(axis=tuple({0, 1, 2} - {axis})).argmax())


@styled
def histograms(case: Case, *, simulated: bool) -> Figure:
    """Distribution of the normalised intensities of each tissue, per modality."""
    scan = load_scan(case, tuple(case.images))
    columns = min(2, len(scan.volumes))
    rows = -(-len(scan.volumes) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, 3 * rows + 1), sharex=True, squeeze=False)
    bins = np.linspace(-4, 6, 101)
    names = ["brain outside tumour" if case.seg else "brain (no segmentation)", *map(named, CLASSES[1:])]
    brain = np.any([volume != 0 for volume in scan.volumes.values()], axis=0)
    classes = np.zeros(brain.shape, np.uint8) if scan.mask is None else scan.mask
    for ax, (name, volume) in zip(axes.flat, scan.volumes.items(), strict=False):
        scores = normalise(volume)
        for index, tissue in enumerate(CLASSES):
            values = scores[brain & (classes == index)]
            if values.size:
                heights = np.histogram(values, bins)[0] / values.size / (bins[1] - bins[0])
                ax.stairs(
                    heights, bins, color=COLOURS[tissue], fill=index == 0, alpha=0.35 if index == 0 else 1,
                    linestyle=DASHES[tissue], linewidth=1.6, label=names[index],
                )  # fmt: skip
        ax.set_title(PRINTED[name])
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    for ax in axes.flat[len(scan.volumes) :]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel("z-score (standard deviations from the brain's mean)")
    figure.supylabel("share of the tissue's voxels", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4)
    detail = "normalised intensity of each tissue; every curve encloses the same area"
    title(figure, f"{case.id} · {', '.join(PRINTED[name] for name in scan.volumes)}", detail, simulated)
    return figure


def cube(inside: np.ndarray) -> list[slice]:
    """A box of equal sides, as far as the volume allows, around the true voxels, with 15 voxels of margin."""
    ends = [(side.min(), side.max() + 1) for side in np.nonzero(inside)]
    side = max(high - low for low, high in ends) + 30
    middles = [(low + high) // 2 for low, high in ends]
    starts = [max(0, min(at - side // 2, n - side)) for at, n in zip(middles, inside.shape, strict=True)]
    return [slice(start, start + side) for start in starts]


def nilearn_input(case: Case, modality: str) -> tuple[nib.Nifti1Image, nib.Nifti1Image | None, list[float], tuple]:
    """Image and mask within the brain's box, the tumour's centre in mm, and the window."""
    scan = load_scan(case, [modality])
    voxels, image = case.read(modality)
    box = tuple(around(voxels != 0))
    mask = nib.Nifti1Image(read_mask(case.seg, case.numbering), image.affine) if case.seg else None
    focus = voxels != 0 if mask is None or not np.any(mask.dataobj) else np.asarray(mask.dataobj) > 0
    centre = nib.affines.apply_affine(image.affine, [fullest(focus, axis) for axis in range(3)])
    crop = None if mask is None else mask.slicer[box]
    return image.slicer[box], crop, [float(value) for value in centre], scan.window(modality)
