"""Runs with several sources: shares in the history, one budget of neurons, deltas, resume, and what cannot be mined."""

import json
import shutil
import sys

import pytest
import torch
from feature_networks import GreyFeatures
from safetensors.torch import load_file
from tiny_conditional import Conditional
from tiny_run import RUN, SIZES, cut_off
from torch import nn

import minegan_fast as mf
from minegan_fast.cli import app
from minegan_fast.finetune import load_delta
from minegan_fast.mining import MultiGenerator
from minegan_fast.models import StyleGAN2Generator, load_generator, save_model
from minegan_fast.training import TransferConfig, dry_run
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.generators import Several
from minegan_fast.training.kernel_loss import KernelLoss
from minegan_fast.training.kernel_mixture import KernelMixture
from minegan_fast.training.loss_features import LossFeatures
from minegan_fast.training.names import short_names
from minegan_fast.training.processes import Processes
from minegan_fast.training.results import evaluate_result, open_result

pytestmark = pytest.mark.filterwarnings("ignore:.*were enlarged", "ignore:by held-out KID no snapshot")

KERNEL = {"loss_features": GreyFeatures(), "features": "pixels", "density": 0.3, "part": 3}
CRITIC = {"loss": "hinge", "explore": 0.25, "train_critic": "sparse", "features": "pixels"}


class Plain(nn.Module):
    """z [B, 4] -> images; where it is broken, NaN."""

    latent_dim = 4

    def __init__(self, resolution=8, image_channels=1, broken=False):
        super().__init__()
        self.resolution, self.image_channels, self.broken = resolution, image_channels, broken
        self.layer = nn.Linear(4, image_channels * resolution**2)

    def forward(self, z):
        images = self.layer(z).tanh().view(-1, self.image_channels, self.resolution, self.resolution)
        return images * torch.nan if self.broken else images


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Two sources of one name in two folders; the first is that of `tiny`, with its critic."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(1)
    paths = [folder / name / "model.safetensors" for name in ("cats", "dogs")]
    for path in paths:
        path.parent.mkdir()
    save_model(paths[0], tiny["generator"], tiny["discriminator"])
    save_model(paths[1], StyleGAN2Generator(latent_dim=6, mapping_layers=1, **SIZES).eval())
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def settings(tiny, files):
    torch.manual_seed(2)
    return {**RUN, "source": [*files, Conditional()], "images": str(tiny["images"]), "snapshot_every": 4}


NAMES = ["cats-model", "dogs-model", "Conditional"]


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """{"kernel": result, "critic": result}."""
    folder = tmp_path_factory.mktemp("runs")
    both = {"kernel": KERNEL, "critic": CRITIC}
    return {name: mf.transfer(**settings | own, out=folder / name) for name, own in both.items()}


