"""Experiments: trainings of equal length that take turns, scored on the same validation patients."""

import contextlib
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import pandas as pd
import torch

from brats_helpers import machine
from brats_helpers.data.cache import Packed
from brats_helpers.evaluation.networks import load_network, predict
from brats_helpers.files import read_json, write_json
from brats_helpers.labels import DataError
from brats_helpers.log import duration, progress
from brats_helpers.runs import Run
from brats_helpers.scoring.overlap import mean_dice, mean_dice_of_epoch
from brats_helpers.scoring.rules import region_dice
from brats_helpers.scoring.scores import collect
from brats_helpers.scoring.statistics import ENOUGH_PAIRS, interval_text
from brats_helpers.training.checkpoint import fingerprint, read_weights, seen_by, weights_file
from brats_helpers.training.loop import fit
from brats_helpers.training.model import build_model, summary
from brats_helpers.training.settings import Settings

MEAN = "mean"
"""The key, beside the structures, of the mean over a patient's WT, TC and ET."""
SCORED = 8
"""Smallest number of validation patients to compare arms on, if the run has enough patients."""
Outcome = tuple[dict[str, pd.DataFrame], dict[str, dict]]
"""By arm: the history of its training, see `loop.fit`, and its scores in the form of `metrics.json`."""


class _TurnOver(Exception):
    """The turn of a training is over."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The set-up that all experiments of a notebook share.

    Attributes:
        run: of the notebook; the experiments are in its folder `experiments`. An experiment that was scored there
            with the same patients on the same kind of machine is not repeated.
        questions: the names of the questions to answer.
        device, workers: see `loop.fit`.
        simulated: whether the patients are simulated.
        seeds: trainings of each arm, with seeds that count up from the settings' own.
        turn_s: seconds of training in a turn, rounded up to whole epochs.
    """

    run: Run
    questions: Sequence[str]
    device: torch.device
    workers: int
    simulated: bool
    seeds: int = 1
    turn_s: float = 25.0
    _done: dict = field(default_factory=dict)

    def ask(
        self,
        question: str,
        arms: Mapping[str, Settings],
        train: Sequence[Packed],
        val: Sequence[Packed],
        scored: Sequence[Packed],
    ) -> Outcome | None:
        """Return `try_out(...)` if `question` is part of this run; else print its cost and the command."""
        if question in self.questions:
            return self.try_out(arms, train, val, scored)
        n = len(arms) * self.seeds
        minutes = next(iter(arms.values())).minutes
        asked = ",".join([*self.questions, question])
        print(
            f"Not part of this run: {n} trainings of {duration(60 * minutes)}, {duration(60 * minutes * n)} in all."
            f" To run them: {self.run.command('04', questions=asked)}"
        )
        return None

    def try_out(
        self,
        arms: Mapping[str, Settings],
        train: Sequence[Packed],
        val: Sequence[Packed],
        scored: Sequence[Packed],
    ) -> Outcome:
        """Train the arms in turns and score each. An arm that two questions share is trained only once.

        Args:
            arms: settings by a name for the reader; their `minutes` should be equal.
            train: prepared cases for training.
            val: prepared cases that choose the best epoch.
            scored: prepared validation cases with labels, on which the arms are compared.

        Returns:
            By arm, the history of the first seed's training, and the scores: the Dice of WT, TC, ET and their `MEAN`,
            averaged over the seeds. Under `seeds` the mean of each.

        Raises:
            DataError: the weights that an arm starts from have seen a patient of `scored`; nothing is trained then.
        """
        for settings in arms.values():
            _check_unseen(settings.encoder_weights, scored)
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
        histories, metrics = {}, {}
        for name, listed in keys.items():
            histories[name] = self._done[listed[0]][0]
            metrics[name] = self._averaged([self._done[key][1] for key in listed])
        return histories, metrics

    def _train_in_turns(
        self, todo: Mapping[str, tuple[str, Settings]], train: Sequence[Packed], val: Sequence[Packed]
    ) -> None:
        """Train each for `turn_s`, then the next, until all are done, so that a slow phase of the machine affects all.

        A training resumes from `last.pt`. Its clock counts neither the other turns nor the trial steps of the preflight
        at the start of its own.
        """
        waiting, seconds = dict(todo), dict.fromkeys(todo, 0.0)
        bar = progress(None, what="training", total=round(sum(60 * own.minutes for _, own in todo.values())), unit="s")
        while waiting:
            for key, (title, settings) in list(waiting.items()):
                own = self._place(key, title)
                if self._turn(own, settings, train, val):
                    del waiting[key]
                row = pd.read_csv(own.history).iloc[-1]
                bar.update(round(row["seconds"] - seconds[key]))
                seconds[key] = row["seconds"]
                who = f"{len(val)} patients who choose" if len(val) > 1 else "patient who chooses"
                so_far = f"mean Dice {mean_dice_of_epoch(row):.3f} of the {who} the epoch"
                print(f"{title}: {duration(row['seconds'])} of training, {so_far}", flush=True)
        bar.close()

    def _turn(self, own: Run, settings: Settings, train: Sequence[Packed], val: Sequence[Packed]) -> bool:
        """Train for one turn; return whether the training is over."""
        begun = pd.read_csv(own.history)["seconds"].iloc[-1] if own.last.exists() and own.history.exists() else 0.0
        limit = 60 * settings.minutes or float("inf")

        def follow(history: list[dict]) -> None:
            if begun + self.turn_s <= history[-1]["seconds"] < limit:
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
        """Load the result of an earlier session; return whether there is one."""
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
            scores[case.id] = with_mean(dice)
        write_json(own.metrics, self._collect(scores))
        own.last.unlink()  # four times as large as the network, and no longer needed
        self._done[key] = pd.read_csv(own.history), read_json(own.metrics)

    def _collect(self, scores: Mapping[str, Mapping]) -> dict:
        return collect(scores, convention="brats2020", simulated=self.simulated, not_scored={}, leakage=[])

    def _averaged(self, seeds: Sequence[Mapping]) -> dict:
        """Average the scores of several seeds, patient by patient."""
        cases = {}
        for case_id, first in seeds[0]["cases"].items():
            found = [metrics["cases"][case_id] for metrics in seeds]
            cases[case_id] = {structure: {"dice": _average(found, structure)} for structure in first}
        means = [metrics["summary"][MEAN]["dice"]["mean"] for metrics in seeds]
        return self._collect(cases) | {"seeds": means}

    def _key(self, settings: Settings, *cases: Sequence[Packed]) -> str:
        """Digest of everything that determines the scores, including the machine's speed and precision."""
        start = weights_file(settings.encoder_weights)
        weights = hashlib.sha256(start.read_bytes()).hexdigest() if start.is_file() else ""
        hardware = machine.describe(self.device)
        speed = [hardware[name] for name in ("device", "precision", "cores")]
        return hashlib.sha256(repr([settings, weights, *map(fingerprint, cases), speed]).encode()).hexdigest()


