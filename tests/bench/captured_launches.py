"""What whole steps of a training that is captured ask of the host: prints it as JSON, for test_captured_launches.py.

The trainer is that of `transfer(cuda_graphs=True)`, and the steps that are watched are replays of the stand-in for its
graphs, which run what a graph would hold. All kernels are launched as on a GPU, by bench/launch_driver.py.
"""

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import torch
from graphs_on_cpu import GraphsOnCPU
from launch_driver import HostWatch, install, recording

from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator
from minegan_fast.ops import row_update
from minegan_fast.training import TransferConfig
from minegan_fast.training.captured import WARM_UP
from minegan_fast.training.images import to_float
from minegan_fast.training.kernel_loss import KernelLoss
from minegan_fast.training.loss_features import LossFeatures
from minegan_fast.training.trainer import Trainer

SIZES = {"resolution": 8, "channel_base": 64, "channel_max": 8}
SETTINGS = {"batch": 4, "score_samples": 4, "lr": 2e-3, "r1_every": 2, "path_length_every": 2, "density": 0.3}
RECIPES = {
    "critic": {},
    "critic in bf16": {"precision": "bf16"},
    "critic in fp16": {"precision": "fp16"},
    "wgan": {"loss": "wgan"},
    "both losses": {"mmd_weight": 0.5},
    "sparse critic": {"train_critic": "sparse"},
    "elastic weights": {"method": "ewc"},  # which has no miner, and so no stage 1
    "kernel": {"loss": "mmd"},
    "kernel of another range": {"loss": "mmd", "normalize": "imagenet"},
}


def make(generator, critic, images, stage: str, normalize: str = "[-1,1]", **settings) -> Trainer:
    config = TransferConfig(**SETTINGS | settings)
    kernel = None
    if config.kernel:
        features = LossFeatures(critic, name="critic", probe=to_float(images[:2]), normalize=normalize)
        kernel = KernelLoss(features, images)
    networks = copy.deepcopy((generator, critic))
    trainer = Trainer(config, *networks, images, "cpu", kernel=kernel, graphs=GraphsOnCPU())
    if stage == "finetuning":
        trainer.select()
    return trainer


def watched(trainer: Trainer) -> dict:
    """A step with the lazy penalties, and one without."""
    for number in range(2 * (WARM_UP + 2)):
        trainer.step(number)
    found = {}
    for name, number in (("lazy penalties", 20), ("plain", 21)):
        trainer.captured.graphs.calls.clear()
        with recording() as launches, HostWatch() as watch:
            trainer.step(number)
        found[name] = {"waits": watch.waits, "copies": watch.copies, "launches": len(launches)}
        found[name] |= {"faults": [x.specialisation.fault for x in launches if x.specialisation.fault]}
        found[name] |= {"calls": trainer.captured.graphs.calls[:], "why_eager": trainer.why_eager}
    return found


def planted(trainer: Trainer, fault) -> dict:
    forward = trainer.generator.forward

    def faulty(*args, **keywords):
        images = forward(*args, **keywords)
        fault(images)
        return images

    trainer.generator.forward = faulty
    return watched(trainer)


def main():
    torch.manual_seed(0)
    networks = StyleGAN2Generator(latent_dim=8, mapping_layers=2, **SIZES).eval(), StyleGAN2Discriminator(**SIZES)
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    trainers = {
        f"{name}, {stage}": make(*networks, images, stage, **settings)
        for name, settings in RECIPES.items()
        for stage in ("mining", "finetuning")
        if stage == "finetuning" or "method" not in settings
    }
    faults = {
        "item": lambda x: x.sum().item(),
        "tensor": lambda x: torch.tensor([1.0]),
        "zeros": lambda x: torch.zeros(3),
    }
    faulty = {name: make(*networks, images, "mining") for name in faults}
    install()
    row_update._placed = lambda hyper, device: hyper  # a learning rate on a CPU would be read; on a GPU it stays
    found = {name: watched(trainer) for name, trainer in trainers.items()}
    found["planted"] = {name: planted(trainer, faults[name]) for name, trainer in faulty.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
