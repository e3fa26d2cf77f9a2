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
ANY = "\0"  # in place of what is filled in


def messages() -> list[str]:
    """Every string of the code but its docstrings, and every line of the scripts."""
    found = [
        re.sub(r"\$\{[^}]+\}|\$\w+", ANY, line) for path in ROOT.glob("*.sh") for line in path.read_text().splitlines()
    ]
    for path in (ROOT / "brats_helpers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n\n" not in node.value:
                found.append(node.value)
    return found


MESSAGES = messages()


def is_one(quoted: str) -> bool:
    """Whether a part of some message reads so: `...`, and what the message fills in, stand for any text."""
    quoted = quoted.replace("...", ANY)
    for message in MESSAGES:
        fixed = sum(len(part) for part in message.split(ANY) if len(part) > 3 and part.strip() in quoted)
        inside = sum(len(part) for part in quoted.split(ANY) if len(part) > 3 and part in message)
        if max(fixed, inside) > 0.25 * len(quoted) and _fits(quoted, message):
            return True
    return False


def _fits(quoted: str, message: str) -> bool:
    """Whether all of `quoted` can be read from some place of `message` on, by what can be reached after each letter."""
    reached = set(range(len(message) + 1))
    for letter in quoted:
        if letter == ANY:
            reached = set(range(min(reached), len(message) + 1))
            continue
        after = {k + 1 for k in reached if message[k : k + 1] == letter}
        stays = {k for k in reached if message[k : k + 1] == ANY}
        reached = after | stays | {k + 1 for k in stays}
        reached |= {k + 1 for k in reached if message[k : k + 1] == ANY}  # which may fill in nothing
        if not reached:
            return False
    return True


@pytest.mark.parametrize("quoted", QUOTED)
def test_every_message_of_the_troubleshooting_table_is_one_of_the_code(quoted):
    assert is_one(quoted)


@pytest.mark.parametrize(
    "quoted",
    [
        "ImageNet weights have to be fetched",
        "out of memory: going home with 8 slices at a time",
        "one slice alone does not fit into the memory",
    ],
)
def test_a_message_that_is_none_is_noticed(quoted):
    assert len(QUOTED) > 15 and not is_one(quoted)


def test_every_file_that_the_readme_links_is_there():
    for link in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / link).exists(), link
