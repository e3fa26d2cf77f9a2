"""The validation report: each line on a run where it holds, and on one that was spoilt on purpose."""

import json
import shutil

import numpy as np
import pytest
import torch

from brats_helpers.report.review import review
from brats_helpers.report.validation import Line, Mark, tally, validate, write_markdown
from brats_helpers.runs import FIGURE_REGISTER, NEEDS, Run
from brats_helpers.training.model import PACKAGED_ENCODER, build_model
from tests.conftest import write_tiny_case
from tests.tiny_run import HOSTILE, PARTS, png, write_tiny_folds, write_tiny_run

HEADINGS = [
    "Data set integration", "Data pipeline", "Model architecture", "Training loop", "Evaluation metrics",
    "Visualisation", "Code quality", "Documentation",
]  # fmt: skip


def look(run):
    metrics = json.loads(run.metrics.read_text()) if run.metrics.exists() else {}
    return validate(run, review(run, metrics))


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


def test_every_line_of_a_finished_run_holds_except_for_few_patients_and_skipped_steps(whole):
    lines = look(whole)
    assert list(dict.fromkeys(line.heading for line in lines.values())) == HEADINGS
    assert [check for check, line in lines.items() if line.mark in (Mark.PARTLY, Mark.FAILED)] == ["intervals"]
    assert {check for check, line in lines.items() if line.mark == Mark.NOT_APPLICABLE} == {
        "split-persons",
        "folds-unseen",
        "audit-clean",
        "preflight",
        "postprocessing",
        "uncertainty",
    }


def test_an_empty_run_holds_nothing_and_raises_nothing(tmp_path):
    lines = look(Run(tmp_path / "new"))
    assert all(line.mark == Mark.NOT_APPLICABLE for line in lines.values())


def test_a_patient_in_two_parts_fails_the_split(run):
    rewrite(run.splits, val=["Val_0", HOSTILE])
    line = look(run)["split-disjoint"]
    assert line.mark == Mark.FAILED
    assert line.evidence == f"splits.json: train ∩ val 0, train ∩ test 0, val ∩ test 1; shared: {HOSTILE}"


def test_a_network_that_saw_a_test_patient(run):
    saved = torch.load(run.best, weights_only=True)
    torch.save(saved | {"train_cases": ["Train_0", "NoET_0"]}, run.best)
    line = look(run)["network-unseen"]
    assert line.mark == Mark.FAILED and line.evidence.endswith("1 of them test patients; seen: NoET_0")
    torch.save(saved | {"facts": {"unrecorded": "checkpoint_final.pth"}}, run.best)
    line = look(run)["network-unseen"]
    assert line.mark == Mark.PARTLY
    assert line.evidence.endswith("which patients the initial weights, checkpoint_final.pth, have seen is not recorded")
    run.best.unlink()  # scored by others' checkpoints alone
    assert look(run)["network-unseen"].mark == Mark.HELD
    rewrite(run.metrics, leakage=["Exact_0"])
    line = look(run)["network-unseen"]
    assert line.mark == Mark.FAILED and line.evidence.endswith("checkpoints had seen; seen: Exact_0")


def test_a_broken_file_fails_its_lines_and_no_others(run):
    run.best.write_bytes(run.best.read_bytes()[:5000])
    (run.notebooks / "01_explore.ipynb").write_text('{"cells": [')
    lines = look(run)
    assert lines["weights-finite"].mark == lines["notebooks-in-order"].mark == Mark.FAILED
    assert lines["notebooks-in-order"].evidence.startswith("could not be checked: ValueError")
    assert lines["test-scored"].mark == Mark.HELD


def test_folds_that_know_their_test_patients(tmp_path):
    run = write_tiny_folds(tmp_path)
    lines = look(run)
    assert lines["folds-unseen"].mark == Mark.HELD
    evidence = "splits.json: 3 patients, each tested by one of 2 folds and in one part"
    assert lines["split-disjoint"].evidence == evidence
    assert lines["test-scored"].evidence == "metrics.json: 3 of 3"
    assert lines["notebooks-finished"].mark == Mark.HELD
    best = run.folds[1].best
    torch.save(torch.load(best, weights_only=True) | {"val_cases": ["NoET_0"]}, best)
    lines = look(run)
    assert lines["folds-unseen"].mark == Mark.FAILED
    assert lines["folds-unseen"].evidence.endswith("seen: NoET_0")
    run.folds[0].best.unlink()
    rewrite(run.metrics, leakage=["Exact_0", "NoET_0"])
    line = look(run)["folds-unseen"]
    evidence = "best.pt of 1 of 2 folds, metrics.json: 2 leaked; seen: Exact_0, NoET_0"
    assert line.evidence == evidence
    run.metrics.unlink()  # folds still run
    assert look(run)["folds-unseen"].mark == Mark.FAILED
    run.record(expected=[*NEEDS])
    assert look(run)["notebooks-finished"].evidence == "manifest.json: 4 of 5; not run: 04_advanced"


