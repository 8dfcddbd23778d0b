"""What each of two processes does for test_processes.py."""

import copy
import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_conditional import Conditional, Critic

import minegan_fast as mf
from minegan_fast.training import TransferConfig
from minegan_fast.training import folder as run_folder
from minegan_fast.training.processes import Processes
from minegan_fast.training.trainer import Trainer

# A batch of 8 on two processes: the minibatch standard deviation has the same groups of 4 as on one.
TRAINER = {
    "batch": 8,
    "score_samples": 16,
    "r1_every": 1,
    "augment": "color,translation",
    "gradient_penalty_weight": 1.0,
}
VARIANTS = {
    "fisher": {"density": 0.2},
    "gradient": {"criterion": "gradient", "train_critic": "sparse", "path_length_weight": 0.0},
    "saliency": {"criterion": "saliency", "score_samples": 3},
    "movement": {"criterion": "movement", "scope": "layer"},
    "class miner": {"conditional": True, "density": 0.3, "path_length_weight": 0.0},
    "constant": {"mine": "w", "mine_constant": True, "criterion": "random"},
    "magnitude": {"criterion": "magnitude", "batch": 6},  # 3 samples of path length, 2 of them the first process's
}

KERNEL = {"loss": "mmd", "loss_features": "critic", "features": "pixels", "density": 0.3}


def several(tiny) -> dict[str, dict]:
    """Settings of runs with several sources, of which one is conditional; of those whose name says so none draws noise,
    which is another one where they are spread."""
    torch.manual_seed(3)
    two, still = [copy.deepcopy(tiny["generator"]), Conditional()], [Plain(), Conditional(), Plain()]
    common = {"mining_steps": 2, "finetune_steps": 2}
    mixture = common | KERNEL | {"critic": None, "loss_features": Features()}
    winner = common | {"loss": "hinge", "explore": 0.2, "density": 0.3}
    # Under hinge the gradient of the critic's last bias is 0 but for rounding, of which Adam makes whole steps.
    beside = {"loss": "nonsaturating", "mmd_weight": 0.5, "loss_features": Features(), "prior_weight": 0.5}
    return {
        "mixture": mixture | {"source": two},
        "winner": winner | {"source": two},
        "still mixture": mixture | {"source": still, "prior_weight": 0.5},
        "still parts": mixture | {"source": still, "part": 3, "view_augment": ""},
        "still winner": winner | beside | {"source": still},
    }


class Plain(torch.nn.Module):
    """z [B, 4] -> images, without noise."""

    latent_dim, resolution, image_channels = 4, 8, 1

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 64)

    def forward(self, z):
        return self.layer(z).tanh().view(-1, 1, 8, 8)


class Features(torch.nn.Module):
    """The same in every process."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.weight, stride=2).tanh()


LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def one_step_of_each_stage(tiny, settings, processes=None):
    """What the critic sees in a step of mining, its gradients and the miner's; the selection; a step after it."""
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = TRAINER | settings
    torch.manual_seed(0)
    own = (Conditional(), Critic()) if settings.pop("conditional", False) else None
    config = TransferConfig(**settings)
    networks = own or (copy.deepcopy(tiny["generator"]), copy.deepcopy(tiny["discriminator"]))
    trainer = Trainer(config, *networks, images, "cpu", processes)
    found = {"seen": []}
    network = trainer.adversary.critic
    hook = network.register_forward_pre_hook(lambda _, inputs: found["seen"].append(inputs[0].detach().clone()))
    found["losses"] = trainer.step(0)
    hook.remove()
    found["gradients"] = [p.grad.clone() for p in (*network.parameters(), *trainer.mined.mining_parameters())]
    trainer.begin_finetuning()
    trainer.select()
    optimizers = [o for o in (trainer.finetuner, trainer.adversary.optimizer) if isinstance(o, mf.SparseFinetuner)]
    found["selected"] = [{n: r.tolist() for n, r in o.selection.rows.items()} for o in optimizers]
    found["sent"] = []
    with pytest.MonkeyPatch.context() as patch:
        reduce = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda t, **k: (found["sent"].append(t.numel()), reduce(t, **k)))
        trainer.step(4)
    critic = [p for group in trainer.adversary.optimizer.param_groups for p in group["params"]]
    rows = trainer.finetuner.parameters()
    found["trained"] = [sum(p.numel() for p in ps) for ps in (critic, [*trainer.mined.mining_parameters(), *rows])]
    found["rows"] = [p.grad.clone() for p in trainer.finetuner.parameters()]
    found["path length"] = trainer.path_length_mean
    trainer.finetuner.verify()
    return found


