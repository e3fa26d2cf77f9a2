"""nnU-Net's own trainer under a clock: found by nnU-Net through nnUNet_extTrainer, with BENCHMARK_SECONDS set.

Network, loss, augmentation, sampling, SGD and polynomial learning rate are nnU-Net's; only, the learning rate falls
with the seconds instead of the epochs, an epoch is validated by 2 batches, not 50, and the training ends when the
seconds are over.
"""

import os
import time

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerSeconds(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.seconds = float(os.environ["BENCHMARK_SECONDS"])
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 250, 2
        self.num_epochs, self.steps = 10**6, 0

    def run_training(self):
        self.on_train_start()
        self.began = time.perf_counter()
        while self.spent() < 1:
            self.on_epoch_start()
            self.on_train_epoch_start()
            losses = []
            while len(losses) < self.num_iterations_per_epoch and (self.spent() < 1 or not losses):
                losses.append(self.train_step(next(self.dataloader_train)))
            self.on_train_epoch_end(losses)
            with torch.no_grad():
                self.on_validation_epoch_start()
                found = [
                    self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)
                ]
                self.on_validation_epoch_end(found)
            self.on_epoch_end()
        print(f"steps: {self.steps}", flush=True)
        self.on_train_end()

    def spent(self) -> float:
        return (time.perf_counter() - self.began) / self.seconds

    def train_step(self, batch):
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * max(1 - self.spent(), 0) ** 0.9
        return super().train_step(batch)

    def perform_actual_validation(self, save_probabilities=False):
        """The benchmark scores the test patients; nothing is chosen by the validation patients' full volumes."""