@pytest.mark.parametrize("loss", ["kernel", "critic"])
def test_shares_are_in_the_history_and_with_the_result(runs, loss):
    result = runs[loss]
    rows = [row for row in result.history if "loss_G" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        p = [row[f"p_{name}"] for name in NAMES]
        assert min(p) >= 0
        assert sum(p) == pytest.approx(1, abs=1e-6)
    last = json.loads((result.folder / "last" / "shares.json").read_text())
    assert last["names"] == NAMES
    assert last["p"] == pytest.approx([rows[-1][f"p_{name}"] for name in NAMES], abs=1e-6)
    assert (last["interval"] is not None) == (loss == "kernel")
    assert all(low <= p <= high for p, (low, high) in zip(last["p"], last["interval"] or [(0, 1)] * 3, strict=True))
    assert isinstance(result.mined, MultiGenerator)
    assert [*result.shares] == NAMES
    assert sum(result.shares.values()) == pytest.approx(1)
    assert torch.equal(result.sample(5), result.sample(5))
    with pytest.raises(ValueError, match=r"there are 3 sources: mined\.branches has"):
        _ = result.generator


def test_a_critics_p_begins_anew_in_stage_2(runs):
    """A step of 4 samples, of which the counts of stage 1 are no part: p are quarters."""
    row = next(row for row in runs["critic"].history if row["step"] == 5)
    assert all((4 * row[f"p_{name}"]) % 1 == pytest.approx(0, abs=1e-6) for name in NAMES)


@pytest.mark.parametrize("loss", ["kernel", "critic"])
def test_a_delta_for_each_over_its_source(runs, settings, loss):
    last, trained = runs[loss].folder / "last", 0
    for name, source in zip(NAMES, settings["source"], strict=True):
        generator = source if isinstance(source, nn.Module) else load_generator(source)
        before = {n: t.clone() for n, t in generator.state_dict().items()}
        load_delta(generator, last / name / "delta.safetensors")
        written = load_file(last / name / "generator.safetensors")
        written = {n.removeprefix("generator."): t for n, t in written.items()}
        assert all(torch.equal(written[n], t) for n, t in generator.state_dict().items())
        trained += any(not torch.equal(before[n], t) for n, t in generator.state_dict().items())
        if source is generator:
            source.load_state_dict(before)
            del source.__dict__["_minegan_fast_deltas"]
    assert trained
    other = load_generator(settings["source"][1])
    nn.init.zeros_(next(other.parameters()))
    with pytest.raises(ValueError, match="another base"):
        load_delta(other, last / NAMES[1] / "delta.safetensors")


@pytest.mark.parametrize("loss", ["kernel", "critic"])
def test_a_run_that_was_cut_off_ends_as_if_not(runs, settings, loss, monkeypatch, tmp_path):
    own = settings | {"kernel": KERNEL, "critic": CRITIC}[loss] | {"out": tmp_path / "cut"}
    again = cut_off(monkeypatch, own)

    def results(folder):
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
        return found | {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("shares.json")}

    assert results(again.folder) == results(runs[loss].folder)
    assert again.sample(3).equal(runs[loss].sample(3))


def test_one_budget_of_neurons_over_all(runs):
    rows = mf.Selection.load(RunFolder(runs["kernel"].folder).selection)
    counts = [0, 0, 0]
    for name, own in rows.rows.items():
        counts[int(name.split(".")[1])] += len(own)
    row = next(row for row in runs["kernel"].history if row["step"] == 4 and "p_Conditional" in row)
    without = [count for count, name in zip(counts, NAMES, strict=True) if not row[f"p_{name}"]]
    assert not any(without), "a source without a share got neurons"
    assert rows.density == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("settings_of", [{"loss": "hinge"}, {"loss_features": GreyFeatures()}], ids=["critic", "mmd"])
def test_a_source_of_nan_gets_no_share_and_is_named(settings_of, run_settings, capfd):
    run_settings |= {"source": [Plain(), Plain(broken=True)], "critic": None, "features": "pixels", "progress": True}
    run_settings |= {"mining_steps": 2, "finetune_steps": 1, "snapshot_every": 4}
    with pytest.warns(UserWarning, match=r"Plain-2 (cannot win|gets no share)"):
        result = mf.transfer(**run_settings | settings_of)
    assert result.shares == {"Plain-1": 1, "Plain-2": 0}
    assert all(row["p_Plain-2"] == 0 for row in result.history if "loss_G" in row)
    said = capfd.readouterr().err
    assert "2 sources: Plain-1, Plain-2" in said
    assert "the images of Plain-2 hold NaN or inf: it gets no share" in said
    assert "shares: Plain-1 100 %" in said


def test_a_source_that_takes_all_is_named():
    multi = MultiGenerator([Plain(), Plain()], names=["a", "b"])
    for _ in range(19):
        multi.take(torch.tensor([0.0, 1.0]).double())
    with pytest.warns(UserWarning, match=r"^b has 100\.0 % of the samples, so the others hardly learn any more"):
        multi.take(torch.tensor([0.0, 1.0]).double())


def test_the_program(files, tiny, monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["minegan-fast", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            app.main()
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        return out + err

    run = tmp_path / "run"
    short = {**RUN, "mining_steps": 2, "finetune_steps": 0, "snapshot_every": 2}
    words = {name: value for name, value in short.items() if name not in ("progress", "report")}
    options = ["--no-report", *(f"--{name.replace('_', '-')}={value}" for name, value in words.items())]
    source = [option for path in files for option in ("--source", path)]
    said = call("transfer", *source, "--images", tiny["images"], "--out", run, *options)
    assert "kernel distance of critic features" in said, "the first file has a critic"
    assert "p cats-model" in said or "p dogs-model" in said
    call("sample", run, "--out", tmp_path / "s", "-n", 5, "--by-source", "--which", "last")
    pictures = sorted(path.name for path in (tmp_path / "s").glob("0*.png"))
    assert len(pictures) == 5
    assert {name[6:] for name in pictures} <= {"cats-model.png", "dogs-model.png"}
    report = json.loads(call("evaluate", run, "--images", tiny["images"], "--samples", 12).splitlines()[-1])
    assert report["features"] == "critic (which trained it)"
    assert "cats-model" in call("transfer", "--out", run, "--resume", "--finetune-steps", 1, "--log-every", 1)
    assert open_result(run).names == NAMES[:2]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("a.pt", "i/", [], None), ("a.pt", "i/")),
        ((None, None, ["a.pt", "b.pt"], "i/"), (["a.pt", "b.pt"], "i/")),
        (("i/", None, ["a.pt", "b.pt"], None), (["a.pt", "b.pt"], "i/")),
        (("a.pt", None, [], "i/"), ("a.pt", "i/")),
        ((None, None, [], None), (None, None)),
        (("a.pt", "i/", ["b.pt"], None), "source is given twice: 'a.pt' and --source"),
        (("a.pt", "i/", [], "j/"), "images is given twice: 'i/' and --images"),
    ],
)
def test_sources_and_images_as_arguments_and_options(given, found):
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            app._named_once(*given)
    else:
        assert app._named_once(*given) == found


