"""Banks of miners: the miners one by one, shared memory whatever is done to either, files, and who takes which way."""

import copy
import pickle

import pytest
import torch
from torch import nn

from minegan_fast.mining import Mined, Miner, MinerBank, load_bank, load_miner, project, save_miner
from minegan_fast.mining import miner as miner_module

SHAPES = {
    "plain": {"latent_dim": 6, "depth": 2},
    "deep": {"latent_dim": 6, "depth": 4, "width": 9, "activation": "tanh"},
    "affine": {"latent_dim": 6, "input_dim": 4, "activation": "lrelu", "affine": True},
    "sizes": {"latent_dim": 6, "depth": 1, "input_dim": 5, "output_dim": 3, "residual": False, "activation": "linear"},
}


def bank_of(name="plain", n=3) -> MinerBank:
    """A bank none of whose weights is zero."""
    bank = MinerBank(n, **SHAPES[name])
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return bank


def assert_tied(bank: MinerBank):
    """Each miner lies in the bank's memory, and computes what the bank does."""
    for i, miner in enumerate(bank):
        for name, parameter in miner.named_parameters():
            part = bank.get_parameter(name)[i]
            assert (parameter.data_ptr(), parameter.dtype) == (part.data_ptr(), part.dtype)
            assert torch.equal(parameter, part)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("batch", [1, 16])
