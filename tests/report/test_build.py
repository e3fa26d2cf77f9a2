"""The report: what it says, what it refuses to load, and that it stands on whatever a run has so far."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import nbformat
import numpy as np
import pytest
from PIL import Image

from brats_helpers.__main__ import main
from brats_helpers.report import build as report
from brats_helpers.report.build import build_report, fresh_report
from brats_helpers.report.notebooks import notebook_body
from brats_helpers.runs import NEEDS, Run
from tests.tiny_run import HOSTILE, png, write_tiny_folds, write_tiny_run


class Page(HTMLParser):
    """What a browser would load from a page, and the text that it would show."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.text, self.handlers, self.rows, self.cell = [], [], "", [], [], False
        self.scripts, self.places = [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "srcset", "srcdoc", "poster", "data") if name in attributes]
        self.places += [attributes["id"]] if "id" in attributes else []
        if tag == "link":
            self.loads.append(attributes["href"])
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.cell = True
        if tag == "script":
            self.scripts.append("")
        self.handlers += [name for name in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.lasttag = ""
        if tag in ("th", "td"):
            self.cell = False

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[-1] += data
        elif self.lasttag != "style":
            self.text += data
            if self.cell:
                self.rows[-1][-1] += " ".join(data.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_tiny_run(tmp_path_factory.mktemp("report"))
    build_report(run)
    return run


@pytest.fixture(scope="module")
def pages(run):
    return {path.stem: Page(path) for path in run.report.parent.glob("*.html")}


@pytest.fixture
def bare(tmp_path):
    """A run without patients' files: fast to report on."""
    run = Run(tmp_path / "runs" / "bare")
    run.record(stages={stage: {"status": "finished", "seconds": 61.0} for stage in NEEDS if stage != "04_advanced"})
    wt = {"mean": 0.8512, "median": 0.9, "std": 0.05, "q1": 0.8, "q3": 0.95, "ci95": [0.7, 0.91], "n": 2}

    mm = {"mean": 188.1, "median": 3.0, "std": 261.7, "q1": 2.0, "q3": 373.13, "ci95": [1.0, 373.13], "n": 2}

    def case(wt, et, hd95):
        return {"WT": {"dice": wt, "hd95_mm": hd95}, "TC": {"dice": 0.7, "hd95_mm": 2.0}, "ET": {"dice": et}}

    metrics = {
        "convention": "brats2020: the rule; the details",
        "simulated": False,
        "cases": {"A_1": case(0.9, 0.8, 3.04), "B_1": case(0.8, None, 373.13)},
        "summary": {"WT": {"dice": wt, "hd95_mm": mm}, "ET": {"dice": {"mean": 0.8}}},
        "not_scored": {"C_1": "unlabelled"},
    }
    run.metrics.write_text(json.dumps(metrics))
    return run


def rewrite(run, **entries):
    run.metrics.write_text(json.dumps(json.loads(run.metrics.read_text()) | entries))
    return Page(build_report(run))


def test_nothing_is_loaded_from_elsewhere_and_every_image_is_there(run, pages):
    assert set(pages) == {"index", "validation", *NEEDS}
    for page in pages.values():
        for source in page.loads:
            kind, _, content = source.partition(";base64,")
            assert kind in ("data:image/png", "data:image/gif")
            Image.open(io.BytesIO(base64.b64decode(content, validate=True))).load()
    assert len(pages["index"].loads) == 7  # five figures, an animation, and the volumes that the report draws
    assert len(pages["01_explore"].loads) == 2
    for path in run.report.parent.glob("*.html"):
        assert not re.search(r"https?://|@import|url\(", path.read_text("utf-8"))


def test_the_one_script_is_the_one_that_the_policy_names(run, pages):
    source = run.report.read_text("utf-8")
    data, script = pages["index"].scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\">" in source
    assert json.loads(data)["regions"][0]["name"] == "WT"
    for name, page in pages.items():
        assert page.handlers == []
        if name != "index":
            assert page.scripts == [] and "script-src" not in (run.report.parent / f"{name}.html").read_text("utf-8")


def test_links_lead_somewhere(run, pages):
    from urllib.parse import unquote

    links = pages["index"].links
    assert {"01_explore.html", "validation.html", "../predictions/NoET_0_seg.nii.gz"} <= set(links)
    assert "../figures/01_view%201.html" in pages["01_explore"].links
    for page in pages.values():
        for link in page.links:
            if link.startswith("#"):
                assert link[1:] in page.places
            else:
                assert (run.report.parent / unquote(link)).exists(), link
    assert all("index.html" in pages[stage].links for stage in (*NEEDS, "validation"))


def test_names_from_the_data_are_text(run, pages):
    for path in run.report.parent.glob("*.html"):
        assert "<img src=x" not in path.read_text("utf-8") and "alert(1)>" not in path.read_text("utf-8")
    page = pages["index"]
    assert any(row[0] == HOSTILE for row in page.rows)
    assert ["Unlabelled_0", f"unlabelled {HOSTILE}"] in page.rows
    assert ["place", HOSTILE] in page.rows
    assert f"tiny patients of {HOSTILE}." in page.text
    assert HOSTILE in [patient["id"] for patient in json.loads(page.scripts[0])["patients"]]
    assert f"case {HOSTILE}" in pages["01_explore"].text


def test_intervals_of_too_few_patients_are_not_shown(bare):
    page = Page(build_report(bare))
    assert "test patients: WT 0.851, TC –, ET 0.800. With so few" in " ".join(page.text.split())
    assert ["WT", "0.851", "–", "0.900", "0.800 to 0.950", "0.050", "2"] in page.rows


def test_the_verdict_comes_first_with_its_intervals(bare, monkeypatch):
    monkeypatch.setattr(report, "FEWEST", 2)
    page = Page(build_report(bare))
    text = " ".join(page.text.split())
    verdict = "Mean Dice over 2 test patients: WT 0.851 (95 % interval 0.700 to 0.910), TC –, ET 0.800."
    verdict += " With so few patients this is only an indication."
    assert f"Run bare {verdict} Scored by brats2020: the rule." in text
    assert "The rule in full" in text and "the details." in text
    assert ["WT", "0.851", "0.700 to 0.910", "0.900", "0.800 to 0.950", "0.050", "2"] in page.rows
    assert ["WT", "188.1", "1.0 to 373.1", "3.0", "2.0 to 373.1", "261.7", "2"] in page.rows
    assert ["ET", "0.800", "–", "–", "– to –", "–", "–"] in page.rows
    assert ["HD95", "95th percentile of the distances between their surfaces in mm; lower is better"] in page.rows
    assert [row[0] for row in page.rows if row[0] in ("A_1", "B_1")] == ["B_1", "A_1"]  # 1.5 and 2.4 in sum
    assert ["A_1", "0.900", "0.700", "0.800", "3.0", "2.0", "–", "–", ""] in page.rows
    assert ["02_train", "finished", "1 min 01 s"] in page.rows


def test_failures_conventions_and_validation_are_told(pages):
    rows = pages["index"].rows
    assert ["missed enhancing tumour", "NoET_0", "ET", "0.000"] in [row[:4] for row in rows]
    text = " ".join(pages["index"].text.split())
    assert "Failures: 1 of 3 patients." in text and "1 of 3 test patients; one row per failed region" in text
    stopped = "all 3 epochs are done; best epoch 2; limits: 3 epochs, patience 2, any number of minutes"
    assert f"Best epoch 2 of 3: mean validation Dice of WT, TC and ET 0.800. Training stopped: {stopped}." in text
    assert any(row[0].startswith("brats2023: mean over patients") and len(row) == 4 for row in rows)
    checks = pages["validation"].rows
    shared = "splits.json: train ∩ val 0, train ∩ test 0, val ∩ test 0"
    assert ["✅ held", "No patient appears in two parts", shared] in checks
    headings = ["Data set integration", "Data pipeline", "Model architecture", "Training loop", "Evaluation metrics"]
    places = [pages["validation"].text.index(name) for name in [*headings, "Visualisation", "Code quality"]]
    assert places == sorted(places)


def test_the_viewer_gets_the_worst_the_median_and_the_best_patient(pages):
    patients = json.loads(pages["index"].scripts[0])["patients"]
    assert [(patient["rank"], patient["id"]) for patient in patients] == [
        ("Worst", "NoET_0"), ("Median", HOSTILE), ("Best", "Exact_0"),
    ]  # fmt: skip
    for patient in patients:
        assert set(patient["images"]) == {"flair", "t1ce"} and patient["modality"] == "t1ce"
        assert all(uri.startswith("data:image/webp;base64,") for uri in patient["images"].values())


def test_what_other_stages_leave_is_shown_where_it_is_there(bare):
    plain = Page(build_report(bare))
    for word in ("Audit", "Uncertainty", "post-processing", "measured over predicted", "Left out"):
        assert word not in plain.text
    finding = {"code": "nan", "severity": "warning", "file": "A_1_t1.nii", "message": f"12 voxels of {HOSTILE}"}
    report = {"cases": {"A_1": {"findings": [finding]}, "B_1": {"findings": []}}, "summary": {"read": 1}}
    (bare.folder / "audit.json").write_text(json.dumps(report))
    bare.record(excluded={"D_1": ["flat"]}, preflight={"predicted": {"seconds": 100}, "measured": {"seconds": 150.0}})
    dice = {"WT": 0.9, "TC": 0.8, "ET": 0.7}
    post = {"rules": {"et_voxels": 30}, "test": {"n": 2, "before": dice, "after": dice | {"ET": 0.65}}}
    bare.answers.write_text(json.dumps({"04_start.png": ["frozen against fine-tuned: better."]}))
    curves = {"WT": {"ece": 0.0213}, "ET": {"ece": None}}
    uncertainty = {"auc": 0.9312, "auc_tumour": 0.75, "calibration": curves}
    page = rewrite(bare, postprocess=post, uncertainty=uncertainty, leakage=["A_1"])
    assert ["A_1", "warning", "nan", "A_1_t1.nii", f"12 voxels of {HOSTILE}"] in page.rows
    assert ["D_1", "flat"] in page.rows and ["seconds", "100", "150", "1.50"] in page.rows
    assert ["test", "2", "0.900", "+0.0000", "0.800", "+0.0000", "0.700", "-0.0500"] in page.rows
    assert "frozen against fine-tuned: better." in page.text
    text = " ".join(page.text.split())
    assert "1 finding in 2 patients; the files of 1 were read" in text
    assert "an area under the ROC curve of 0.931 in the brain" in text and "tumour it is 0.750" in text
    assert "Expected calibration error (0 is perfect): WT 0.021, ET –." in text
    page = rewrite(bare, uncertainty={"auc": None, "auc_tumour": None})
    assert "so uncertainty cannot be judged" in " ".join(page.text.split())
    assert "These scores are not valid: the network was trained on, or selected by, A_1" in page.text


def test_stages_that_lack_are_named(bare):
    bare.record(stages={"01_explore": {"status": "failed"}, "02_train": {"status": "finished"}})
    text = Page(build_report(bare)).text
    assert "04_advanced has not run yet: run ./run_all.sh --run bare --only 04" in text
    assert "01_explore is not finished (failed)" in text
    assert "02_train has not run" not in text and "02_train is not finished" not in text


def test_scores_of_an_earlier_network_are_marked(run):
    said = "03_evaluate is out of date: this section shows results of an earlier network"
    rewrite(run, networks=run.identify([run.best]))
    assert said not in Page(build_report(run)).text
    run.best.write_bytes(b"trained again")
    stages = {"04_advanced": {"status": "outdated"}}
    run.record(stages=run.manifest["stages"] | stages)
    text = Page(build_report(run)).text
    assert said in text and "04_advanced is out of date" in text


def test_notebooks_run_by_hand_have_run(run):
    run.record(stages={})
    text = Page(build_report(run)).text
    assert "has not run yet" not in text.replace(
        "04_advanced has not run yet: run its notebook to fill this section", ""
    )


def test_a_cross_validation_shows_its_folds_with_their_own_reports(tmp_path):
    run = write_tiny_folds(tmp_path)
    page = Page(build_report(run))
    folds = [row for row in page.rows if row[0].startswith("fold ")]
    by_id = json.loads(run.metrics.read_text())["cases"]
    exact = [f"{by_id['Exact_0'][region]['dice']:.3f}" for region in ("WT", "TC", "ET")]
    assert folds[0] == ["fold 0", "1", "1", "1", "2", "0.800", *exact, "2 min 02 s"] and len(folds) == 2
    for k in range(2):
        link = f"../folds/{k}/report/index.html"
        assert link in page.links and (run.report.parent / link).exists()
    assert len([row for row in page.rows if row[0] in by_id and len(row) == 9]) == 3  # every patient of either fold
    drawn = {path.name for path in run.figures.glob("0[23]*")}
    assert drawn == {"02_folds.png", "03_volumes.png", "03_scores.png", "03_patients.png", "03_overlays.png"}
    assert "04_advanced does not belong to this run" in page.text and "--only 04" not in page.text
    assert "over 3 simulated patients, each scored by the fold that tested it" in " ".join(page.text.split())
    assert ["tested by fold 1", "2", f"{HOSTILE}, NoET_0"] in page.rows
    own = Page(run.folds[1].report)
    assert "Run tiny, fold 1" in own.text and "../../../report/index.html" in own.links
    assert (
        "00_setup does not belong to this run" not in own.text and "01_explore does not belong to this run" in own.text
    )


def test_a_cross_validation_that_goes_on_shows_what_there_is(tmp_path):
    run = write_tiny_folds(tmp_path)
    done, again = run.folds
    again.metrics.unlink()
    again.forget("02_train")
    again.record(best_epoch=12, stages={"02_train": {"status": "running"}})  # of its last training
    lines = again.history.read_text().splitlines(keepends=True)
    again.history.write_text("".join(lines[:2]))
    page = Page(build_report(run))
    assert ["fold 1", "1", "1", "2", "1", "0.500", "–", "–", "–", "–"] in page.rows
    assert "03_evaluate has not run yet: run ./run_all.sh --run tiny to fill this section" in Page(again.report).text
    parts = json.loads(run.splits.read_text())
    parts["folds"][1]["test"] = ["Train_0"]
    run.splits.write_text(json.dumps(parts))  # 00_setup again, with other parts: the old fold is none of this run
    assert [fold.name for fold in run.folds] == ["tiny, fold 0"] == [done.name]
    assert not any(row[0] == "fold 1" for row in Page(build_report(run)).rows)


def test_reports_of_folds_are_written_again_where_they_are_older_and_one_that_fails_is_no_link(tmp_path, monkeypatch):
    run = write_tiny_folds(tmp_path)
    built = []

    def noting(own, **how):
        built.append(own.name)
        if own.folder.name == "1" and len(built) > 3:
            raise OSError("a disk that is full")
        return build(own, **how)

    build = report.build_report
    monkeypatch.setattr(report, "build_report", noting)
    fresh_report(run)
    assert built == ["tiny", "tiny, fold 0", "tiny, fold 1"]
    fresh_report(run)
    assert len(built) == 3
    run.folds[1].record(seed=1)
    run.record(seed=0)
    fresh_report(run)
    assert built[3:] == ["tiny", "tiny, fold 1"]
    page = Page(run.report)
    assert "../folds/0/report/index.html" in page.links and "../folds/1/report/index.html" not in page.links


def test_a_sweep_shows_its_ranking_and_has_no_scores_of_its_own(bare):
    bare.metrics.unlink()
    (bare.folder / "sweep.csv").write_text("combination,validation Dice\nlr=0.1;flips=true,0.25\ngone,0.2\n")
    Run(bare.folder / "sweep" / "lr=0.1;flips=true").record(stages={})
    page = Page(build_report(bare))
    assert ["lr=0.1;flips=true", "0.250"] in page.rows and ["gone", "0.200"] in page.rows
    assert (bare.folder / "sweep" / "lr=0.1;flips=true" / "report" / "index.html").exists()
    assert [link for link in page.links if "sweep" in link] == [
        "#sweep", "#sweep", "../sweep/lr%3D0.1%3Bflips%3Dtrue/report/index.html",
    ]  # fmt: skip
    assert not (bare.folder / "sweep" / "gone").exists() and "No patient is scored yet" not in page.text


def test_simulated_is_marked_on_every_page_or_on_none(run, bare):
    paths = list(run.report.parent.glob("*.html"))
    assert all("Simulated patients." in Page(path).text for path in paths)
    assert all("(simulated)</title>" in path.read_text("utf-8") for path in paths)
    assert "(simulated patients)" in (run.folder / "validation.md").read_text("utf-8")
    build_report(bare)
    real = [*bare.report.parent.glob("*.html"), bare.folder / "validation.md"]
    assert not any(re.search(r"Simulated patients\.|[(]simulated", path.read_text("utf-8")) for path in real)


def test_files_that_are_broken_cost_what_they_hold_and_no_more(tmp_path):
    run = write_tiny_run(tmp_path)
    (run.figures / "01_balance.png").write_bytes(png()[:30])
    (run.notebooks / "01_explore.ipynb").write_text('{"cells": [')
    page = Page(build_report(run))
    assert "Mean Dice over 3 simulated test patients" in " ".join(page.text.split())
    assert "01_explore.ipynb cannot be read" in Page(run.report.parent / "01_explore.html").text


def test_an_empty_run_has_a_report(tmp_path):
    page = Page(build_report(Run(tmp_path / "new")))
    assert "Not scored yet." in page.text and page.loads == []
    for stage in NEEDS:
        assert f"{stage} has not run yet" in page.text


@pytest.mark.parametrize("key", ["convention", "simulated", "cases", "summary", "not_scored"])
def test_any_key_of_the_metrics_may_lack(bare, key):
    metrics = json.loads(bare.metrics.read_text())
    del metrics[key]
    bare.metrics.write_text(json.dumps(metrics))
    assert ("Not scored yet." in Page(build_report(bare)).text) == (key == "summary")


@pytest.mark.parametrize("value", [None, np.nan])
def test_figures_that_do_not_exist_are_dashes(bare, value):
    metrics = json.loads(bare.metrics.read_text())
    metrics["cases"]["A_1"]["WT"]["hd95_mm"] = value
    page = rewrite(bare, cases=metrics["cases"])
    assert ["A_1", "0.900", "0.700", "0.800", "–", "2.0", "–", "–", ""] in page.rows


def test_entries_of_the_manifest_may_lack(bare):
    bare.record(versions={}, stages={"02_train": {}, "03_evaluate": {"status": "running", "seconds": None}})
    page = Page(build_report(bare))
    assert ["02_train", "–", "–"] in page.rows and ["03_evaluate", "running", "–"] in page.rows


def test_the_verb_writes_the_report_again(bare, capsys):
    assert main(["report", str(bare.folder)]) == 0
    assert str(bare.report) in capsys.readouterr().out and bare.report.exists()
    assert main(["report", str(bare.folder / "nowhere")]) == 1
    assert "is no run: there is no manifest.json in it" in capsys.readouterr().out
    assert not (bare.folder / "nowhere").exists()


def test_the_set_up_cell_is_folded_on_a_notebooks_page(tmp_path):
    hidden = {"jupyter": {"source_hidden": True}}
    said = nbformat.v4.new_output("stream", name="stdout", text="installing numpy")
    cells = [
        nbformat.v4.new_code_cell("# @title Set-up <here>\nimport os", metadata=hidden, outputs=[said]),
        nbformat.v4.new_code_cell("print('shown')"),
        nbformat.v4.new_markdown_cell("[![badge](https://a.example/b.svg)](https://c.example)\n![picture](../d.png)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    body, _ = notebook_body(tmp_path / "n.ipynb", [])
    fold = body[body.index("<details>") : body.index("</details>")]
    assert "<summary>Set-up &lt;here&gt;</summary>" in fold and "os" in fold and "installing numpy" not in fold
    assert "installing numpy" in body and "shown" not in fold and "<img" not in body
