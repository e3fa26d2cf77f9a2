"""The validation report: each line on a run where it holds, and on one that was spoilt on purpose."""

import json
import shutil

import numpy as np
import pytest
import torch

from brats_helpers import log
from brats_helpers.report.review import review
from brats_helpers.report.validation import NOT_APPLICABLE, Line, tally, validate, write_markdown
from brats_helpers.runs import NEEDS, Run
from brats_helpers.training.model import PACKAGED_ENCODER, build_model
from tests.tiny_run import HOSTILE, PARTS, png, write_tiny_folds, write_tiny_run

HEADINGS = [
    "Data set integration", "Data pipeline", "Model architecture", "Training loop", "Evaluation metrics",
    "Visualisation", "Code quality", "Documentation",
]  # fmt: skip


def look(run):
    metrics = json.loads(run.metrics.read_text()) if run.metrics.exists() else {}
    return {line.check: line for line in validate(run, review(run, metrics))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the finished run to spoil; its patients lie where they were."""
    shutil.copytree(whole.folder, tmp_path / "runs" / "tiny")
    return Run(tmp_path / "runs" / "tiny")


def rewrite(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_finished_run_holds_but_for_its_few_patients_and_what_it_did_not_do(whole):
    lines = look(whole)
    assert list(dict.fromkeys(line.heading for line in lines.values())) == HEADINGS
    assert [check for check, line in lines.items() if line.mark in (log.WARN, log.FAIL)] == [
        "Each mean has its interval, from enough patients"
    ]
    assert {check for check, line in lines.items() if line.mark == NOT_APPLICABLE} == {
        "Nobody is in two parts under two names",
        "No fold has seen its test patients",
        "The audit has nothing against the patients used",
        "Time and memory were as the preflight predicted",
        "Post-processing, chosen on validation, gains on test",
        "The network's doubt points at its errors",
        "The tests passed at this revision",
    }


def test_an_empty_run_holds_nothing_and_raises_nothing(tmp_path):
    lines = look(Run(tmp_path / "new"))
    assert all(line.mark == NOT_APPLICABLE for line in lines.values())


def test_a_patient_in_two_parts(run):
    rewrite(run.splits, val=["Val_0", HOSTILE])
    line = look(run)["No patient is in two parts"]
    assert line.mark == log.FAIL
    assert line.evidence == f"splits.json: train ∩ val 0, train ∩ test 0, val ∩ test 1; shared: {HOSTILE}"


def test_a_network_that_saw_a_test_patient(run):
    saved = torch.load(run.best, weights_only=True)
    torch.save(saved | {"train_cases": ["Train_0", "NoET_0"]}, run.best)
    line = look(run)["The scored network has seen no test patient"]
    assert line.mark == log.FAIL and line.evidence.endswith("1 of them test patients; seen: NoET_0")
    run.best.unlink()  # scored by others' checkpoints alone
    assert look(run)["The scored network has seen no test patient"].mark == log.OK
    rewrite(run.metrics, leakage=["Exact_0"])
    line = look(run)["The scored network has seen no test patient"]
    assert line.mark == log.FAIL and line.evidence.endswith("that the scored checkpoints name as seen; seen: Exact_0")


def test_a_broken_file_fails_its_lines_and_no_others(run):
    run.best.write_bytes(run.best.read_bytes()[:5000])
    (run.notebooks / "01_explore.ipynb").write_text('{"cells": [')
    lines = look(run)
    assert lines["Every weight is finite"].mark == lines["Each figure is there"].mark == log.FAIL
    assert lines["Each figure is there"].evidence.startswith("could not be looked at: JSONDecodeError")
    assert lines["Every test patient is scored"].mark == log.OK


def test_folds_that_know_their_test_patients(tmp_path):
    run = write_tiny_folds(tmp_path)
    lines = look(run)
    assert lines["No fold has seen its test patients"].mark == log.OK
    evidence = "splits.json: 3 patients, each tested by one of 2 folds and in one part"
    assert lines["No patient is in two parts"].evidence == evidence
    assert lines["Every test patient is scored"].evidence == "metrics.json: 3 of 3"
    assert lines["Every notebook finished"].mark == log.OK
    best = run.folds[1].best
    torch.save(torch.load(best, weights_only=True) | {"val_cases": ["NoET_0"]}, best)
    lines = look(run)
    assert lines["No fold has seen its test patients"].mark == log.FAIL
    assert lines["No fold has seen its test patients"].evidence.endswith("seen: NoET_0")
    run.folds[0].best.unlink()
    rewrite(run.metrics, leakage=["Exact_0", "NoET_0"])
    line = look(run)["No fold has seen its test patients"]
    evidence = "best.pt of 1 of 2 folds, metrics.json: 2 leaked; seen: Exact_0, NoET_0"
    assert line.evidence == evidence
    run.metrics.unlink()  # folds still run
    assert look(run)["No fold has seen its test patients"].mark == log.FAIL
    run.record(expected=[*NEEDS])
    assert look(run)["Every notebook finished"].evidence == "manifest.json: 4 of 5; not run: 04_advanced"


@pytest.mark.parametrize("part", ["val", "test"])
def test_folds_that_share_patients(tmp_path, part):
    run = write_tiny_folds(tmp_path)
    for own, splits in ((run, "folds"), (run.folds[0], None)):
        content = json.loads(own.splits.read_text())
        (content[splits][0] if splits else content)[part].append("NoET_0" if part == "test" else "Train_0")
        own.splits.write_text(json.dumps(content))
    line = look(run)["No patient is in two parts"]
    assert line.mark == log.FAIL and line.evidence.endswith("but not: " + ("NoET_0" if part == "test" else "Train_0"))


def test_people_under_two_names_and_findings_of_the_audit(run):
    ids = [case_id for part in PARTS.values() for case_id in part] + ["Unlabelled_0"]
    cases = {case_id: {"group": case_id, "findings": []} for case_id in ids}
    audit = run.folder / "audit.json"
    audit.write_text(json.dumps({"cases": cases}))
    assert look(run)["Nobody is in two parts under two names"].mark == log.OK
    assert look(run)["The audit has nothing against the patients used"].mark == log.OK
    cases["Val_0"] = {"group": "Train_0", "findings": [{"severity": "warning"}]}
    cases["Left_0"] = {"group": "Left_0", "findings": [{"severity": "error"}]}
    audit.write_text(json.dumps({"cases": cases}))
    run.record(excluded={"Left_0": ["flat"]})
    lines = look(run)
    assert lines["Nobody is in two parts under two names"].mark == log.FAIL
    line = lines["The audit has nothing against the patients used"]
    assert line.mark == log.WARN
    evidence = "audit.json: 6 patients used of 7 found, findings: 1 warning; left out: Left_0"
    assert line.evidence == evidence
    cases["Val_0"]["findings"] = []
    cases["Unread_0"] = {"group": "Unread_0", "findings": [{"severity": "warning"}]}  # found, never opened
    audit.write_text(json.dumps({"cases": cases}))
    assert look(run)["The audit has nothing against the patients used"].mark == log.OK
    del cases["Exact_0"]
    audit.write_text(json.dumps({"cases": cases}))
    line = look(run)["The audit has nothing against the patients used"]
    assert line.mark == log.FAIL and "not in it: Exact_0" in line.evidence


def test_patients_that_changed(run, tmp_path):
    shutil.copytree(run.manifest["data"], tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "Val_0")
    run.record(data=str(tmp_path / "data"))
    line = look(run)["The patients are still those that were split"]
    assert line.mark == log.FAIL and "Val_0 is gone" in line.evidence


def test_a_prediction_that_is_gone(run):
    (run.predictions / "Exact_0_seg.nii.gz").unlink()
    line = look(run)["Scores repeat from the files as written"]
    assert line.mark == log.FAIL
    assert line.evidence == "70 figures of 2 patients counted again: off by at most 0; not to be read again: Exact_0"


def test_parts_without_patients_and_unlabelled_ones_that_are_scored(run):
    rewrite(run.splits, train=[], unlabelled=["Exact_0", "New_0"])
    lines = look(run)
    assert lines["Every part of the split has patients"].mark == log.FAIL
    line = lines["Unlabelled patients are predicted and not scored"]
    assert (line.mark, line.evidence) == (log.FAIL, "1 of 2 predicted, 1 scored")


def test_checks_of_the_set_up_that_did_not_hold_and_no_augmentation(run):
    path = run.notebooks / "00_setup.ipynb"
    path.write_text(path.read_text().replace("7 of 7 checks held", "6 of 7 checks held"))
    saved = torch.load(run.best, weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | {"augment": "none"}}, run.best)
    lines = look(run)
    assert lines["The checks of 00_setup held"].mark == log.FAIL
    assert lines["Training slices were augmented"].mark == NOT_APPLICABLE


def test_predictions_in_other_numbers_or_off_the_grid(run):
    facts = review(run, json.loads(run.metrics.read_text()))
    facts.predicted_labels, facts.off_grid = {1, 3, 4}, ["Exact_0"]
    lines = {line.check: line for line in validate(run, facts)}
    assert lines["Label numbers are known ones before, and the same after"].mark == log.WARN
    line = lines["Predictions lie in each patient's own geometry"]
    assert line.mark == log.FAIL and line.evidence.endswith("for 2 of 3; not for: Exact_0")


def test_rules_that_are_not_those_named(run):
    check = "The rules are known ones, and named beside the figures"
    rewrite(run.metrics, convention="brats2020: of our own")
    assert look(run)[check].mark == log.FAIL
    run.cases_csv.write_text("case,convention\nExact_0,brats2023\n")
    line = look(run)[check]
    assert line.mark == log.FAIL and line.evidence == "metrics.json: brats2020; cases.csv: brats2023"


def test_enough_patients(run):
    metrics = json.loads(run.metrics.read_text())
    scores = next(iter(metrics["cases"].values()))
    rewrite(run.metrics, cases={f"P_{k}": scores for k in range(10)})
    assert look(run)["Each mean has its interval, from enough patients"].mark == log.OK


def test_patients_that_are_gone(run, tmp_path):
    run.record(data=str(tmp_path / "nowhere"))
    lines = look(run)
    assert lines["The patients are still those that were split"].mark == log.WARN
    for check in ("Scores repeat from the files as written", "Predictions lie in each patient's own geometry"):
        assert lines[check].mark == NOT_APPLICABLE and "nowhere" in lines[check].evidence


def test_weights_that_are_not_imagenets(run):
    saved = torch.load(run.best, weights_only=True)
    encoder = [name for name in saved["model"] if name.startswith("encoder.") and saved["model"][name].ndim == 4]
    generator = torch.Generator().manual_seed(0)

    def mark(change, **settings):
        model = {k: change(v) if k in encoder else v for k, v in saved["model"].items()}
        torch.save(saved | {"model": model, "settings": saved["settings"] | settings}, run.best)
        return look(run)["The encoder's weights are ImageNet's"].mark

    def noisy(tensor):
        return tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    assert mark(noisy) == log.FAIL  # frozen until the kept epoch, and yet not equal
    assert mark(noisy, frozen_epochs=1) == log.OK  # trained on, and still alike
    assert mark(lambda t: torch.randn(t.shape, generator=generator), frozen_epochs=0) == log.FAIL
    assert mark(noisy, encoder_weights="none") == NOT_APPLICABLE
    assert mark(noisy, encoder="resnet18") == log.WARN  # its weights would have to be fetched


def test_a_weight_that_is_not_finite_and_channels_that_do_not_fit(run):
    saved = torch.load(run.best, weights_only=True)
    saved["model"]["segmentation_head.0.bias"][1] = np.nan
    torch.save(saved | {"settings": saved["settings"] | {"context_slices": 1, "shrink": 2}}, run.best)
    lines = look(run)
    assert "shrunk to 1/2" in lines["Input channels are modalities times slices"].evidence
    assert lines["Every weight is finite"].mark == log.FAIL
    assert lines["Input channels are modalities times slices"].mark == log.FAIL


@pytest.mark.parametrize("encoder, patch_size", [(PACKAGED_ENCODER, 0), ("monai-unet", 32)])
def test_a_network_that_is_another_than_its_settings_say(run, encoder, patch_size):
    saved = torch.load(run.best, weights_only=True)
    model = build_model(encoder=encoder, weights="none", in_channels=2, patch_size=patch_size).state_dict()
    saved["settings"] |= {"encoder": encoder, "patch_size": patch_size}
    check = "The network is the one that is named, with one output for each class"
    torch.save(saved | {"model": model}, run.best)
    assert look(run)[check].mark == log.OK
    last = [*model][-1]
    torch.save(saved | {"model": model | {last: model[last][:3]}}, run.best)
    line = look(run)[check]
    assert line.mark == log.FAIL and last in line.evidence
    assert model[last].shape[0] == 4


@pytest.mark.parametrize(
    "settings, mark",
    [
        ({"epochs": 3, "patience": 5, "minutes": 0.0}, log.OK),  # all done
        ({"epochs": 9, "patience": 1, "minutes": 0.0}, log.OK),  # epoch 2 was the best, epoch 3 the last
        ({"epochs": 9, "patience": 0, "minutes": 1.0}, log.OK),  # 60 s were up
        ({"epochs": 9, "patience": 2, "minutes": 2.0}, log.FAIL),
        ({"epochs": 9, "patience": 0, "minutes": 0.0}, log.FAIL),
    ],
)
def test_the_stopping_rule(run, settings, mark):
    saved = torch.load(run.best, weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | settings}, run.best)
    assert look(run)["It stopped when its rule says"].mark == mark


def test_the_kept_epoch(run):
    run.record(best_epoch=3)
    line = look(run)["The kept epoch is the best one on validation"]
    assert line.mark == log.FAIL
    assert line.evidence == "history.csv: epoch 2, mean Dice 0.800; best.pt: epoch 2; manifest.json: epoch 3"


def test_a_loss_that_rose_and_a_learning_rate_that_stayed(run):
    rows = run.history.read_text().splitlines()
    run.history.write_text("\n".join([rows[0], rows[2], rows[1]]) + "\n")  # 0.6, then 1.0; the rate doubles
    lines = look(run)
    assert lines["The training loss is finite and fell"].mark == log.FAIL
    assert lines["The learning rate came down to its end"].mark == log.WARN


@pytest.mark.parametrize("measured, mark", [(125, log.OK), (80, log.OK), (130, log.WARN), (201, log.FAIL)])
def test_the_preflight(run, measured, mark):
    """That it stopped early is no fault of it."""
    predicted, found = {"epochs": 20, "seconds_per_epoch": 100}, {"epochs": 8, "seconds_per_epoch": measured}
    run.record(preflight={"predicted": predicted | {"steps": 5}, "measured": found})
    line = look(run)["Time and memory were as the preflight predicted"]
    assert line.mark == mark and line.evidence.startswith(
        f"seconds_per_epoch: predicted 100, measured {measured}; held"
    )
    run.record(preflight={"predicted": {"epochs": 20}, "measured": {"epochs": 8}})
    assert look(run)["Time and memory were as the preflight predicted"].mark == NOT_APPLICABLE


def test_scores_that_lack_or_do_not_repeat(run):
    metrics = json.loads(run.metrics.read_text())
    metrics["cases"]["NoET_0"]["WT"]["volume_ml"] += 0.001
    del metrics["cases"]["Exact_0"]
    run.metrics.write_text(json.dumps(metrics))
    lines = look(run)
    assert lines["Scores repeat from the files as written"].mark == log.FAIL
    assert lines["Every test patient is scored"].mark == log.FAIL
    assert "without a reason: Exact_0" in lines["Every test patient is scored"].evidence
    rewrite(run.metrics, not_scored={"Exact_0": "misaligned"})
    assert look(run)["Every test patient is scored"].mark == log.WARN


@pytest.mark.parametrize(
    "gain, wt, mark",
    [(0.01, 0, log.OK), (0, 0, log.WARN), (0.01, -0.005, log.WARN), (-0.01, 0, log.FAIL)],
)
def test_a_loss_by_post_processing_is_told(run, gain, wt, mark):
    dice = {"WT": 0.9, "TC": 0.8, "ET": 0.7}
    changed = {"n": 3, "before": dice, "after": dice | {"WT": 0.9 + wt, "ET": 0.7 + gain}}
    post = {"rules": {"et_voxels": 30}, "validation": changed, "test": changed}
    rewrite(run.metrics, postprocess=post)
    line = look(run)["Post-processing, chosen on validation, gains on test"]
    assert line.mark == mark and f"on 3 test patients WT {wt:+.4f}, TC +0.0000, ET {gain:+.4f}" in line.evidence
    rewrite(run.metrics, postprocess=post | {"validation": changed | {"n": 0}})
    assert look(run)["Post-processing, chosen on validation, gains on test"].mark == log.FAIL
    rewrite(run.metrics, postprocess=post | {"rules": {"et_voxels": 0}})
    assert look(run)["Post-processing, chosen on validation, gains on test"].mark == NOT_APPLICABLE


@pytest.mark.parametrize("auc, mark", [(0.8, log.OK), (0.7, log.WARN), (0.55, log.FAIL), (None, NOT_APPLICABLE)])
def test_doubt(run, auc, mark):
    rewrite(run.metrics, uncertainty={"auc_tumour": auc, "auc": 0.97})
    assert look(run)["The network's doubt points at its errors"].mark == mark


def test_figures_that_lack_or_hide_that_patients_are_simulated(run):
    (run.figures / "02_curves.png").unlink()
    (run.figures / "03_scores.png").write_bytes(png("Scores"))
    (run.figures / "03_overlays.png").write_bytes(b"no picture")
    lines = look(run)
    assert lines["Each figure is there"].mark == log.FAIL
    assert lines["Each figure is there"].evidence.endswith("not to be read: 02_curves.png, 03_overlays.png")
    assert lines["Figures of simulated patients say so, and no others do"].evidence.endswith("wrong: 03_scores.png")


def test_notebooks_that_failed_or_ran_out_of_order(run):
    path = run.notebooks / "02_train.ipynb"
    content = path.read_text().replace('"execution_count": 2', '"execution_count": 7').replace("  # passes", "")
    path.write_text(content.replace("**It takes**", "It takes"))
    run.record(stages=run.manifest["stages"] | {"02_train": {"status": "failed"}})
    lines = look(run)
    for check in ("Notebooks ran from top to bottom without an error", "Every notebook finished"):
        assert lines[check].mark == log.FAIL and "02_train" in lines[check].evidence
    assert lines["Every parameter says what it means"].evidence == "4 of 5 in the executed notebooks"
    assert lines["Notebooks say what they need and how long they take"].mark == log.FAIL


def test_the_revision_and_its_tests(run):
    record = run.folder.parent / "tests.json"
    record.write_text(json.dumps({"revision": "0123abc", "passed": 9, "failed": 0, "skipped": 1}))
    line = look(run)["The tests passed at this revision"]
    assert (line.mark, line.evidence) == (log.OK, "tests.json: 9 passed, 0 failed, 1 skipped")
    stages = run.manifest["stages"]
    dirty = {stage: entry | {"revision": "0123abc-dirty"} for stage, entry in stages.items()}
    run.record(stages=dirty)
    rewrite(record, revision="0123abc-dirty")
    line = look(run)["The tests passed at this revision"]
    assert line.mark == log.WARN and "changes that no commit has" in line.evidence
    run.record(stages=stages)
    rewrite(record, revision="0123abc")
    record.write_text(json.dumps({"revision": "0123abc", "passed": 9, "failed": 1, "skipped": 1}))
    assert look(run)["The tests passed at this revision"].mark == log.FAIL
    assert look(run)["The revision is known and clean"].mark == log.OK
    stages = run.manifest["stages"]
    stages["03_evaluate"] |= {"revision": "4567def", "command": "./run_all.sh --only 03", "versions": {"torch": "2.5"}}
    run.record(stages=stages)
    lines = look(run)
    assert (
        lines["The tests passed at this revision"].evidence == "the tests last ran at 0123abc, not every notebook did"
    )
    line = lines["The revision is known and clean"]
    assert line.mark == log.WARN and line.evidence.endswith("04_advanced); 4567def (03_evaluate)")
    assert lines["The commands that repeat the run are recorded"].evidence.endswith(
        "04_advanced); ./run_all.sh --only 03 (03_evaluate)"
    )
    line = lines["The versions of the packages are recorded"]
    assert line.mark == log.WARN and line.evidence == "manifest.json: 1 by notebook; not the same in all: torch"
    run.record(stages={stage: entry | {"revision": "4567def-dirty"} for stage, entry in stages.items()})
    assert look(run)["The revision is known and clean"].mark == log.WARN
    run.record(stages={stage: entry | {"revision": None} for stage, entry in stages.items()})
    assert look(run)["The revision is known and clean"].mark == log.FAIL
    del stages["02_train"]  # run by hand
    run.record(stages=stages)
    lines = look(run)
    for check in (
        "The commands that repeat the run are recorded",
        "The revision is known and clean",
        "The versions of the packages are recorded",
    ):
        assert lines[check].mark == log.WARN and lines[check].evidence.endswith("not known of: 02_train")
    assert lines["The tests passed at this revision"].mark == NOT_APPLICABLE


def test_markdown_shows_the_lines_as_text(tmp_path):
    lines = [Line("Heading", "A | b", log.OK, f"{HOSTILE} `x` [a](b) *c*\nnext"), Line("Other", "C", log.FAIL, "d")]
    write_markdown(tmp_path / "v.md", "r<b>", lines, simulated=True)
    text = (tmp_path / "v.md").read_text("utf-8")
    assert text.startswith("# Validation of run r&lt;b&gt; (simulated patients)\n\n✅ 1 held, ⚠️ 0 partly, ❌ 1 not")
    assert "| ✅ | A \\| b | &lt;img src=x onerror=alert(1)&gt; \\`x\\` \\[a\\](b) \\*c\\* next |" in text
    assert text.index("## Heading") < text.index("## Other")


def test_the_tally_gives_no_total():
    lines = [Line("", "", mark, "") for mark in (log.OK, log.OK, log.WARN, NOT_APPLICABLE)]
    assert tally(lines) == "✅ 2 held, ⚠️ 1 partly, ❌ 0 not, 1 not applicable"
