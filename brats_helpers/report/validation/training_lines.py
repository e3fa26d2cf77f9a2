"""Lines about the network and its training."""

import hashlib
import math
from collections.abc import Mapping

from brats_helpers.labels import CLASSES
from brats_helpers.log import duration
from brats_helpers.report.validation.facts import Mark, NotDone, RunFacts, line, mark
from brats_helpers.scoring.overlap import mean_dice_of_epoch

MODEL, TRAINING = "Model architecture", "Training loop"
_RELATED = 0.5  # least cosine of trained and pretrained filters; unrelated filters have 0.00
_CLOSE, _FAR = 1.25, 2.0  # factors between a measurement and its estimate


@line("input-channels", MODEL, "The number of input channels is modalities times slices")
def _inputs(facts: RunFacts) -> tuple[Mark, str]:
    settings, channels = facts.checkpoint["settings"], facts.checkpoint["in_channels"]
    modalities, slices = len(settings["modalities"]), 2 * settings["context_slices"] + 1
    evidence = f"best.pt: {modalities} modalities, {slices} slice{'s' * (slices > 1)} at a time, {channels} channels"
    return mark(channels == modalities * slices), evidence


@line("network-shape", MODEL, "The network is the named one, with one output per class")
def _outputs(facts: RunFacts) -> tuple[Mark, str]:
    import torch

    from brats_helpers.training.model import build_model

    saved, settings = facts.checkpoint, facts.checkpoint["settings"]
    named = {name: settings[name] for name in ("encoder", "patch_size", "decoder")}
    with torch.device("meta"):  # shapes alone
        network = build_model(**named, weights="none", in_channels=saved["in_channels"])
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in saved["model"].items()}
    differ = [name for name in expected | found if expected.get(name) != found.get(name)]
    evidence = f"best.pt: {len(found)} tensors, as in {settings['encoder']} with outputs for {', '.join(CLASSES)}"
    return mark(not differ), f"{evidence}, but {', '.join(differ[:3])}" if differ else evidence


@line("weights-finite", MODEL, "Every weight is finite")
def _finite(facts: RunFacts) -> tuple[Mark, str]:
    weights = facts.checkpoint["model"].values()
    finite = all(bool(tensor.isfinite().all()) for tensor in weights)
    size = sum(tensor.numel() for tensor in weights)
    return mark(finite), f"best.pt: {facts.checkpoint['settings']['encoder']}, {size:,} weights and statistics"


@line("weights-imagenet", MODEL, "The encoder's weights come from ImageNet")
def _imagenet(facts: RunFacts) -> tuple[Mark, str]:
    saved, settings = facts.checkpoint, facts.checkpoint["settings"]
    if settings["encoder_weights"] != "imagenet":
        raise NotDone(f"training started from encoder_weights {settings['encoder_weights']}")

    import torch

    from brats_helpers.training.model import build_model
    from brats_helpers.training.weights import WeightsError, in_slices

    encoder = in_slices(settings["encoder"])  # an ACS network has the weights of its network of slices
    prefix = "encoder." if encoder == settings["encoder"] else "network.encoder."
    try:
        network = build_model(encoder=encoder, weights="imagenet", in_channels=saved["in_channels"])
    except WeightsError as error:
        return Mark.PARTLY, f"the ImageNet weights for comparison cannot be loaded: {error}"
    reference = network.encoder.state_dict()
    own = {name: saved["model"][prefix + name] for name in reference}
    equal = sum(torch.equal(own[name], tensor) for name, tensor in reference.items())
    cosine = torch.nn.functional.cosine_similarity(_filters(own), _filters(reference), dim=0).item()
    frozen = settings["frozen_epochs"] >= saved["epoch"]
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in reference.values()))
    evidence = (
        f"ImageNet's {settings['encoder']} has the fingerprint {digest.hexdigest()[:16]}; in best.pt {equal} of"
        f" {len(reference)} tensors equal it bit for bit, the cosine of the filters is {cosine:.3f} (unrelated: 0.00);"
        f" the encoder was {'frozen until then' if frozen else 'fine-tuned'}"
    )
    return mark(equal == len(reference) if frozen else cosine > _RELATED), evidence


def _filters(state: Mapping):
    """All convolution filters of an encoder as one vector."""
    import torch

    return torch.cat([tensor.flatten() for tensor in state.values() if tensor.ndim == 4])


