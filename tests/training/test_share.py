"""Results that are shared: what is in the folder, what the card says, and that its own code takes them back."""

import json
import re
import shutil

import pytest
import torch
from hub_stand_in import hub as hub_fixture
from tiny_run import RUN, SIZES
from torch import nn

import minegan_fast as mf
from minegan_fast.finetune import fingerprint
from minegan_fast.models import StyleGAN2Generator, load_generator, save_model
from minegan_fast.training.card import Base, Facts, card, text
from minegan_fast.training.evaluation import generate
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.results import evaluate_result, open_result
from minegan_fast.training.share import pack, push_run

hub = hub_fixture
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*were enlarged", "ignore:by held-out KID no snapshot", "ignore:.*share"
)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a run with a sparse delta in last/."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    paths = {name: str(tiny[name]) for name in ("source", "critic", "images")}
    mf.transfer(**RUN | paths, method="minegan++", density=0.3, features="pixels", out=folder)
    return folder


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """The folder of a run with two sources, and theirs."""
    folder = tmp_path_factory.mktemp("several")
    torch.manual_seed(3)
    for name in ("cats", "dogs"):
        save_model(folder / f"{name}.safetensors", StyleGAN2Generator(latent_dim=8, mapping_layers=1, **SIZES).eval())
    sources = [str(folder / f"{name}.safetensors") for name in ("cats", "dogs")]
    own = {"critic": str(tiny["critic"]), "loss": "hinge", "explore": 0.25, "features": "pixels"}
    mf.transfer(**RUN | own, source=sources, images=str(tiny["images"]), out=folder / "run")
    return folder / "run"


def code_of(readme: str) -> str:
    return re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[1]


def made_by(readme: str, folder, monkeypatch):
    """What the card's code calls `images`, run in a folder."""
    monkeypatch.chdir(folder)
    names = {}
    torch.manual_seed(5)
    exec(code_of(readme), names)
    return names["images"]


def test_a_delta_comes_back_over_its_base(run, tiny, hub, monkeypatch):
    address, notes = push_run(run, "user/digits", which="last", licence="mit", message="first")
    assert address == f"{hub.address}/user/digits"
    assert hub.repos["user/digits"]["commits"][-1][1] == "first"
    files = hub.files("user/digits")
    assert set(files) == {".gitattributes", "README.md", "delta.safetensors", "miner.safetensors", "samples.png"}
    assert files["delta.safetensors"] == (run / "last" / "delta.safetensors").read_bytes()
    assert files["samples.png"] == (run / "samples" / "000008.png").read_bytes()

    images = made_by(files["README.md"].decode(), tiny["source"].parent, monkeypatch)
    torch.manual_seed(5)
    assert torch.equal(images, open_result(run, "last").sample(16))
    assert fingerprint(load_generator(tiny["source"])) in files["README.md"].decode()
    assert not [note for note in notes if "--whole" in note]

    other = load_generator(tiny["source"])
    with torch.no_grad():
        next(other.parameters()).add_(1)
    base = fingerprint(load_generator(tiny["source"]))[:12]
    with pytest.raises(ValueError, match=f"'hf://user/digits' .* from a StyleGAN2Generator of fingerprint {base}"):
        mf.load_delta(other, "hf://user/digits")
    shown = open_result("hf://user/digits", source=tiny["source"])
    assert torch.equal(generate(shown, 4, 0), generate(open_result(run, "last"), 4, 0))
    with pytest.raises(FileNotFoundError, match="has no network: --source names its base"):
        open_result("hf://user/digits")


def test_a_network_takes_the_place_of_a_delta_that_was_there(run, hub, tmp_path, monkeypatch):
    push_run(run, "user/digits", which="last", samples=0)
    push_run(run, "user/digits", which="last", samples=0, whole=True)
    files = hub.files("user/digits")
    assert set(files) == {".gitattributes", "README.md", "generator.safetensors", "miner.safetensors", "samples.png"}
    images = made_by(files["README.md"].decode(), tmp_path, monkeypatch)
    torch.manual_seed(5)
    assert torch.equal(images, open_result(run, "last").sample(16))
    assert torch.equal(generate(open_result("hf://user/digits"), 4, 0), generate(open_result(run, "last"), 4, 0))
    first = hub.repos["user/digits"]["commits"][-2][0]
    assert mf.load_mined(f"hf://user/digits@{first}", open_result(run, "last").generator) is not None
    with pytest.raises(FileNotFoundError, match=r"has no delta: it may be a whole network"):
        open_result("hf://user/digits", source=run / "last" / "generator.safetensors")


@pytest.mark.parametrize("whole", [False, True])
def test_several_sources(several, hub, monkeypatch, whole):
    push_run(several, "user/pets", which="last", whole=whole)
    files = hub.files("user/pets")
    kind = "generator" if whole else "delta"
    each = {f"{name}/{file}.safetensors" for name in ("cats", "dogs") for file in (kind, "miner")}
    assert set(files) == {".gitattributes", "README.md", "samples.png", "shares.json", *each}
    images = made_by(files["README.md"].decode(), several.parent, monkeypatch)
    torch.manual_seed(5)
    assert torch.equal(images, open_result(several, "last").sample(16))


