"""What the README quotes and names is what the suite prints and has."""

import ast
import re

import pytest

from brats_helpers.environment import ROOT

README = (ROOT / "README.md").read_text("utf-8")
QUOTED = [
    quoted
    for row in re.findall(
        r"^\| (`.+?) \| ", README.partition("| it says | do |")[2].partition("\n## ")[0], re.MULTILINE
    )
    for quoted in re.findall(r"`([^`]+)`", row)
]


def templates() -> list[list[str]]:
    """The fixed parts of every string in the code and of every line of the scripts, between what is filled in."""
    found = [
        re.split(r"\$\{[^}]+\}|\$\w+", line) for path in ROOT.glob("*.sh") for line in path.read_text().splitlines()
    ]
    for path in (ROOT / "brats_helpers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append([part.value for part in node.values if isinstance(part, ast.Constant)])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append([node.value])
    return found


TEMPLATES = templates()


def share(quoted: str) -> float:
    """How much of a quoted message is fixed text of one message of the code."""
    shown = quoted.replace("...", "")

    def covered(parts: list[str]) -> int:
        whole = max(
            (len(piece) for piece in quoted.split("...") if any(piece.strip() in part for part in parts)), default=0
        )
        return max(whole, sum(len(part.strip()) for part in parts if len(part.strip()) > 3 and part.strip() in shown))

    return max(map(covered, TEMPLATES)) / len(shown)


@pytest.mark.parametrize("quoted", QUOTED)
def test_every_message_of_the_troubleshooting_table_is_one_of_the_code(quoted):
    assert share(quoted) > 0.3


def test_a_message_that_is_none_is_noticed():
    assert len(QUOTED) > 15
    assert share("the moon is too far: going home with 8 slices") < 0.2


def test_every_file_that_the_readme_links_is_there():
    for link in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / link).exists(), link
