"""What the pages quote and link is what the suite prints and has."""

import ast
import re
from pathlib import Path

import nbclient.client
import pytest

from brats_helpers.suite.environment import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "MODEL_CARD.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").partition("| it says | do |")[2]
ROWS = re.findall(r"^\| (`.+?) \| ", TABLE, re.MULTILINE)
QUOTED = [quoted for row in ROWS for quoted in re.findall(r"`([^`]+)`", row)]
ANY = "\0"  # in place of what is filled in
ENOUGH = 0.42  # of a quoted message, the rest being examples of what is filled in


def messages() -> list[str]:
    """Every string of the code but its docstrings, and every line of the scripts."""
    found = [
        re.sub(r"\$\{[^}]+\}|\$\w+", ANY, line) for path in ROOT.glob("*.sh") for line in path.read_text().splitlines()
    ]
    for path in (*(ROOT / "brats_helpers").rglob("*.py"), Path(nbclient.client.__file__)):  # it tells of dead kernels
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n\n" not in node.value:
                found.append(node.value)
    return found


MESSAGES = messages()


def share(quoted: str) -> float:
    """How much of a quoted message is fixed text of one message of the code that may read so: 0 to 1.

    `...`, and what the message fills in, stand for any text.
    """
    quoted = quoted.replace("...", ANY)
    known = [message for message in MESSAGES if _common(quoted, message)]
    return max((_fixed(quoted, message) for message in known), default=0) / len(quoted.replace(ANY, ""))


def _common(quoted: str, message: str) -> bool:
    """Whether they share a piece of five letters, without which nothing is worth a closer look."""
    pieces = (quoted[k : k + 5] for k in range(max(len(quoted) - 4, 1)))
    return any(piece in message for piece in pieces if ANY not in piece)


def _fixed(quoted: str, message: str) -> int:
    """The most letters of `quoted` that are letters of `message`, if all of it can be read from some place there on."""
    reached = dict.fromkeys(range(len(message) + 1), 0)  # by place in the message
    for letter in quoted:
        after: dict[int, int] = {}
        if letter == ANY:
            best = -1
            for k in range(min(reached, default=0), len(message) + 1):
                best = max(best, reached.get(k, -1))
                after[k] = best
        for k, n in reached.items() if letter != ANY else ():
            while message[k : k + 1] == ANY:  # which may take the letter, or nothing
                after[k] = max(after.get(k, 0), n)
                k += 1
            if message[k : k + 1] == letter:
                after[k + 1] = max(after.get(k + 1, 0), n + 1)
        reached = after
    return max(reached.values(), default=0)


@pytest.mark.parametrize("quoted", QUOTED)
def test_every_message_of_the_troubleshooting_table_is_one_of_the_code(quoted):
    assert share(quoted) > ENOUGH


@pytest.mark.parametrize(
    "quoted",
    [
        "ImageNet weights have to be fetched",
        "HDF5 slices, which h5py reads",
        "out of memory: going home with 8 slices at a time",
        "one slice alone does not fit into the memory",
    ],
)
def test_a_quoted_message_that_does_not_exist_is_noticed(quoted):
    assert len(QUOTED) > 15 and share(quoted) < ENOUGH


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_exists(page):
    for link in re.findall(r"\]\(([^):#]+)\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


def test_the_readme_is_short():
    """A newcomer reads it whole; the rest is one click away in docs/."""
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 900
