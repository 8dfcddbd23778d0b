"""A hash changes with every bit, and with nothing else."""

import copy

import pytest
import torch
from sample_networks import build

from minegan_fast.finetune import SparseFinetuner, fingerprint
from minegan_fast.finetune.hashing import row_hashes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_one_changed_bit_changes_its_row_only(dtype):
    t = torch.randn(5, 7, 3).to(dtype)
    for axis in (0, 1, 2):
        before = row_hashes(t, axis)
        assert before.shape == (t.shape[axis],)
        changed = t.clone()
        changed[3, 4, 1] = -changed[3, 4, 1]
        row = (3, 4, 1)[axis]
        assert (row_hashes(changed, axis) != before).tolist() == [i == row for i in range(t.shape[axis])]


def test_bits_count_not_values():
    a, b = torch.tensor([[0.0, float("nan")]]), torch.tensor([[-0.0, float("nan")]])
    assert row_hashes(a) != row_hashes(b)
    assert row_hashes(a) == row_hashes(a.clone())


def test_layout_does_not_matter():
    t = torch.randn(4, 3, 5, 5)
    assert torch.equal(row_hashes(t), row_hashes(t.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(row_hashes(t, 1), row_hashes(t.transpose(0, 1).contiguous()))


def test_permutations_and_pairs_of_changes_are_seen():
    t = torch.arange(12.0).reshape(1, 12)
    hashes = {row_hashes(t.roll(i, 1)).item() for i in range(12)}
    assert len(hashes) == 12
    swapped = t.clone()
    swapped[0, [2, 7]] = t[0, [7, 2]]
    assert row_hashes(swapped) != row_hashes(t)


def test_chunks_do_not_matter(monkeypatch):
    t = torch.randn(50, 9)
    whole = row_hashes(t)
    monkeypatch.setattr("minegan_fast.finetune.hashing._CHUNK", 20)
    assert torch.equal(row_hashes(t), whole)


def test_fingerprint():
    net = build("resnet")
    base = fingerprint(net)
    assert len(base) == 64
    assert fingerprint(copy.deepcopy(net)) == base
    net[1].bn1.running_mean += 1
    assert fingerprint(net) == base
    ft = SparseFinetuner(net, criterion="random", density=0.5)
    ft.select()
    assert fingerprint(net) == base
    with torch.no_grad():
        net[2].bn2.bias[1] += 1
    assert fingerprint(net) != base
    assert fingerprint(build("resnet", seed=1)) != base
    renamed = torch.nn.ModuleDict({"a": build("mlp")})
    assert fingerprint(renamed) != fingerprint(build("mlp"))
    assert fingerprint(build("mlp").float()) != fingerprint(build("mlp"))
