"""The report: what it says, what it refuses to load, and that it stands on whatever a run has so far."""

import base64
import io
import json
from html.parser import HTMLParser

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from brats_helpers.report import SECTIONS, build_report
from brats_helpers.runs import Run

HOSTILE = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """What a browser would load from a page, and the text that it would show."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.text, self.scripts, self.rows, self.cell = [], [], "", 0, [], False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "srcset", "poster", "data") if name in attributes]
        if tag == "link":
            self.loads.append(attributes["href"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.cell = True
        self.scripts += tag == "script" or any(name.startswith("on") for name in attributes)

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.cell = False

    def handle_data(self, data):
        if self.lasttag != "style":
            self.text += data
        if self.cell:
            self.rows[-1][-1] += data.strip()


def png(title=None):
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    if title:
        info.add_text("Title", title)
    Image.new("RGB", (3, 2)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def gif():
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "GIF", comment=b"A_1 \xc2\xb7 slices")
    return file.getvalue()


def encoded(content):
    return base64.b64encode(content).decode()


@pytest.fixture
def run(tmp_path):
    """A run of simulated patients in which everything but 04_advanced is finished, and 01_explore failed."""
    run = Run(tmp_path / "runs" / "demo")
    stages = {
        stage: {"status": "finished", "seconds": 61.0, "parameters": {"epochs": 6, "modalities": "flair,t1"}}
        for stage in SECTIONS
        if stage != "04_advanced"
    }
    stages["01_explore"]["status"] = "failed"
    run.record(simulated=True, data={"place": HOSTILE}, device="cpu", seed=3, versions={"torch": "2.4"}, stages=stages)

    def case(wt, et, hd95):
        return {"WT": {"dice": wt, "hd95_mm": hd95}, "TC": {"dice": 0.7, "hd95_mm": 2.0}, "ET": {"dice": et}}

    wt = {"mean": 0.8512, "median": 0.9, "std": 0.05, "q1": 0.8, "q3": 0.95, "ci95": [0.7, 0.91], "n": 2}
    metrics = {
        "convention": "brats2020: the rules in full",
        "simulated": True,
        "cases": {"A_1": case(0.9, 0.8, 3.04), HOSTILE: case(0.8, None, 373.13)},
        "summary": {"WT": {"dice": wt, "hd95_mm": {"mean": 188.1, "median": 3.0}}, "ET": {"dice": {"mean": 0.8}}},
        "not_scored": {"B_1": f"unlabelled {HOSTILE}"},
    }
    run.metrics.write_text(json.dumps(metrics))

    run.figures.mkdir()
    (run.figures / "03_scores.png").write_bytes(png(f"Scores of {HOSTILE}"))
    (run.figures / "02_curves.png").write_bytes(png())
    (run.figures / "01_scroll.gif").write_bytes(gif())
    (run.figures / "01_view 1.html").write_text("a viewer")

    run.notebooks.mkdir()
    outputs = [
        new_output("stream", text=f"case {HOSTILE}\n"),
        new_output("display_data", data={"image/png": encoded(png()), "text/plain": "<Figure>"}),
        new_output("display_data", data={"image/gif": encoded(gif()), "text/plain": "<Image>"}),
        new_output("error", ename="DataError", evalue=HOSTILE, traceback=[f"\x1b[31m{HOSTILE}\x1b[0m"]),
    ]
    cells = [new_markdown_cell("# Explore\n\nWhat there is."), new_code_cell("print(1)", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), run.notebooks / "01_explore.ipynb")
    return run


def test_nothing_is_loaded_from_elsewhere_and_every_image_is_there(run):
    index = build_report(run)
    assert index == run.report
    pages = {path.name: Page(path) for path in index.parent.glob("*.html")}
    assert set(pages) == {"index.html", "01_explore.html"}
    for page in pages.values():
        for source in page.loads:
            kind, _, content = source.partition(";base64,")
            assert kind in ("data:image/png", "data:image/gif")
            Image.open(io.BytesIO(base64.b64decode(content, validate=True))).load()
        assert page.scripts == 0
    assert len(pages["index.html"].loads) == 3 and len(pages["01_explore.html"].loads) == 2
    for path in index.parent.glob("*.html"):
        assert "http://" not in path.read_text("utf-8") and "https://" not in path.read_text("utf-8")


def test_links_lead_somewhere(run):
    index = build_report(run)
    page = Page(index)
    assert "01_explore.html" in page.links and "../figures/01_view%201.html" in page.links
    for link in page.links:
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in index.read_text("utf-8")
        else:
            assert (index.parent / link.replace("%20", " ")).exists()
    assert "index.html" in Page(index.parent / "01_explore.html").links


def test_names_from_the_data_are_text(run):
    index = build_report(run)
    page, source = Page(index), index.read_text("utf-8")
    assert "<img src=x" not in source and "alert(1)>" not in source
    assert [HOSTILE, "0.800", "0.700", "–", "373.1", "2.0", "–"] in page.rows
    assert ["B_1", f"unlabelled {HOSTILE}"] in page.rows
    assert ["data", f"place: {HOSTILE}"] in page.rows
    assert f"Scores of {HOSTILE}" in page.text
    assert "<img src=x" not in (index.parent / "01_explore.html").read_text("utf-8")
    assert Page(index.parent / "01_explore.html").text.count(HOSTILE) == 2  # printed, and in the traceback


def test_figures_of_the_run_are_stated(run):
    page = Page(build_report(run))
    verdict = "Mean Dice over 2 simulated test patients: WT 0.851 (95 % interval 0.700 to 0.910), TC –, ET 0.800."
    assert verdict in page.text and "brats2020: the rules in full" in page.text
    assert ["WT", "0.851", "0.700 to 0.910", "0.900", "0.800 to 0.950", "0.050", "188.1", "3.0", "2"] in page.rows
    assert ["ET", "0.800", "–", "–", "– to –", "–", "–", "–", "–"] in page.rows
    patients = [row[0] for row in page.rows if row[0] in ("A_1", HOSTILE)]
    assert patients == [HOSTILE, "A_1"]  # 1.5 and 2.4 in sum: the lowest first
    assert ["02_train", "finished", "1 min 01 s"] in page.rows
    assert ["epochs", "6"] in page.rows and ["torch", "2.4"] in page.rows and ["seed", "3"] in page.rows
    assert "02_curves" in page.text and "A_1 · slices" in page.text


def test_stages_that_lack_are_named(run):
    text = Page(build_report(run)).text
    assert "04_advanced has not run yet: ./run_all.sh --run demo --only 04" in text
    assert "01_explore is not finished (failed)" in text
    assert "02_train has not run" not in text and "02_train is not finished" not in text


def test_simulated_is_marked_on_every_page_or_on_none(run):
    pages = [build_report(run), run.report.parent / "01_explore.html"]
    assert all("Simulated patients." in Page(path).text for path in pages)
    assert all("(simulated)</title>" in path.read_text("utf-8") for path in pages)
    run.record(simulated=False)
    run.metrics.write_text(json.dumps(json.loads(run.metrics.read_text()) | {"simulated": False}))
    build_report(run)
    assert not any("simulated" in Page(path).text.lower().replace("simulatedfalse", "") for path in pages)


def test_an_empty_run_has_a_report(tmp_path):
    page = Page(build_report(Run(tmp_path / "new")))
    assert "Not scored yet." in page.text
    for stage in SECTIONS:
        assert f"{stage} has not run yet" in page.text
    assert page.loads == []


@pytest.mark.parametrize("key", ["convention", "simulated", "cases", "summary", "not_scored"])
def test_any_key_of_the_metrics_may_lack(run, key):
    metrics = json.loads(run.metrics.read_text())
    del metrics[key]
    run.metrics.write_text(json.dumps(metrics))
    assert ("Not scored yet." in Page(build_report(run)).text) == (key == "summary")


@pytest.mark.parametrize("value", [None, np.nan])
def test_figures_that_do_not_exist_are_dashes(run, value):
    metrics = json.loads(run.metrics.read_text())
    metrics["cases"]["A_1"]["WT"]["hd95_mm"] = value
    run.metrics.write_text(json.dumps(metrics))
    assert ["A_1", "0.900", "0.700", "0.800", "–", "2.0", "–"] in Page(build_report(run)).rows


def test_entries_of_the_manifest_may_lack(run):
    run.record(versions={}, stages={"02_train": {}, "03_evaluate": {"status": "running", "seconds": None}})
    page = Page(build_report(run))
    assert ["02_train", "–", "–"] in page.rows and ["03_evaluate", "running", "–"] in page.rows
