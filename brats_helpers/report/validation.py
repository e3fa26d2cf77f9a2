"""The validation report: what can be said of a run line by line, each computed from its files, evidence beside it."""

import csv
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

from brats_helpers.files import whole_file
from brats_helpers.labels import CLASSES, LABELS, REGIONS
from brats_helpers.log import FAIL, OK, WARN, duration
from brats_helpers.report.review import Review
from brats_helpers.runs import Run
from brats_helpers.scoring.rules import CONVENTIONS
from brats_helpers.scoring.statistics import ENOUGH, interval_text

NOT_APPLICABLE = "not applicable"
MEANINGS = {OK: "held", WARN: "partly", FAIL: "not", NOT_APPLICABLE: "not applicable"}
"""The marks of a line, and how they are read."""
_ALIKE = 0.5  # cosine of trained and pretrained filters; filters that have nothing to do with each other have 0.00
_GAIN = 0.001  # a change of mean Dice that counts
_CLOSE, _FAR = 1.25, 2.0  # how far measured and predicted may be apart, as a factor


@dataclass(frozen=True)
class Line:
    """One line of the validation report; `mark` is a key of `MEANINGS`."""

    heading: str
    check: str
    mark: str
    evidence: str


def validate(run: Run, review: Review) -> list[Line]:
    """Every line of a run's validation, in order of its headings.

    Args:
        run: its folder, in whatever state.
        review: its predictions read again, see `review.review`.
    """
    facts, lines = _Facts(run, review), []
    for heading, check, compute in _CHECKS:
        try:
            mark, evidence = compute(facts)
        except _NotDone as reason:
            mark, evidence = NOT_APPLICABLE, str(reason)
        except KeyError as key:
            mark, evidence = NOT_APPLICABLE, f"the run's files have no entry {key}"
        except Exception as error:  # a file that is broken or says nonsense: its line fails, the others stand
            mark, evidence = FAIL, f"could not be looked at: {type(error).__name__}: {error}"
        lines.append(Line(heading, check, mark, evidence))
    return lines


def tally(lines: list[Line]) -> str:
    """How many lines have which mark."""
    counts = Counter(line.mark for line in lines)
    marks = [f"{mark} {counts[mark]} {meaning}" for mark, meaning in MEANINGS.items() if mark != NOT_APPLICABLE]
    return ", ".join([*marks, f"{counts[NOT_APPLICABLE]} {NOT_APPLICABLE}"])


def write_markdown(path: Path, name: str, lines: list[Line], *, simulated: bool) -> None:
    """Write the lines as `validation.md`: a table under each heading."""
    text = [f"# Validation of run {_literal(name)}{' (simulated patients)' * simulated}", "", f"{tally(lines)}.", ""]
    text += ["Every line was computed from the run's own files; none was written by hand. There is no total score."]
    for heading in dict.fromkeys(line.heading for line in lines):
        text += ["", f"## {heading}", "", "| held? | check | evidence |", "| --- | --- | --- |"]
        own = [line for line in lines if line.heading == heading]
        text += [f"| {line.mark} | {_literal(line.check)} | {_literal(line.evidence)} |" for line in own]
    with whole_file(path) as file:
        file.write("\n".join(text) + "\n")


