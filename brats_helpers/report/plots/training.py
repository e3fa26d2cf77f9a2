"""Figures of slices, batches and training."""

import sys
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brats_helpers.labels import CLASSES, REGIONS
from brats_helpers.log import watched
from brats_helpers.report.plots.style import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    PART_INK,
    PRINTED,
    SOFT,
    WIDTH,
    Z_WINDOW,
    array,
    class_legend,
    convention,
    named,
    outline,
    panels,
    show,
    styled,
    title,
    z_window,
)
from brats_helpers.runs import Run
from brats_helpers.scoring.overlap import mean_dice_of_epoch


@styled
def balance(counts: Mapping[str, Sequence[np.ndarray]], *, simulated: bool) -> Figure:
    """Share and number of the patients and slices of each part that hold each class.

    Args:
        counts: for each part of the split one array a patient, (slices, 4): voxels of each class per slice of
            the brain's box (`cache.Packed.counts`).
    """
    kinds = ["tumour", *CLASSES[1:]]
    table = {}
    for part, patients in counts.items():
        holds = [np.column_stack([voxels[:, 1:].any(axis=1), voxels[:, 1:] > 0]) for voxels in patients]
        in_patients = np.array([slices.any(axis=0) for slices in holds]).sum(axis=0)
        in_slices = np.concatenate(holds).sum(axis=0)
        table[part] = {"patients": (len(holds), in_patients), "slices": (sum(map(len, holds)), in_slices)}

    figure = plt.figure(figsize=(WIDTH, 4.2 + 0.3 * len(table)))
    axes = figure.subplots(2, 2, height_ratios=[3, 0.3 * (len(table) + 1)])
    for (ax, below), unit in zip(axes.T, ("patients", "slices"), strict=True):
        width = 0.8 / len(table)
        for place, (part, ink) in enumerate(zip(table, PART_INK, strict=False)):
            total, numbers = table[part][unit]
            at = np.arange(len(kinds)) + (place - (len(table) - 1) / 2) * width
            ax.bar(at, 100 * numbers / max(total, 1), width * 0.92, color=ink, label=part)
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set_xlim(-0.5, len(kinds) - 0.5)  # above the columns of the table
        for label in ax.get_xticklabels()[1:]:
            label.set_bbox({"facecolor": to_rgba(COLOURS[label.get_text()], 0.45), "edgecolor": "none", "pad": 2})
        ax.tick_params(axis="x", length=0, pad=6)
        ax.set_ylim(0, 100 if unit == "patients" else None)
        ax.set_ylabel(f"share of the part's {unit} (%)")
        ax.set_title(unit.capitalize())
        ax.grid(axis="y")
        below.axis("off")
        cells = below.table(
            [list(map("{:,}".format, row[unit][1])) for row in table.values()],
            rowLabels=[f"{part}: {row[unit][0]:,}" for part, row in table.items()], loc="center", edges="horizontal",
            cellLoc="center", rowLoc="left", bbox=[0, 0, 1, 1],
        )  # fmt: skip
        cells.auto_set_font_size(False)
        cells.set_fontsize(9)
        for cell in cells.get_celld().values():
            cell.set_edgecolor("#D0D0D0")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=len(table))
    headline = f"Patients and slices with each class · {', '.join(table)}"
    title(figure, headline, "slices: axial, within the brain's box; split by patient", simulated)
    return figure


@styled
def batch(images, masks, *, modalities: Sequence[str], count: int = 6, simulated: bool) -> Figure:
    """Slices as the network sees them, with the segmentation outlined.

    Args:
        images: (batch, channels, Y, X), z-scores; with neighbouring slices as channels, the middle one is shown.
        masks: (batch, Y, X), class indices.
        modalities: names of a slice's channels.
        count: slices shown at most.
    """
    images, masks = _middle(images, len(modalities))[:count], array(masks)[:count]
    figure, axes = panels(len(modalities), len(images), images.shape[2:])
    for row, name in enumerate(modalities):
        _outlined(axes[row], images[:, row], masks, PRINTED[name])
    class_legend(figure)
    height, width = images.shape[2:]
    headline = f"A training batch · {', '.join(PRINTED[name] for name in modalities)}"
    title(figure, headline, f"{z_window()} · {height} × {width} pixels", simulated)
    return figure


