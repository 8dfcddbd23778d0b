"""Deltas: what they hold, and every way of putting them on and taking them off."""

import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sample_networks import NETWORKS, assert_same, build, data, loss
from torch import nn

from minegan_fast.finetune import SparseFinetuner, load_delta, unload_delta
from minegan_fast.finetune.hashing import fingerprint


def trained(name, rows, path, steps=3, seed=0):
    """A network with `rows` trained, its delta written to `path`."""
    net = build(name)
    ft = SparseFinetuner(net, lr=1e-2, seed=seed, density=0.4, criterion="random")
    ft.select(rows)
    for _ in range(steps):
        ft.zero_grad()
        loss(net.eval(), data(), penalties=False).backward()
        ft.step()
    ft.save_delta(path)
    ft.release()
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_on_and_off(name, tmp_path):
    path = tmp_path / "d.safetensors"
    live, plain, base = trained(name, None, path), build(name).eval(), build(name).eval()
    load_delta(plain, path)
    assert [torch.equal(p, q) for p, q in zip(plain.parameters(), live.parameters(), strict=True)].count(False) == 0
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), base.parameters(), strict=True))
    unload_delta(plain)
    assert_same(plain, base)
    load_delta(plain, path, scale=0.5)
    for p, q, r in zip(plain.parameters(), live.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(p, (q + r) / 2, rtol=0, atol=1e-15)
    unload_delta(plain)
    assert_same(plain, base)
    with pytest.raises(RuntimeError, match="no delta is loaded"):
        unload_delta(plain)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_several_overlap(tmp_path):
    a = trained("mlp", {"1.weight": [0, 2, 5]}, tmp_path / "a")
    b = trained("mlp", {"1.weight": [2, 3], "3.weight": [1]}, tmp_path / "b", steps=5)
    base, net = build("mlp"), build("mlp")
    load_delta(net, tmp_path / "a")
    load_delta(net, tmp_path / "b")
    assert torch.equal(net[1].weight[[0, 5]], a[1].weight[[0, 5]])
    assert torch.equal(net[1].weight[3], b[1].weight[3])
    assert torch.equal(net[3].weight, b[3].weight)
    sum_of_both = a[1].weight[2] + (b[1].weight[2] - base[1].weight[2])
    assert torch.equal(net[1].weight[2], sum_of_both)
    load_delta(net, tmp_path / "a", scale=-1.0)
    torch.testing.assert_close(net[1].weight[2], b[1].weight[2], rtol=0, atol=1e-15)
    unload_delta(net)
    assert_same(net, base)


def test_a_delta_is_small_and_says_what_it_is(tmp_path):
    net = build("mlp")
    ft = SparseFinetuner(net)
    base = fingerprint(net)
    with pytest.raises(RuntimeError, match="nothing has been trained"):
        ft.save_delta(tmp_path / "d")
    ft.select({"1.weight": [5, 1]})
    net(data()).sum().backward()
    ft.step()
    ft.select({"1.weight": [3], "3.weight": [0]})
    ft.save_delta(tmp_path / "d")
    with safe_open(tmp_path / "d", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        assert file.get_tensor("1.weight:rows").tolist() == [1, 3, 5]  # every row since construction
        assert torch.equal(file.get_tensor("1.weight"), net[1].weight.detach()[[1, 3, 5]])
    assert keys == {"1.weight:rows", "1.weight", "1.bias", "3.weight:rows", "3.weight", "3.bias"}
    assert metadata["base"] == base
    assert metadata["version"] == "1"
    assert json.loads(metadata["layers"])["1.weight"] == [["1.weight", 0], ["1.bias", 0]]
    wide = nn.Linear(2000, 200)
    ft = SparseFinetuner(wide, criterion="random", density=0.05)
    ft.select()
    ft.save_delta(tmp_path / "w")
    assert os.path.getsize(tmp_path / "w") < 0.06 * wide.weight.nbytes


def test_the_average_can_be_written_instead(tmp_path):
    net = build("mlp")
    ft = SparseFinetuner(net, lr=1e-2, ema_decay=0.5)
    ft.select({"1.weight": [2]})
    for _ in range(2):
        ft.zero_grad()
        net(data()).square().mean().backward()
        ft.step()
    ft.save_delta(tmp_path / "d", ema=True)
    plain = build("mlp")
    load_delta(plain, tmp_path / "d")
    assert_same(plain, ft.ema_model())
    assert not torch.equal(plain[1].weight, net[1].weight)
    ft.save_delta(tmp_path / "again", ema=True)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes()


def test_added_parameters_of_the_model_are_in_the_delta(tmp_path):
    net = build("constant")
    ft = SparseFinetuner(net, lr=1e-2, exclude="shifts")
    ft.add_param_group({"params": list(net.shifts.parameters())})
    ft.select({"gain": [0]})
    net(data()).square().mean().backward()
    ft.step()
    ft.save_delta(tmp_path / "d")
    plain = build("constant")
    load_delta(plain, tmp_path / "d")
    assert_same(plain, net)
    unload_delta(plain)
    assert_same(plain, build("constant"))


def test_a_delta_goes_onto_a_wrapped_model_that_trains(tmp_path):
    """A delta on a base that a finetuning holds is a write like any other: the rows that train start from it."""
    want = trained("mlp", {"1.weight": [0, 2]}, tmp_path / "d")
    net = build("mlp")
    ft = SparseFinetuner(net, lr=0.0)
    ft.select({"1.weight": [2, 3]})
    load_delta(nn.DataParallel(net), tmp_path / "d")
    net(data()).sum().backward()
    ft.step()
    assert torch.equal(net[1].weight, want[1].weight)
    unload_delta(net)
    ft.release()
    assert_same(net, build("mlp"))


def test_files_and_models_that_do_not_fit(tmp_path):
    path = tmp_path / "d"
    trained("mlp", {"1.weight": [6]}, path)
    wrong = build("mlp", seed=1)
    before = copy.deepcopy(wrong)
    with pytest.raises(ValueError, match=r"another base: .* a Sequential of fingerprint [0-9a-f]{12}, .*strict=False"):
        load_delta(wrong, path)
    with pytest.raises(ValueError, match=r"'1\.weight', which the model does not have"):
        load_delta(build("resnet"), path, strict=False)
    with pytest.raises(ValueError, match=r"rows of shape \[108\] in the delta, \[90\] in the model"):
        load_delta(nn.Sequential(nn.Flatten(), nn.Linear(90, 7)), path, strict=False)
    with pytest.raises(ValueError, match="beyond its 3"):
        load_delta(nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), path, strict=False)
    (tmp_path / "junk").write_bytes(b"0" * 64)
    with pytest.raises(ValueError, match="not a delta"):
        load_delta(wrong, tmp_path / "junk")
    ft = SparseFinetuner(build("mlp"), criterion="random")
    ft.select().save(tmp_path / "s")
    with pytest.raises(ValueError, match="holds no delta"):
        load_delta(wrong, tmp_path / "s")
    assert_same(wrong, before)
    with pytest.raises(RuntimeError, match="no delta"):
        unload_delta(wrong)
    load_delta(wrong, path, strict=False)
    assert not torch.equal(wrong[1].weight[6], before[1].weight[6])
    unload_delta(wrong)
    assert_same(wrong, before)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([1, 3, 4], "3 rows of '1.weight', and values of 2"),
        ([3, 3], "no list of rows"),
        ([1.0, 3.0], "no list of rows"),
        ([[1, 3]], "no list of rows"),
        ([1, 400], "beyond its"),
    ],
)
def test_rows_that_do_not_fit_their_values_leave_the_model_alone(rows, told, tmp_path):
    path = tmp_path / "d"
    trained("mlp", {"1.weight": [1, 3]}, path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"1.weight:rows": torch.tensor(rows)}, path, metadata)
    net = build("mlp")
    with pytest.raises(ValueError, match=told):
        load_delta(net, path)
    assert_same(net, build("mlp"))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "d"
    trained("mlp", {"1.weight": [6]}, path)
    old = path.read_bytes()

    def full(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minegan_fast.files.atomic.save_file", full)
    with pytest.raises(OSError, match="No space"):
        trained("mlp", {"1.weight": [1]}, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_base_is_what_was_there_before_training(tmp_path):
    """Weights loaded between construction and selection are the base."""
    source, net = build("mlp", seed=5), build("mlp")
    ft = SparseFinetuner(net, lr=0.1)
    net.load_state_dict(source.state_dict())
    ft.select({"1.weight": [1, 3]})
    net(data()).square().mean().backward()
    ft.step()
    ft.save_delta(tmp_path / "d")
    with pytest.raises(ValueError, match="another base"):
        load_delta(build("mlp"), tmp_path / "d")
    load_delta(source, tmp_path / "d")
    assert_same(source, net)


def test_a_delta_trained_on_top_of_another(tmp_path):
    trained("mlp", {"1.weight": [1, 3]}, tmp_path / "a")
    first = build("mlp")
    load_delta(first, tmp_path / "a")
    ft = SparseFinetuner(first, lr=0.1)
    ft.select({"1.weight": [3, 4], "3.weight": [0]})
    first(data()).square().mean().backward()
    ft.step()
    ft.save_delta(tmp_path / "c")
    net = build("mlp")
    load_delta(net, tmp_path / "a")
    load_delta(net, tmp_path / "c")
    assert_same(net, first)
    unload_delta(net)
    assert_same(net, build("mlp"))


def test_a_scale_that_is_not_finite(tmp_path):
    trained("mlp", {"1.weight": [1]}, tmp_path / "a")
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        load_delta(build("mlp"), tmp_path / "a", scale=float("nan"))


@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
def test_a_delta_is_taken_off_only_what_it_is_on(tmp_path, half):
    net = build("mlp")
    source = copy.deepcopy(net.state_dict())
    path = tmp_path / "a.safetensors"
    trained("mlp", {"1.weight": [1, 3]}, path)
    load_delta(net, path)
    if half is not None:
        net.to(half)
    with torch.no_grad():
        moved = net.get_parameter("1.weight")
        moved[3] += 1
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"rows of '1.weight' that a delta changed have changed since"):
        unload_delta(net)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    net.load_state_dict(source)
    load_delta(net, path, strict=half is None)
    unload_delta(net)
    assert all(torch.equal(t, source[n].to(t.dtype)) for n, t in net.state_dict().items())


def test_a_delta_of_several_networks_takes_their_list(tmp_path):
    first, second = build("mlp"), build("resnet").eval()
    ft = SparseFinetuner([first, second], criterion="random", density=0.3)
    ft.select()
    (first(data()).sum() + second(data()).sum()).backward()
    ft.step()
    ft.save_delta(tmp_path / "both.safetensors")
    ft.release()
    again = [build("mlp"), build("resnet")]
    load_delta(again, tmp_path / "both.safetensors")
    for net, other in zip(again, (first, second), strict=True):
        assert_same(net, other)


def test_buffers_that_have_moved_are_named(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    ft = SparseFinetuner(net, density=0.5, score_steps=1)

    def train(steps):
        for _ in range(steps):
            net(torch.randn(16, 6)).square().mean().backward()
            ft.step()

    net.eval()
    train(3)
    ft.save_delta(tmp_path / "quiet.safetensors")
    net.train()
    train(1)
    with pytest.warns(UserWarning, match=r"have moved 1\.running_mean, 1\.running_var, .*: the delta alone"):
        ft.save_delta(tmp_path / "moved.safetensors")


def test_a_part_of_the_model_has_a_delta_of_its_own(tmp_path):
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    bases, model = copy.deepcopy(parts), nn.ModuleDict({"one": parts[0], "other": parts[1]})
    ft = SparseFinetuner(model, lr=0.1, density=0.5)
    ft.select({"one.0.weight": [1, 3], "one.2.weight": [0]})
    ft.zero_grad()
    sum(part(torch.ones(2, 3)).square().sum() for part in parts).backward()
    ft.step()
    for name, base, part in zip(model, bases, parts, strict=True):
        path = tmp_path / f"{name}.safetensors"
        ft.save_delta(path, part=(name, base))
        with safe_open(path, "pt") as file:
            assert file.metadata()["base"] == fingerprint(base)
        alone = copy.deepcopy(base)
        load_delta(alone, path)
        assert_same(alone, part)
    assert not torch.equal(parts[0][0].weight, bases[0][0].weight)
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert {"0.weight:rows", "0.weight", "0.bias", "2.weight:rows", "2.weight", "2.bias"} == set(file.keys())
