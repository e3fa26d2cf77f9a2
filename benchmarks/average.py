"""Average the weights of two checkpoints of the same network, such as a fine-tuned one and the one it started from.

Between simulated and real patients such a mean can be better than both (Wortsman et al., Robust fine-tuning of
zero-shot models, 2022). `simulated` stands for the packaged network. Everything but the weights is the first one's.

    python benchmarks/average.py runs/pretrained/checkpoints/best.pt simulated --out runs/averaged/checkpoints/best.pt
"""

import argparse
from pathlib import Path

from brats_helpers.training.checkpoint import read_checkpoint, save_file, weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="FILE", type=Path)
    parser.add_argument("second", metavar="FILE")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    options = parser.parse_args()
    first, second = read_checkpoint(options.first), read_checkpoint(weights_file(options.second))
    weights = {}
    for name, weight in first["model"].items():
        other = second["model"][name].to(weight.dtype)
        weights[name] = weight.lerp(other, 0.5) if weight.is_floating_point() else weight
    save_file(options.out, first | {"model": weights})


if __name__ == "__main__":
    main()