def _literal(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def predicted_and_measured(manifest: Mapping) -> dict[str, tuple[float, float]]:
    """By name, what the preflight predicted and what was measured, of what is known both ways."""
    preflight = manifest.get("preflight", {})
    predicted, measured = preflight.get("predicted", {}), preflight.get("measured", {})
    return {
        name: (float(value), float(measured[name]))
        for name, value in predicted.items()
        if isinstance(value, int | float) and isinstance(measured.get(name), int | float)
    }


class _NotDone(Exception):
    """The run did not do what a line is about; the message says what lacks."""


class _Facts:
    """The files of a run, each read once, when a line asks for it. What is not there raises `_NotDone`."""

    def __init__(self, run: Run, review: Review):
        self.run, self._review = run, review
        self.manifest = run.manifest

    @cached_property
    def splits(self) -> dict:
        return _read(self.run.splits)

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """The parts that must share nobody: of a cross-validation the test parts of its folds."""
        if self.folds:
            return {f"fold {k}": parts["test"] for k, parts in enumerate(self.splits["folds"])}
        return {name: self.splits[name] for name in ("train", "val", "test")}

    @property
    def tested(self) -> list[str]:
        """Who is to be scored: of a cross-validation everyone."""
        return sum(self.parts.values(), []) if self.folds else self.parts["test"]

    @cached_property
    def folds(self) -> list[Run]:
        return self.run.folds

    @cached_property
    def metrics(self) -> dict:
        return _read(self.run.metrics)

    @cached_property
    def audit(self) -> dict:
        return _read(self.run.audit)

    @property
    def review(self) -> Review:
        if not self._review.cases:
            raise _NotDone(self._review.problem or "no patient is scored")
        return self._review

    @cached_property
    def history(self) -> list[dict[str, float]]:
        if not self.run.history.exists():
            raise _NotDone("no history.csv")
        with open(self.run.history, newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    @cached_property
    def checkpoint(self) -> dict:
        import torch

        if not self.run.best.exists():
            raise _NotDone("no checkpoints/best.pt")
        return torch.load(self.run.best, map_location="cpu", weights_only=True, mmap=True)

    @cached_property
    def stages(self) -> dict[str, dict]:
        """What the manifests say of every finished notebook: by its name, in a fold by the fold's as well."""
        own = {"": self.run} | {f" of fold {fold.folder.name}": fold for fold in self.folds}
        found = {
            f"{stage}{place}": entry
            for place, run in own.items()
            for stage, entry in run.manifest.get("stages", {}).items()
            if entry.get("status") == "finished" and "revision" in entry
        }
        if not found:
            raise _NotDone("manifest.json says of no notebook how it was made")
        return found

    @cached_property
    def unnoted(self) -> list[str]:
        """Executed notebooks of which the manifest does not say how they were made: by hand, or by an older suite."""
        return [stage for stage in self.code if stage not in self.stages]

    def made(self, fact: str) -> dict[str, list[str]]:
        """The finished notebooks by what their entries say under `fact`."""
        stages: dict[str, list[str]] = {}
        for stage, entry in self.stages.items():
            stages.setdefault(entry[fact] or "none", []).append(stage)
        return stages

    @cached_property
    def code(self) -> dict[str, list[dict]]:
        """The code cells of each executed notebook, by stage."""
        return {stage: [c for c in cells if c["cell_type"] == "code"] for stage, cells in self.notebooks.items()}

    @cached_property
    def notebooks(self) -> dict[str, list[dict]]:
        """The cells of each executed notebook, by stage."""
        found = {path.stem: _read(path)["cells"] for path in sorted(self.run.notebooks.glob("*.ipynb"))}
        if not found:
            raise _NotDone("no executed notebook")
        return found

    @cached_property
    def pictures(self) -> dict[str, str | None]:
        """Title by name of every picture that the executed notebooks' code names; None for one that cannot be read."""
        from PIL import Image

        code = "\n".join("".join(cell["source"]) for cells in self.code.values() for cell in cells)
        titles: dict[str, str | None] = {}
        for name in sorted(set(re.findall(r'figures / "([\w.]+\.(?:png|gif))"', code))):
            try:
                with Image.open(self.run.figures / name) as image:
                    image.load()
                    titles[name] = image.info.get("Title") or image.info.get("comment", b"").decode()
            except OSError:
                titles[name] = None
        if not titles:
            raise _NotDone("no executed notebook names a figure")
        return titles


def _read(path: Path) -> dict:
    if not path.exists():
        raise _NotDone(f"no {path.name}")
    return json.loads(path.read_text("utf-8"))


def _mark(held: bool, otherwise: str = FAIL) -> str:
    return OK if held else otherwise


def _but(label: str, names: Iterable) -> str:
    """What to add to the evidence: `; label: a, b, ...`, or nothing where there are no names."""
    names = [str(name) for name in names]
    more = f" and {len(names) - 5} more" * (len(names) > 5)
    return f"; {label}: {', '.join(names[:5])}{more}" if names else ""


_CHECKS: list[tuple[str, str, Callable[[_Facts], tuple[str, str]]]] = []


def _line(heading: str, check: str):
    def register(compute):
        _CHECKS.append((heading, check, compute))
        return compute

    return register


@_line("Data set integration", "Every part of the split has patients")
def _parts(facts):
    sizes = ", ".join(f"{part} {len(ids)}" for part, ids in facts.parts.items())
    return _mark(all(facts.parts.values())), f"splits.json: {sizes}"


@_line("Data set integration", "No patient is in two parts")
def _disjoint(facts):
    if facts.folds:
        tests = Counter(case_id for ids in facts.parts.values() for case_id in ids)
        twice = {case_id for case_id, times in tests.items() if times > 1}
        for parts in facts.splits["folds"]:
            twice |= {case_id for case_id, times in Counter(sum(parts.values(), [])).items() if times > 1}
        evidence = f"splits.json: {len(tests)} patients, each tested by one of {len(facts.parts)} folds and in one part"
        return _mark(not twice), evidence + _but("but not", sorted(twice))
    pairs = list(combinations(facts.parts, 2))
    shared = {f"{a} ∩ {b}": set(facts.parts[a]) & set(facts.parts[b]) for a, b in pairs}
    evidence = "splits.json: " + ", ".join(f"{pair} {len(ids)}" for pair, ids in shared.items())
    return _mark(not any(shared.values())), evidence + _but("shared", sorted(set().union(*shared.values())))


@_line("Data set integration", "Nobody is in two parts under two names")
def _groups(facts):
    homes: dict[str, set[str]] = {}
    known = facts.audit["cases"]
    for part, ids in facts.parts.items():
        for case_id in ids:
            homes.setdefault(known[case_id]["group"] if case_id in known else case_id, set()).add(part)
    spread = sorted(group for group, home in homes.items() if len(home) > 1)
    evidence = f"audit.json: {len(homes)} people, by the content of their scans and the tables"
    return _mark(not spread), evidence + _but("in two parts", spread)


@_line("Data set integration", "The scored network has seen no test patient")
def _unseen(facts):
    if facts.folds:
        raise _NotDone("a cross-validation: see the next line")
    leaked = set(facts.metrics.get("leakage", ()))
    evidence = f"metrics.json: {len(leaked)} that the scored checkpoints name as seen"
    if facts.run.best.exists():
        seen = {*facts.checkpoint["train_cases"], *facts.checkpoint["val_cases"]}
        own = seen & set(facts.parts["test"])
        evidence += f"; best.pt names {len(seen)} it was trained on or chosen by, {len(own)} of them test patients"
        leaked |= own
    return _mark(not leaked), evidence + _but("seen", sorted(leaked))


@_line("Data set integration", "No fold has seen its test patients")
def _out_of_fold(facts):
    import torch

    if not facts.folds:
        raise _NotDone("no cross-validation")
    trained = [fold for fold in facts.folds if fold.best.exists()]
    if not trained:
        raise _NotDone("no fold is trained yet")
    leaked = set(facts.metrics.get("leakage", ())) if facts.run.metrics.exists() else set()
    for fold in trained:
        saved = torch.load(fold.best, map_location="cpu", weights_only=True, mmap=True)
        leaked |= {*saved["train_cases"], *saved["val_cases"]} & {*facts.parts[f"fold {fold.folder.name}"]}
    evidence = f"best.pt of {len(trained)} of {len(facts.parts)} folds, metrics.json: {len(leaked)} leaked"
    return _mark(not leaked), evidence + _but("seen", sorted(leaked))


@_line("Data set integration", "The patients are still those that were split")
def _unchanged(facts):
    if facts._review.problem and not facts._review.unreadable:
        return FAIL if facts._review.changed else WARN, facts._review.problem
    if not facts._review.unreadable:
        _ = facts.review
    return OK, f"each patient's voxels are those of splits.json, fingerprint {facts.splits['fingerprint']}"


@_line("Data set integration", "Label numbers are known ones before, and the same after")
def _labels(facts):
    before, after = sorted(facts.review.reference_labels), sorted(facts.review.predicted_labels)
    numbering = next((numbers for numbers in LABELS.values() if {*before, *after} <= {*numbers}), ())
    evidence = f"on disk, references of the test patients: {before}, predictions: {after}"
    return _mark(bool(numbering), WARN), evidence + "; in between they are classes 1 to 3"


@_line("Data set integration", "The audit has nothing against the patients used")
def _audited(facts):
    known, excluded = facts.audit["cases"], facts.manifest.get("excluded", {})
    used = {*facts.tested, *sum(facts.parts.values(), []), *facts.splits.get("unlabelled", ())}
    unknown = sorted(used - known.keys())
    found = Counter(finding["severity"] for case_id in used & known.keys() for finding in known[case_id]["findings"])
    counts = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for severity, count in sorted(found.items()))
    evidence = f"audit.json: {len(used)} patients used of {len(known)} found, findings: {counts or 'none'}"
    evidence += _but("not in it", unknown) + _but("left out", excluded)
    return FAIL if unknown or found["error"] else _mark(not found["warning"], WARN), evidence


@_line("Data pipeline", "The checks of 00_setup held")
def _setup(facts):
    outputs = [output for cell in facts.code.get("00_setup", ()) for output in cell["outputs"]]
    found = re.search(r"(\d+) of (\d+) checks held", "".join("".join(o.get("text", ())) for o in outputs))
    if not found:
        raise _NotDone("00_setup has not run to its end")
    return _mark(found[1] == found[2]), f"notebooks/00_setup.ipynb printed: {found[0]}"


@_line("Data pipeline", "Training slices were augmented")
def _augmented(facts):
    strength = facts.checkpoint["settings"]["augment"]
    return OK if strength != "none" else NOT_APPLICABLE, f"best.pt, settings: augment {strength}"


@_line("Data pipeline", "Predictions lie in each patient's own geometry")
def _geometry(facts):
    n, off = len(facts.review.cases), facts.review.off_grid
    evidence = f"shape and affine are those of the first modality for {n - len(off)} of {n}"
    return _mark(not off), evidence + _but("not for", off)


@_line("Data pipeline", "Unlabelled patients are predicted and not scored")
def _unlabelled(facts):
    ids = facts.splits["unlabelled"]
    if not ids:
        raise _NotDone("no unlabelled patient")
    predicted = [name for name in ids if (facts.run.predictions / f"{name}_seg.nii.gz").exists()]
    scored = set(ids) & set(facts.metrics["cases"])
    held = len(predicted) == len(ids) and not scored
    return _mark(held), f"{len(predicted)} of {len(ids)} predicted, {len(scored)} scored"


@_line("Model architecture", "Input channels are modalities times slices")
def _inputs(facts):
    from brats_helpers.training.model import EARLIER_SETTINGS

    settings, channels = EARLIER_SETTINGS | facts.checkpoint["settings"], facts.checkpoint["in_channels"]
    modalities, slices = len(settings["modalities"].split(",")), 2 * settings["context_slices"] + 1
    evidence = f"best.pt: {modalities} modalities, {slices} slice{'s' * (slices > 1)} at a time, {channels} channels"
    if settings["shrink"] > 1:
        evidence += f"; slices shrunk to 1/{settings['shrink']} of their width and height"
    return _mark(channels == modalities * slices), evidence


@_line("Model architecture", "The network is the one that is named, with one output for each class")
def _outputs(facts):
    saved, settings = facts.checkpoint, facts.checkpoint["settings"]

    import torch

    from brats_helpers.training.model import build_model

    of = {"encoder": settings["encoder"], "in_channels": saved["in_channels"], "patch_size": settings["patch_size"]}
    with torch.device("meta"):  # shapes alone
        expected = {name: tensor.shape for name, tensor in build_model(weights="none", **of).state_dict().items()}
    found = {name: tensor.shape for name, tensor in saved["model"].items()}
    differ = [name for name in expected | found if expected.get(name) != found.get(name)]
    evidence = f"best.pt: {len(found)} tensors, as {settings['encoder']} with outputs for {', '.join(CLASSES)} has them"
    return _mark(not differ), f"{evidence}, but {', '.join(differ[:3])}" if differ else evidence


@_line("Model architecture", "Every weight is finite")
def _finite(facts):
    weights = facts.checkpoint["model"].values()
    finite = all(bool(tensor.isfinite().all()) for tensor in weights)
    size = sum(tensor.numel() for tensor in weights)
    return _mark(finite), f"best.pt: {facts.checkpoint['settings']['encoder']}, {size:,} weights and statistics"


@_line("Model architecture", "The encoder's weights are ImageNet's")
def _imagenet(facts):
    saved, settings = facts.checkpoint, facts.checkpoint["settings"]
    if settings["encoder_weights"] != "imagenet":
        raise _NotDone(f"training started from encoder_weights {settings['encoder_weights']}")

    import torch

    from brats_helpers.training.model import WeightsError, build_model

    try:
        network = build_model(encoder=settings["encoder"], weights="imagenet", in_channels=saved["in_channels"])
    except WeightsError as error:
        return WARN, f"ImageNet's weights are not to be had here for comparison: {error}"
    reference = network.encoder.state_dict()
    own = {name: saved["model"][f"encoder.{name}"] for name in reference}
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in reference.values()))
    equal = sum(torch.equal(own[name], tensor) for name, tensor in reference.items())
    filters = [torch.cat([t.flatten() for t in state.values() if t.ndim == 4]) for state in (own, reference)]
    cosine = torch.nn.functional.cosine_similarity(*filters, dim=0).item()
    frozen = settings["frozen_epochs"] >= saved["epoch"]
    evidence = (
        f"ImageNet's {settings['encoder']} has the fingerprint {digest.hexdigest()[:16]}; in best.pt {equal} of"
        f" {len(reference)} tensors equal it bit for bit, cosine of the filters {cosine:.3f} (unrelated: 0.00);"
        f" the encoder was {'frozen until then' if frozen else 'trained on from there'}"
    )
    return _mark(equal == len(reference) if frozen else cosine > _ALIKE), evidence


