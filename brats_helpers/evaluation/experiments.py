"""Experiments of the same length on the same patients, scored alike, and what they say."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from brats_helpers import machine
from brats_helpers.data.cache import Packed
from brats_helpers.evaluation.inference import load_network, predict
from brats_helpers.files import write_json
from brats_helpers.labels import REGIONS, DataError
from brats_helpers.runs import Run
from brats_helpers.scoring.overlap import mean_dice
from brats_helpers.scoring.rules import region_dice
from brats_helpers.scoring.scores import collect
from brats_helpers.scoring.statistics import ENOUGH_PAIRS, compare, interval_text
from brats_helpers.training.checkpoint import fingerprint, learnt_from
from brats_helpers.training.loop import fit
from brats_helpers.training.model import build_model, summary
from brats_helpers.training.settings import Settings, shown

MEAN = "mean"
"""The structure that stands for the mean of WT, TC and ET of a patient."""
LEARNT = 0.05
"""Mean Dice of a region below which a network has not learnt it: who starts faster is no answer to what is better."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all experiments of a notebook have in common.

    Attributes:
        folder: each experiment gets a folder in it, and goes on from what it left there on such a machine and of the
            same patients: once scored, its `best.pt`, `history.csv` and `metrics.json`.
        device, workers: see `train.fit`.
        simulated: whether the patients are simulated.
    """

    folder: Path
    device: torch.device
    workers: int
    simulated: bool
    _done: dict = field(default_factory=dict)

    def try_out(
        self, arms: Mapping[str, Settings], train: Sequence[Packed], val: Sequence[Packed], test: Sequence[Packed]
    ) -> tuple[dict[str, pd.DataFrame], dict[str, dict]]:
        """Train and score each of `arms`; what two questions share, once.

        Args:
            arms: by a name for the reader the settings, whose `minutes` should be the same.
            train: prepared cases to learn from.
            val: prepared cases to choose the epoch by.
            test: prepared cases to score, with their labels.

        Returns:
            By the same names: the history of each training, see `train.fit`, and the scores in the form of
            `metrics.json`, with the Dice of WT, TC, ET and their `MEAN`.

        Raises:
            DataError: the weights that one starts from have seen a patient of `test`; nothing is trained then.
        """
        for settings in arms.values():
            _check_unseen(settings.encoder_weights, test)
        for name, settings in arms.items():
            key = self._key(settings, train, val, test)
            if key not in self._done:
                own = Run(self.folder / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', name)}-{key[:6]}")
                if own.metrics.exists():
                    print(f"{name}: scored before")
                else:
                    print(f"{name}:", flush=True)
                    fit(
                        settings,
                        train,
                        val,
                        own.folder,
                        device=self.device,
                        workers=self.workers,
                        checkpoint_minutes=0,
                        deterministic=False,
                        tracker="none",
                    )
                    write_json(own.metrics, self._score(own.best, test))
                    own.last.unlink()  # four times as big as the network, and of no more use
                self._done[key] = pd.read_csv(own.history), json.loads(own.metrics.read_text("utf-8"))
        found = {name: self._done[self._key(settings, train, val, test)] for name, settings in arms.items()}
        return {name: history for name, (history, _) in found.items()}, {name: own for name, (_, own) in found.items()}

    def _key(self, settings: Settings, *cases: Sequence[Packed]) -> str:
        """Changes with whatever scores follow from: patients' content and the machine's speed and precision as well."""
        start = Path(settings.encoder_weights)
        weights = hashlib.sha256(start.read_bytes()).hexdigest() if start.is_file() else ""
        hardware = machine.describe(self.device)
        speed = [hardware[name] for name in ("device", "precision", "cores")]
        return hashlib.sha256(repr([settings, weights, *map(fingerprint, cases), speed]).encode()).hexdigest()

    def _score(self, checkpoint: Path, test: Sequence[Packed]) -> dict:
        network = load_network(checkpoint, device=self.device)
        scores = {}
        for case in test:
            classes = predict([network], case, flips=False).argmax(axis=1).astype(np.uint8)
            dice = region_dice(classes, np.asarray(case.labels), convention="brats2020")
            scores[case.id] = {name: {"dice": value} for name, value in (dice | {MEAN: mean_dice(dice)}).items()}
        return collect(scores, convention="brats2020", simulated=self.simulated, not_scored={}, leakage=[])


def _check_unseen(weights: str, test: Sequence[Packed]) -> None:
    if leaked := sorted({*learnt_from(weights)}.intersection(case.id for case in test)):
        raise DataError(
            f"{', '.join(leaked)}: the weights to start from were trained on, or chosen by, these patients, who are"
            " to score them. Start from imagenet, none, or a checkpoint of other patients."
        )


def going_on_from(checkpoint: Path, base: Settings) -> Settings:
    """`base`, but with the network of a checkpoint to start from.

    Raises:
        DataError: there is no such checkpoint, or its network was shown something else than `base` shows.
    """
    known = load_network(checkpoint, device=torch.device("cpu")).settings
    names = ("modalities", "context_slices", "patch_size")
    now = {name: getattr(base, name) for name in names}
    differ = [f"{name} {shown(known[name])}, not {shown(now[name])}" for name in names if known[name] != now[name]]
    if differ:
        raise DataError(
            f"{checkpoint} learnt with {'; '.join(differ)}: it would not know what it is shown here. Give one that"
            " learnt as these experiments do."
        )
    return replace(base, encoder=known["encoder"], encoder_weights=str(checkpoint))


def answers(metrics: Mapping[str, Mapping]) -> list[str]:
    """One sentence for each experiment but the first: how it compares with the first, patient by patient.

    It is decided where there are `ENOUGH_PAIRS` patients, both have `LEARNT` each region, and the 95 % interval of the
    mean difference does not hold 0. The interval is over patients: each network was trained once.

    Args:
        metrics: by name, scores of the same patients, as `Bench.try_out` gives them.
    """
    first, *others = metrics
    if not others:
        return [f"Not asked by this run: there is nothing to compare {first} with."]
    sentences = []
    for other in others:
        result = compare(metrics[first], metrics[other])
        change = result["differences"][MEAN]["dice"]
        low, high = change["ci95"]
        patients = f"{'simulated ' * result['simulated']}patient{'s' * (result['n'] > 1)}"
        fresh = [
            f"{name} has not learnt {regions} yet (a mean Dice below {LEARNT:g})"
            for name in (first, other)
            if (regions := _unlearnt(metrics[name]))
        ]
        if result["n"] < ENOUGH_PAIRS:
            verdict = f"not decided by this run, which has fewer than {ENOUGH_PAIRS} patients to score"
        elif fresh:
            verdict = f"not decided by this run: {' and '.join(fresh)}"
        elif low <= 0 <= high:
            verdict = "not decided by this run"
        else:
            verdict = "better" if low > 0 else "worse"
        dice = f"{_mean(metrics[other])} against {_mean(metrics[first])}, {change['mean_difference']:+.3f}"
        sentences.append(
            f"{other} against {first}: {verdict}. Mean Dice of WT, TC and ET {dice}"
            f" ({interval_text((low, high), result['n'], '+.3f')}), {result['n']} {patients}."
        )
    return sentences


def _mean(metrics: Mapping) -> str:
    return f"{metrics['summary'][MEAN]['dice']['mean']:.3f}"


def _unlearnt(metrics: Mapping) -> str:
    """The regions that a network has not learnt."""
    summary = metrics["summary"]
    return " and ".join(name for name in REGIONS if name in summary and summary[name]["dice"]["mean"] < LEARNT)


def keep_answers(run: Run, name: str, metrics: Mapping[str, Mapping], *, besides: Sequence[str] = ()) -> None:
    """Print the `answers` of a question and what is said `besides`, kept in `answers.json` under its figure's name."""
    sentences = [*answers(metrics), *besides]
    known = json.loads(run.answers.read_text("utf-8")) if run.answers.exists() else {}
    write_json(run.answers, known | {name: sentences})
    print(*sentences, sep="\n")


