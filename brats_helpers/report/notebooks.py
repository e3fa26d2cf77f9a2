"""Executed notebooks as parts of the report's pages."""

import html
import re
from pathlib import Path
from urllib.parse import quote


def notebook_body(path: Path, views: list[str]) -> tuple[str, str]:
    """The cells of a notebook as HTML, and the style of its code; interactive views become links to their files."""
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    links = ", ".join(f'<a href="../figures/{quote(view)}">{html.escape(view)}</a>' for view in views)
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError as error:  # not JSON: the run was interrupted while writing it
        return f'<p class="missing">{html.escape(f"{path} cannot be read: {error}")}</p>', ""
    heading = path.stem
    _fold_hidden_input(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # badges would be loaded from a network, pictures from the checkout
            cell.source = re.sub(r"^\[?!\[.*\n?", "", cell.source, flags=re.MULTILINE)
            cell.source = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.html)", cell.source)
            cell.source = re.sub(r"\[([^]]+)\]\(\.\./(docs/[\w-]+\.md)\)", r"\1 (\2)", cell.source)
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.partition("\n")[0].lstrip("# ")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "<iframe" in data.get("text/html", ""):  # its script may not run on this page
                data["text/html"] = f"<p>Interactive view, on a page of its own: {links or 'not saved'}</p>"
            if "image/gif" in data:  # nbconvert shows no GIF
                picture = f"data:image/gif;base64,{data['image/gif'].strip()}"
                data["text/html"] = f'<img src="{picture}" alt="animation">'
            if "image/png" in data:
                output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": f"figure of: {heading}"}
    # Other templates than `basic` load scripts from a network.
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    return body, HtmlFormatter().get_style_defs(".highlight")


def _fold_hidden_input(notebook) -> None:
    """Turn code cells whose input is hidden into closed sections, followed by their outputs; `notebook` is changed."""
    import nbformat

    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.metadata.get("jupyter", {}).get("source_hidden"):
            name, _, code = cell.source.removeprefix("# @title ").partition("\n")
            fold = f"<details><summary>{html.escape(name)}</summary>\n\n```python\n{code}\n```\n\n</details>"
            cells.append(nbformat.v4.new_markdown_cell(fold))
            cell.source = ""
            if not cell.outputs:
                continue
        cells.append(cell)
    notebook.cells = cells