@_line("Training loop", "The training loss is finite and fell")
def _fell(facts):
    losses = [row["train_loss"] for row in facts.history]
    if len(losses) == 1:
        raise _NotDone("one epoch")
    finite = all(math.isfinite(value) for row in facts.history for value in row.values())
    evidence = f"history.csv: {losses[0]:.3f} in epoch 1, {losses[-1]:.3f} in epoch {len(losses)}"
    return _mark(finite and losses[-1] < losses[0]), evidence


def best_epoch(history: list[dict[str, float]]) -> tuple[int, float]:
    """The first epoch with the highest mean validation Dice of the regions, and that Dice."""
    means = [sum(row[f"dice_{region}"] for region in REGIONS) / len(REGIONS) for row in history]
    return means.index(max(means)) + 1, max(means)


@_line("Training loop", "The kept epoch is the best one on validation")
def _kept(facts):
    best, dice = best_epoch(facts.history)
    kept, named = facts.checkpoint["epoch"], facts.manifest["best_epoch"]
    evidence = f"history.csv: epoch {best}, mean Dice {dice:.3f}; best.pt: epoch {kept}; manifest.json: epoch {named}"
    return _mark(best == kept == named), evidence


@_line("Training loop", "It stopped when its rule says")
def _stopped(facts):
    settings, n = facts.checkpoint["settings"], len(facts.history)
    epochs, patience, minutes = (settings[name] for name in ("epochs", "patience", "minutes"))
    (best, _), seconds = best_epoch(facts.history), facts.history[-1]["seconds"]
    reasons = [
        (n == epochs, f"all {n} epochs are done"),
        (patience and n - best == patience, f"{patience} epochs without progress after epoch {best}"),
        (minutes and seconds >= 0.99 * 60 * minutes, f"its time was up, after {duration(seconds)}"),
    ]
    reason = next((text for holds, text in reasons if holds), f"for no reason it had, after epoch {n}")
    limits = f"{epochs} epochs, patience {patience or 'without end'}, {minutes or 'any number of'} minutes"
    return _mark(any(holds for holds, _ in reasons)), f"{reason}; best epoch {best}; limits: {limits}"