def test_several_sources_of_one_size(several, hub, monkeypatch, tmp_path):
    run = RunFolder(shutil.copytree(several, tmp_path / "run"))
    shares = run.last / "shares.json"
    shares.write_text(json.dumps(json.loads(shares.read_text()) | {"resize": 16}))
    push_run(run.path, "user/large", which="last", samples=0)
    images = made_by(hub.files("user/large")["README.md"].decode(), several.parent, monkeypatch)
    assert images.shape[2:] == (16, 16)
    torch.manual_seed(5)
    assert torch.equal(images, open_result(run.path, "last").sample(16))


def test_damaged_shares_are_not_shared(several, tmp_path):
    run = RunFolder(shutil.copytree(several, tmp_path / "run"))
    (run.last / "shares.json").write_text('{"names": ["cats"]}')
    with pytest.raises(ValueError, match=r"shares\.json is damaged"):
        pack(run.path, "user/pets", tmp_path / "out", which="last", samples=0)
    assert not (tmp_path / "out").exists()


def test_a_miner_alone_goes_before_the_source(run, tiny, hub, monkeypatch):
    push_run(run, "user/mined", which="mined", samples=0)
    files = hub.files("user/mined")
    assert "delta.safetensors" not in files
    images = made_by(files["README.md"].decode(), tiny["source"].parent, monkeypatch)
    torch.manual_seed(5)
    assert torch.equal(images, open_result(run, "mined").sample(16))
    assert fingerprint(load_generator(tiny["source"])) in files["README.md"].decode()


class Net(nn.Module):
    latent_dim, resolution, image_channels = 6, 8, 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 64)

    def forward(self, z):
        return self.layer(z).tanh().view(-1, 1, 8, 8)


def test_a_module_of_the_users_own(tiny, hub, tmp_path):
    source = Net()
    own = {"source": source, "images": str(tiny["images"]), "features": "pixels", "critic": str(tiny["critic"])}
    mf.transfer(**RUN | own, method="minegan++", density=0.3, out=tmp_path / "run")
    _, notes = push_run(tmp_path / "run", "user/net", which="last")
    readme = hub.files("user/net")["README.md"].decode()
    assert "G = ...  # the network Net, with the weights of the base below" in readme
    assert fingerprint(source) in readme
    assert any("without intervals" in note for note in notes)
    assert str(tmp_path) not in readme
    assert "95 % interval" not in readme
    mf.load_delta(source, "hf://user/net")
    mined = mf.load_mined("hf://user/net", source)
    back = mf.load_mined(tmp_path / "run", Net())
    best = mf.load_mined(tmp_path / "run" / "last" / "miner.safetensors", source)
    u = torch.randn(4, 6)
    assert torch.equal(mined(u), best(u))
    assert back(u).shape == (4, 1, 8, 8)


def test_a_source_on_the_hub(tiny, hub, tmp_path, monkeypatch):
    hub.commit("other/gans", {"small/tiny.safetensors": tiny["source"].read_bytes()})
    source = "hf://other/gans/small/tiny.safetensors"
    own = {"source": source, "images": str(tiny["images"]), "features": "pixels", "critic": str(tiny["critic"])}
    settings = {**RUN, **own, "method": "minegan++", "density": 0.3, "out": tmp_path / "run"}
    mf.transfer(**settings)
    mf.transfer(**settings, resume=True)
    push_run(tmp_path / "run", "user/name", which="last", samples=0)
    readme = hub.files("user/name")["README.md"].decode()
    images = made_by(readme, tmp_path, monkeypatch)  # where the source does not lie
    torch.manual_seed(5)
    assert torch.equal(images, open_result(tmp_path / "run", "last").sample(16))
    assert f'"source": "{source}"' in readme
    mf.transfer(**settings | {"source": str(tiny["source"])}, resume=True)


def test_the_card_measures_again_with_intervals(run, tmp_path):
    pack(run, "user/x", tmp_path / "out", which="last", samples=20)
    readme = (tmp_path / "out" / "README.md").read_text()
    # 24 images, of which a quarter was held out
    assert "20 generated images against 6 real ones, which were held out of the training, on pixels features" in readme
    found = dict(re.findall(r"^\| (\w+) \| \S+ \| (\S+ to \S+)? ", readme, re.MULTILINE))
    assert set(found) == {"fid", "kid", "kmmd", "mv", "diversity"}
    assert [name for name, interval in found.items() if not interval] == ["fid"]
    shown = dict(re.findall(r"^\| (\w+) \| (\S+) \|", readme, re.MULTILINE))
    low, high = map(float, found["kmmd"].split(" to "))
    assert low < float(shown["kmmd"]) < high
    assert "rank-deficient" in readme


def test_measured_intervals_are_around_their_values(run, tiny):
    report = evaluate_result(run, "last", None, None, None, tiny["images"], 20, "pixels", 0, with_intervals=True)
    for name, (low, high) in report["intervals"].items():
        assert low < report["metrics"][name] < high
        assert (low + high) / 2 == pytest.approx(report["metrics"][name])


