"""The state of a training: the network, its EMA, the optimiser and the loss."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from timm.layers import convert_sync_batchnorm
from torch import nn

from brats_helpers.training.augment import augment, generators, seed_of
from brats_helpers.training.batch import Batch
from brats_helpers.training.checkpoint import save_file, versions
from brats_helpers.training.ema import MovingAverage
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.model import build_model, freeze_encoder, train_mode
from brats_helpers.training.progress import Progress, publish
from brats_helpers.training.settings import Settings
from brats_helpers.training.steps import FiniteCheck, fitted, gradients

LOOK_EVERY = 16
"""Steps between two synchronisations with a GPU or with the other processes."""


def make_accelerator(device: torch.device, *, tracker: str, folder: Path) -> Accelerator:
    """Set up accelerate for the device and the processes. Precision, sampling and loss scale are the suite's own."""
    if "WORLD_SIZE" not in os.environ:
        forget_device()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        # Frozen layers get no gradients, nor do the last layers of some encoders, which a U-Net does not use.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
    )


def forget_device() -> None:
    """Make accelerate forget the device of an earlier training in this process.

    There is no public way. If the private one disappears, a process merely cannot change its device.
    """
    reset = getattr(AcceleratorState, "_reset_state", None)
    if reset:
        reset(reset_partial_state=True)


def frozen_share(epoch: int, settings: Settings) -> float:
    """Share of the encoder's layers that are frozen in `epoch` (from 1). It falls from all to none."""
    thawed = (epoch - settings.frozen_epochs) / (settings.unfreeze_epochs + 1)
    return 1 - min(max(thawed, 0.0), 1.0)