@_line("Training loop", "The learning rate came down to its end")
def _came_down(facts):
    rates = [row["lr"] for row in facts.history]
    if len(rates) == 1:
        raise _NotDone("one epoch")
    evidence = f"history.csv, at the ends of epochs: {max(rates):.1e} at most, {rates[-1]:.1e} at last"
    return _mark(rates[-1] < 0.05 * max(rates), WARN), evidence


@_line("Training loop", "Time and memory were as the preflight predicted")
def _predicted(facts):
    compared = predicted_and_measured(facts.manifest)
    if not compared:
        raise _NotDone("manifest.json has no preflight with both")
    # How many epochs it takes is nobody's to know: it may have been enough before.
    counting = {name: pair for name, pair in compared.items() if name not in ("epochs", "seconds")}
    if not counting:
        raise _NotDone("manifest.json's preflight has nothing that an early stop leaves comparable")
    apart = max(max(p, m) / max(min(p, m), 1e-9) for p, m in counting.values())
    evidence = "; ".join(f"{name}: predicted {p:.4g}, measured {m:.4g}" for name, (p, m) in counting.items())
    evidence += f"; held up to a factor of {_CLOSE:g}, partly up to {_FAR:g}"
    return FAIL if apart > _FAR else _mark(apart <= _CLOSE, WARN), evidence