@styled
def augmentation(
    images, masks, augmented, augmented_masks, *, modalities: Sequence[str], count: int = 5, simulated: bool
) -> Figure:
    """The first modality of some slices before (above) and after (below) augmentation; shapes as in `batch`."""
    rows = {"before": (images, masks), "after": (augmented, augmented_masks)}
    rows = {name: (_middle(x, len(modalities))[:count, 0], array(y)[:count]) for name, (x, y) in rows.items()}
    figure, axes = panels(2, len(rows["before"][0]), rows["before"][0].shape[1:])
    for row, (name, (pictures, classes)) in enumerate(rows.items()):
        _outlined(axes[row], pictures, classes, name)
    class_legend(figure)
    headline = f"Slices before and after augmentation · {PRINTED[modalities[0]]}"
    title(figure, headline, z_window(), simulated)
    return figure


def _outlined(axes: Sequence[Axes], images: np.ndarray, masks: np.ndarray, name: str) -> None:
    """Draw a row of slices with the outlines of their classes; the first one has the name as its title."""
    for k, (ax, image, mask) in enumerate(zip(axes, images, masks, strict=True)):
        show(ax, image, Z_WINDOW, name if k == 0 else "")
        for index, tissue in enumerate(CLASSES[1:], start=1):
            outline(ax, mask == index, COLOURS[tissue])


@styled
def filters(colours, channels, *, modalities: Sequence[str], encoder: str, count: int = 8, simulated: bool) -> Figure:
    """The first layer's filters for three colours (above), and as they are spread over the modalities (below).

    Args:
        colours: (filters, 3, height, width), weights for red, green and blue.
        channels: (filters, channels, height, width), weights of the network before training; with neighbouring
            slices as channels, those of the middle one are shown.
        modalities: names of a slice's channels.
        encoder: its name.
        count: filters shown at most; those with the largest variation.
    """
    colours, channels = array(colours), _middle(channels, len(modalities))
    chosen = np.sort(colours.reshape(len(colours), -1).std(axis=1).argsort()[::-1][:count])
    figure, axes = panels(1 + len(modalities), len(chosen), (1, 1), legend=False)
    for column, index in enumerate(chosen):
        pattern = colours[index].transpose(1, 2, 0)
        pattern = 0.5 + pattern / (2 * max(abs(pattern).max(), 1e-9))  # grey is 0
        axes[0, column].imshow(pattern)
        axes[0, column].set_title("colours" if column == 0 else "")
        limit = max(abs(channels[index]).max(), 1e-9)
        for row, name in enumerate(modalities):
            show(axes[1 + row, column], channels[index, row], (-limit, limit), PRINTED[name] if column == 0 else "")
    detail = f"{len(chosen)} of {len(colours)} filters, before training; mid-grey is 0"
    title(figure, f"From three colours to {len(modalities)} modalities · {encoder}", detail, simulated)
    return figure


def _middle(images, modalities: int) -> np.ndarray:
    """The channels of the middle slice, (batch, modalities, Y, X)."""
    images = array(images).astype(np.float32)
    first = (images.shape[1] - modalities) // 2
    return images[:, first : first + modalities]


@styled
def training_curves(history: pd.DataFrame, *, best_epoch: int, run: str, simulated: bool) -> Figure:
    """Loss, validation Dice per region and class, learning rate and speed over the epochs, with the best one marked.

    Args:
        history: `history.csv` of the run; a panel whose columns are missing stays empty.
        best_epoch: the one whose weights were saved.
        run: its name.
    """
    figure = plt.figure(figsize=(WIDTH, 6.2))
    layout = [["loss"] * 2 + ["regions"] * 2 + ["classes"] * 2, ["lr"] * 3 + ["speed"] * 3]
    axes = figure.subplot_mosaic(layout, height_ratios=[2, 1])
    _curve(axes["loss"], history, "train_loss", INK, "-", "o", "training")
    _curve(axes["loss"], history, "val_loss", SOFT, "--", "s", "validation")
    for panel, names in (("regions", REGIONS), ("classes", CLASSES[1:])):
        for name in names:
            _curve(axes[panel], history, f"dice_{name}", COLOURS[name], DASHES[name], MARKERS[name], name)
        axes[panel].set_ylim(0, 1)
    _curve(axes["lr"], history, "lr", INK, "-", "o")
    _curve(axes["speed"], history, "slices_per_s", INK, "-", "o")
    titles = {
        "loss": ("Loss", "cross-entropy + Dice loss"),
        "regions": ("Validation Dice by region", "Dice (0 to 1), brats2020"),
        "classes": ("Validation Dice by class", "Dice (0 to 1), brats2020"),
        "lr": ("Learning rate", "learning rate"),
        "speed": ("Speed", "slices per second"),
    }
    for name, ax in axes.items():
        ax.axvline(best_epoch, color=SOFT, linewidth=0.8, linestyle=":", zorder=0)
        ax.set_title(titles[name][0])
        ax.set_ylabel(titles[name][1])
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(axis="y")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best")
    for name in ("lr", "speed"):
        axes[name].set_ylim(0, 1.1 * axes[name].get_ylim()[1])
    epochs = history["epoch"]
    detail = f"epochs {epochs.min()} to {epochs.max()} · dotted line: epoch {best_epoch}, the one kept"
    title(figure, f"Training of {run}", detail, simulated)
    return figure