@pytest.mark.parametrize("part", ["val", "test"])
def test_folds_that_share_patients(tmp_path, part):
    run = write_tiny_folds(tmp_path)
    for own, splits in ((run, "folds"), (run.folds[0], None)):
        content = json.loads(own.splits.read_text())
        (content[splits][0] if splits else content)[part].append("NoET_0" if part == "test" else "Train_0")
        own.splits.write_text(json.dumps(content))
    line = look(run)["split-disjoint"]
    assert line.mark == Mark.FAILED and line.evidence.endswith("except: " + ("NoET_0" if part == "test" else "Train_0"))


def test_people_under_two_names_and_findings_of_the_audit(run):
    ids = [case_id for part in PARTS.values() for case_id in part] + ["Unlabelled_0"]
    cases = {case_id: {"group": case_id, "findings": []} for case_id in ids}
    audit = run.folder / "audit.json"
    audit.write_text(json.dumps({"cases": cases}))
    assert look(run)["split-persons"].mark == Mark.HELD
    assert look(run)["audit-clean"].mark == Mark.HELD
    cases["Val_0"] = {"group": "Train_0", "findings": [{"severity": "warning"}]}
    cases["Left_0"] = {"group": "Left_0", "findings": [{"severity": "error"}]}
    audit.write_text(json.dumps({"cases": cases}))
    run.record(excluded={"Left_0": ["flat"]})
    lines = look(run)
    assert lines["split-persons"].mark == Mark.FAILED
    line = lines["audit-clean"]
    assert line.mark == Mark.PARTLY
    evidence = "audit.json: 6 patients used of 7 examined, findings: 1 warning; left out: Left_0"
    assert line.evidence == evidence
    cases["Val_0"]["findings"] = []
    cases["Unread_0"] = {"group": "Unread_0", "findings": [{"severity": "warning"}]}  # found, never opened
    audit.write_text(json.dumps({"cases": cases}))
    assert look(run)["audit-clean"].mark == Mark.HELD
    del cases["Exact_0"]
    audit.write_text(json.dumps({"cases": cases}))
    line = look(run)["audit-clean"]
    assert line.mark == Mark.FAILED and "not audited: Exact_0" in line.evidence


def test_patients_that_changed(run, tmp_path):
    shutil.copytree(run.manifest["data"], tmp_path / "data")
    write_tiny_case(tmp_path / "data", "New_0", seed=8)
    run.record(data=str(tmp_path / "data"))
    line = look(run)["patients-unchanged"]
    assert line.mark == Mark.FAILED and "New_0 is new" in line.evidence


def test_a_missing_prediction(run):
    (run.predictions / "Exact_0_seg.nii.gz").unlink()
    line = look(run)["scores-repeat"]
    assert line.mark == Mark.FAILED
    assert (
        line.evidence == "120 scores of 2 patients computed again: they differ by at most 0; could not be read: Exact_0"
    )


def test_parts_without_patients_and_unlabelled_ones_that_are_scored(run):
    rewrite(run.splits, train=[], unlabelled=["Exact_0", "New_0"])
    lines = look(run)
    assert lines["split-not-empty"].mark == Mark.FAILED
    line = lines["unlabelled-predicted"]
    assert (line.mark, line.evidence) == (Mark.FAILED, "1 of 2 predicted, 1 scored")


def test_checks_of_the_set_up_that_did_not_hold_and_no_augmentation(run):
    run.record_checks("00_setup", {"the crop maps back": (False, "P_1"), "disjoint": (True, "")})
    saved = torch.load(run.best, weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | {"augment": "none"}}, run.best)
    lines = look(run)
    assert lines["setup-checks"].mark == Mark.FAILED
    assert lines["setup-checks"].evidence == "checks.json: 1 of 2; failed: the crop maps back"
    assert lines["augmentation"].mark == Mark.NOT_APPLICABLE