@_line("Evaluation metrics", "Every test patient is scored")
def _scored(facts):
    lacking = [name for name in facts.tested if name not in facts.metrics["cases"]]
    silent = [name for name in lacking if name not in facts.metrics.get("not_scored", {})]
    n = len(facts.tested)
    evidence = f"metrics.json: {n - len(lacking)} of {n}" + _but("lacking", lacking) + _but("without a reason", silent)
    return FAIL if silent else _mark(not lacking, WARN), evidence


@_line("Evaluation metrics", "The rules are known ones, and named beside the figures")
def _named(facts):
    if not facts.run.cases_csv.exists():
        raise _NotDone("no cases.csv")
    with open(facts.run.cases_csv, newline="") as file:
        named = {row["convention"] for row in csv.DictReader(file)}
    line = facts.metrics["convention"]
    name = line.partition(":")[0]
    held = CONVENTIONS.get(name) == line and named == {name}
    return _mark(held), f"metrics.json: {name}; cases.csv: {', '.join(sorted(named)) or 'none'}"


@_line("Evaluation metrics", "Scores repeat from the files as written")
def _repeat(facts):
    review = facts._review
    if not (review.cases or review.unreadable):
        raise _NotDone(review.problem or "no patient is scored")
    evidence = f"{review.recounted} figures of {len(review.cases)} patients counted again"
    evidence += f": off by at most {review.largest_difference:.1g}" * bool(review.recounted)
    held = review.recounted and review.largest_difference < 1e-6 and not review.unreadable
    return _mark(held), evidence + _but("not to be read again", sorted(review.unreadable))