def fails(settings, kind, message):
    with pytest.raises(kind, match=message):
        mf.transfer(**settings)
    assert not dist.is_initialized()


def dying_at(step, how):
    """Trainer.step that does `how` before a step."""
    whole = Trainer.step

    def stopped(self, number):
        if number == step:
            how()
        return whole(self, number)

    return stopped


def raise_in_step():
    raise FloatingPointError("only on the second process")


def main(rank: int, port: int, folder: str, tiny: dict, settings: dict):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": LOOPBACK}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    folder = Path(folder)
    settings["images"] = settings.get("images") or tiny["images"]

    written = []
    watching = [True]

    def watch(event, arguments):
        # flags of a file that is opened for writing; no file of a run is written but by opening or renaming one
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if watching[0] and (opened or event in ("os.rename", "os.mkdir")) and str(folder) in str(arguments[0]):
            written.append((event, arguments))

    if rank:
        sys.addaudithook(watch)
    result = mf.transfer(**settings | {"report": True}, out=folder / "two")
    assert not dist.is_initialized()
    resumed = mf.transfer(**settings, out=folder / "one then two", resume=True)
    mf.transfer(**settings | {"finetune_steps": 3}, out=folder / "two then one")
    assert not written, f"the second process wrote {written}"
    watching[0] = False
    found = {name: (r.sample(3), r.step, r.history) for name, r in (("two", result), ("one then two", resumed))}
    torch.save(found, folder / f"results{rank}.pt")

    out = folder / "refused"
    fails(settings | {"batch": 7, "out": out}, ValueError, "batch 7 cannot be divided among 2 processes")
    fails(settings | {"seed": rank, "out": out}, ValueError, "different settings")
    if rank == 1:
        settings["images"] = "nowhere"
    fails(settings | {"out": out}, FileNotFoundError, "no image folder at 'nowhere'")
    settings["images"] = tiny["images"]
    assert not out.exists()
    fails(settings | {"out": tiny["source"]}, ValueError, "cannot write the run")
    fails(settings | {"out": folder / "two"}, ValueError, "already holds a run")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Trainer, "step", dying_at(1, raise_in_step))
        fails(settings | {"out": folder / "failed"}, FloatingPointError, "only on the second")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:

            def full(*_, **__):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(run_folder.torch, "save", full)
        fails(settings | {"out": folder / "full"}, RuntimeError, "disk is full.*there is no snapshot yet")

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: one_step_of_each_stage(tiny, v, Processes(rank, 2)) for name, v in VARIANTS.items()}
    found["two samples"] = one_step_of_each_stage(tiny, {"batch": 2}, Processes(rank, 2))
    torch.save(found, folder / f"steps{rank}.pt")
    mf.transfer(**settings, out=folder / "own group")
    mf.transfer(**settings | KERNEL, out=folder / "kernel two")
    for name, changes in several(tiny).items():
        mf.transfer(**settings | changes, out=folder / f"{name} two")
        if not name.startswith("still"):
            continue
        spread = settings | changes | {"spread": True}
        mf.transfer(**spread | {"report": True}, out=folder / f"{name} spread")
        mf.transfer(**spread | {"mining_steps": 1, "finetune_steps": 0}, out=folder / f"{name} spread then one")
        mf.transfer(**spread, out=folder / f"{name} one then spread", resume=True)
    assert dist.is_initialized(), "a group that the caller made is the caller's"
    dist.destroy_process_group()

    if rank == 1:
        Trainer.step = dying_at(6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    mf.transfer(**settings, out=folder / "killed")