def with_mean(dice: Mapping[str, float | None]) -> dict[str, dict]:
    """Return the Dice of WT, TC and ET and their `MEAN`, in the form of a patient's entry in `metrics.json`."""
    return {structure: {"dice": value} for structure, value in (*dice.items(), (MEAN, mean_dice(dice)))}


def _average(found: Sequence[Mapping], structure: str) -> float:
    return float(np.mean([scores[structure]["dice"] for scores in found]))


def _check_unseen(weights: str, scored: Sequence[Packed]) -> None:
    seen = {*chain.from_iterable(seen_by(weights).values())}
    if leaked := sorted(seen.intersection(case.id for case in scored)):
        raise DataError(
            f"{', '.join(leaked)}: the weights to start from were trained on, or chosen by, these patients, who are"
            " to be scored. Start from imagenet, none, or a checkpoint of other patients."
        )


def hold_out(
    train: Sequence[Packed], val: Sequence[Packed], *, n: int = SCORED, seed: int, groups: Mapping[str, str]
) -> tuple[list[Packed], list[Packed]]:
    """Move randomly drawn training patients to the validation patients until there are `n` to compare arms on.

    At most half of the training patients are moved. All scans of a person move together.

    Args:
        train, val: prepared cases.
        n: wanted number of patients to compare on.
        seed: of the draw.
        groups: person by case ID, as in splits.json.

    Returns:
        The patients left for training, and those to compare on, `val` first.
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
    """Plan trainings on `n` randomly drawn patients, who also choose the best epoch.

    One round is enough if `scored` has `ENOUGH_PAIRS` patients. Otherwise each of `ENOUGH_PAIRS` patients is left out
    once and scored by a network trained on `n` others. Without `n` others there is no round.

    Args:
        train: prepared cases to draw from.
        scored: prepared cases to compare on.
        n: number of patients to train on.
        seed: of the draw.
        groups: person by case ID, as in splits.json.

    Returns:
        For each round the patients to train on, to choose the epoch by, and to score.
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
    """Merge the scores of rounds on different patients, such as a leave-one-out, into those of one experiment."""
    together = {}
    for name, first in metrics[0].items():
        cases = {case_id: scores for found in metrics for case_id, scores in found[name]["cases"].items()}
        scores = collect(cases, convention="brats2020", simulated=first["simulated"], not_scored={}, leakage=[])
        together[name] = scores | {"seeds": np.mean([found[name]["seeds"] for found in metrics], axis=0).tolist()}
    return together


def starting_from(weights: str, base: Settings) -> Settings:
    """Return `base` with another network as its start: `simulated`, the packaged one, or a checkpoint.

    Modalities are matched by name, see `weights.fine_tune`.

    Raises:
        DataError: the file holds an encoder alone.
        SettingsError: the network is 3D and `base` is not, or the other way round.
        WeightsError: there is no such file.
    """
    state = read_weights(weights)
    if "settings" not in state:
        raise DataError(f"{weights} holds an encoder alone. Give a checkpoint of a whole network.")
    then = Settings.parse(**state["settings"])
    return replace(base, encoder=then.encoder, decoder=then.decoder, encoder_weights=weights)


def backbones(
    arms: Mapping[str, Settings], histories: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping], shape: tuple
) -> pd.DataFrame:
    """Compare the cost of each network, and the Dice that it reached in the same time.

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
