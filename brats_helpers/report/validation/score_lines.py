"""Lines about the scores."""

import csv

from brats_helpers.labels import REGIONS
from brats_helpers.report.validation.facts import Mark, NotDone, RunFacts, but, line, mark
from brats_helpers.scoring.rules import CONVENTIONS
from brats_helpers.scoring.statistics import ENOUGH, interval_text

METRICS = "Evaluation metrics"
_GAIN = 0.001  # the smallest change of mean Dice that counts


@line("test-scored", METRICS, "Every test patient is scored")
def _scored(facts: RunFacts) -> tuple[Mark, str]:
    missing = [case_id for case_id in facts.tested if case_id not in facts.metrics["cases"]]
    unexplained = [case_id for case_id in missing if case_id not in facts.metrics.get("not_scored", {})]
    n = len(facts.tested)
    evidence = f"metrics.json: {n - len(missing)} of {n}" + but("missing", missing)
    evidence += but("without a reason", unexplained)
    return Mark.FAILED if unexplained else mark(not missing, Mark.PARTLY), evidence


@line("rules-named", METRICS, "The scoring rules are known and shown beside the scores")
def _named(facts: RunFacts) -> tuple[Mark, str]:
    if not facts.run.cases_csv.exists():
        raise NotDone("no cases.csv")
    with open(facts.run.cases_csv, newline="", encoding="utf-8") as file:
        named = {row["convention"] for row in csv.DictReader(file)}
    sentence = facts.metrics["convention"]
    name = sentence.partition(":")[0]
    held = CONVENTIONS.get(name) == sentence and named == {name}
    return mark(held), f"metrics.json: {name}; cases.csv: {', '.join(sorted(named)) or 'none'}"


@line("scores-repeat", METRICS, "Scoring the written files again gives the same scores")
def _repeat(facts: RunFacts) -> tuple[Mark, str]:
    review = facts.reviewed
    if not (review.cases or review.unreadable):
        raise NotDone(review.problem or "no patient is scored")
    evidence = f"{review.recounted} scores of {len(review.cases)} patients computed again"
    if review.recounted:
        evidence += f": they differ by at most {review.largest_difference:.1g}"
    held = review.recounted and review.largest_difference < 1e-6 and not review.unreadable
    return mark(bool(held)), evidence + but("could not be read", sorted(review.unreadable))


@line("intervals", METRICS, "Each mean has an interval from enough patients")
def _intervals(facts: RunFacts) -> tuple[Mark, str]:
    n, summary = len(facts.metrics["cases"]), facts.metrics["summary"]
    intervals = [f"{region} {interval_text(summary[region]['dice']['ci95'], n)}" for region in REGIONS]
    evidence = f"{', '.join(intervals)}, from {n} patient{'s' * (n != 1)}"
    if n < ENOUGH:
        return Mark.PARTLY, f"{evidence}; fewer than {ENOUGH} give only an indication"
    return Mark.HELD, evidence


@line("postprocessing", METRICS, "Post-processing chosen on validation also gains on test")
def _postprocessed(facts: RunFacts) -> tuple[Mark, str]:
    post = facts.metrics["postprocess"]
    if not any(post["rules"].values()):
        raise NotDone("no rule was chosen")
    if not post["validation"]["n"]:
        return Mark.FAILED, "metrics.json: rules that no validation patient chose"
    changes, on_test = [], {}
    for part in ("validation", "test"):
        gains = {region: post[part]["after"][region] - post[part]["before"][region] for region in REGIONS}
        listed = ", ".join(f"{region} {gain:+.4f}" for region, gain in gains.items())
        changes.append(f"on {post[part]['n']} {part} patients {listed}")
        on_test = gains
    rules = ", ".join(f"{name} {value}" for name, value in post["rules"].items())
    evidence = f"{rules}; change of Dice {'; '.join(changes)} (less than {_GAIN:g} counts as none)"
    gained = any(gain >= _GAIN for gain in on_test.values())
    lost = any(gain <= -_GAIN for gain in on_test.values())
    return Mark.FAILED if lost and not gained else mark(gained and not lost, Mark.PARTLY), evidence


@line("uncertainty", METRICS, "The network's uncertainty indicates its errors")
def _uncertainty(facts: RunFacts) -> tuple[Mark, str]:
    auc, brain = (facts.metrics["uncertainty"][name] for name in ("auc_tumour", "auc"))
    if auc is None:
        raise NotDone("the predictions have no error")
    evidence = (
        f"area under the ROC curve of error detection: {auc:.3f} within the tumour (chance 0.5, partly from 0.6, held"
        f" from 0.8), {brain:.3f} in the whole brain, which is easier"
    )
    return Mark.FAILED if auc < 0.6 else mark(auc >= 0.8, Mark.PARTLY), evidence
