"""The parameters that the notebooks declare, and the profiles that set them."""

import ast
import difflib
import io
import json
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from brats_helpers.runs import NEEDS
from brats_helpers.training.settings import Default, SettingsError, check_text, defaults, from_text

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_KINDS = {"int": "an int", "float": "a float", "bool": "true or false"}


SETTINGS = "settings"
"""The parameter that takes all settings for which the notebook has no parameter of their own."""


class UsageError(Exception):
    """The command cannot be carried out as given; the message says what is wrong and what to write instead."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `epochs: int = 20  # passes over the training slices`."""

    name: str
    type: str
    default: object
    meaning: str

    def read(self, text: str) -> object:
        """Return the value that `text` stands for, in the declared type.

        Raises:
            UsageError: `text` is not a value of that type.
        """
        try:
            if self.type == "bool":
                return _BOOLEANS[text.lower()]
            return {"int": int, "float": float, "str": str}[self.type](text)
        except (ValueError, KeyError):
            raise UsageError(f"{self.name} takes {_KINDS[self.type]} ({self.meaning}), got {text!r}") from None


@dataclass(frozen=True)
class Notebook:
    """A stored notebook.

    Attributes:
        parameters: those that its cell declares, by name.
        code: source of its other code cells.
    """

    parameters: dict[str, Parameter]
    code: list[str]

    @property
    def further(self) -> dict[str, Default]:
        """The settings that the parameter `settings` takes together, as `ema=0.9, warm_up=0.1`, by name."""
        return (
            {name: d for name, d in defaults().items() if name not in self.parameters}
            if SETTINGS in self.parameters
            else {}
        )

    @property
    def defaults(self) -> dict[str, object]:
        """The default value of every parameter."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


def read_notebooks(root: Path) -> dict[str, Notebook]:
    """Read every notebook of the suite below `root`, by stage."""
    return {stage: _read_notebook(root / "notebooks" / f"{stage}.ipynb") for stage in NEEDS}


def _read_notebook(path: Path) -> Notebook:
    if not path.exists():
        raise UsageError(f"{path} does not exist; run from a complete checkout of the suite")
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    if len(tagged) != 1:
        raise UsageError(f"{path} has {len(tagged)} cells tagged `parameters`, expected one")
    code = ["".join(cell["source"]) for cell in cells if cell is not tagged[0]]
    return Notebook(_declared("".join(tagged[0]["source"]), path), code)


def _declared(source: str, path: Path) -> dict[str, Parameter]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    parameters = {}
    for node in ast.parse(source).body:
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=name),
                annotation=ast.Name(id="int" | "float" | "str" | "bool" as kind),
                value=ast.expr(),
            ):
                default = ast.literal_eval(node.value)
                parameters[name] = Parameter(name, kind, default, comments.get(node.end_lineno, ""))
            case _:
                raise UsageError(f"{path}, parameters cell, line {node.lineno}: not of the form `name: type = literal`")
    return parameters


def read_settings(text: str) -> dict[str, str]:
    """Split the text of the parameter `settings`, and check every value.

    Raises:
        UsageError: an unknown setting, a value that is not allowed, or text that is not of the form `name=value`.
    """
    try:
        values = from_text(text)
        for name, value in values.items():
            check_text(name, value)
    except SettingsError as error:
        raise UsageError(str(error)) from None
    return values


def join_settings(*texts: str) -> str:
    """Join texts of the parameter `settings`; a later value takes precedence, and the order is alphabetic."""
    values = {name: value for text in texts for name, value in read_settings(text).items()}
    return ", ".join(f"{name}={value}" for name, value in sorted(values.items()))


def profiles(root: Path) -> list[str]:
    """Return the names of the profiles below `root`."""
    return sorted(path.stem for path in (root / "profiles").glob("*.yaml"))


def read_profile(path: Path) -> dict[str, str]:
    """Read a profile, a flat YAML file of `key: value`, with every value as text.

    Before anything is installed there is no PyYAML. The result is then empty: `run` reads the profile again after the
    installation and before the first notebook.

    Raises:
        UsageError: the file is not YAML, or not flat.
    """
    try:
        import yaml
    except ImportError:
        return {}
    try:
        content = yaml.load(path.read_text("utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from None
    content = {} if content in (None, "") else content
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected lines of the form `key: value`")
    for key, value in content.items():
        if not isinstance(value, str):
            raise UsageError(f"{path}: {key} has several values; write a list as one text, such as `{key}: a,b`")
    return content


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for a mistyped word: the most similar known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
