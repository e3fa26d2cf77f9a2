"""Checkouts of the suite's driver with five notebooks of a few lines, and ways to run them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat

from tests.conftest import write_tiny_case

HERE = Path(__file__).parents[2]

CELLS = {
    "00_setup": [
        'run_dir: str = "runs/demo"  # folder of the run\n'
        'data: str = "phantom"  # where the patients are\n'
        'modalities: str = "flair,t1,t1ce,t2"  # which images, in order\n'
        "skip: bool = False  # leave incomplete patients out\n"
        'cache_dir: str = "cache"  # prepared patients\n'
        'data_dir: str = "data"  # downloads',
        "from brats_helpers.runs import Run\n\nRun(run_dir).record(seen=[data, modalities, skip])",
    ],
    "01_explore": ['run_dir: str = "runs/demo"  # folder of the run', "print('explored')"],
    "02_train": [
        'run_dir: str = "runs/demo"  # folder of the run\n'
        "epochs: int = 3  # passes over the training slices\n"
        "lr: float = 0.001  # learning rate\n"
        "minutes: float = 0.0  # of training; 0: no limit\n"
        'wait_for: str = ""  # a file that must be there before the training ends',
        "from pathlib import Path\nimport os, sys, time",
        "for epoch in range(epochs):\n    print(f'epoch {epoch + 1} lr {lr}')\n    print('noise', file=sys.stderr)",
        "Path(run_dir, 'pid').write_text(str(os.getpid()))\n"
        "while wait_for and not Path(wait_for).exists():\n    time.sleep(0.05)",
        "Path(run_dir, 'trained').write_text(f'{epochs} {lr}')\nsys.executable",
    ],
    "03_evaluate": [
        'run_dir: str = "runs/demo"  # folder of the run',
        "from pathlib import Path",
        "trained = Path(run_dir, 'trained').read_text()\n"
        "assert trained != '13 0.001', 'thirteen\\nbrings bad luck'\nprint('scored', trained)",
    ],
    "04_advanced": [
        'run_dir: str = "runs/demo"  # folder of the run\nminutes: float = 2.0  # training time a variant\n'
        "epochs: int = 1  # of each variant",
        "print('compared', minutes)",
    ],
}
REPORT = """
def fresh_report(run):
    run.report.parent.mkdir(exist_ok=True)
    run.report.write_text("report")
    return run.report
