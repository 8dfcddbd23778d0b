"""Two processes select and train as one."""

import pytest
import ranks
import torch
from sample_networks import build, data

from minegan_fast.finetune import SparseFinetuner


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(ranks.main, (str(tmp_path),), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, (state, rows, scores) in results.items():
        net = build("mlp")
        ft = SparseFinetuner(net, score_steps=2, **ranks.ARGUMENTS)
        if name == "after":
            with ft.scoring():
                for x in data(4, seed=3).split(1):
                    net(x).square().mean().backward()
            ft.select()
        steps, batch = {"after": (3, 4), "accumulation": (4, 12)}.get(name, (5, 4))
        for i in range(steps):
            ranks.step(net, ft, data(batch, seed=i))
        assert {n: r.tolist() for n, r in rows.items()} == {n: r.tolist() for n, r in ft.selection.rows.items()}
        for layer, score in ft.scores().items():
            torch.testing.assert_close(scores[layer], score, rtol=1e-6, atol=0)
        for key, value in net.state_dict().items():
            # means of two halves against the mean of the whole, in float64
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-12)
