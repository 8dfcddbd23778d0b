"""The embedded default: a small StyleGAN2 of the digits 0 to 8, its critic, a digit classifier, and real nines.

`bench/train_digits.py` made all of it. `record.json` says with which seed, steps and results, and `NOTICE` has the
licences.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from .classifier import DigitClassifier

FOLDER = Path(__file__).parent
GENERATOR = FOLDER / "digits_generator.safetensors"
CRITIC = FOLDER / "digits_critic.safetensors"
CLASSIFIER = FOLDER / "digits_classifier.safetensors"
TARGET = FOLDER / "nines"
NINES = FOLDER / "nines.npz"


def classifier() -> DigitClassifier:
    """The digit classifier, in eval mode."""
    model = DigitClassifier()
    model.load_state_dict(load_file(CLASSIFIER))
    return model.eval()


def nines(split: str) -> torch.Tensor:
    """Real nines, uint8 [N, 1, 32, 32]: "validation" and "floor" from MNIST's training images, "test" from its test
    images. None of them is in the target folder `TARGET`."""
    with np.load(NINES) as arrays:
        if split not in arrays:
            raise ValueError(f"split must be one of {sorted(arrays)}, got {split!r}")
        return torch.from_numpy(arrays[split])
