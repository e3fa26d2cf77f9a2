"""Lines about the patients, their split and their files."""

from collections import Counter
from itertools import combinations

from brats_helpers.labels import NUMBERINGS
from brats_helpers.report.validation.facts import Mark, NotDone, RunFacts, but, line, load_checkpoint, mark

INTEGRATION, PIPELINE = "Data set integration", "Data pipeline"


@line("split-not-empty", INTEGRATION, "Every part of the split has patients")
def _not_empty(facts: RunFacts) -> tuple[Mark, str]:
    sizes = ", ".join(f"{part} {len(ids)}" for part, ids in facts.parts.items())
    return mark(all(facts.parts.values())), f"splits.json: {sizes}"


@line("split-disjoint", INTEGRATION, "No patient appears in two parts")
def _disjoint(facts: RunFacts) -> tuple[Mark, str]:
    if facts.folds:
        return _folds_disjoint(facts)
    shared = {(a, b): {*facts.parts[a]} & {*facts.parts[b]} for a, b in combinations(facts.parts, 2)}
    evidence = "splits.json: " + ", ".join(f"{a} ∩ {b} {len(ids)}" for (a, b), ids in shared.items())
    return mark(not any(shared.values())), evidence + but("shared", sorted(set().union(*shared.values())))


def _folds_disjoint(facts: RunFacts) -> tuple[Mark, str]:
    tested = Counter(facts.tested)
    twice = _repeated(facts.tested)
    for parts in facts.splits["folds"]:
        twice |= _repeated(sum(parts.values(), []))
    evidence = f"splits.json: {len(tested)} patients, each tested by one of {len(facts.parts)} folds and in one part"
    return mark(not twice), evidence + but("except", sorted(twice))


def _repeated(ids: list[str]) -> set[str]:
    return {case_id for case_id, times in Counter(ids).items() if times > 1}


@line("split-persons", INTEGRATION, "No person appears in two parts under different names")
def _persons(facts: RunFacts) -> tuple[Mark, str]:
    audited = facts.audit["cases"]
    parts_of: dict[str, set[str]] = {}
    for part, ids in facts.parts.items():
        for case_id in ids:
            person = audited[case_id]["group"] if case_id in audited else case_id
            parts_of.setdefault(person, set()).add(part)
    spread = sorted(person for person, parts in parts_of.items() if len(parts) > 1)
    evidence = f"audit.json: {len(parts_of)} persons, by the content of their scans, their names and the tables"
    return mark(not spread), evidence + but("in two parts", spread)


@line("network-unseen", INTEGRATION, "The scored network has seen no test patient")
def _unseen(facts: RunFacts) -> tuple[Mark, str]:
    if facts.folds:
        raise NotDone("a cross-validation: see folds-unseen")
    leaked = {*facts.metrics.get("leakage", ())}
    evidence = f"metrics.json: {len(leaked)} patients that the scored checkpoints had seen"
    if facts.run.best.exists():
        seen = {*facts.checkpoint["train_cases"], *facts.checkpoint["val_cases"]}
        own = seen & {*facts.parts["test"]}
        evidence += f"; best.pt lists {len(seen)} training and validation patients, {len(own)} of them test patients"
        leaked |= own
        if not leaked and (file := facts.checkpoint.get("facts", {}).get("unrecorded")):
            return Mark.PARTLY, f"{evidence}; which patients the initial weights, {file}, have seen is not recorded"
    return mark(not leaked), evidence + but("seen", sorted(leaked))


@line("folds-unseen", INTEGRATION, "No fold has seen its own test patients")
def _folds_unseen(facts: RunFacts) -> tuple[Mark, str]:
    if not facts.folds:
        raise NotDone("no cross-validation")
    trained = [fold for fold in facts.folds if fold.best.exists()]
    if not trained:
        raise NotDone("no fold is trained yet")
    leaked = {*facts.metrics.get("leakage", ())} if facts.run.metrics.exists() else set()
    for fold in trained:
        saved = load_checkpoint(fold)
        leaked |= {*saved["train_cases"], *saved["val_cases"]} & {*facts.parts[f"fold {fold.folder.name}"]}
    evidence = f"best.pt of {len(trained)} of {len(facts.parts)} folds, metrics.json: {len(leaked)} leaked"
    return mark(not leaked), evidence + but("seen", sorted(leaked))