@line("loss-fell", TRAINING, "The training loss is finite and fell")
def _fell(facts: RunFacts) -> tuple[Mark, str]:
    losses = [row["train_loss"] for row in facts.history]
    if len(losses) == 1:
        raise NotDone("only one epoch")
    finite = all(math.isfinite(value) for row in facts.history for value in row.values())
    evidence = f"history.csv: {losses[0]:.3f} in epoch 1, {losses[-1]:.3f} in epoch {len(losses)}"
    return mark(finite and losses[-1] < losses[0]), evidence


def best_epoch(history: list[dict[str, float]]) -> tuple[int, float]:
    """The first epoch with the highest mean validation Dice of the regions, and that Dice."""
    means = list(map(mean_dice_of_epoch, history))
    return means.index(max(means)) + 1, max(means)


@line("best-epoch", TRAINING, "The saved epoch is the best on validation")
def _kept(facts: RunFacts) -> tuple[Mark, str]:
    best, dice = best_epoch(facts.history)
    saved, recorded = facts.checkpoint["epoch"], facts.manifest["best_epoch"]
    evidence = f"history.csv: epoch {best}, mean Dice {dice:.3f}; best.pt: epoch {saved}"
    return mark(best == saved == recorded), f"{evidence}; manifest.json: epoch {recorded}"


@line("training-stopped", TRAINING, "Training ended by one of its stopping rules")
def _stopped(facts: RunFacts) -> tuple[Mark, str]:
    settings, n = facts.checkpoint["settings"], len(facts.history)
    epochs, patience, minutes = (settings[name] for name in ("epochs", "patience", "minutes"))
    best, _ = best_epoch(facts.history)
    seconds = facts.history[-1]["seconds"]
    limits = f"{epochs} epochs, patience {patience or 'off'}, {minutes or 'any number of'} minutes"
    if n == epochs:
        reason = f"all {n} epochs are done"
    elif patience and n - best == patience:
        reason = f"{patience} epochs without progress after epoch {best}"
    elif minutes and seconds >= 0.99 * 60 * minutes:
        reason = f"the time was up after {duration(seconds)}"
    else:
        return Mark.FAILED, f"no stopping rule explains the end after epoch {n}; best epoch {best}; limits: {limits}"
    return Mark.HELD, f"{reason}; best epoch {best}; limits: {limits}"


@line("learning-rate", TRAINING, "The learning rate decayed to its final value")
def _decayed(facts: RunFacts) -> tuple[Mark, str]:
    rates = [row["lr"] for row in facts.history]
    if len(rates) == 1:
        raise NotDone("only one epoch")
    evidence = f"history.csv, at the ends of epochs: highest {max(rates):.1e}, last {rates[-1]:.1e}"
    return mark(rates[-1] < 0.05 * max(rates), Mark.PARTLY), evidence


def predicted_and_measured(manifest: Mapping) -> dict[str, tuple[float, float]]:
    """The preflight's estimates and the measurements, by name, where the manifest has both."""
    preflight = manifest.get("preflight", {})
    predicted, measured = preflight.get("predicted", {}), preflight.get("measured", {})
    return {
        name: (float(value), float(measured[name]))
        for name, value in predicted.items()
        if isinstance(value, int | float) and isinstance(measured.get(name), int | float)
    }


@line("preflight", TRAINING, "Time and memory matched the preflight's estimate")
def _predicted(facts: RunFacts) -> tuple[Mark, str]:
    compared = predicted_and_measured(facts.manifest)
    if not compared:
        raise NotDone("manifest.json has no estimate with its measurement")
    # Early stopping may end a training sooner than estimated.
    counting = {name: pair for name, pair in compared.items() if name not in ("epochs", "seconds")}
    if not counting:
        raise NotDone("the preflight estimated nothing that is independent of early stopping")
    factor = max(max(pair) / max(min(pair), 1e-9) for pair in counting.values())
    evidence = "; ".join(f"{name}: predicted {p:.4g}, measured {m:.4g}" for name, (p, m) in counting.items())
    evidence += f"; held up to a factor of {_CLOSE:g}, partly up to {_FAR:g}"
    if factor > _FAR:
        return Mark.FAILED, evidence
    return mark(factor <= _CLOSE, Mark.PARTLY), evidence
