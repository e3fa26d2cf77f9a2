"""Experiments: trainings of equal length that take turns, scored on the same validation patients."""

import contextlib
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from brats_helpers import machine
from brats_helpers.data.cache import Packed
from brats_helpers.evaluation.networks import load_network, predict
from brats_helpers.files import read_json, write_json
from brats_helpers.labels import REGIONS, DataError
from brats_helpers.log import duration
from brats_helpers.runs import Run
from brats_helpers.scoring.overlap import mean_dice
from brats_helpers.scoring.rules import region_dice
from brats_helpers.scoring.scores import collect
from brats_helpers.scoring.statistics import ENOUGH_PAIRS, interval_text
from brats_helpers.training.checkpoint import fingerprint, learnt_from, weights_file
from brats_helpers.training.loop import fit
from brats_helpers.training.model import build_model, summary
from brats_helpers.training.settings import Settings, shown

MEAN = "mean"
"""Stands among the structures for the mean of a patient's WT, TC and ET."""
SCORED = 8
"""Validation patients that arms are compared on, at least, if the run has so many."""
Outcome = tuple[dict[str, pd.DataFrame], dict[str, dict]]
"""By arm: the history of its training, see `loop.fit`, and its scores in the form of `metrics.json`."""


class _TurnOver(Exception):
    """A training has had its turn."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all experiments of a notebook have in common.

    Attributes:
        run: whose notebook this is; the experiments are in its folder `experiments`. An experiment that was scored
            there on such a machine and with the same patients is not repeated.
        questions: the names of the questions to answer.
        device, workers: see `loop.fit`.
        simulated: whether the patients are simulated.
        seeds: trainings of each arm, with seeds that count up from the settings' own.
        turn_s: seconds of training after which the next arm has its turn, in whole epochs.
    """

    run: Run
    questions: Sequence[str]
    device: torch.device
    workers: int
    simulated: bool
    seeds: int = 1
    turn_s: float = 15.0
    _done: dict = field(default_factory=dict)

    def ask(
        self,
        question: str,
        arms: Mapping[str, Settings],
        train: Sequence[Packed],
        val: Sequence[Packed],
        scored: Sequence[Packed],
    ) -> Outcome | None:
        """`try_out`, if `question` is to be answered; else print what it costs and the command, and return None."""
        if question in self.questions:
            return self.try_out(arms, train, val, scored)
        n = len(arms) * self.seeds
        minutes = next(iter(arms.values())).minutes
        asked = ",".join([*self.questions, question])
        print(
            f"Not asked by this run: {n} trainings of {duration(60 * minutes)}, {duration(60 * minutes * n)} in all."
            f" To ask: ./run_all.sh --run {self.run.folder.name} --only 04 -p questions {asked}"
        )
        return None

    def try_out(
        self,
        arms: Mapping[str, Settings],
        train: Sequence[Packed],
        val: Sequence[Packed],
        scored: Sequence[Packed],
    ) -> Outcome:
        """Train the arms in turns and score each. An arm that two questions share is trained once.

        Args:
            arms: settings by a name for the reader; their `minutes` should be equal.
            train: prepared cases to learn from.
            val: prepared cases to choose the epoch by.
            scored: prepared validation cases to compare the arms on, with their labels.

        Returns:
            By arm, the history of the first seed's training, and the scores: the Dice of WT, TC, ET and their `MEAN`,
            averaged over the seeds. Under `seeds` the mean of each.

        Raises:
            DataError: the weights that an arm starts from have seen a patient of `scored`; nothing is trained then.
        """
        for settings in arms.values():
            _check_unseen(settings.encoder_weights, scored)
        found: dict[str, list[tuple[pd.DataFrame, dict]]] = {}
        todo: dict[str, tuple[str, Settings]] = {}
        keys: dict[str, list[str]] = {}
        for name, settings in arms.items():
            keys[name] = []
            for more in range(self.seeds):
                own = replace(settings, seed=settings.seed + more)
                key = self._key(own, train, val, scored)
                keys[name].append(key)
                title = name if self.seeds == 1 else f"{name}, seed {own.seed}"
                if key not in self._done and not self._recall(key, title):
                    todo.setdefault(key, (title, own))
        self._train_in_turns(todo, train, val)
        for key, (title, own) in todo.items():
            self._score(key, self._place(key, title), own, scored)
        found = {name: [self._done[key] for key in listed] for name, listed in keys.items()}
        histories = {name: results[0][0] for name, results in found.items()}
        return histories, {name: self._averaged([scores for _, scores in results]) for name, results in found.items()}

    def _train_in_turns(
        self, todo: Mapping[str, tuple[str, Settings]], train: Sequence[Packed], val: Sequence[Packed]
    ) -> None:
        """Train each for `turn_s`, then the next, until all are done: what slows the machine down slows all of them.

        A training resumes from `last.pt`, on the clock that stood still meanwhile. Each turn begins with the warm-up
        steps of the preflight, which the clock does not count.
        """
        waiting = dict(todo)
        while waiting:
            for key, (title, settings) in list(waiting.items()):
                own = self._place(key, title)
                if self._turn(own, settings, train, val):
                    del waiting[key]
                row = pd.read_csv(own.history).iloc[-1]
                dice = np.mean([row[f"dice_{region}"] for region in REGIONS])
                print(f"{title}: {duration(row['seconds'])} of training, mean validation Dice {dice:.3f}", flush=True)

    def _turn(self, own: Run, settings: Settings, train: Sequence[Packed], val: Sequence[Packed]) -> bool:
        """Train for one turn; return whether the training is over."""
        begun = pd.read_csv(own.history)["seconds"].iloc[-1] if own.last.exists() and own.history.exists() else 0.0

        def follow(history: list[dict]) -> None:
            if history[-1]["seconds"] - begun >= self.turn_s:
                raise _TurnOver

        how = {"checkpoint_minutes": 0, "deterministic": False, "tracker": "none", "follow": follow}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                fit(settings, train, val, own.folder, device=self.device, workers=self.workers, **how)
        except _TurnOver:
            return False
        return True

    def _place(self, key: str, title: str) -> Run:
        return Run(self.run.folder / "experiments" / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', title)}-{key[:6]}")

    def _recall(self, key: str, title: str) -> bool:
        """Whether an earlier session scored this experiment; its result is then known."""
        for metrics in (self.run.folder / "experiments").glob(f"*-{key[:6]}/metrics.json"):
            print(f"{title}: scored before")
            self._done[key] = pd.read_csv(Run(metrics.parent).history), read_json(metrics)
            return True
        return False

    def _score(self, key: str, own: Run, settings: Settings, scored: Sequence[Packed]) -> None:
        network = load_network(own.best, device=self.device)
        scores = {}
        for case in scored:
            soft = predict([network], case, channels=settings.modalities, flips=False)
            dice = region_dice(soft.argmax(axis=1).astype(np.uint8), np.asarray(case.labels), convention="brats2020")
            scores[case.id] = dice | {MEAN: mean_dice(dice)}
        write_json(own.metrics, self._collect(scores))
        own.last.unlink()  # four times as large as the network, and of no more use
        self._done[key] = pd.read_csv(own.history), read_json(own.metrics)

    def _collect(self, dice: Mapping[str, Mapping[str, float]]) -> dict:
        scores = {case: {name: {"dice": value} for name, value in found.items()} for case, found in dice.items()}
        return collect(scores, convention="brats2020", simulated=self.simulated, not_scored={}, leakage=[])

    def _averaged(self, seeds: Sequence[Mapping]) -> dict:
        """The scores of several seeds as those of one experiment."""
        cases = {}
        for case_id, first in seeds[0]["cases"].items():
            cases[case_id] = {
                name: float(np.mean([scores["cases"][case_id][name]["dice"] for scores in seeds])) for name in first
            }
        means = [scores["summary"][MEAN]["dice"]["mean"] for scores in seeds]
        return self._collect(cases) | {"seeds": means}

    def _key(self, settings: Settings, *cases: Sequence[Packed]) -> str:
        """Changes with everything that scores follow from, the machine's speed and precision included."""
        start = weights_file(settings.encoder_weights)
        weights = hashlib.sha256(start.read_bytes()).hexdigest() if start.is_file() else ""
        hardware = machine.describe(self.device)
        speed = [hardware[name] for name in ("device", "precision", "cores")]
        return hashlib.sha256(repr([settings, weights, *map(fingerprint, cases), speed]).encode()).hexdigest()


def _check_unseen(weights: str, scored: Sequence[Packed]) -> None:
    if leaked := sorted({*learnt_from(weights)}.intersection(case.id for case in scored)):
        raise DataError(
            f"{', '.join(leaked)}: the weights to start from were trained on, or chosen by, these patients, who are"
            " to be scored. Start from imagenet, none, or a checkpoint of other patients."
        )


def hold_out(
    train: Sequence[Packed], val: Sequence[Packed], *, n: int = SCORED, seed: int, groups: Mapping[str, str]
) -> tuple[list[Packed], list[Packed]]:
    """Set training patients aside, drawn with the seed, until there are `n` validation patients to compare arms on.

    At most half of the training patients are set aside, and whole persons only.

    Args:
        train, val: prepared cases.
        n: how many patients are wanted.
        seed: of the draw.
        groups: by ID the person, as in splits.json.

    Returns:
        The patients left to learn from, and those to compare on, `val` first.
    """
    persons: dict[str, list[Packed]] = {}
    for case in train:
        persons.setdefault(groups.get(case.id, case.id), []).append(case)
    scored: list[Packed] = list(val)
    most = len(val) + len(train) // 2
    for person in np.random.default_rng(seed).permutation(sorted(persons)).tolist():
        if len(scored) < n and len(scored) + len(persons[person]) <= most:
            scored += persons[person]
    chosen = {case.id for case in scored}
    return [case for case in train if case.id not in chosen], scored


def rounds_of_few(
    train: Sequence[Packed], scored: Sequence[Packed], *, n: int, seed: int, groups: Mapping[str, str]
) -> list[tuple[list[Packed], list[Packed], list[Packed]]]:
    """Make rounds of training on `n` patients drawn with the seed, who also choose the epoch.

    There is one round if `scored` has `ENOUGH_PAIRS` patients. Otherwise each of so many patients is left out once and
    scored by a network of `n` others. There are no rounds if there are not `n` others.

    Args:
        train: prepared cases to draw from.
        scored: prepared cases to compare on.
        n: how many patients to learn from.
        seed: of the draw.
        groups: by ID the person, as in splits.json.

    Returns:
        Per round the patients to learn from, to choose the epoch by, and to score.
    """
    order = np.random.default_rng(seed)
    drawn = [train[k] for k in order.permutation(len(train))]
    if len(scored) >= ENOUGH_PAIRS:
        return [(drawn[:n], drawn[:n], list(scored))] if len(drawn) >= n else []
    pool = [*scored, *drawn]
    rounds = []
    for case in pool[:ENOUGH_PAIRS]:
        person = groups.get(case.id, case.id)
        others = [other for other in [*drawn, *scored] if groups.get(other.id, other.id) != person][:n]
        if len(others) < n:
            return []
        rounds.append((others, others, [case]))
    return rounds


def merged(metrics: Sequence[Mapping[str, Mapping]]) -> dict[str, dict]:
    """Put the scores of rounds on different patients, such as a leave-one-out, together as one experiment's."""
    together = {}
    for name, first in metrics[0].items():
        cases = {case_id: scores for found in metrics for case_id, scores in found[name]["cases"].items()}
        scores = collect(cases, convention="brats2020", simulated=first["simulated"], not_scored={}, leakage=[])
        together[name] = scores | {"seeds": np.mean([found[name]["seeds"] for found in metrics], axis=0).tolist()}
    return together


def going_on_from(checkpoint: Path, base: Settings) -> Settings:
    """`base`, but starting from the network of a checkpoint.

    Raises:
        DataError: there is no such checkpoint, or its network sees another input than `base` gives.
    """
    known = load_network(checkpoint, device=torch.device("cpu")).settings
    names = ("modalities", "context_slices", "patch_size")
    then, now = Settings.parse(**known), base
    differ = [
        f"{name} {shown(getattr(then, name))}, not {shown(getattr(now, name))}"
        for name in names
        if getattr(then, name) != getattr(now, name)
    ]
    if differ:
        raise DataError(f"{checkpoint} was trained with {'; '.join(differ)}. Give one trained on the same input.")
    return replace(base, encoder=then.encoder, decoder=then.decoder, encoder_weights=str(checkpoint))


def backbones(
    arms: Mapping[str, Settings], histories: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping], shape: tuple
) -> pd.DataFrame:
    """What each network costs, and what it reached in the same time.

    Args:
        arms, histories, metrics: see `Bench.try_out`.
        shape: (channels, height, width) of one slice.

    Returns:
        A row per arm: its initial weights, parameters and multiply-adds per slice in millions, slices per second in
        training, and the mean Dice of WT, TC and ET with its 95 % interval.
    """
    rows = {}
    for name, settings in arms.items():
        network = {"encoder": settings.encoder, "patch_size": settings.patch_size, "decoder": settings.decoder}
        cost = summary(build_model(**network, weights="none", in_channels=shape[0]), shape)
        dice = metrics[name]["summary"][MEAN]["dice"]
        rows[name] = {
            "initial weights": settings.encoder_weights,
            "parameters (M)": cost["parameters"] / 1e6,
            "multiply-adds (M)": cost["multiply_adds"] / 1e6,
            "slices per second": histories[name]["slices_per_s"].mean(),
            "mean Dice": dice["mean"],
            "95 % interval": interval_text(dice["ci95"], dice["n"]),
        }
    return pd.DataFrame(rows).T