def test_a_result_with_a_module_leads_back_to_python(runs):
    with pytest.raises(ValueError, match=r"source \d of \d .* is a module of yours: .* the result of transfer"):
        open_result(runs["kernel"].folder)


def test_a_result_with_a_module_is_opened_with_that(runs, settings, tiny):
    module = next(one for one in settings["source"] if isinstance(one, nn.Module))
    for result in runs.values():
        opened = open_result(result.folder, source=[module])
        assert opened.sample(6, torch.Generator().manual_seed(1)).equal(
            result.mined.sample(6, torch.Generator().manual_seed(1))
        )
    report = evaluate_result(runs["critic"].folder, "best", None, module, None, tiny["images"], 8, None, 0)
    assert report["generated"] == 8
    with pytest.raises(ValueError, match=r"1 of the 3 sources of the run in .* are modules, and 2 are given"):
        open_result(runs["kernel"].folder, source=[module, module])


def test_estimate_of_several_is_that_of_the_largest(files, tiny):
    small = {"images": str(tiny["images"]), "loss": "hinge", "features": "pixels", "batch": 2, "mining_steps": 1,
             "finetune_steps": 1, "score_samples": 1, "augment": ""}  # fmt: skip
    one, both = (dry_run(TransferConfig(source=source, **small))[0] for source in (files[0], files))
    alone = [*one.work[:3], one.work[-1]]  # path length is of one source
    assert [work.per_sample for work in both.work] == pytest.approx([work.per_sample for work in alone], rel=0.05)
    assert both.networks > one.networks


def test_images_of_two_sizes_are_resized_where_asked(run_settings):
    run_settings |= {"source": [Plain(8), Plain(4)], "critic": None, "loss": "nonsaturating", "finetune_steps": 1}
    run_settings |= {"mining_steps": 1, "features": "pixels", "images": torch.rand(8, 1, 8, 8) * 2 - 1}
    with pytest.raises(ValueError, match=r"^Plain-2 makes images of 4 pixels, Plain-1 of 8: resize=8 \(--resize 8\)"):
        mf.transfer(**run_settings)
    result = mf.transfer(**run_settings, resize=8)
    assert result.sample(4).shape == (4, 1, 8, 8)
    assert result.mined.resize == (8, 8)