def test_without_its_images_the_card_has_the_runs_numbers(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"images": "/nowhere/of/mine"}))
    notes = pack(moved, "user/x", tmp_path / "out", which="last")
    last = [row for row in RunFolder(run).read_history() if "kid" in row][-1]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"| kid | {last['kid']:.4g} |\n" in readme
    assert any("without intervals, which could not be measured again" in note for note in notes)
    assert "nowhere" not in readme
    with pytest.raises(FileNotFoundError):
        pack(moved, "user/x", tmp_path / "again", which="last", images=tmp_path / "none")


@pytest.mark.parametrize("whole", [False, True])
def test_no_path_of_this_machine_is_shared(run, tiny, tmp_path, whole):
    pack(run, "user/x", tmp_path / "out", which="last", whole=whole, samples=20)
    settings = json.loads((run / "config.json").read_text())
    for file in (tmp_path / "out").rglob("*.*"):
        content = file.read_bytes()
        for path in (run.parent, tiny["source"].parent, settings["images"].rpartition("/")[0]):
            assert str(path).encode() not in content, file


def facts(**changes) -> Facts:
    base = Base("a|b `c` <script>.pt", "Net<b>", "0" * 64)
    given = {"repo": "user/name", "content": "delta", "which": "best", "step": 3, "bases": [base], **changes}
    return Facts(**given)


def test_names_are_no_markup():
    assert text("a|b\n# *c* <i>&[x](y)") == r"a\|b \# \*c\* &lt;i&gt;&amp;\[x\]\(y\)"
    assert text("- x") == r"\- x"
    assert text("https://x www.y.z") == r"https\://x www\.y.z"
    evil = 'x"\n```\n<script>alert(1)</script> ![](http://x)'
    one = facts(
        warnings=[evil], settings={evil: evil}, metrics={evil: 1.0}, origin=evil, versions={"a": evil},
        bases=[Base(evil, evil, evil)],
    )  # fmt: skip
    made = card(one)
    blocks = re.split("^```", made, flags=re.MULTILINE)
    outside = "".join(blocks[0::2])
    assert len(blocks) == 7  # three blocks, none of which a name has ended
    assert "<script>" not in outside
    assert "![](" not in outside
    compile(code_of(made), "card", "exec")


def test_the_front_matter_is_yaml():
    yaml = pytest.importorskip("yaml")
    front = card(facts(licence="cc-by-4.0", origin="some/base", families=["stylegan2"])).split("---\n")[1]
    assert yaml.safe_load(front) == {
        "license": "cc-by-4.0", "library_name": "minegan_fast", "pipeline_tag": "unconditional-image-generation",
        "base_model": "some/base", "base_model_relation": "adapter", "tags": ["gan", "minegan", "stylegan2", "delta"],
    }  # fmt: skip
    assert "base_model" not in card(facts(origin="http://x/y"))
    assert "It is to be had at <http://x/y>." in card(facts(origin="http://x/y"))


def test_what_the_hub_refuses_is_said(run, hub, monkeypatch):
    push = {"which": "last", "samples": 0}
    with pytest.raises(ValueError, match=r'the Hub refused \(.*"license" must be one of'):
        push_run(run, "user/a", licence="my-own", **push)
    with pytest.raises(PermissionError, match=r"may not do that to 'other/a' \(You don't have the rights"):
        push_run(run, "other/a", **push)
    hub.commit("user/public", {"README.md": b"mine"})
    with pytest.raises(ValueError, match="user/public is there already and public, so nothing was sent"):
        push_run(run, "user/public", private=True, **push)
    assert list(hub.files("user/public")) == ["README.md"]
    push_run(run, "user/hidden", private=True, **push)
    assert hub.repos["user/hidden"]["private"]
    push_run(run, "user/shown", **push)
    assert not hub.repos["user/shown"]["private"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match="does not take the token"):
        push_run(run, "user/a", **push)
    monkeypatch.delenv("HF_TOKEN")
    seen = len(hub.seen)
    with pytest.raises(PermissionError, match="not logged in to the Hub: run hf auth login, or set HF_TOKEN"):
        push_run(run, "user/a", **push)
    assert len(hub.seen) == seen


def test_an_upload_that_breaks_off_leaves_no_commit(run, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.broken = "/store/"
    with pytest.raises(ConnectionError, match="does not answer, or broke off"):
        push_run(run, "user/a", which="last", samples=0)
    assert list(hub.files("user/a")) == [".gitattributes"]
    hub.broken = None
    push_run(run, "user/a", which="last", samples=0)
    assert "delta.safetensors" in hub.files("user/a")


def test_what_cannot_be_shared_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="USER/NAME"):
        pack(run, "name", tmp_path / "out")
    with pytest.raises(ValueError, match="licence must be an identifier"):
        pack(run, "user/x", tmp_path / "out", licence="MIT\nx: y")
    with pytest.raises(ValueError, match="which must be one of"):
        pack(run, "user/x", tmp_path / "out", which="first")
    with pytest.raises(FileNotFoundError, match="no best result of a run"):
        pack(tmp_path, "user/x", tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        pack(run, "user/x", run)
    assert not (tmp_path / "out").exists()