def test_predictions_in_other_numbers_or_off_the_grid(run):
    facts = review(run, json.loads(run.metrics.read_text()))
    facts.predicted_labels, facts.off_grid = {1, 3, 5}, ["Exact_0"]
    lines = validate(run, facts)
    assert lines["label-numbers"].mark == Mark.PARTLY
    line = lines["prediction-geometry"]
    assert line.mark == Mark.FAILED and line.evidence.endswith("first modality; others: Exact_0")


def test_a_rule_that_is_not_the_named_one(run):
    check = "rules-named"
    rewrite(run.metrics, convention="brats2020: of our own")
    assert look(run)[check].mark == Mark.FAILED
    run.cases_csv.write_text("case,convention\nExact_0,brats2023\n")
    line = look(run)[check]
    assert line.mark == Mark.FAILED and line.evidence == "metrics.json: brats2020; cases.csv: brats2023"


def test_enough_patients(run):
    metrics = json.loads(run.metrics.read_text())
    scores = next(iter(metrics["cases"].values()))
    rewrite(run.metrics, cases={f"P_{k}": scores for k in range(10)})
    assert look(run)["intervals"].mark == Mark.HELD


def test_missing_patients(run, tmp_path):
    run.record(data=str(tmp_path / "nowhere"))
    lines = look(run)
    assert lines["patients-unchanged"].mark == Mark.PARTLY
    for check in ("scores-repeat", "prediction-geometry"):
        assert lines[check].mark == Mark.NOT_APPLICABLE and "nowhere" in lines[check].evidence


def test_weights_that_are_not_imagenets(run):
    saved = torch.load(run.best, weights_only=True)
    encoder = [name for name in saved["model"] if name.startswith("encoder.") and saved["model"][name].ndim == 4]
    generator = torch.Generator().manual_seed(0)

    def mark(change, **settings):
        model = {k: change(v) if k in encoder else v for k, v in saved["model"].items()}
        torch.save(saved | {"model": model, "settings": saved["settings"] | settings}, run.best)
        return look(run)["weights-imagenet"].mark

    def noisy(tensor):
        return tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    assert mark(noisy) == Mark.FAILED  # frozen until the kept epoch, and yet not equal
    assert mark(noisy, frozen_epochs=1) == Mark.HELD  # trained on, and still alike
    assert mark(lambda t: torch.randn(t.shape, generator=generator), frozen_epochs=0) == Mark.FAILED
    assert mark(noisy, encoder_weights="none") == Mark.NOT_APPLICABLE
    assert mark(noisy, encoder="resnet18") == Mark.PARTLY  # its weights would have to be fetched
    saved["model"] = {f"network.{name}": weight for name, weight in saved["model"].items()}
    encoder = [f"network.{name}" for name in encoder]
    volumes = {"encoder": f"acs-{PACKAGED_ENCODER}", "patch_size": 64, "frozen_epochs": 1}
    assert mark(noisy, **volumes) == Mark.HELD
    assert mark(lambda t: torch.randn(t.shape, generator=generator), **volumes) == Mark.FAILED


def test_a_weight_that_is_not_finite_and_channels_that_do_not_fit(run):
    saved = torch.load(run.best, weights_only=True)
    saved["model"]["segmentation_head.0.bias"][1] = np.nan
    torch.save(saved | {"settings": saved["settings"] | {"context_slices": 1}}, run.best)
    lines = look(run)
    assert lines["weights-finite"].mark == Mark.FAILED
    assert lines["input-channels"].mark == Mark.FAILED


@pytest.mark.parametrize(
    "encoder, patch_size", [(PACKAGED_ENCODER, 0), ("monai-unet", 32), (f"acs-{PACKAGED_ENCODER}", 64)]
)
def test_a_network_that_does_not_match_its_settings(run, encoder, patch_size):
    saved = torch.load(run.best, weights_only=True)
    model = build_model(encoder=encoder, weights="none", in_channels=2, patch_size=patch_size).state_dict()
    saved["settings"] |= {"encoder": encoder, "patch_size": patch_size}
    check = "network-shape"
    torch.save(saved | {"model": model}, run.best)
    assert look(run)[check].mark == Mark.HELD
    last = [*model][-1]
    torch.save(saved | {"model": model | {last: model[last][:3]}}, run.best)
    line = look(run)[check]
    assert line.mark == Mark.FAILED and last in line.evidence
    assert model[last].shape[0] == 4


