"""What is embedded: GANs of digits, and real images of digits that they are to learn.

The default is a small StyleGAN2 of the digits 0 to 8, its critic, a digit classifier, and real nines. For several GANs
at once there are `SOURCES`, {digits: file}: three that began as it and know the digits {0, 1, 2}, {3, 4, 5} and
{6, 7, 8}, without critics; and real fours and sevens, of which the second and the third one know one each. These three
are float16 in their files; `load_generator` makes them float32.

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
SOURCES = {
    (0, 1, 2): FOLDER / "digits_012.safetensors",
    (3, 4, 5): FOLDER / "digits_345.safetensors",
    (6, 7, 8): FOLDER / "digits_678.safetensors",
}
FOURS_AND_SEVENS = FOLDER / "fours_and_sevens.npz"


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


def fours_and_sevens(share: float, split: str = "target") -> torch.Tensor:
    """Real fours and sevens, uint8 [N, 1, 32, 32]: round(share * N) fours, then sevens.

    N is 100 for the split "target" and 200 for "validation", both from MNIST's training images, which the GANs of
    `SOURCES` have seen, and 300 for "test", from its test images. The splits have no image in common. The fours of a
    smaller share are among those of a larger one.

    ValueError: another split, or a share that is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share!r}")
    with np.load(FOURS_AND_SEVENS) as arrays:
        splits = sorted({name.split("_")[0] for name in arrays})
        if split not in splits:
            raise ValueError(f"split must be one of {splits}, got {split!r}")
        fours, sevens = arrays[f"{split}_fours"], arrays[f"{split}_sevens"]
    count = round(share * len(fours))
    return torch.from_numpy(np.concatenate([fours[:count], sevens[: len(sevens) - count]]))