@_line("Evaluation metrics", "Each mean has its interval, from enough patients")
def _intervals(facts):
    n = len(facts.metrics["cases"])
    ends = {region: interval_text(facts.metrics["summary"][region]["dice"]["ci95"], n) for region in REGIONS}
    evidence = ", ".join(f"{region} {end}" for region, end in ends.items())
    few = f", fewer than {ENOUGH}: an indication" * (n < ENOUGH)
    return _mark(n >= ENOUGH, WARN), f"{evidence}, from {n} patient{'s' * (n != 1)}{few}"


@_line("Evaluation metrics", "Post-processing, chosen on validation, gains on test")
def _postprocessed(facts):
    post = facts.metrics["postprocess"]
    if not any(post["rules"].values()):
        raise _NotDone("no rule was chosen")
    if not post["validation"]["n"]:
        return FAIL, "metrics.json: rules without a validation patient who chose them"
    gains = {
        part: {region: post[part]["after"][region] - post[part]["before"][region] for region in REGIONS}
        for part in ("validation", "test")
    }
    changes = "; ".join(
        f"on {post[part]['n']} {part} patients " + ", ".join(f"{region} {gain:+.4f}" for region, gain in each.items())
        for part, each in gains.items()
    )
    rules = ", ".join(f"{name} {value}" for name, value in post["rules"].items())
    up, down = (any(sign * gain >= _GAIN for gain in gains["test"].values()) for sign in (1, -1))
    changes += f" (less than {_GAIN:g} is none)"
    return FAIL if down and not up else _mark(up and not down, WARN), f"{rules}; change of Dice {changes}"


@_line("Evaluation metrics", "The network's doubt points at its errors")
def _doubt(facts):
    auc, easy = (facts.metrics["uncertainty"][name] for name in ("auc_tumour", "auc"))
    if auc is None:
        raise _NotDone("no error to find")
    mark = FAIL if auc < 0.6 else _mark(auc >= 0.8, WARN)
    curve = f"area under the curve of error detection within the tumour {auc:.3f}"
    return mark, f"{curve} (chance: 0.5; partly from 0.6, held from 0.8), in the whole brain, which is easy, {easy:.3f}"


@_line("Visualisation", "Each figure is there")
def _figures(facts):
    lacking = [name for name, title in facts.pictures.items() if title is None]
    evidence = f"{len(facts.pictures) - len(lacking)} of {len(facts.pictures)} that the executed notebooks name"
    return _mark(not lacking), evidence + _but("not to be read", lacking)


@_line("Visualisation", "Figures of simulated patients say so, and no others do")
def _honest(facts):
    simulated = bool(facts.manifest["simulated"])
    titles = {name: title for name, title in facts.pictures.items() if title is not None}
    wrong = [name for name, title in titles.items() if ("simulated" in title) != simulated]
    evidence = f"titles of {len(titles)} figures of {'simulated' if simulated else 'real'} patients"
    return _mark(not wrong), evidence + _but("wrong", wrong)


