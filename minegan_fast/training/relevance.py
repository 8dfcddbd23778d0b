"""How a run scores neurons: by the loss that will finetune them, on latents that the miners give.

Fisher information, agreement and contrast are made of the gradients of single samples. Under an adversarial loss the
recipe computes one sample at a time. The kernel distance has no value for one sample, but its gradient by a batch is a
sum over the samples, and each of them adds a part of its own.
"""

import torch
from torch import Tensor

from ..finetune import SparseFinetuner
from ..finetune.evidence import BY_SAMPLE, WITHOUT_EVIDENCE
from .critics import train_mode
from .generators import own_samples
from .methods import KERNEL
from .randomness import set_random_state


def score(trainer, optimizer: SparseFinetuner) -> None:
    """Gives `optimizer`, of the trainer's generator or of its critic, the evidence that its criterion asks for.

    "contrast" compares with the same loss of the source's own samples, made without the miners.
    """
    config, adversary = trainer.config, trainer.adversary
    if config.criterion in WITHOUT_EVIDENCE:
        return
    still = list(trainer.mined.mining_parameters())
    networks = [trainer.generator] + ([adversary.critic] if adversary else [])
    still += [p for network in networks if network is not optimizer.model for p in network.parameters()]
    # One that is frozen already is left alone: a weight that is told to be still does not train when it is selected.
    still = [p for p in still if p.requires_grad]
    for parameter in still:
        parameter.requires_grad_(False)
    if adversary:
        adversary.critic.eval()  # in train mode its buffers would move, by other samples on every process
    _collect(trainer, optimizer, "target")
    if config.criterion == "contrast":
        _collect(trainer, optimizer, "source")
    for parameter in still:
        parameter.requires_grad_(True)
    if adversary:
        train_mode(adversary.critic)  # only now, since it asks which parameters are frozen


def _collect(trainer, optimizer: SparseFinetuner, of: str) -> None:
    """Collects the evidence of `score_samples` samples, of the "target" or of the "source"."""
    config, processes, hooks = trainer.config, trainer.processes, []
    kernel = trainer.loss_name == KERNEL
    # One sample at a time: the critics of Progressive GAN and the StyleGANs couple the samples of a batch by their
    # minibatch standard deviation, also in eval mode, and whether a user's critic does cannot be seen from outside. For
    # critics that couple none, as BigGAN's, `scoring()` could take the samples of a batch apart; but to select the same
    # neurons, each sample would have to draw its latent, noise and augmentation from a seed of its own, only to save a
    # part of `score_samples` passes, which take no longer than a few steps of thousands.
    batch = 1 if config.criterion in BY_SAMPLE and not kernel else config.batch
    with optimizer.scoring("sum" if kernel else "mean", samples=1 if batch == 1 else None, of=of):
        if config.criterion == "movement" and processes.size > 1 and not kernel:
            # Its dense steps are those of the whole batch, so every gradient becomes the mean over the processes.
            hooks = [
                m.parameter.register_hook(trainer.machine.mean) for layer in optimizer.layers for m in layer.members
            ]
        # A batch of the source's own samples is that of one source, each of which has its turns.
        rounds = -(-config.score_samples // batch) * (len(trainer.branches) if of == "source" else 1)
        for k in range(rounds):
            set_random_state(config.seed, "score", of, k)
            samples = torch.arange(k * batch, (k + 1) * batch)
            if kernel:  # the distance is of a whole batch: every process scores all of them
                _backward(trainer, optimizer, samples, of, k)
            elif batch % processes.size == 0:
                with processes.part(batch):
                    _backward(trainer, optimizer, processes.own(samples), of, k)
            elif k % processes.size == processes.rank:
                _backward(trainer, optimizer, samples, of, k)
    for hook in hooks:
        hook.remove()


def _backward(trainer, optimizer: SparseFinetuner, samples: Tensor, of: str, turn: int) -> None:
    """Brings the gradient that is the evidence: of the critic's loss of these samples, or of the generator's of as
    many."""
    count = len(samples)
    if optimizer.model is not trainer.generator:
        trainer.adversary.evidence(trainer.loss_name, samples, trainer.mined).backward()
    elif of == "source":
        trainer.loss(own_samples(trainer.generator, count, turn)).backward()
    elif trainer.mixture and trainer.loss_name == KERNEL:
        trainer.mixture_backward(count, learn=False)
    else:
        trainer.loss(trainer.mined(trainer.machine.latents(trainer.mined, count))).backward()