@pytest.mark.parametrize(
    "settings, mark",
    [
        ({"epochs": 3, "patience": 5, "minutes": 0.0}, Mark.HELD),  # all done
        ({"epochs": 9, "patience": 1, "minutes": 0.0}, Mark.HELD),  # epoch 2 was the best, epoch 3 the last
        ({"epochs": 9, "patience": 0, "minutes": 1.0}, Mark.HELD),  # 60 s were up
        ({"epochs": 9, "patience": 2, "minutes": 2.0}, Mark.FAILED),
        ({"epochs": 9, "patience": 0, "minutes": 0.0}, Mark.FAILED),
    ],
)
def test_the_stopping_rule_line(run, settings, mark):
    saved = torch.load(run.best, weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | settings}, run.best)
    assert look(run)["training-stopped"].mark == mark


def test_the_best_epoch_line(run):
    run.record(best_epoch=3)
    line = look(run)["best-epoch"]
    assert line.mark == Mark.FAILED
    assert line.evidence == "history.csv: epoch 2, mean Dice 0.800; best.pt: epoch 2; manifest.json: epoch 3"


def test_a_loss_that_rose_and_a_learning_rate_that_stayed(run):
    rows = run.history.read_text().splitlines()
    run.history.write_text("\n".join([rows[0], rows[2], rows[1]]) + "\n")  # 0.6, then 1.0; the rate doubles
    lines = look(run)
    assert lines["loss-fell"].mark == Mark.FAILED
    assert lines["learning-rate"].mark == Mark.PARTLY


@pytest.mark.parametrize("measured, mark", [(125, Mark.HELD), (80, Mark.HELD), (130, Mark.PARTLY), (201, Mark.FAILED)])
def test_the_preflight_line(run, measured, mark):
    """That it stopped early is no fault of it."""
    predicted, found = {"epochs": 20, "seconds_per_epoch": 100}, {"epochs": 8, "seconds_per_epoch": measured}
    run.record(preflight={"predicted": predicted | {"steps": 5}, "measured": found})
    line = look(run)["preflight"]
    assert line.mark == mark and line.evidence.startswith(
        f"seconds_per_epoch: predicted 100, measured {measured}; held"
    )
    run.record(preflight={"predicted": {"epochs": 20}, "measured": {"epochs": 8}})
    assert look(run)["preflight"].mark == Mark.NOT_APPLICABLE


def test_scores_that_lack_or_do_not_repeat(run):
    metrics = json.loads(run.metrics.read_text())
    metrics["cases"]["NoET_0"]["WT"]["volume_ml"] += 0.001
    del metrics["cases"]["Exact_0"]
    run.metrics.write_text(json.dumps(metrics))
    lines = look(run)
    assert lines["scores-repeat"].mark == Mark.FAILED
    assert lines["test-scored"].mark == Mark.FAILED
    assert "without a reason: Exact_0" in lines["test-scored"].evidence
    rewrite(run.metrics, not_scored={"Exact_0": "misaligned"})
    assert look(run)["test-scored"].mark == Mark.PARTLY


@pytest.mark.parametrize(
    "gain, wt, mark",
    [(0.01, 0, Mark.HELD), (0, 0, Mark.PARTLY), (0.01, -0.005, Mark.PARTLY), (-0.01, 0, Mark.FAILED)],
)
def test_a_loss_by_post_processing_is_reported(run, gain, wt, mark):
    dice = {"WT": 0.9, "TC": 0.8, "ET": 0.7}
    changed = {"n": 3, "before": dice, "after": dice | {"WT": 0.9 + wt, "ET": 0.7 + gain}}
    post = {"rules": {"et_voxels": 30}, "validation": changed, "test": changed}
    rewrite(run.metrics, postprocess=post)
    line = look(run)["postprocessing"]
    assert line.mark == mark and f"on 3 test patients WT {wt:+.4f}, TC +0.0000, ET {gain:+.4f}" in line.evidence
    rewrite(run.metrics, postprocess=post | {"validation": changed | {"n": 0}})
    assert look(run)["postprocessing"].mark == Mark.FAILED
    rewrite(run.metrics, postprocess=post | {"rules": {"et_voxels": 0}})
    assert look(run)["postprocessing"].mark == Mark.NOT_APPLICABLE


