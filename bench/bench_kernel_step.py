"""A whole step of kernel mining, against its generator and its feature network alone, forward and backward: what the
kernel distance, its features' statistics, the prior and the optimizers add must not be felt."""

import pytest
import torch
from measure import OURS, whole_steps

from minegan_fast.models import BigGANDiscriminator, StyleGAN2Generator
from minegan_fast.training.config import TransferConfig
from minegan_fast.training.images import to_float
from minegan_fast.training.kernel_loss import KernelLoss
from minegan_fast.training.loss_features import LossFeatures
from minegan_fast.training.trainer import Trainer

ALONE = "generator and features alone"


@pytest.mark.parametrize("stage", ["mining", "finetuning 10 %"])
def test_kernel_step(benchmark, device, recorder, pytestconfig, stage):
    quick = pytestconfig.getoption("--quick")
    resolution, width, batch, target, turns = (32, 4, 4, 8, 2) if quick else (64, 32, 32, 100, 11)
    torch.manual_seed(0)
    base = 512 if quick else 8192
    generator = StyleGAN2Generator(resolution, 64 if quick else 512, channel_base=base, mapping_layers=8).to(device)
    critic = BigGANDiscriminator(resolution, num_classes=1, channel_width=width).to(device).eval()
    images = torch.randint(0, 256, (target, 3, resolution, resolution), dtype=torch.uint8)
    features = LossFeatures(critic, name="critic", probe=to_float(images[:2]).to(device))
    kernel = KernelLoss(features, images)
    config = TransferConfig(loss="mmd", lr=2e-3, batch=batch, density=0.1, criterion="random", scope="layer")
    trainer = Trainer(config, generator, None, images, device, kernel=kernel)
    if stage != "mining":
        trainer.begin_finetuning()
        trainer.select()
    trained = [
        p for o in (trainer.miner_optimizer, trainer.finetuner) if o for g in o.param_groups for p in g["params"]
    ]

    def ours():
        trainer.step(0)

    def alone():
        u = torch.randn(batch, trainer.mined.input_dim, device=device)
        maps = features.maps(trainer.mined(u))
        torch.autograd.backward(maps, [torch.ones_like(m) for m in maps], inputs=trained)
        for p in trained:
            p.grad = None

    calls = {OURS: ours, ALONE: alone}
    for call in calls.values():
        call()
    assert bool(trainer.finite)
    key = {"op": "kernel_step", "pass": stage, "shape": [batch, 3, resolution, resolution], "dtype": "float32"}
    recorder.add(whole_steps(key, calls, device, turns))
    benchmark.pedantic(ours)
