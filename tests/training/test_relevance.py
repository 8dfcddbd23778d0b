"""Which samples score the neurons together, and why an adversarial loss takes them one at a time."""

import copy

import pytest
import torch

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.models import BigGANDiscriminator, BigGANGenerator
from minegan_fast.training import TransferConfig
from minegan_fast.training.losses import generator_loss
from minegan_fast.training.trainer import Trainer


def biggan():
    torch.manual_seed(0)
    sizes = {"resolution": 32, "num_classes": 4, "channel_width": 2, "attention": [16], "image_channels": 1}
    return BigGANGenerator(latent_dim=16, class_dim=5, **sizes).eval(), BigGANDiscriminator(**sizes).eval()


def fisher(generator, critic, latents, batch):
    """The scores of the generator's neurons by these samples, in batches."""
    generator, critic = copy.deepcopy((generator, critic))
    critic.requires_grad_(False)
    optimizer = SparseFinetuner(generator, criterion="fisher")
    with optimizer.scoring(samples=1 if batch == 1 else None):
        for arguments in zip(*(tensor.split(batch) for tensor in latents), strict=True):
            generator_loss("nonsaturating", critic(generator(*arguments))).backward()
    return torch.cat([score for _, score in sorted(optimizer.scores().items())])


def test_a_batch_stands_for_its_samples_where_the_critic_couples_none(tiny):
    """As BigGAN's, but not StyleGAN2's: which is why the recipe scores by one sample at a time."""
    generator, critic = biggan()
    latents = torch.randn(8, 16), torch.randint(4, (8,))
    one, batch = (fisher(generator, critic, latents, size) for size in (1, 8))
    torch.testing.assert_close(batch, one, rtol=1e-4, atol=1e-6 * float(one.max()))

    class Quiet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = tiny["generator"]

        def forward(self, z):
            return self.generator(z, noise="constant")

    latents = (torch.randn(8, 8),)
    one, batch = (fisher(Quiet(), tiny["discriminator"], latents, size) for size in (1, 8))
    assert float((batch - one).abs().max()) > 1e-2 * float(one.max())


@pytest.mark.parametrize(("criterion", "expected"), [("fisher", [1] * 6), ("gradient", [4, 4])])
def test_an_adversarial_loss_scores_one_sample_at_a_time(tiny, criterion, expected):
    config = TransferConfig(batch=4, score_samples=6, criterion=criterion, augment="")
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8)
    trainer = Trainer(config, copy.deepcopy(tiny["generator"]), copy.deepcopy(tiny["discriminator"]), images, "cpu")
    judged = []
    trainer.adversary.critic.register_forward_pre_hook(lambda _, inputs: judged.append(len(inputs[0])))
    trainer.select()
    assert judged == expected