"""


N = 2
FOLD_CELLS = {
    "00_setup": [
        'run_dir: str = ""  # folder of the run\nfolds: int = 0  # folds to write',
        "import json\n\nfrom brats_helpers.runs import Run\n\nrun = Run(run_dir)",
        f"ids = [f'P{{k}}' for k in range({2 * N})]\n"
        "tests = [ids[k::folds] for k in range(folds)] or [ids[:1]]\n"
        "rest = [[i for i in ids if i not in test] for test in tests]\n"
        "parts = [{'train': r[1:], 'val': r[:1], 'test': t} for r, t in zip(rest, tests)]\n"
        "rest = {'unlabelled': [], 'folds': parts[:folds], 'contents': dict.fromkeys(ids)}\n"
        "run.splits.write_text(json.dumps(parts[0] | rest))\n"
        "run.record(simulated=True, seed=0, data='patients', modalities=['t2'], cache_dir='cache')",
    ],
    "01_explore": ['run_dir: str = ""  # folder of the run', "1"],
    "02_train": [
        'run_dir: str = ""  # folder of the run\nlr: float = 0.5  # learning rate\n'
        "smooth: bool = False  # some choice\n"
        'hold: str = ""  # a file to wait for\nfail_in: str = ""  # the fold that fails',
        "import os\nimport time\nfrom pathlib import Path",
        "here = Path(run_dir)\n(here / 'trained').open('a').write(f'{os.getppid()} ')\n"
        "while hold and here.name == '1' and not Path(hold).exists():\n    time.sleep(0.05)\n"
        "assert here.name != fail_in, 'as asked'\n"
        "epochs = f'1,0,0,{lr}\\n2,0,0,{3 * lr}\\n3,0,0,0\\n'\n"
        "(here / 'history.csv').write_text(f'seconds,dice_WT,dice_TC,dice_ET\\n{epochs}')",
    ],
    "03_evaluate": [
        'run_dir: str = ""  # folder of the run\ndevice: str = "cpu"  # device\nflips: bool = False  # mirrored too\n'
        'labels: str = "2020"  # numbers\nconvention: str = "brats2020"  # rules',
        "import json\n\nfrom brats_helpers.scoring.scores import collect\nfrom brats_helpers.runs import Run",
        "run = Run(run_dir)\n"
        "dice = {i: int(i[1:]) / 10 for i in json.loads(run.splits.read_text())['test']}\n"
        "cases = {i: {r: {'dice': d, 'hd95_mm': 1.0} for r in ('WT', 'TC', 'ET')} for i, d in dice.items()}\n"
        "scores = collect(cases, convention=convention, simulated=True, not_scored={}, leakage=[])\n"
        "run.metrics.write_text(json.dumps(scores))\n"
        "run.emptied(run.predictions)\nfor i in dice:\n    (run.predictions / f'{i}_seg.nii.gz').write_text(i)",
    ],
    "04_advanced": ['run_dir: str = ""  # folder of the run', "1"],
}


def write_notebooks(folder: Path, cells_of: dict[str, list[str]]) -> None:
    """Write one notebook per stage: the first source is its parameters cell, and a heading precedes the last one."""
    folder.mkdir(exist_ok=True)
    for stage, sources in cells_of.items():
        cells = [nbformat.v4.new_markdown_cell(f"# {stage}"), *map(nbformat.v4.new_code_cell, sources)]
        cells[1].metadata["tags"] = ["parameters"]
        cells.insert(-1, nbformat.v4.new_markdown_cell("Text.\n\n## The last step"))
        kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / f"{stage}.ipynb")


def write_checkout(root: Path) -> None:
    """Write the package with a report of one word, the notebooks of `CELLS`, and two profiles."""
    copy_package(root)
    (root / "brats_helpers" / "report" / "build.py").write_text(REPORT)
    for name in ("run_all.sh", "setup_env.sh", "pyproject.toml"):
        shutil.copy(HERE / name, root)
    (root / "requirements.txt").write_text("papermill>=2.6  # why\nno-such-package\n")
    write_notebooks(root / "notebooks", CELLS)
    (root / "profiles").mkdir()
    (root / "profiles" / "demo.yaml").write_text("# for the newcomer\nepochs: 2  # in 02 and 04\nlr: 1e-2\n")
    (root / "profiles" / "small.yaml").write_text('# on real data\nmodalities: "flair,t1ce"\n')
    kernel = root / "jupyter" / "kernels" / "python3"  # another Python's, which must not be used
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "Other", "language": "python"}')


def write_splitting_checkout(root: Path) -> Path:
    """Write the package, the notebooks of `FOLD_CELLS`, their four patients and a profile."""
    copy_package(root)
    write_notebooks(root / "notebooks", FOLD_CELLS)
    for k in range(2 * N):
        write_tiny_case(root / "patients", f"P{k}", seed=k, modalities=["t2"])
    (root / "profiles").mkdir()
    (root / "profiles" / "demo.yaml").write_text("# a profile\n")
    (root / "requirements.txt").write_text("papermill\n")
    return root


def copy_package(root: Path) -> None:
    """Copy this checkout's package to `root`."""
    shutil.copytree(HERE / "brats_helpers", root / "brats_helpers", ignore=shutil.ignore_patterns("__pycache__"))


def start(checkout: Path, *arguments: str, python=(sys.executable,), **environ: str) -> subprocess.Popen:
    """Start the verb `run` in a checkout, without GPUs."""
    command = [*python, "-m", "brats_helpers", "run", *arguments]
    here = {"PYTHONPATH": str(checkout), "JUPYTER_PATH": str(checkout / "jupyter"), "CUDA_VISIBLE_DEVICES": ""}
    environ = os.environ | here | environ
    return subprocess.Popen(
        command, cwd=checkout, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def run(checkout: Path, *arguments: str, python=(sys.executable,), **environ: str) -> subprocess.CompletedProcess:
    """Run the verb `run` in a checkout to its end."""
    with start(checkout, *arguments, python=python, **environ) as process:
        stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def manifest(checkout: Path, name: str) -> dict:
    """Read the manifest of the run `name`."""
    return json.loads((checkout / "runs" / name / "manifest.json").read_text("utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait(condition, seconds: float = 60) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def dead(pid: int) -> bool:
    """Whether a process has ended, also where nobody has waited for it yet."""
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def clone(folder: Path) -> Path:
    """The files of this checkout that the package is made from."""
    for name in ("pyproject.toml", "requirements.txt"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, folder)
    shutil.copytree(HERE / "brats_helpers", folder / "brats_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    return folder
