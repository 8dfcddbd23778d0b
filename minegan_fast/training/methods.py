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
    random        random neurons, as many parameters: the control of minegan++
"""

from typing import Any

KERNEL = "mmd"

# By the loss of the stage that a setting belongs to. Learning rates that these give are in `TransferConfig`.
_ADVERSARIAL = {"miner_steps": 1000, "steps": 2000, "batch": 16, "lr": 2e-3, "beta1": 0.0, "ema_decay": 0.998}
_KERNEL = {"miner_steps": 150, "steps": 300, "batch": 32, "lr": 1e-3, "beta1": 0.9, "ema_decay": 0.98}

_WITHOUT_MINER = {"train_miner": False, "mining_steps": 0}
_DENSE = {"density": 1.0, "budget": "neurons"}

METHODS: dict[str, dict[str, Any]] = {
    "minegan++": {},
    "random": {"criterion": "random", "budget": "parameters"},
    "minegan": _DENSE,
    "mined": {"finetune_steps": 0},
    "transfergan": {**_WITHOUT_MINER, **_DENSE},
    "scratch": {**_WITHOUT_MINER, **_DENSE},
    "freezed": {**_WITHOUT_MINER, **_DENSE, "train_critic": "freezed"},
    "scale_shift": {**_WITHOUT_MINER, **_DENSE},
    "ewc": {**_WITHOUT_MINER, **_DENSE},
    "freeze_top": {**_WITHOUT_MINER, "policy": "freeze_top", "density": 0.5},
}

# What no method and no loss has a reason to choose otherwise.
_COMMON = {
    "train_miner": True, "density": 0.05, "budget": "neurons", "criterion": "fisher", "scope": "global",
    "policy": "train_top", "train_critic": "all",
}  # fmt: skip


def chosen(method: str, mining_loss: str, finetune_loss: str) -> dict[str, Any]:
    """The value of every setting that a user left open."""
    mining, finetuning = (_KERNEL if loss == KERNEL else _ADVERSARIAL for loss in (mining_loss, finetune_loss))
    steps = {"mining_steps": mining["miner_steps"], "finetune_steps": finetuning["steps"]}
    shared = {name: finetuning[name] for name in ("batch", "lr", "beta1", "ema_decay")}
    return {**_COMMON, **shared, **steps, **METHODS[method]}
