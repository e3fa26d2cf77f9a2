"""Lines about figures, notebooks and the information needed to repeat the run."""

from brats_helpers.report.validation.facts import Mark, NotDone, RunFacts, but, line, mark
from brats_helpers.runs import NO_PATIENT

FIGURES, CODE, DOCUMENTATION = "Visualisation", "Code quality", "Documentation"


@line("figures-present", FIGURES, "Every figure is present")
def _present(facts: RunFacts) -> tuple[Mark, str]:
    unreadable = [name for name, title in facts.figures.items() if title is None]
    n = len(facts.figures)
    evidence = f"{n - len(unreadable)} of {n} that the notebooks saved"
    return mark(not unreadable), evidence + but("missing or unreadable", unreadable)


@line("figures-honest", FIGURES, "Figures of simulated patients say so, and only those")
def _honest(facts: RunFacts) -> tuple[Mark, str]:
    simulated = bool(facts.manifest["simulated"])
    titles = {name: text for name, text in facts.figures.items() if text is not None and NO_PATIENT not in text}
    wrong = [name for name, title in titles.items() if ("simulated" in title) != simulated]
    evidence = f"titles of {len(titles)} figures of {'simulated' if simulated else 'real'} patients"
    return mark(not wrong), evidence + but("wrong", wrong)


@line("notebooks-finished", CODE, "Every notebook finished")
def _finished(facts: RunFacts) -> tuple[Mark, str]:
    stages = facts.manifest.get("stages", {})
    status = {stage: stages.get(stage, {}).get("status") for stage in facts.run.expected}
    if not any(status.values()):
        raise NotDone("manifest.json lists no notebook; notebooks run by hand are not recorded there")
    never = [stage for stage in status if status[stage] is None]
    broken = [stage for stage in status if status[stage] not in ("finished", None)]
    evidence = f"manifest.json: {len(status) - len(never) - len(broken)} of {len(status)}"
    evidence += but("not finished", broken) + but("not run", never)
    return Mark.FAILED if broken else mark(not never, Mark.PARTLY), evidence


@line("notebooks-in-order", CODE, "Notebooks ran from top to bottom without an error")
def _in_order(facts: RunFacts) -> tuple[Mark, str]:
    disordered, failed = [], []
    for stage, cells in facts.code.items():
        if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
            disordered.append(stage)
        outputs = sum((cell["outputs"] for cell in cells), [])
        if any(output["output_type"] == "error" for output in outputs):
            failed.append(stage)
    evidence = f"{sum(map(len, facts.code.values()))} code cells of {len(facts.code)} notebooks"
    return mark(not failed and not disordered), evidence + but("errors in", failed) + but("not in order", disordered)


@line("revision-clean", CODE, "The revision is known and has no uncommitted changes")
def _revision(facts: RunFacts) -> tuple[Mark, str]:
    revisions = facts.by_fact("revision")
    evidence = f"manifest.json: {_listed(revisions)}" + but("unknown for", facts.unrecorded)
    clean = len(revisions) == 1 and not any("-dirty" in name for name in revisions) and not facts.unrecorded
    return Mark.FAILED if "none" in revisions else mark(clean, Mark.PARTLY), evidence


@line("versions-recorded", DOCUMENTATION, "The versions of the packages are recorded")
def _versions(facts: RunFacts) -> tuple[Mark, str]:
    known: dict[str, set] = {}
    for entry in facts.stages.values():
        for name, version in entry["versions"].items():
            known.setdefault(name, set()).add(version)
    unknown = [name for name, versions in known.items() if None in versions]
    several = [name for name, versions in known.items() if len(versions) > 1]
    evidence = f"manifest.json: {len(known)} packages" + but("without a version", unknown)
    evidence += but("not the same in all notebooks", several) + but("unknown for", facts.unrecorded)
    return mark(not unknown and not several and not facts.unrecorded, Mark.PARTLY), evidence


@line("commands-recorded", DOCUMENTATION, "The commands that repeat the run are recorded")
def _commands(facts: RunFacts) -> tuple[Mark, str]:
    evidence = f"manifest.json: {_listed(facts.by_fact('command'))}" + but("unknown for", facts.unrecorded)
    return mark(not facts.unrecorded, Mark.PARTLY), evidence


def _listed(stages_by_value: dict[str, list[str]]) -> str:
    """List the values; if there are several, each with its notebooks."""
    if len(stages_by_value) == 1:
        return next(iter(stages_by_value))
    return "; ".join(f"{value} ({', '.join(stages)})" for value, stages in stages_by_value.items())
