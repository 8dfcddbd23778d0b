"""Runs whose sources sleep: the files are those of a run whose sources do not, bit by bit, and nothing runs asleep.

Without a GPU the place where they wake is a stand-in, whose sleeping weights no module may read.
"""

import copy
import json

import pytest
import torch
from feature_networks import GreyFeatures
from sleeping import StandIn
from tiny_conditional import Conditional
from tiny_run import RUN, SIZES, cut_off

import minegan_fast as mf
from minegan_fast.mining import device_bytes
from minegan_fast.models import StyleGAN2Generator
from minegan_fast.training import TransferConfig, dry_run, prepared
from minegan_fast.training.estimate import HEADROOM
from minegan_fast.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:by held-out KID no snapshot")

KERNEL = {"loss_features": GreyFeatures(), "density": 0.3, "part": 3}
CRITIC = {"loss": "hinge", "explore": 0.25}
SETTINGS = {
    "mixture": KERNEL,
    "winner": CRITIC | {"mmd_weight": 0.1, "loss_features": GreyFeatures()},
    "contrast": CRITIC | {"criterion": "contrast", "reselect_every": 2},
    "ewc": CRITIC | {"method": "ewc", "mining_steps": 0},
    "affine alone": CRITIC | {"method": "scale_shift", "mining_steps": 0},
    "new weights": CRITIC | {"method": "scratch", "mining_steps": 0},
    "w and constants": CRITIC | {"mine": "w", "mine_constant": True, "finetune_steps": 0, "prior_weight": 0.1},
}


class Watched(StandIn):
    """Notes which memory sleeps, and who sleeps in it."""

    def __init__(self):
        super().__init__(poison=False)
        self.hosts = []

    def __deepcopy__(self, memo):
        return self

    def host(self, tensor):
        self.hosts.append(super().host(tensor))  # kept, so that its memory serves nothing else
        return self.hosts[-1]

    def has(self, tensor):
        return any(tensor.data_ptr() == host.data_ptr() for host in self.hosts)


watched: list[Watched] = []


def refuse_asleep(module, _):
    assert not any(w.has(p) for w in watched for p in module.parameters(recurse=False)), f"{module} runs asleep"


@pytest.fixture
def asleep(monkeypatch):
    watched[:] = [Watched()]
    monkeypatch.setattr(prepared, "pinned_memory", lambda device: watched[0])
    yield watched[0]
    watched.clear()


@pytest.fixture(scope="module")
def settings(tiny):
    torch.manual_seed(2)
    sources = [copy.deepcopy(tiny["generator"]), StyleGAN2Generator(latent_dim=6, mapping_layers=1, **SIZES).eval()]
    for source in (*sources, other := Conditional()):
        for module in source.modules():
            module.register_forward_pre_hook(refuse_asleep)
    return {**RUN, "source": sources, "other": other, "images": str(tiny["images"]), "features": "pixels",
            "snapshot_every": 4, "critic_warmup": 0}  # fmt: skip


def with_third(settings, changes):
    """Three sources, but two where w is mined, which the third does not have, and where it cannot begin anew."""
    settings = dict(settings)
    other = settings.pop("other")
    more = [] if changes.get("mine") == "w" or changes.get("method") == "scratch" else [other]
    return settings | changes | {"source": [*settings["source"], *more]}


def files(folder):
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
    found |= {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("shares.json")}
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return found | {"history": [{k: v for k, v in row.items() if k != "seconds"} for row in rows]}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_files_are_those_of_a_run_that_is_awake(settings, name, asleep, tmp_path):
    own = with_third(settings, SETTINGS[name])
    one = mf.transfer(**own, out=tmp_path / "awake")
    assert not asleep.events
    two = mf.transfer(**own, out=tmp_path / "asleep", offload="cpu")
    assert asleep.events
    assert files(tmp_path / "awake") == files(tmp_path / "asleep")
    assert one.sample(5).equal(two.sample(5))
    assert two.mined.runner.offload, "the result sleeps too"


def test_a_run_that_was_cut_off_wakes_where_it_was(settings, asleep, monkeypatch, tmp_path):
    own = with_third(settings, KERNEL)
    mf.transfer(**own, out=tmp_path / "awake")
    cut_off(monkeypatch, own | {"out": tmp_path / "cut", "offload": "cpu"})
    assert files(tmp_path / "awake") == files(tmp_path / "cut")


def test_sources_in_which_nothing_trains_sleep_in_stage_2(settings, asleep, monkeypatch, tmp_path):
    """And two at most were awake until then."""
    seen, select = [], Trainer.select

    def watching(self):
        seen.append(asleep.most)
        found = select(self)
        offload = self.mined.runner.offload
        offload.rest()
        for i, network in enumerate(self.generator):
            trains = any(p.requires_grad for p in network.parameters())
            seen.append((trains, offload.sleeps(i), any(map(asleep.has, network.parameters()))))
        return found

    monkeypatch.setattr(Trainer, "select", watching)
    few = KERNEL | {"density": 1e-4, "method": "minegan++", "offload": "cpu"}
    mf.transfer(**with_third(settings, few), out=tmp_path / "run")
    most, *states = seen
    assert most <= 2
    assert sorted(states) == [(False, True, True), (False, True, True), (True, False, False)]


def test_the_estimate_is_of_two_sources_until_one_trains(settings, asleep):
    sources = [settings["source"][0]] * 4
    common = {"images": settings["images"], "loss": "hinge", "features": "pixels", "batch": 2, "mining_steps": 1,
              "score_samples": 1, "density": 0.1, "augment": "", "source": [None] * 4}  # fmt: skip

    def networks(**changes):
        return dry_run(TransferConfig(**common | changes), source=sources)[0].networks

    frozen = [copy.deepcopy(source).requires_grad_(False) for source in sources]
    two = device_bytes(frozen, offload=True)[0]
    size = sum(p.nbytes for p in sources[0].parameters())
    assert two == 2 * size + 4 * sum(b.nbytes for b in sources[0].buffers())
    mining, asleep_mining = networks(finetune_steps=0), networks(finetune_steps=0, offload="cpu")
    assert mining - asleep_mining == pytest.approx(HEADROOM["cpu"] * (4 * size - two), rel=0.01)
    assert networks(finetune_steps=1, offload="cpu") > asleep_mining + 2 * size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "^offload is for a GPU, whose memory is short, and the miners are on cpu: leave it out"),
        ({"source": "a.pt", "explore": 0.0}, "^offload and spread are for several sources, and there is one"),
        ({"offload": "disk"}, "^offload must be one of cpu, got 'disk'"),
        ({"offload": None, "spread": True}, "^spread shares the sources among processes, and this is the only one"),
        ({"offload": None, "spread": True, "mining_steps": 0}, "^spread shares the sources .* in stage 1, which takes"),
    ],
    ids=["no GPU", "one source", "elsewhere", "one process", "no stage 1"],
)
def test_what_cannot_sleep_or_be_spread_is_named(settings, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as found:
        mf.transfer(**with_third(settings, CRITIC) | {"offload": "cpu", "device": "cpu"} | changes, out=tmp_path / "o")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "o").exists()