class Bare(Conditional):
    """Without class embeddings."""

    class_embeddings = property()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": []}, "^there is no source: give the path"),
        ({"source": [Plain(), Plain(image_channels=3)]}, "^Plain-2 makes images of 3 channels, Plain-1 of 1"),
        ({"source": [Plain(), Bare()]}, "^Bare: the source Bare is class-conditional, but has no class_embeddings"),
        ({"source": [Plain(broken=True)] * 2}, r"^the images of all 2 sources \(Plain-1, Plain-2\) hold NaN or inf"),
        ({"source": Plain(), "explore": 0.1}, "^resize and explore are for several sources, and there is one"),
        ({"source": [Plain(), Plain()], "explore": 2.0}, "^explore is a share of a batch, from 0 to 1"),
        ({"source": [Plain(), Plain()], "explore": 0.1, "loss": "mmd"}, "^explore is for a critic's choice"),
        ({"source": [Plain(), Plain()], "path_length_weight": 1.0}, "^path_length_weight is for one source"),
        ({"source": [Plain(), Plain()], "mined_class": "1"}, r"^Plain-1: mined_class is 1, but Plain has no classes"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_mined_is_named(run_settings, changes, message):
    run_settings |= {"critic": None, "features": "pixels", "loss": "hinge"}
    with pytest.raises(ValueError, match=message) as found:
        mf.transfer(**run_settings | changes)
    assert "\n" not in str(found.value)
    assert not run_settings["out"].exists()


def test_names_are_short_and_unique():
    paths = ["/m/cats/best.pt", "/m/dogs/best.pt", "/m/faces.pkl", "/n/cats/best.pt", "/m/faces.pkl"]
    names = short_names([*paths, Plain(), Plain(), Conditional()])
    assert names[:5] == ["m-cats-best", "dogs-best", "m-faces-1", "n-cats-best", "m-faces-2"]
    assert names[5:] == ["Plain-1", "Plain-2", "Conditional"]
    assert short_names(["a b/ö.pt", "/x/../.hidden.pt"]) == ["ö", "_hidden"]
    with pytest.raises(ValueError, match=r"^b makes images of 3 channels, a of 1: the channels must be the same"):
        Several([Plain(), Plain(image_channels=3)], ["a", "b"])


class Bright(nn.Module):
    """A critic that prefers bright images."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.mean((1, 2, 3))


@pytest.mark.parametrize(
    "loss", [{"loss": "hinge", "critic": Bright()}, {"loss_features": GreyFeatures()}], ids=["critic", "mmd"]
)
def test_a_source_that_wins_and_in_which_nothing_trains(run_settings, loss):
    """No miner, and so few neurons that the bright source, which makes the target, has none of them."""
    sources = [Plain(), Plain()]
    for source, bias in zip(sources, (1.0, -9.0), strict=True):
        nn.init.constant_(source.layer.bias, bias)
    run_settings |= {"source": sources, "critic": None, "features": "pixels", "train_miner": False, "batch": 2}
    run_settings |= {"density": 0.05, "finetune_steps": 3, "snapshot_every": 4, "criterion": "magnitude"}
    run_settings |= {"mining_steps": 0, "images": torch.rand(24, 1, 8, 8) - 0.05}
    result = mf.transfer(**run_settings | loss)
    rows = mf.Selection.load(RunFolder(result.folder).selection).rows
    assert {name.split(".")[1] for name, own in rows.items() if len(own)} == {"1"}
    assert result.history[-1]["step"] == 3
    assert json.loads((result.folder / "last" / "shares.json").read_text())["p"][0] > 0.9


@pytest.mark.parametrize("part", [None, 2])
def test_the_gradient_is_that_of_the_mixture(part):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    kernel = KernelLoss(LossFeatures(GreyFeatures(), probe=torch.rand(2, 1, 8, 8) * 2 - 1), images, flips=False)
    generators, z = [Plain().requires_grad_(True) for _ in range(3)], torch.randn(3, 5, 4)
    calls = [0, 0, 0]

    def make(i):
        def made(first, last):
            calls[i] += 1
            return generators[i](z[i, first:last])

        return made

    mixture = KernelMixture(kernel, ["a", "b", "c"], 5, Processes())
    loss = mixture.backward([make(i) for i in range(3)], 5, part, 2.0)
    p = mixture.mixture.p
    parts = 1 if part is None else 3
    assert calls == [parts * (2 if share else 1) for share in p], "a source without a share was made with a graph"
    features = [kernel.features(g(x)) for g, x in zip(generators, z, strict=True)]
    expected = mixture.mixture.loss(features)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    active = [g.layer.weight for g, share in zip(generators, p, strict=True) if share]
    for weight, slope in zip(active, torch.autograd.grad(2 * expected, active), strict=True):
        torch.testing.assert_close(weight.grad, slope, rtol=1e-4, atol=1e-7)
    assert all(g.layer.weight.grad is None for g, share in zip(generators, p, strict=True) if not share)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 10**9},
        {"resize": [8, 8]},
        {"names": ["../a", "b", "c"]},
        {"p": [1, 2]},
        {"p": [-1, 1, 1]},
        {"p": "x"},
    ],
    ids=str,
)
def test_damaged_shares_are_named(runs, tmp_path, change):
    folder = tmp_path / "run"
    shutil.copytree(runs["critic"].folder, folder)
    path = folder / "best" / "shares.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"shares\.json is damaged"):
        open_result(folder)
