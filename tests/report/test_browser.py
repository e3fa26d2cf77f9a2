"""The report in a browser: headless Chromium, through playwright. Skipped, with the reason, where there is none."""

import base64
import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from brats_helpers.report.build import build_report
from brats_helpers.report.plots.style import COLOURS
from brats_helpers.runs import NEEDS
from tests.tiny_run import HOSTILE, write_tiny_run

PAGES = ["index", "validation", *NEEDS]


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium or Chrome, else the one that `playwright install chromium` left."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: install the extra `test`")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with contextlib.ExitStack() as stack:
        try:
            p = stack.enter_context(playwright.sync_playwright())
            browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Exception as error:  # playwright's own, or a plain one where its driver lacks a library
            reason = str(error).partition("\n")[0] or type(error).__name__
            pytest.skip(f"no browser that starts: {reason}; install Chromium")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_report(write_tiny_run(tmp_path_factory.mktemp("browser"))).parent


@pytest.fixture
def look(browser, folder):
    """Opens a page of the report from disk; whatever it complains about or asks of a network fails the test."""
    complaints, contexts = [], []

    def opened(name, *, width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(r.url))
        page.goto((folder / f"{name}.html").as_uri())
        if name == "index":
            page.wait_for_selector("#viewer[data-shown]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def pixels(page):
    return page.eval_on_selector_all("#viewer canvas", "all => all.map(canvas => canvas.toDataURL())")


def picture(uri, mode="RGB"):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert(mode)


def column(page, k):
    cells = f"#patients .sortable tbody tr > :nth-child({k + 1})"
    return page.eval_on_selector_all(cells, "cells => cells.map(cell => cell.textContent.trim())")


@pytest.mark.parametrize("name", PAGES)
def test_pages_open_without_a_complaint_and_every_figure_loads(look, name):
    page = look(name)
    page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
    sizes = page.eval_on_selector_all("img", "all => all.map(image => image.complete && image.naturalWidth)")
    assert all(sizes) and (len(sizes) == 7 if name == "index" else True)


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_a_phone(look, name):
    page = look(name, width=375)
    page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_a_heading_sorts_by_click_and_by_keyboard(look):
    page = look("index")
    assert column(page, 0)[0] == "NoET_0"  # the lowest mean Dice
    head = page.locator("#patients thead th").nth(1)  # Dice of WT
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [float(value) for value in column(page, 1)]
    assert rising == sorted(rising) and column(page, 0)[0] == HOSTILE
    page.keyboard.press("Enter")  # the button has the focus
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in column(page, 1)] == sorted(rising, reverse=True)
    page.locator("#patients thead th").nth(0).get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    assert column(page, 0) == [HOSTILE, "Exact_0", "NoET_0"]


def test_the_viewer_draws_and_its_toggles_change_the_picture(look):
    page = look("index")
    seen = [pixels(page)]
    assert len(set(seen[0])) == 3
    for box in ("prediction", "reference"):
        page.locator(f"#viewer [name={box}]").press("Space")
        seen.append(pixels(page))
    for planes in zip(*seen, strict=True):
        assert len(set(planes)) == 3  # both, the reference alone, neither
    plain = np.asarray(picture(seen[2][0]))[20:-20, 20:-20].astype(int)  # without the ticks at the edges
    assert plain.max() > 100 and np.ptp(plain, axis=2).max() == 0  # a brain, and nothing is coloured


def test_of_two_quick_choices_the_last_is_drawn(look):
    page = look("index")
    before = pixels(page)
    page.evaluate(
        """() => {
            const select = document.querySelector("#viewer [name=patient]");
            for (const value of ["1", "0"]) {
                select.value = value;
                select.dispatchEvent(new Event("change"));
            }
        }"""
    )
    page.wait_for_timeout(500)
    assert pixels(page) == before


def test_the_viewer_fills_a_voxel_with_the_colour_of_its_innermost_region(look):
    page = look("index")
    data = json.loads(page.locator("#viewer-data").text_content())
    k, patient = next((k, patient) for k, patient in enumerate(data["patients"]) if patient["id"] == "NoET_0")
    page.locator("#viewer [name=patient]").select_option(str(k))
    page.wait_for_selector("#viewer[data-shown^=NoET_0]")
    page.locator("#viewer [name=reference]").uncheck()
    (_, _, z), (width, height, _), columns = patient["start"], patient["shape"], patient["columns"]
    left, top = z % columns * width, z // columns * height
    tile = np.asarray(picture(patient["labels"], "L"))[top : top + height, left : left + width]
    y, x = np.argwhere((tile // 64 == 1) & (tile // 16 % 4 == 3))[0]  # ET in the reference, predicted as NCR
    colour = bytes.fromhex(COLOURS["TC"][1:])

    at = (int(3 * x + 1), int(3 * y + 1))  # three pixels a voxel, and its middle one
    filled = picture(pixels(page)[0]).getpixel(at)
    page.locator("#viewer [name=prediction]").uncheck()
    grey = picture(pixels(page)[0]).getpixel(at)
    assert len(set(grey)) == 1
    assert filled == pytest.approx([0.6 * a + 0.4 * b for a, b in zip(grey, colour, strict=True)], abs=2)


def test_slices_move_by_keyboard_and_by_click(look):
    page = look("index")
    before, slider = pixels(page), page.locator("#viewer input[type=range]").first
    number = int(page.locator("#viewer output").first.text_content())
    slider.press("ArrowRight")
    assert int(page.locator("#viewer output").first.text_content()) == number + 1
    assert slider.get_attribute("aria-valuetext") == f"slice {number + 1}"
    assert pixels(page)[0] != before[0]
    page.locator("#viewer canvas").first.click(position={"x": 40, "y": 60})
    after = pixels(page)
    assert after[1] != before[1] and after[2] != before[2]
    assert "axial slice" in page.locator("#viewer canvas").first.get_attribute("aria-label")


def test_patient_and_modality_change_the_picture(look):
    page = look("index")
    seen = [pixels(page)[0]]
    page.locator("#viewer [name=modality]").select_option("flair")
    page.wait_for_selector("#viewer[data-shown$=flair]")
    seen.append(pixels(page)[0])
    page.locator("#patients tr", has_text=HOSTILE).get_by_role("link", name="viewer").click()
    page.wait_for_function(f"document.getElementById('viewer').dataset.shown == {HOSTILE + ' flair'!r}")
    seen.append(pixels(page)[0])
    assert len(set(seen)) == 3


@pytest.mark.parametrize("name", PAGES)
def test_markup_in_names_is_text(look, name):
    page = look(name)
    assert page.locator("img[src=x]").count() == 0
    if name not in ("validation",):
        assert HOSTILE in page.locator("body").inner_text()
    if name == "index":
        assert page.locator(f"#viewer option:has-text({HOSTILE!r})").count() == 1


def test_print_shows_what_is_folded_away_and_no_controls(look):
    page = look("index")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("#viewer").is_visible() and not page.locator("nav").first.is_visible()
    assert page.locator("#pictures img").is_visible()
    assert page.pdf(format="A4")[:4] == b"%PDF"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


def test_tables_scroll_in_their_own_box_and_can_be_reached_by_keyboard(look):
    page = look("index", width=375)
    box = page.locator("#patients .wide").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth") and box.get_attribute("tabindex") == "0"
    assert box.get_attribute("role") == "region" and box.get_attribute("aria-label")
