"""A run's report: `report/index.html`, one page that opens from disk, and the executed notebooks as pages behind it.

No page loads anything from a network, and its content security policy says so. Whatever comes from the data (case IDs,
paths, titles) goes through jinja's escaping and is text, never markup.
"""

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path

from jinja2 import DictLoader, Environment

from brats_helpers.cases import CLASSES, REGIONS
from brats_helpers.log import duration
from brats_helpers.plots import COLOURS
from brats_helpers.runs import Run

SECTIONS = {
    "03_evaluate": "Scores",
    "02_train": "Training",
    "04_advanced": "Experiments",
    "01_explore": "Data",
    "00_setup": "This run",
}
"""The report's sections in their order, by the notebook whose figures (`figures/03_*.png`) they show."""

_STRUCTURES = [*REGIONS, *(name for name in CLASSES[1:] if name not in REGIONS)]
_IMAGES = {".png": "image/png", ".gif": "image/gif"}

_BASE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 {%- block policy %}{% endblock %}">
<title>{% block title %}{% endblock %}{{ " (simulated)" if simulated }}</title>
<style>
:root { color: #222; background: #fff; font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
body { max-width: 62rem; margin: 0 auto; padding: 0 1rem 3rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid #ddd }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
a { color: #00558a }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: .75rem 0; padding: 0 }
.simulated { background: #fff3d6; border-left: .4rem solid #e69f00; margin: 1rem 0; padding: .5rem .75rem }
.verdict { font-size: 1.15rem; margin: 1rem 0 .25rem }
.note, figcaption { color: #595959; font-size: .9rem }
.missing { background: #f3f3f3; border-left: .4rem solid #8c8c8c; padding: .5rem .75rem }
figure { margin: 1.25rem 0; break-inside: avoid }
img { max-width: 100%; height: auto }
img[src^="data:image/gif"] { width: 40rem }
.wide { overflow-x: auto }
table { margin: .75rem 0; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: #595959; padding-bottom: .25rem }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e2e2e2; text-align: left; vertical-align: top }
th { font-weight: 600 }
thead th { white-space: nowrap }
.n { text-align: right; white-space: nowrap }
td { overflow-wrap: anywhere }
.key { display: inline-block; width: .75rem; height: .75rem; margin-right: .4rem; border-radius: 2px }
details { margin: .5rem 0 }
summary { cursor: pointer }
@media print { nav, .back { display: none } body { max-width: none } a { color: inherit } .wide { overflow: visible } }
{% block style %}{% endblock %}
</style>
</head>
<body>
{% if simulated %}<p class="simulated" role="note"><strong>Simulated patients.</strong>
These figures say that the pipeline works, not how well it does on real scans.</p>{% endif %}
{% block body %}{% endblock %}
</body>
</html>
"""

_INDEX = """{% extends "base" %}
{% macro table(caption, head, rows) %}
<div class="wide" tabindex="0" role="region" aria-label="{{ caption }}">
<table>
<caption>{{ caption }}</caption>
<thead><tr>{% for cell in head %}<th scope="col"{{ ' class="n"'|safe if not loop.first }}>{{ cell }}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><th scope="row">
{%- if row[0] in colours %}<span class="key" style="background: {{ colours[row[0]] }}"></span>{% endif %}
{{ row[0] }}</th>
{%- for cell in row[1:] %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
</div>
{% endmacro %}
{% macro facts(caption, entries) %}
<table>
<caption>{{ caption }}</caption>
<tbody>
{% for name, value in entries.items() %}<tr><th scope="row">{{ name }}</th><td>{{ value|plain }}</td></tr>
{% endfor %}</tbody>
</table>
{% endmacro %}
{% block title %}Run {{ name }}{% endblock %}
{% block body %}
<header>
<h1>Run {{ name }}</h1>
<p class="verdict">{{ verdict }}</p>
<p class="note">{{ convention }}</p>
<nav aria-label="Sections"><ul>
{% for section in sections %}<li><a href="#{{ section.stage }}">{{ section.heading }}</a></li>
{% endfor %}</ul></nav>
<nav aria-label="Notebooks as they ran"><ul>
{% for page in pages %}<li><a href="{{ page }}.html">{{ page }}</a></li>
{% endfor %}</ul></nav>
</header>
<main>
{% for section in sections %}
<section id="{{ section.stage }}" aria-labelledby="{{ section.stage }}-heading">
<h2 id="{{ section.stage }}-heading">{{ section.heading }}</h2>
{% if section.missing %}<p class="missing">{{ section.missing }}</p>{% endif %}
{% if section.stage == "03_evaluate" and regions %}
{{ table("Over the test patients; the interval is that of the mean Dice", ["region or label", "Dice, mean",
   "95 % interval", "median", "quartiles", "std", "HD95 mean, mm", "HD95 median, mm", "patients"], regions) }}
{% endif %}
{% for figure in section.figures %}
<figure><img src="{{ figure.src }}" alt="{{ figure.title }}"><figcaption>{{ figure.title }}</figcaption></figure>
{% endfor %}
{% if section.views %}<p>To click through:
{% for view in section.views %}<a href="../figures/{{ view|urlencode }}">{{ view }}</a>{{ ", " if not loop.last }}
{%- endfor %}</p>{% endif %}
{% if section.stage == "03_evaluate" and patients %}
{{ table("Patient by patient, the lowest mean Dice first", ["patient", "Dice WT", "Dice TC", "Dice ET", "HD95 WT, mm",
   "HD95 TC, mm", "HD95 ET, mm"], patients) }}
{% if not_scored %}<h3>Not scored</h3>{{ facts("Patients without figures, and why", not_scored) }}{% endif %}
{% endif %}
{% if section.stage == "00_setup" %}
{% if stages %}{{ table("Notebooks of this run", ["notebook", "status", "time"], stages) }}{% endif %}
{% if about %}{{ facts("What was run, on what", about) }}{% endif %}
{% for stage, values in parameters.items() %}<details><summary>Parameters of {{ stage }}</summary>
{{ facts("Parameters of " ~ stage, values) }}</details>
{% endfor %}
{% if versions %}<details><summary>Versions</summary>
{{ facts("Versions of the packages", versions) }}</details>{% endif %}
{% endif %}
</section>
{% endfor %}
</main>
{% endblock %}
"""

_NOTEBOOK = """{% extends "base" %}
{% block policy %} script-src 'unsafe-inline'; font-src data:{% endblock %}
{% block title %}{{ page }}, run {{ name }}{% endblock %}
{% block style %}
{{ highlighting }}
.prompt, .anchor-link { display: none }
.input_area { background: #f6f6f6; border-left: 3px solid #ccc; margin: 1rem 0 .5rem; padding: .1rem .75rem }
.celltag_injected-parameters .input_area { border-left-color: #0072b2 }
pre { overflow-x: auto; font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace; margin: .4rem 0 }
.output_error pre, .output_stderr pre { background: #fdf0ee }
iframe { max-width: 100% }
.output_html, .rendered_html { overflow-x: auto }
{% endblock %}
{% block body %}
<p class="back"><a href="index.html">← Run {{ name }}</a></p>
<main>
{{ body|safe }}
</main>
{% endblock %}
"""


def build_report(run: Run) -> Path:
    """Write the report of a run from whatever its folder holds so far; sections without content say what is missing.

    Returns:
        `report/index.html` of the run.
    """
    manifest, metrics = run.manifest, _read(run.metrics)
    stages = manifest.get("stages", {})
    simulated = bool(metrics.get("simulated", manifest.get("simulated", False)))
    notebooks = sorted(run.notebooks.glob("*.ipynb"))
    files = sorted(run.figures.glob("*")) if run.figures.is_dir() else []
    sections = []
    for stage, heading in SECTIONS.items():
        own = [path for path in files if path.name.startswith(stage[:2])]
        sections.append(
            {
                "stage": stage,
                "heading": heading,
                "missing": _missing(run.name, stage, stages.get(stage, {})),
                "figures": [_figure(path) for path in own if path.suffix in _IMAGES],
                "views": [path.name for path in own if path.suffix == ".html"],
            }
        )

    pages = Environment(
        loader=DictLoader({"base": _BASE, "index": _INDEX, "notebook": _NOTEBOOK}), autoescape=True, trim_blocks=True
    )
    pages.filters["plain"] = _plain
    run.report.parent.mkdir(parents=True, exist_ok=True)
    common = {"name": run.name, "simulated": simulated}
    for path in notebooks:
        body, highlighting = _notebook_body(path)
        html = pages.get_template("notebook").render(body=body, highlighting=highlighting, page=path.stem, **common)
        (run.report.parent / f"{path.stem}.html").write_text(html, "utf-8")
    html = pages.get_template("index").render(
        verdict=_verdict(metrics, simulated),
        convention=metrics.get("convention", ""),
        colours=COLOURS,
        sections=sections,
        pages=[path.stem for path in notebooks],
        regions=_region_rows(metrics),
        patients=_patient_rows(metrics),
        not_scored=metrics.get("not_scored", {}),
        stages=[[stage, entry.get("status", "–"), _time(entry)] for stage, entry in stages.items()],
        parameters={stage: entry["parameters"] for stage, entry in stages.items() if entry.get("parameters")},
        versions=manifest.get("versions", {}),
        about={key: value for key, value in manifest.items() if key not in ("stages", "versions")},
        **common,
    )
    run.report.write_text(html, "utf-8")
    return run.report


def _read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _missing(run: str, stage: str, entry: Mapping) -> str:
    """What to say of a stage that is not finished."""
    status = entry.get("status")
    if status == "finished":
        return ""
    if status is None:
        return f"{stage} has not run yet: ./run_all.sh --run {run} --only {stage[:2]} makes this section."
    return f"{stage} is not finished ({status}): this section shows what it left."


def _figure(path: Path) -> dict[str, str]:
    """An image as a data URI, with the title that `plots` put into the file."""
    from PIL import Image

    with Image.open(path) as image:
        title = image.info.get("Title") or image.info.get("comment", b"").decode() or path.stem
    return {"src": _data_uri(path.read_bytes(), _IMAGES[path.suffix]), "title": title}


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _notebook_body(path: Path) -> tuple[str, str]:
    """The cells of a notebook as HTML, and the style of its code."""
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    notebook = nbformat.read(path, as_version=4)
    heading = path.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.partition("\n")[0].lstrip("# ")
        for output in cell.get("outputs", []):
            if "image/gif" in output.get("data", {}):  # nbconvert shows no GIF
                picture = f"data:image/gif;base64,{output.data['image/gif'].strip()}"
                output.data["text/html"] = f'<img src="{picture}" alt="animation">'
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": f"figure of: {heading}"}
    # The `basic` template is the cells alone; the others load scripts from a network.
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    return body, HtmlFormatter().get_style_defs(".highlight")


def _verdict(metrics: Mapping, simulated: bool) -> str:
    """The result in one line."""
    summary, n = metrics.get("summary", {}), len(metrics.get("cases", {}))
    if not summary:
        return "Not scored yet."
    parts = []
    for region in REGIONS:
        dice = summary.get(region, {}).get("dice", {})
        interval = f" (95 % interval {_interval(dice.get('ci95'))})" if dice.get("ci95") else ""
        parts.append(f"{region} {_number(dice.get('mean'))}{interval}")
    patients = f"{n} {'simulated ' * simulated}test patient{'s' * (n != 1)}"
    return f"Mean Dice over {patients}: {', '.join(parts)}."


def _region_rows(metrics: Mapping) -> list[list[str]]:
    rows = []
    for name in _STRUCTURES:
        found = metrics.get("summary", {}).get(name)
        if found:
            dice, hd95 = found.get("dice", {}), found.get("hd95_mm", {})
            rows.append(
                [name, _number(dice.get("mean")), _interval(dice.get("ci95")), _number(dice.get("median"))]
                + [_interval([dice.get("q1"), dice.get("q3")]), _number(dice.get("std"))]
                + [_number(hd95.get("mean"), 1), _number(hd95.get("median"), 1), _plain(dice.get("n"))]
            )
    return rows


def _patient_rows(metrics: Mapping) -> list[list[str]]:
    def dice_sum(item: tuple[str, Mapping]) -> float:
        return sum(item[1].get(region, {}).get("dice") or 0 for region in REGIONS)

    return [
        [case_id]
        + [_number(scores.get(region, {}).get("dice")) for region in REGIONS]
        + [_number(scores.get(region, {}).get("hd95_mm"), 1) for region in REGIONS]
        for case_id, scores in sorted(metrics.get("cases", {}).items(), key=dice_sum)
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval(ends: list[float] | None) -> str:
    return f"{_number(ends[0])} to {_number(ends[1])}" if ends else "–"


def _time(entry: Mapping) -> str:
    return duration(entry["seconds"]) if entry.get("seconds") is not None else "–"


def _plain(value) -> str:
    """Any value of a JSON file as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)
