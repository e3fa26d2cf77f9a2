"""Figures of scores and predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case
from brats_helpers.data.nifti import read_mask
from brats_helpers.data.numbering import predicted_as
from brats_helpers.evaluation.uncertainty import entropy
from brats_helpers.labels import REGIONS
from brats_helpers.report.plots.patients import PLANES, cube, fullest, load_scan, upright
from brats_helpers.report.plots.style import (
    COLOURS,
    DASHED,
    ERROR,
    INK,
    MARKERS,
    MEANINGS,
    MOST,
    PART_INK,
    PRINTED,
    SOFT,
    WIDTH,
    Z_WINDOW,
    class_legend,
    convention,
    named,
    outline,
    overlay,
    panels,
    show,
    styled,
    title,
    z_window,
)
from brats_helpers.runs import NO_PATIENT
from brats_helpers.scoring.overlap import mean_dice_of_case
from brats_helpers.scoring.scores import score_case


@styled
def overlays(cases: Sequence[Case], predictions: Path, metrics: Mapping, *, modality: str, simulated: bool) -> Figure:
    """Best, median and worst patient: outlines of prediction and reference in three planes.

    Args:
        cases: the scored patients.
        predictions: folder of `<case>_seg.nii.gz`.
        metrics: `metrics.json`; patients are ranked by their mean Dice of WT, TC and ET.
    """
    scores = metrics["cases"]
    by_id = {case.id: case for case in cases}
    picks = best_median_worst(scores)
    figure = plt.figure(figsize=(WIDTH, 3.9 * len(picks) + 0.8))
    rows = figure.subfigures(len(picks), 1, squeeze=False)[:, 0]
    for row, (rank, case_id) in zip(rows, picks.items(), strict=True):
        case = by_id[case_id]
        scan = load_scan(case, [modality])
        image = case.read(modality)[1]
        mask = read_mask(predictions / f"{case_id}_seg.nii.gz", predicted_as(case, metrics))
        predicted = upright(nib.Nifti1Image(mask, image.affine))[0]
        focus = predicted > 0 if predicted.any() and not np.any(scan.mask) else scan.focus
        box = cube(focus | (predicted > 0))
        for ax, plane in zip(row.subplots(1, 3), PLANES, strict=True):
            ax.axis("off")
            at = fullest(focus, PLANES[plane])
            picture = scan.cut(scan.volumes[modality], plane, at, box)
            show(ax, picture, scan.window(modality), f"{plane} slice {at}", scan.aspect(plane))
            for name, members in REGIONS.items():
                for mask, dash in ((scan.mask, "-"), (predicted, DASHED)):
                    inside = np.isin(scan.cut(mask, plane, at, box), members)
                    outline(ax, inside, COLOURS[name], dash, 3.2 if name == "TC" else 1.2)  # TC shows below ET
        dice = ", ".join(f"{name} {_number(scores[case_id], name, 'dice'):.2f}" for name in REGIONS)
        row.suptitle(f"{rank}: {case_id} · Dice {dice}", x=0.01, ha="left", fontsize=11)
    handles = [Line2D([], [], color=COLOURS[name], label=named(name)) for name in REGIONS]
    handles += [
        Line2D([], [], color=INK, label="reference"),
        Line2D([], [], color=INK, linestyle=DASHED, label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    headline = f"Prediction against reference · {PRINTED[modality]} · {_tested(len(scores))}"
    detail = "slices with most reference tumour, zoomed to it · patient's right on the left"
    title(figure, headline, f"{convention(metrics)} · {detail}", simulated)
    return figure


@styled
def one_false_voxel(*, name: str) -> Figure:
    """A drawn patient without enhancing tumour, a correct prediction, and one with a single false voxel.

    Args:
        name: the convention to score by, see `scoring.rules.CONVENTIONS`.
    """
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    brain, tumour = x**2 / 0.6 + y**2 < 0.95, (x - 0.25) ** 2 + (y + 0.1) ** 2
    reference = np.where(tumour < 0.03, 1, np.where(tumour < 0.14, 2, 0)).astype(np.uint8)
    spotted = reference.copy()
    spotted[21, 30] = 3
    figure, axes = panels(1, 3, brain.shape)
    pictures = {"reference, no ET": reference, "prediction without ET": reference, "one false voxel": spotted}
    for ax, (what, classes) in zip(axes[0], pictures.items(), strict=True):
        scores = score_case(classes[None], reference[None], spacing_mm=(1, 1, 1), convention=name)["ET"]
        says = f" · Dice {scores['dice']:.0f}, HD95 {scores['hd95_mm']:.2f} mm"
        show(ax, brain * 0.5, (0, 1), what if what.startswith("reference") else what + says)
        overlay(ax, classes)
    class_legend(figure)
    title(figure, "What one false voxel costs", f"a drawn slice, {NO_PATIENT} · convention {name}", False)
    return figure


def best_median_worst(scores: Mapping[str, Mapping]) -> dict[str, str]:
    """IDs by rank; fewer than three if there are fewer patients."""
    ranked = sorted(scores, key=lambda case_id: -mean_dice_of_case(scores[case_id]))
    picks = {"Best": ranked[0], "Median": ranked[len(ranked) // 2], "Worst": ranked[-1]}
    if len(ranked) < 3:
        del picks["Median"]
    return {"Only": ranked[0]} if len(ranked) == 1 else picks


def _tested(n: int) -> str:
    return f"{n} test patient{'s' * (n != 1)}"


def _number(scores: Mapping, region: str, metric: str) -> float:
    """One figure of one patient; nan where it is missing."""
    value = scores.get(region, {}).get(metric)
    return float("nan") if value is None else float(value)


@styled
def score_distributions(metrics: Mapping, *, simulated: bool) -> Figure:
    """Dice and HD95 of every test patient, per region: a point a patient, a box over the quartiles.

    Args:
        metrics: `metrics.json` of the run.
    """
    cases = metrics["cases"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.6))
    for ax, metric in ((left, "dice"), (right, "hd95_mm")):
        for place, region in enumerate(REGIONS):
            values = np.array([_number(scores, region, metric) for scores in cases.values()])
            values = values[~np.isnan(values)]
            ax.boxplot(
                values, positions=[place], widths=0.5, showfliers=False,
                medianprops={"color": INK, "linewidth": 1.6}, boxprops={"color": SOFT},
                whiskerprops={"color": SOFT}, capprops={"color": SOFT},
            )  # fmt: skip
            spread = np.random.default_rng(0).uniform(-0.17, 0.17, len(values))
            ax.scatter(place + spread, values, 22, COLOURS[region], marker=MARKERS[region], linewidths=0, zorder=3)
        ax.set_xticks(range(len(REGIONS)), [f"{region}\n{MEANINGS[region]}" for region in REGIONS])
        ax.tick_params(axis="x", length=0)
        ax.grid(axis="y")
    left.set(ylim=(-0.02, 1.02), ylabel="Dice (0 to 1, higher is better)", title="Dice")
    right.set_yscale("symlog", linthresh=1, linscale=0.4)
    right.set_yticks([0, 1, 3, 10, 30, 100, 373], ["0", "1", "3", "10", "30", "100", "373"])
    right.minorticks_off()
    right.set(ylim=(-0.1, 450), ylabel="HD95 (mm, lower is better)", title="HD95, a percentile of the surface distance")
    detail = f"{convention(metrics)} · a point is a patient; box: quartiles, line: median"
    title(figure, f"Scores of {_tested(len(cases))}", detail, simulated)
    return figure


@styled
def calibration(metrics: Mapping, *, simulated: bool) -> Figure:
    """Observed frequency of each region over its predicted probability; `metrics` is `metrics.json`."""
    found = metrics["uncertainty"]["calibration"]
    figure, axes = plt.subplots(1, len(REGIONS), figsize=(WIDTH, 4.3), sharey=True)
    for ax, (region, curve) in zip(axes, found.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
        bins = pd.DataFrame(curve["bins"], columns=["predicted", "observed"])
        ax.plot(bins["predicted"], bins["observed"], color=COLOURS[region], marker=MARKERS[region], markersize=6)
        error = "no voxel" if curve["ece"] is None else f"calibration error {curve['ece']:.3f}"
        ax.set(title=f"{region} · {error}", xlabel="probability given", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.grid()
    axes[0].set_ylabel("share that is the region")
    detail = "brain voxels with a probability of 0.01 or more · dotted: perfect · above: more often than predicted"
    title(figure, f"Calibration on {_tested(len(metrics['uncertainty']['cases']))}", detail, simulated)
    return figure


@styled
def doubt(case: Packed, soft: np.ndarray, *, modality: str, modalities: Sequence[str], simulated: bool) -> Figure:
    """Reference, prediction before post-processing, its errors and uncertainty, on the slice with the most errors.

    Args:
        case: a prepared patient with its labels.
        soft: its probabilities, see `networks.predict`.
        modality: shown below the errors.
        modalities: of the prepared patient, in order.
    """
    predicted = soft.argmax(axis=1)
    wrong = (predicted != case.labels) & case.brain
    at = int(wrong.sum(axis=(1, 2)).argmax())
    image = case.images[at, list(modalities).index(modality)]
    figure, ((reference, answer, errors, doubts),) = panels(1, 4, image.shape)
    for ax, what, classes in ((reference, "reference", case.labels), (answer, "before post-processing", predicted)):
        show(ax, image, Z_WINDOW, what)
        overlay(ax, classes[at])
    show(errors, image, Z_WINDOW, f"errors (red): {int(wrong[at].sum()):,} voxels")
    errors.imshow(np.where(wrong[at, ..., None], to_rgba(ERROR), 0))
    shown = doubts.imshow(entropy(np.moveaxis(soft[at], 0, -1)), cmap="magma", vmin=0, vmax=1)
    doubts.set_title("uncertainty (entropy)")
    bar = figure.colorbar(shown, ax=doubts, location="bottom", ticks=[0, 1], shrink=0.9, pad=0.02)
    bar.ax.set_xticklabels(["certain", "undecided"])
    class_legend(figure)
    headline = f"{case.id} · errors and uncertainty · {PRINTED[modality]} · axial slice {case.origin[0] + at}"
    title(figure, headline, f"the slice with the most errors · {z_window()}", simulated)
    return figure


@styled
def patient_dice(metrics: Mapping, *, simulated: bool) -> Figure:
    """Dice of WT, TC and ET of up to `MOST` patients, the worst at the bottom; `metrics` is `metrics.json`."""
    cases = metrics["cases"]
    ranked = sorted(cases, key=lambda case_id: mean_dice_of_case(cases[case_id]))[:MOST]
    figure, ax = plt.subplots(figsize=(WIDTH, 1.9 + 0.24 * len(ranked)))
    for region in REGIONS:
        values = [_number(cases[case_id], region, "dice") for case_id in ranked]
        ax.plot(
            values, range(len(ranked)), linestyle="none", marker=MARKERS[region], color=COLOURS[region], markersize=6,
            label=named(region),
        )  # fmt: skip
    ax.set_yticks(range(len(ranked)), ranked)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(ranked) - 0.4), xlabel="Dice (0 to 1, higher is better)")
    ax.grid()
    figure.legend(loc="outside lower left", ncols=len(REGIONS))
    detail = f"{convention(metrics)} · ordered by the mean of the three regions"
    lowest = f"the {len(ranked)} lowest of " * (len(ranked) < len(cases))
    title(figure, f"Dice of {lowest}{_tested(len(cases))}", detail, simulated)
    return figure


@styled
def volume_agreement(metrics: Mapping, *, simulated: bool) -> Figure:
    """Predicted minus reference volume over the mean of the two, per region, a point a patient.

    The lines are the mean difference and the limits of agreement, 1.96 standard deviations to either side of it
    (Bland and Altman, Lancet 327, 1986). `metrics` is `metrics.json`.
    """
    cases = metrics["cases"]
    figure, axes = plt.subplots(1, len(REGIONS), figsize=(WIDTH, 3.9))
    for ax, region in zip(axes, REGIONS, strict=True):
        predicted = np.array([_number(scores, region, "volume_ml") for scores in cases.values()])
        true = np.array([_number(scores, region, "volume_ml_truth") for scores in cases.values()])
        difference = predicted - true
        style = {"color": COLOURS[region], "marker": MARKERS[region], "markersize": 6}
        ax.plot((predicted + true) / 2, difference, linestyle="none", **style)
        mean = np.nanmean(difference)
        spread = 1.96 * np.nanstd(difference, ddof=1) if len(cases) > 1 else 0
        lines = {mean: "-"} | ({mean - spread: "--", mean + spread: "--"} if len(cases) > 1 else {})
        for at, dash in lines.items():
            ax.axhline(at, color=INK, linewidth=1, linestyle=dash)
            ax.annotate(
                f"{at:+.1f}", (1, at), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=9,
            )  # fmt: skip
        ax.axhline(0, color=SOFT, linewidth=0.8, linestyle=":")
        ax.margins(x=0.12, y=0.15)
        ax.set(title=named(region), xlabel="mean of the two volumes (ml)")
        ax.grid(axis="y")
    axes[0].set_ylabel("predicted minus reference (ml)")
    detail = "a point is a patient · line: mean difference, dashed: limits of agreement (1.96 standard deviations)"
    title(figure, f"Volume agreement of {_tested(len(cases))}", detail, simulated)
    return figure


@styled
def strata(patients: pd.DataFrame, *, simulated: bool) -> Figure:
    """Compare the parts of a split in grade and tumour size: shares of their patients and of their slices.

    Args:
        patients: a row a patient: `part`, `grade` (None where unknown), `tumour_ml` (whole tumour, ml), and `slices`,
            its axial slices with tumour.
    """
    third = (patients["tumour_ml"].rank(method="first") - 1) * 3 // len(patients)
    spans = patients["tumour_ml"].groupby(third).agg(["min", "max"])
    sizes = {k: f"{span['min']:,.0f} to {span['max']:,.0f} ml" for k, span in spans.iterrows()}
    kinds = {"Whole tumour": third}
    if patients["grade"].notna().any():
        kinds = {"Grade": patients["grade"].fillna("unknown")} | kinds
    parts = list(patients["part"].unique())
    figure = plt.figure(figsize=(WIDTH, 1 + 2.5 * len(kinds)))
    axes = figure.subplots(len(kinds), 2, sharey="row", squeeze=False)
    for row, (name, kind) in zip(axes, kinds.items(), strict=True):
        for ax, unit in zip(row, ("patients", "slices with tumour"), strict=True):
            weights = patients["slices"] if unit != "patients" else 1
            table = patients.assign(kind=kind, n=weights).pivot_table(
                index="kind", columns="part", values="n", aggfunc="sum", fill_value=0
            )
            for place, (part, ink) in enumerate(zip(parts, PART_INK, strict=False)):
                at = np.arange(len(table)) + (place - (len(parts) - 1) / 2) * 0.8 / len(parts)
                shares = 100 * table[part] / max(table[part].sum(), 1)
                bars = ax.bar(at, shares, 0.74 / len(parts), color=ink, label=part)
                ax.bar_label(bars, [f"{n:,}" for n in table[part]], fontsize=8, color=SOFT)
            ax.set_xticks(range(len(table)), [sizes.get(key, key) for key in table.index])
            ax.tick_params(axis="x", length=0)
            ax.margins(y=0.12)
            ax.set_title(f"{name}, {unit}")
            ax.grid(axis="y")
        row[0].set_ylabel("share of the part (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=len(parts))
    detail = "numbers above the bars: how many; sizes: all patients, ordered by the reference, in three equal groups"
    title(
        figure,
        f"Patients and slices by {' and '.join(kinds).lower()} · {', '.join(parts)}",
        detail,
        simulated,
    )
    return figure
