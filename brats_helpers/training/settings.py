"""What decides how a network is built and trained."""

from dataclasses import dataclass

from brats_helpers.training.model import sees_patches


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides how a network is built and trained. Every checkpoint carries them.

    Attributes:
        modalities: comma-separated, in the order of the input channels.
        encoder: an encoder of segmentation-models-pytorch, or one of `model.PATCH_NETWORKS`.
        encoder_weights: `imagenet`, `none`, a file with an encoder's, or a checkpoint to go on from.
        context_slices: neighbouring slices on each side fed as further channels.
        patch_size: edge in voxels of the patches that a 3D network sees; 0 for a network of slices.
        shrink: slices are seen at 1/shrink of their width and height, 1, 2, 4 or 8; see `model.SlicesUnet`.
        epochs: passes at most.
        minutes: stop after so many minutes of training and validation; 0 sets no limit. A training that is picked up
            takes the limit that is given then.
        batch_size: slices, or patches, a step, over all processes.
        slices_per_epoch: slices, or patches, an epoch; 0 takes as many as hold every voxel once.
        foreground: share of slices with tumour, or of patches drawn about it; negative keeps the data's own share.
        augment: `none`, `basic` or `strong`.
        class_weights: comma-separated, of background, NCR, ED and ET in the cross-entropy.
        lr: highest learning rate of AdamW.
        encoder_lr: the encoder's learning rate as a share of `lr`.
        weight_decay: of AdamW.
        warm_up: share of the training over which the learning rate rises; half a cosine takes it down from there.
        frozen_epochs: epochs at the start in which the encoder is frozen, statistics included.
        unfreeze_epochs: epochs after these in which it comes free piece by piece, the deepest layers first.
        frozen_statistics: the encoder's BatchNorm keeps the statistics of its pretraining while its weights are
            trained; without pretrained weights there are none to keep, and they are learned.
        ema: decay of the averaged weights that are validated and kept; 0 keeps the weights themselves.
        patience: stop after so many epochs without a better mean Dice of WT, TC and ET; 0 never stops.
        seed: of every random choice.
    """

    modalities: str
    encoder: str
    encoder_weights: str
    context_slices: int
    patch_size: int
    shrink: int
    epochs: int
    minutes: float
    batch_size: int
    slices_per_epoch: int
    foreground: float
    augment: str
    class_weights: str
    lr: float
    encoder_lr: float
    weight_decay: float
    warm_up: float
    frozen_epochs: int
    unfreeze_epochs: int
    frozen_statistics: bool
    ema: float
    patience: int
    seed: int

    def __post_init__(self):
        if sees_patches(self.encoder) != bool(self.patch_size):
            kind = "patches, so expected their edge" if sees_patches(self.encoder) else "slices, so expected 0"
            raise ValueError(f"patch_size {self.patch_size}: {self.encoder} sees {kind}.")
        if self.patch_size and self.shrink != 1:
            raise ValueError(f"shrink {self.shrink}: {self.encoder} sees patches, which are not shrunk: expected 1.")