@_line("Code quality", "Every notebook finished")
def _finished(facts):
    status = {stage: facts.manifest.get("stages", {}).get(stage, {}).get("status") for stage in facts.run.expected}
    if not any(status.values()):
        raise _NotDone("manifest.json has no notebook; those that are run by hand leave no note there")
    never = [stage for stage in status if status[stage] is None]
    broken = [stage for stage in status if status[stage] not in ("finished", None)]
    evidence = f"manifest.json: {len(status) - len(never) - len(broken)} of {len(status)}"
    evidence += _but("not finished", broken) + _but("not run", never)
    return FAIL if broken else _mark(not never, WARN), evidence


@_line("Code quality", "Notebooks ran from top to bottom without an error")
def _in_order(facts):
    order = {stage: [cell["execution_count"] for cell in cells] for stage, cells in facts.code.items()}
    disordered = [stage for stage, counts in order.items() if counts != list(range(1, len(counts) + 1))]
    errors = [
        stage
        for stage, cells in facts.code.items()
        if any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    ]
    evidence = f"{sum(map(len, facts.code.values()))} code cells of {len(facts.code)} notebooks"
    return _mark(not errors and not disordered), evidence + _but("errors in", errors) + _but("not in order", disordered)


@_line("Code quality", "The revision is known and clean")
def _revision(facts):
    made = facts.made("revision")
    evidence = "manifest.json: " + "; ".join(_of(stages, revision, len(made) > 1) for revision, stages in made.items())
    clean = len(made) == 1 and not any("-dirty" in name for name in made) and not facts.unnoted
    return FAIL if "none" in made else _mark(clean, WARN), evidence + _but("not known of", facts.unnoted)


@_line("Code quality", "The tests passed at this revision")
def _tests(facts):
    record = _read(facts.run.folder.parent / "tests.json")
    if [record["revision"]] != list(facts.made("revision")) or facts.unnoted:
        raise _NotDone(f"the tests last ran at {record['revision']}, not every notebook did")
    evidence = "tests.json: " + ", ".join(f"{record[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if not record["passed"] > 0 == record["failed"]:
        return FAIL, evidence
    if "-dirty" in record["revision"]:
        return WARN, f"{evidence}; with changes that no commit has, which may not be those of the run"
    return OK, evidence


@_line("Documentation", "Notebooks say what they need and how long they take")
def _prose(facts):
    texts = {stage: "".join(cells[0]["source"]) for stage, cells in facts.notebooks.items()}
    silent = [stage for stage, text in texts.items() if "**You need**" not in text or "**It takes**" not in text]
    return _mark(not silent), f"{len(texts) - len(silent)} of {len(texts)} executed notebooks" + _but("not", silent)


@_line("Documentation", "Every parameter says what it means")
def _parameters(facts):
    cells = [cell for cells in facts.code.values() for cell in cells]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    declared = re.findall(r"^\w+: \w+ = .*$", "\n".join(tagged), re.MULTILINE)
    if not declared:
        raise _NotDone("no executed notebook declares any")
    explained = [line for line in declared if re.search(r"  # \S", line)]
    return _mark(len(explained) == len(declared)), f"{len(explained)} of {len(declared)} in the executed notebooks"


@_line("Documentation", "The versions of the packages are recorded")
def _versions(facts):
    known: dict[str, set] = {}
    for entry in facts.stages.values():
        for name, version in entry["versions"].items():
            known.setdefault(name, set()).add(version)
    unknown = [name for name, versions in known.items() if None in versions]
    several = [name for name, versions in known.items() if len(versions) > 1]
    evidence = f"manifest.json: {len(known)} by notebook" + _but("without one", unknown)
    evidence += _but("not the same in all", several) + _but("not known of", facts.unnoted)
    return _mark(not unknown and not several and not facts.unnoted, WARN), evidence


@_line("Documentation", "The commands that repeat the run are recorded")
def _command(facts):
    made = facts.made("command")
    commands = "; ".join(_of(stages, command, len(made) > 1) for command, stages in made.items())
    return _mark(not facts.unnoted, WARN), f"manifest.json: {commands}" + _but("not known of", facts.unnoted)


def _of(stages: list[str], what: str, several: bool) -> str:
    """What is true of `stages`; they are named only where other things are true of others."""
    return f"{what} ({', '.join(stages)})" if several else what