@dataclass
class Session:
    """A training in progress.

    Attributes:
        settings: how to train.
        folder: of its files.
        origin: the entries that all its checkpoints share.
        progress: see `progress.Progress`.
        accelerator: of the training.
        network: on the device.
        average: its EMA.
        criterion: the loss.
        optimizer: of the network, one group for the encoder and one for the rest.
        precision: a key of `steps.DTYPES`.
        micro_batch: samples at a time.
    """

    settings: Settings
    folder: Path
    origin: dict
    progress: Progress
    accelerator: Accelerator
    network: nn.Module
    average: MovingAverage
    criterion: CrossEntropyDice
    optimizer: torch.optim.Optimizer
    precision: str = "float32"
    micro_batch: int = 1

    @classmethod
    def build(
        cls, settings: Settings, folder: Path, origin: dict, progress: Progress, accelerator: Accelerator
    ) -> "Session":
        """Build the network, its EMA, the loss and the optimiser. `start` completes the session."""
        device = accelerator.device
        torch.manual_seed(settings.seed)
        network = build_model(
            encoder=settings.encoder,
            weights=settings.encoder_weights,
            in_channels=origin["in_channels"],
            patch_size=settings.patch_size,
            decoder=settings.decoder,
            modalities=settings.modalities,
        ).to(device)
        encoder = dict.fromkeys(network.encoder.parameters())
        rest = [weight for weight in network.parameters() if weight not in encoder]
        groups = [
            {"params": list(encoder), "share": settings.encoder_lr},
            {"params": rest, "share": 1.0},
        ]
        # Fused AdamW skips steps whose gradients are not finite without waiting for the GPU.
        fused = {"fused": True} if device.type == "cuda" else {}
        return cls(
            settings,
            folder,
            origin,
            progress,
            accelerator,
            network,
            MovingAverage(network, settings.ema),
            CrossEntropyDice(class_weights=settings.class_weights).to(device),
            torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, **fused),
        )

    def start(self, saved: dict | None) -> None:
        """Start or, from the content of `last.pt`, resume. Precision and micro-batch must have been set."""
        accelerator = self.accelerator
        if accelerator.num_processes > 1 and self.device.type == "cuda":
            self.network = convert_sync_batchnorm(self.network)
        self.model = accelerator.prepare(self.network)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if saved:
            self.network.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["averaged"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.scaler.is_enabled() and saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
        self.look_every = 1 if self.device.type == "cpu" and accelerator.num_processes == 1 else LOOK_EVERY
        self.check = FiniteCheck(every=self.look_every, scaled=self.scaler.is_enabled())
        self.loss_sum = torch.tensor(self.progress.loss_sum, dtype=torch.float64, device=self.device)
        self.began = time.perf_counter() - self.progress.seconds
        self.agreed_s = self.progress.seconds

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def ready(self, network: nn.Module, epoch: int) -> None:
        """Put a network into training mode and freeze as much of its encoder as the settings say for this epoch."""
        settings = self.settings
        freeze_encoder(network, frozen_share(epoch, settings))
        train_mode(network, frozen_statistics=settings.frozen_statistics and settings.encoder_weights != "none")

    def augmented(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and masks of a batch on the device, augmented by the samples' own seeds."""
        batch = batch.to(self.device)
        return augment(
            batch.images,
            batch.masks,
            strength=self.settings.augment,
            modalities=len(self.settings.modalities),
            modality_dropout=self.settings.modality_dropout,
            generators=generators(batch.seeds),
        )

    def step(self, batch: Batch) -> None:
        """Augment a batch and take one optimiser step."""
        progress = self.progress
        # Dropout depends only on the seed and the position in the training.
        torch.manual_seed(seed_of(self.settings.seed, progress.epoch, progress.step, self.accelerator.process_index))
        images, masks = self.augmented(batch)
        loss = self.gradients(images, masks)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.check.add(progress.step, loss, norm, batch.index)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(self.network, made=norm.isfinite() if self.scaler.is_enabled() else None)
        self.loss_sum += loss
        progress.step += 1

    def gradients(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradients of the batch. A single process reduces the micro-batch if memory runs out."""

        def work(micro_batch: int) -> torch.Tensor:
            return gradients(
                self.model,
                self.loss,
                images,
                masks,
                accelerator=self.accelerator,
                scaler=self.scaler,
                precision=self.precision,
                micro_batch=micro_batch,
            )

        if self.accelerator.num_processes > 1:
            return work(self.micro_batch)
        loss, self.micro_batch = fitted(work, self.micro_batch)
        return loss

    def loss(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The loss of the whole batch. Its gradients are those of this process's samples; processes average them."""
        own = self.criterion.sums(logits, masks)
        whole = self.accelerator.reduce(own.detach(), reduction="sum")
        return self.criterion.value(whole + self.accelerator.num_processes * (own - own.detach()))

    def set_lr(self, factor: float) -> None:
        """Set the learning rate to `factor` times the highest; the encoder gets its share of that."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * group["share"] * factor

    def seconds(self, *, exact: bool = False) -> float:
        """Seconds of training so far, the same in all processes.

        With several processes, the main one's clock is read every `LOOK_EVERY` steps, or at once if `exact`.
        """
        now = time.perf_counter() - self.began
        if self.accelerator.num_processes == 1:
            return now
        if exact or self.progress.step % self.look_every == 0:
            self.agreed_s = broadcast(torch.tensor(now, dtype=torch.float64, device=self.device)).item()
        return self.agreed_s

    def save(self) -> None:
        """Write `last.pt`, from which the training can resume."""
        self.check.look()
        progress = self.progress
        progress.seconds = self.seconds(exact=True)
        progress.loss_sum = self.loss_sum.item()
        if not self.accelerator.is_main_process:
            return
        state = {
            "versions": versions(),
            "model": self.network.state_dict(),
            "averaged": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(progress),
        }
        save_file(self.folder / "checkpoints" / "last.pt", self.origin | state)

    def publish(self) -> None:
        """Update `best.pt` and `history.csv` to agree with `last.pt`."""
        if self.accelerator.is_main_process:
            publish(self.folder, self.progress, self.origin, self.average.network.state_dict())
