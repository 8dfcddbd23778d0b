"""What is chosen for a user who does not choose: the defaults of each loss, and published methods as settings.

All methods are this one recipe: stage 1 trains a miner before the frozen generator, stage 2 trains some of the
generator too. They differ in whether there is a miner, and in what of the generator trains:

    scratch       all of a generator with new weights; no miner
    transfergan   all; no miner                        Wang et al. 2018, arXiv 1805.01677
    freezed       all, the critic's lower blocks frozen; no miner       Mo et al. 2020, arXiv 2002.10964
    scale_shift   gains and biases; no miner           Noguchi and Harada 2019, arXiv 1904.01774
    ewc           all, held to the source by its Fisher information; no miner     Li et al. 2020, arXiv 2012.02780
    freeze_top    all but the neurons that matter most for the target; no miner   after AdAM, Zhao et al. 2022,
                                                                                   arXiv 2210.16559
    mined         nothing: stage 1 alone               MineGAN without finetuning, Wang et al. 2020, arXiv 1912.05270
    minegan       all                                  MineGAN
    minegan++     the neurons that matter for the target                Wang et al. 2021, arXiv 2104.13742
    random        random neurons, as many parameters: a control of minegan++
    shuffled      random neurons, as many of every layer as minegan++ chooses: its stricter control
"""

from typing import Any

import torch
from torch import nn

from .._torch import BATCH_NORMS
from .generators import Generator, networks, own_samples
from .randomness import keep_and_set_random_state

KERNEL = "mmd"
CALIBRATION = 8  # batches that give new batch norms their statistics

# Defaults by the loss of the stage that a setting belongs to. `TransferConfig` makes the other learning rates of lr.
_ADVERSARIAL = {
    "miner_steps": 1000, "steps": 2000, "batch": 16, "lr": 2e-3, "beta1": 0.0, "ema_decay": 0.998, "prior_weight": 0.1,
}  # fmt: skip
_KERNEL = {
    "miner_steps": 120, "steps": 480, "batch": 32, "lr": None, "beta1": 0.9, "ema_decay": 0.98, "prior_weight": 0.003,
}  # fmt: skip

_WITHOUT_MINER = {"train_miner": False, "mining_steps": 0}
_DENSE = {"density": 1.0}

METHODS: dict[str, dict[str, Any]] = {
    "minegan++": {},
    "random": {"criterion": "random"},
    "shuffled": {},
    "minegan": _DENSE,
    "mined": {"finetune_steps": 0},
    "transfergan": {**_WITHOUT_MINER, **_DENSE},
    "scratch": {**_WITHOUT_MINER, **_DENSE},
    "freezed": {**_WITHOUT_MINER, **_DENSE, "train_critic": "freezed"},
    "scale_shift": {**_WITHOUT_MINER, "affine": True},
    "ewc": {**_WITHOUT_MINER, **_DENSE},
    "freeze_top": {**_WITHOUT_MINER, "policy": "freeze_top", "density": 0.5},
}

# Settings for which no method and no loss has a default of its own.
_COMMON = {
    "train_miner": True, "density": 0.1, "budget": "parameters", "criterion": "fisher", "scope": "global",
    "policy": "train_top", "affine": False, "train_critic": "all",
}  # fmt: skip


def kernel_lr(generator: nn.Module) -> float:
    """The learning rate under mmd. Equalised weights (Progressive GAN and later) are of size 1, and steps with them."""
    families = {getattr(network, "family", None) for network in networks(generator)}
    return 1.6e-2 if families <= {"pgan", "stylegan", "stylegan2"} else 2e-3


def chosen(method: str, mining_loss: str, finetune_loss: str) -> dict[str, Any]:
    """The value of every setting that a user left open. An lr of None follows from the generator, by `kernel_lr`."""
    mining, finetuning = (_KERNEL if loss == KERNEL else _ADVERSARIAL for loss in (mining_loss, finetune_loss))
    steps = {"mining_steps": mining["miner_steps"], "finetune_steps": finetuning["steps"]}
    shared = {name: finetuning[name] for name in ("batch", "lr", "beta1", "ema_decay", "prior_weight")}
    return {**_COMMON, **shared, **steps, **METHODS[method]}


@torch.no_grad()
def fresh_weights(generator: Generator, seed: int, device: torch.device | None = None) -> None:
    """Gives every weight of a generator a new initial value, as its class makes it: the start of method "scratch".

    Batch norms get the statistics of the new network, since the recipe runs them in eval mode. device: as of
    `own_samples`, which makes images for these.
    ValueError: a generator of no known family with parameters of a module that has no `reset_parameters()`.
    """
    with keep_and_set_random_state(seed, "scratch"):
        for network in networks(generator):
            if hasattr(network, "family") and hasattr(network, "config"):
                fresh = type(network)(**network.config)
                network.load_state_dict(fresh.state_dict())
            else:
                _reset(network)
        norms = [m for m in generator.modules() if isinstance(m, BATCH_NORMS)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over all batches
        for k in range(CALIBRATION * len(networks(generator)) if norms else 0):
            own_samples(generator, 32, turn=k, device=device)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _reset(generator: nn.Module) -> None:
    for name, module in generator.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"method scratch needs new weights, but {name or 'the generator'} ({type(module).__name__}) has no "
                "reset_parameters(): give it one, or take another method"
            )
