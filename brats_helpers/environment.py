"""What is installed, against what requirements.txt asks for; the standard library alone, as nothing else may be there.

    python -P brats_helpers/environment.py [EXTRA]

prints what is missing, with what pyproject.toml lists for EXTRA, one requirement a line.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "brats-helpers"


def required(root: Path, extra: str | None = None) -> list[str]:
    """The lines of `root/requirements.txt`, and of `extra` in `root/pyproject.toml`: `torch>=2.4`."""
    lines = [line.partition("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    if extra:
        lines += tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    return [line for line in lines if line]


def name_of(requirement: str) -> str:
    """`torch` of `torch>=2.4,<3`."""
    return re.match(r"[\w.-]+", requirement)[0]


def installed(name: str) -> str | None:
    """The version that is installed of package `name`, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_met(requirement: str) -> bool:
    """Whether what is installed meets `requirement`; bounds are `>=` and `<`."""
    found = installed(name_of(requirement))
    if found is None:
        return False
    bounds = re.findall(r"(>=|<)\s*([\d.]+)", requirement)
    return all((_numbers(found) >= _numbers(bound)) == (sign == ">=") for sign, bound in bounds)


def _numbers(version_text: str) -> tuple[int, ...]:
    release = re.match(r"[\d.]*\d", version_text)[0]
    return tuple(int(number) for number in re.sub(r"(\.0)+$", "", release).split("."))


def missing(root: Path, extra: str | None = None) -> list[str]:
    """The requirements that are not met, the package itself among them."""
    return [line for line in [*required(root, extra), PACKAGE] if not is_met(line)]


if __name__ == "__main__":
    print("\n".join(missing(ROOT, *sys.argv[1:])))