def _curve(ax: Axes, history: pd.DataFrame, column: str, colour: str, dash: str, marker: str, label: str = "") -> None:
    if column in history:
        ax.plot(history["epoch"], history[column], color=colour, linestyle=dash, marker=marker, label=label)


@styled
def comparison(
    histories: Mapping[str, pd.DataFrame],
    metrics: Mapping[str, Mapping],
    *,
    headline: str,
    simulated: bool,
    scored_on: str = "test",
) -> Figure:
    """Trainings side by side: validation Dice over training time, and Dice of the scores with its 95 % interval.

    Args:
        histories: `history.csv` of each run by name; `seconds` counts from the start of training.
        metrics: `metrics.json` of each run that was scored, by the same names.
        headline: what they are, or the question that they answer.
        scored_on: which patients were scored, `test` or `validation`.
    """
    end_s = max(history["seconds"].max() for history in histories.values())
    curves = any(len(history) > 1 for history in histories.values())  # a single epoch gives no curve
    heights = [3.6] * curves + [0.9 + 0.63 * len(histories)]
    size = (WIDTH, sum(heights) + 0.8 * (not curves))
    figure, axes = plt.subplots(len(heights), 3, figsize=size, height_ratios=heights, sharey="row", squeeze=False)
    dashes, markers = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")
    for column, region in enumerate(REGIONS):
        above, below = axes[0, column], axes[-1, column]
        for place, (name, history) in enumerate(histories.items()):
            style = {"color": COLOURS[region], "marker": markers[place % 7]}
            if curves and f"dice_{region}" in history:
                above.plot(history["seconds"], history[f"dice_{region}"], linestyle=dashes[place % 4], **style)
            dice = metrics.get(name, {}).get("summary", {}).get(region, {}).get("dice", {})
            if dice.get("mean") is not None:
                mean = dice["mean"]
                below.plot(dice.get("ci95") or [mean, mean], [place, place], color=COLOURS[region], linewidth=2)
                below.plot(mean, place, markersize=7, **style)
                side = "left" if mean < 0.1 else "center"  # clear of the axis
                below.annotate(f"{mean:.3f}", (mean, place), (0, 6), textcoords="offset points", ha=side)
        above.set_title(named(region))
        if curves:
            above.set(xlabel="training time (s)", xlim=(0, 1.05 * end_s), ylim=(-0.02, 1.02))
            above.grid(axis="y")
        below.set(xlabel=f"Dice of the {scored_on} patients", xlim=(-0.02, 1.02), yticks=range(len(histories)))
        below.set_yticklabels(list(histories))
        below.grid(axis="x")
    axes[-1, 0].set_ylim(len(histories) - 0.4, -0.6)
    if curves:
        axes[0, 0].set_ylabel("Dice of the patients\nwho choose the epoch")
        handles = [
            Line2D([], [], color=INK, linestyle=dashes[place % 4], marker=markers[place % 7], label=name)
            for place, name in enumerate(histories)
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=4)
    conventions = sorted({convention(found) for found in metrics.values()})
    what = ["means with 95 % intervals", *["an epoch or less of training each"] * (not curves)]
    detail = " · ".join([", ".join(histories), *what, *conventions])
    title(figure, headline, detail, simulated)
    return figure


def live_curves(run: Run) -> Callable[[list[dict]], None] | None:
    """Curves that grow in place after every epoch, for `launch(follow=...)`; None if no one is watching a notebook."""
    if not (watched() and "ipykernel" in sys.modules):
        return None
    shown = []

    def redraw(history: list[dict]) -> None:
        from IPython.display import display

        best = max(history, key=mean_dice_of_epoch)
        figure = training_curves(
            pd.DataFrame(history), best_epoch=best["epoch"], run=run.name, simulated=run.manifest["simulated"]
        )
        if shown:
            shown[0].update(figure)
        else:
            shown.append(display(figure, display_id=True))

    return redraw