def backbones(
    arms: Mapping[str, Settings], histories: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping], shape: tuple
) -> pd.DataFrame:
    """What each network costs, and what it reached in the same time.

    Args:
        arms, histories, metrics: see `Bench.try_out`.
        shape: (channels, height, width) of one slice.

    Returns:
        A row an arm: its weights, parameters and multiply-adds of one slice in millions, slices a second in training,
        and the mean Dice of WT, TC and ET with its 95 % interval.
    """
    rows = {}
    for name, settings in arms.items():
        network = {"encoder": settings.encoder, "patch_size": settings.patch_size, "decoder": settings.decoder}
        cost = summary(build_model(**network, weights="none", in_channels=shape[0]), shape)
        dice = metrics[name]["summary"][MEAN]["dice"]
        rows[name] = {
            "weights at the start": settings.encoder_weights,
            "parameters (M)": cost["parameters"] / 1e6,
            "multiply-adds (M)": cost["multiply_adds"] / 1e6,
            "slices per second": histories[name]["slices_per_s"].mean(),
            "mean Dice": dice["mean"],
            "95 % interval": interval_text(dice["ci95"], dice["n"]),
        }
    return pd.DataFrame(rows).T


def merged(metrics: Sequence[Mapping[str, Mapping]]) -> dict[str, dict]:
    """Scores of rounds on different patients, such as a leave-one-out, as those of one experiment each."""
    return {
        name: collect(
            {case_id: scores for found in metrics for case_id, scores in found[name]["cases"].items()},
            convention="brats2020",
            simulated=metrics[0][name]["simulated"],
            not_scored={},
            leakage=[],
        )
        for name in metrics[0]
    }


def rounds_of_few(
    train: Sequence[Packed], val: Sequence[Packed], test: Sequence[Packed], *, n: int, groups: Mapping[str, str]
) -> list[tuple[list[Packed], list[Packed], list[Packed]]]:
    """Train, val and test of trainings that learn from `n` patients, who also choose the epoch: nobody else is asked.

    One round, on the first `n` of train, where test has `ENOUGH_PAIRS` patients. Else each of so many, those of test
    first, is left out once and scored by a network of `n` others. No rounds where there are not `n` others.

    Args:
        train, val, test: prepared cases with their labels.
        groups: by ID what names of one person have in common, as in splits.json.
    """
    if len(test) >= ENOUGH_PAIRS:
        return [(list(train[:n]), list(train[:n]), list(test))] if len(train) >= n else []
    rounds = []
    for case in [*test, *val, *train][:ENOUGH_PAIRS]:
        person = groups.get(case.id, case.id)
        others = [other for other in [*train, *val, *test] if groups.get(other.id, other.id) != person][:n]
        if len(others) < n:
            return []
        rounds.append((others, others, [case]))
    return rounds