def test_a_bank_is_its_miners(name, own, batch):
    bank = bank_of(name)
    u = torch.randn(*([3] if own else []), batch, bank.input_dim)
    z = bank(u)
    each = torch.stack([miner(u[i] if own else u) for i, miner in enumerate(bank)])
    torch.testing.assert_close(z, each, rtol=1e-5, atol=1e-5)
    assert z.shape == (3, batch, bank.output_dim)
    sphere = bank(u, sphere=True)
    torch.testing.assert_close(sphere, torch.stack([project(part, "sphere") for part in z]), rtol=1e-5, atol=1e-5)
    gz = torch.randn_like(z)
    z.backward(gz)
    each.backward(gz)
    for i, miner in enumerate(bank):
        for path, parameter in miner.named_parameters():
            torch.testing.assert_close(bank.get_parameter(path).grad[i], parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_residual_bank_starts_as_the_identity():
    u = torch.randn(16, 6)
    assert torch.equal(MinerBank(3, 6)(u), u.expand(3, -1, -1))


def test_a_bank_starts_as_its_miners_would():
    torch.manual_seed(3)
    miners = [Miner(6, residual=False) for _ in range(3)]
    torch.manual_seed(3)
    bank = MinerBank(3, 6, residual=False)
    for miner, own in zip(miners, bank, strict=True):
        assert all(map(torch.equal, miner.parameters(), own.parameters()))


def test_a_list_of_miners():
    bank = bank_of()
    assert len(bank) == 3
    assert [*bank] == [bank[0], bank[1], bank[2]]
    assert bank[-1] is bank[2]
    assert isinstance(bank[0], Miner)
    assert bank[0].config == bank.config == Miner(6).config
    for i in (3, -4):
        with pytest.raises(IndexError, match=rf"there are 3 miners, from 0 to 2, got {i}"):
            bank[i]
    with pytest.raises(TypeError):
        bank["0"]
    assert {name for name, _ in bank.named_parameters()} == {name for name, _ in Miner(6).named_parameters()}


@pytest.mark.parametrize("name", SHAPES)
def test_training_one_trains_the_other(name):
    bank = bank_of(name)
    u = torch.randn(16, bank.input_dim)
    before = [parameter.detach().clone() for parameter in bank.parameters()]
    optimizer = torch.optim.Adam(bank[1].parameters(), 0.1)
    bank[1](u).square().sum().backward()
    optimizer.step()
    for old, parameter in zip(before, bank.parameters(), strict=True):
        assert torch.equal(old[[0, 2]], parameter[[0, 2]])
        assert (old[1] != parameter[1]).any()
    torch.testing.assert_close(bank(u)[1], bank[1](u), rtol=1e-5, atol=1e-5)
    held = bank[0]
    z = held(u)
    optimizer = torch.optim.SGD(bank.parameters(), 0.01)
    bank(u).square().sum().backward()
    optimizer.step()
    assert (held(u) != z).any()
    assert_tied(bank)


def test_writing_into_a_miner_is_seen_by_the_graph_of_the_bank():
    bank = bank_of()
    z = bank(torch.randn(16, 6))
    with torch.no_grad():
        bank[0].layers[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


CHANGES = {
    "double": lambda bank: bank.double(),
    "half": lambda bank: bank.half(),
    "bfloat16": lambda bank: bank.to(torch.bfloat16),
    "state dict": lambda bank: bank.load_state_dict(bank_of().state_dict()) and bank,
    "assigned state dict": lambda bank: bank.load_state_dict(bank_of().state_dict(), assign=True) and bank,
    "inside a module": lambda bank: nn.Sequential(bank).double()[0],
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_memory_stays_shared(change):
    bank = bank_of()
    held = [*bank]
    changed = CHANGES[change](bank)
    if changed is bank:
        assert all(map(lambda a, b: a is b, held, bank))
    else:
        assert not {p.data_ptr() for p in bank.parameters()} & {p.data_ptr() for p in changed.parameters()}
        assert_tied(bank)
    for i, miner in enumerate(held):  # those that someone holds are tied at once, not when they are asked for again
        assert all(torch.equal(p, bank.get_parameter(name)[i]) for name, p in miner.named_parameters())
    assert_tied(changed)
    with torch.no_grad():
        changed[1].layers[0].weight.fill_(0.5)
    assert (changed.layers["0"].weight[1] == 0.5).all()
    u = torch.randn(16, 6).to(next(changed.parameters()).dtype)
    assert changed(u).shape == (3, 16, 6)


def test_a_miner_that_moved_away_comes_back():
    bank = bank_of()
    bank[0].double()
    assert_tied(bank)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_a_bank_and_its_miners_belong_together(copied):
    bank = bank_of()
    both = copied({"bank": bank, "mined": Mined(nn.Identity(), bank[1])})
    assert both["mined"].miner is both["bank"][1]
    assert both["bank"] is not bank
    alone = copied(bank[2])
    assert isinstance(alone, Miner)
    assert all(map(torch.equal, alone.parameters(), bank[2].parameters()))
    assert not {p.data_ptr() for p in alone.parameters()} & {p.data_ptr() for p in bank[2].parameters()}


def test_a_bank_of_miners():
    miners = [Miner(**SHAPES["affine"]) for _ in range(3)]
    for miner in miners:
        miner.match(torch.randn(9, 6))
    bank = MinerBank.of(miners)
    u = torch.randn(16, 4)
    torch.testing.assert_close(bank(u), torch.stack([miner(u) for miner in miners]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        bank[0].skip.bias.add_(1)
    assert not torch.equal(bank[0].skip.bias, miners[0].skip.bias)
    with pytest.raises(ValueError, match="a bank needs one miner at least"):
        MinerBank.of([])
    with pytest.raises(ValueError, match=r"miner 0 is .*, miner 1 .*: a bank takes one shape"):
        MinerBank.of([Miner(6), Miner(6, 3)])


def test_files(tmp_path):
    bank = bank_of("affine")
    save_miner(tmp_path / "bank.safetensors", bank)
    loaded = load_bank(tmp_path / "bank.safetensors")
    assert (len(loaded), loaded.config, loaded.training) == (3, bank.config, False)
    assert all(map(torch.equal, loaded.parameters(), bank.parameters()))
    assert_tied(loaded)
    with pytest.raises(ValueError, match="holds a bank of 3 miners: take load_bank"):
        load_miner(tmp_path / "bank.safetensors")
    save_miner(tmp_path / "one.safetensors", bank[1])
    one = load_miner(tmp_path / "one.safetensors")
    assert type(one) is Miner
    assert all(map(torch.equal, one.parameters(), bank[1].parameters()))
    assert len(load_bank(tmp_path / "one.safetensors")) == 1
    assert (tmp_path / "one.safetensors").stat().st_size < (tmp_path / "bank.safetensors").stat().st_size
    contents = (tmp_path / "bank.safetensors").read_bytes()
    (tmp_path / "damaged.safetensors").write_bytes(contents.replace(b'"miners":"3"', b'"miners":"2"'))
    with pytest.raises(ValueError, match=r"damaged.safetensors: the miner in it is damaged"):
        load_bank(tmp_path / "damaged.safetensors")
    with pytest.raises(FileNotFoundError, match="no miner at"):
        load_bank(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"activation": "gelu"}, "must be one of relu, lrelu, tanh, linear, got 'gelu'"),
        ({"input_dim": 3}, "a residual miner needs input_dim == output_dim"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MinerBank(**({"n": 2, "latent_dim": 6} | arguments))


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 4, 6), (1, 3, 4, 6)])
def test_wrong_inputs_are_named(shape):
    with pytest.raises(ValueError, match=r"u must have shape \[B, 6\] or \[3, B, 6\], got"):
        bank_of()(torch.zeros(shape))


@pytest.fixture
def calls(monkeypatch):
    """How many chains each call of the op has had."""
    found, mine = [], miner_module.mine
    monkeypatch.setattr(miner_module, "mine", lambda chains: found.append(len(chains)) or mine(chains))
    return found


class Sum(nn.Module):
    latent_dim, class_dim = 6, 3

    def forward(self, z, y=None):
        return z if y is None else torch.cat((z, y), 1)


def test_z_and_class_miner_are_one_call(calls):
    bank = bank_of(n=1)
    classes = bank_of("affine", 1)[0]
    mined = Mined(Sum(), bank[0], Miner(6, output_dim=3, affine=True), prior="sphere")
    u = torch.randn(16, 6)
    images = mined(u)
    assert calls == [2]
    torch.testing.assert_close(images[:, :6], mined.latents(u), rtol=0, atol=0)
    torch.testing.assert_close(mined.latents(u), project(bank[0](u), "sphere"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(images, mined.images(mined.latents(u), u), rtol=0, atol=0)
    mined.class_miner.register_forward_hook(lambda *_: torch.zeros(16, 3))
    assert not mined(u)[:, 6:].any()
    assert classes.config["affine"]


def hooked(miner):
    miner.layers[1].register_forward_hook(lambda *_: None)
    return miner


def replaced(miner):
    miner.layers[0] = nn.Sequential(miner.layers[0])
    return miner


def test_the_library_where_the_layers_must_be_called(calls):
    miner, u = bank_of(n=1)[0], torch.randn(16, 6)
    expected = miner(u)
    assert calls == [1]
    calls.clear()
    torch.testing.assert_close(torch.func.vmap(miner)(u[:, None])[:, 0], expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert miner(u).dtype == torch.float32  # u, which is added, is float32
        assert (miner(u) != expected).any()
    plain = Miner(6)
    plain.load_state_dict(miner.state_dict())
    for change in (hooked, replaced):
        torch.testing.assert_close(change(copy.deepcopy(plain))(u), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(miner(u[:3]), expected[:3], rtol=1e-5, atol=1e-5)
    assert miner(u[:0]).shape == (0, 6)
    with pytest.raises(RuntimeError, match="dtype"):
        miner(u.double())
    assert calls == []


def test_a_bank_inside_transforms_and_autocast():
    bank, u = bank_of(), torch.randn(16, 6)
    expected = bank(u)
    found = torch.func.vmap(bank)(u[:, None])
    torch.testing.assert_close(found[:, :, 0].transpose(0, 1), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(bank(u).float(), expected, rtol=0.1, atol=0.2)
    assert bank(u[:0]).shape == (3, 0, 6)