@line("patients-unchanged", INTEGRATION, "The patients are still the ones that were split")
def _unchanged(facts: RunFacts) -> tuple[Mark, str]:
    reviewed = facts.reviewed
    if reviewed.problem and not reviewed.unreadable:
        return Mark.FAILED if reviewed.changed else Mark.PARTLY, reviewed.problem
    if not reviewed.unreadable:
        _ = facts.review
    return Mark.HELD, f"every patient's voxels match splits.json, fingerprint {facts.splits['fingerprint']}"


@line("label-numbers", INTEGRATION, "References and predictions use known label numbers")
def _labels(facts: RunFacts) -> tuple[Mark, str]:
    references, predictions = sorted(facts.review.reference_labels), sorted(facts.review.predicted_labels)
    known = any({*references, *predictions} <= table.numbers for table in NUMBERINGS.values())
    evidence = f"on disk, references of the test patients: {references}, predictions: {predictions}"
    return mark(known, Mark.PARTLY), f"{evidence}; the network uses classes 1 to 3"


@line("audit-clean", INTEGRATION, "The audit found no fault with the patients used")
def _audited(facts: RunFacts) -> tuple[Mark, str]:
    audited = facts.audit["cases"]
    used = {*facts.tested, *sum(facts.parts.values(), []), *facts.splits.get("unlabelled", ())}
    unknown = sorted(used - audited.keys())
    severities = Counter()
    for case_id in used & audited.keys():
        severities.update(finding["severity"] for finding in audited[case_id]["findings"])
    counts = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for severity, count in sorted(severities.items()))
    evidence = f"audit.json: {len(used)} patients used of {len(audited)} examined, findings: {counts or 'none'}"
    evidence += but("not audited", unknown) + but("left out", facts.manifest.get("excluded", {}))
    if unknown or severities["error"]:
        return Mark.FAILED, evidence
    return mark(not severities["warning"], Mark.PARTLY), evidence


@line("setup-checks", PIPELINE, "The checks of 00_setup held")
def _setup(facts: RunFacts) -> tuple[Mark, str]:
    checks = facts.checks["00_setup"]
    failed = [check for check, outcome in checks.items() if not outcome["held"]]
    return mark(not failed), f"checks.json: {len(checks) - len(failed)} of {len(checks)}" + but("failed", failed)


@line("augmentation", PIPELINE, "Training slices were augmented")
def _augmented(facts: RunFacts) -> tuple[Mark, str]:
    strength = facts.checkpoint["settings"]["augment"]
    return Mark.HELD if strength != "none" else Mark.NOT_APPLICABLE, f"best.pt, settings: augment {strength}"


@line("prediction-geometry", PIPELINE, "Predictions lie in each patient's own geometry")
def _geometry(facts: RunFacts) -> tuple[Mark, str]:
    n, off = len(facts.review.cases), facts.review.off_grid
    evidence = f"{n - len(off)} of {n} have the shape and affine of the patient's first modality"
    return mark(not off), evidence + but("others", off)


@line("unlabelled-predicted", PIPELINE, "Unlabelled patients are predicted and not scored")
def _unlabelled(facts: RunFacts) -> tuple[Mark, str]:
    ids = facts.splits["unlabelled"]
    if not ids:
        raise NotDone("no unlabelled patient")
    predicted = [case_id for case_id in ids if (facts.run.predictions / f"{case_id}_seg.nii.gz").exists()]
    scored = {*ids} & {*facts.metrics["cases"]}
    held = len(predicted) == len(ids) and not scored
    return mark(held), f"{len(predicted)} of {len(ids)} predicted, {len(scored)} scored"