@pytest.mark.parametrize(
    "auc, mark", [(0.8, Mark.HELD), (0.7, Mark.PARTLY), (0.55, Mark.FAILED), (None, Mark.NOT_APPLICABLE)]
)
def test_the_uncertainty_line(run, auc, mark):
    rewrite(run.metrics, uncertainty={"auc_tumour": auc, "auc": 0.97})
    assert look(run)["uncertainty"].mark == mark


def test_figures_that_lack_or_hide_that_patients_are_simulated(run):
    (run.figures / "02_curves.png").unlink()
    (run.figures / "03_scores.png").write_bytes(png("Scores"))
    (run.figures / "03_overlays.png").write_bytes(b"no picture")
    (run.figures / "03_rule.png").write_bytes(png("What one voxel costs · a drawn slice, no patient"))
    rewrite(run.figures / FIGURE_REGISTER, **{"03_rule.png": "What one voxel costs"})
    lines = look(run)
    assert lines["figures-present"].mark == Mark.FAILED
    assert lines["figures-present"].evidence.endswith("missing or unreadable: 02_curves.png, 03_overlays.png")
    assert lines["figures-honest"].evidence.endswith("wrong: 03_scores.png")


def test_notebooks_that_failed_or_ran_out_of_order(run):
    path = run.notebooks / "02_train.ipynb"
    content = path.read_text().replace('"execution_count": 2', '"execution_count": 7')
    path.write_text(content)
    run.record(stages=run.manifest["stages"] | {"02_train": {"status": "failed"}})
    lines = look(run)
    for check in ("notebooks-in-order", "notebooks-finished"):
        assert lines[check].mark == Mark.FAILED and "02_train" in lines[check].evidence


def test_revisions_commands_and_versions_of_the_run(run):
    assert look(run)["revision-clean"].mark == Mark.HELD
    stages = run.manifest["stages"]
    stages["03_evaluate"] |= {"revision": "4567def", "command": "./run_all.sh --only 03", "versions": {"torch": "2.5"}}
    run.record(stages=stages)
    lines = look(run)
    line = lines["revision-clean"]
    assert line.mark == Mark.PARTLY and line.evidence.endswith("04_advanced); 4567def (03_evaluate)")
    assert lines["commands-recorded"].evidence.endswith("04_advanced); ./run_all.sh --only 03 (03_evaluate)")
    line = lines["versions-recorded"]
    assert (
        line.mark == Mark.PARTLY and line.evidence == "manifest.json: 1 packages; not the same in all notebooks: torch"
    )
    run.record(stages={stage: entry | {"revision": "4567def-dirty"} for stage, entry in stages.items()})
    assert look(run)["revision-clean"].mark == Mark.PARTLY
    run.record(stages={stage: entry | {"revision": None} for stage, entry in stages.items()})
    assert look(run)["revision-clean"].mark == Mark.FAILED
    del stages["02_train"]  # run by hand
    run.record(stages=stages)
    lines = look(run)
    for check in ("commands-recorded", "revision-clean", "versions-recorded"):
        assert lines[check].mark == Mark.PARTLY and lines[check].evidence.endswith("unknown for: 02_train")


def test_markdown_shows_the_lines_as_text(tmp_path):
    lines = [
        Line("one", "Data pipeline", "A | b", Mark.HELD, f"{HOSTILE} `x` [a](b) *c*\nnext"),
        Line("two", "Training loop", "C", Mark.FAILED, "d"),
    ]
    lines = {line.id: line for line in lines}
    write_markdown(tmp_path / "v.md", "r<b>", lines, simulated=True)
    text = (tmp_path / "v.md").read_text("utf-8")
    assert text.startswith("# Checks of run r&lt;b&gt; (simulated patients)\n\n✅ 1 held, ⚠️ 0 partly, ❌ 1 failed")
    assert "| ✅ | A \\| b | &lt;img src=x onerror=alert(1)&gt; \\`x\\` \\[a\\](b) \\*c\\* next |" in text
    assert text.index("## Data pipeline") < text.index("## Training loop")


def test_the_tally_gives_no_total():
    marks = (Mark.HELD, Mark.HELD, Mark.PARTLY, Mark.NOT_APPLICABLE)
    lines = {str(k): Line(str(k), "", "", mark, "") for k, mark in enumerate(marks)}
    assert tally(lines) == "✅ 2 held, ⚠️ 1 partly, ❌ 0 failed, 1 not applicable"
