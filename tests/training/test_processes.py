"""Two processes do what one does: same draws, same neurons, same weights but for rounding; and they end together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_ranks
import torch
from safetensors.torch import load_file
from tiny_run import RUN

import minegan_fast as mf
from minegan_fast.finetune import Selection
from minegan_fast.training import DoesNotFit
from minegan_fast.training.estimate import Estimate, Work
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.notes import Notes
from minegan_fast.training.processes import Processes, join
from minegan_fast.training.sources import choose_device

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)


@pytest.fixture(scope="module")
def settings(tiny):
    paths = {name: str(tiny[name]) for name in ("source", "critic", "images")}
    # Path length is left to the single steps below: it is not the same but for rounding.
    changes = {"batch": 8, "augment": "color,translation", "path_length_weight": 0.0}
    return {**RUN, **paths, **changes, "mining_steps": 2, "finetune_steps": 6, "snapshot_every": 4}


@pytest.fixture(scope="module")
def two(tiny, settings, tmp_path_factory):
    """The folder in which two processes have done all of recipe_ranks.main, of which the last act is a kill."""
    folder = tmp_path_factory.mktemp("processes")
    mf.transfer(**settings, out=folder / "one")
    mf.transfer(**settings | {"finetune_steps": 3}, out=folder / "one then two")
    mf.transfer(**settings | recipe_ranks.KERNEL, out=folder / "kernel one")
    for name, changes in recipe_ranks.several(tiny).items():
        mf.transfer(**settings | changes, out=folder / f"{name} one")
        if not name.startswith("still"):
            continue
        short = {"mining_steps": 1, "finetune_steps": 0}
        mf.transfer(**settings | changes | short, out=folder / f"{name} one then spread")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as ended:
        torch.multiprocessing.spawn(recipe_ranks.main, (port, str(folder), tiny, settings), nprocs=2)
    assert ended.value.signal_name == signal.SIGKILL.name
    return folder


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    result = getattr(RunFolder(folder), which)
    return {**load_file(result / "generator.safetensors"), **load_file(result / "miner.safetensors")}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - other[name]).double().square().sum()) for name in one) ** 0.5


def assert_same_run(one: Path, other: Path):
    """The selection equal, and weights and losses to rounding.

    Rounding: sums of 8 samples against means of two sums of 4, in float32, for 8 steps. Adam divides by the gradient's
    own size, so where a gradient is nearly 0 its rounding is a visible part of a step; hence the distance of all
    weights, against how far they went.
    """
    assert Selection.load(RunFolder(one).selection) == Selection.load(RunFolder(other).selection)
    start, end, same = weights(one, "mined"), weights(one), weights(other)
    assert distance(end, same) < 1e-5 * distance(start, end)
    rows = [[json.loads(line) for line in RunFolder(f).history.read_text().splitlines()] for f in (one, other)]
    losses, others = ({row["step"]: row for row in part if "loss_G" in row} for part in rows)
    assert list(losses) == list(others) == list(range(1, 9))
    for step, row in losses.items():
        for key in row.keys() & {"loss_D", "loss_G"}:
            assert row[key] == pytest.approx(others[step][key], rel=1e-5)


def test_a_run_on_two_processes_is_that_on_one(two):
    assert_same_run(two / "one", two / "two")
    results = [torch.load(two / f"results{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, (samples, step, history) in results[0].items():
        other = results[1][name]
        assert torch.equal(samples, other[0])
        assert (step, history) == other[1:]


@pytest.mark.parametrize("name", ["two", "still mixture spread", "still winner spread"])
def test_one_report_is_written(two, name):
    """By the first process: the second one wrote nothing at all, as the processes themselves have asked."""
    assert f"<h1>{name}</h1>" in (two / name / "report.html").read_text()
    assert len(Notes(two / name / "log.jsonl").read("intervals")) == 1


def test_the_kernel_distance_is_that_of_all_samples(two):
    assert_same_run(two / "kernel one", two / "kernel two")


SPREAD = ["spread", "one then spread", "spread then one"]
SEVERAL = [(name, "two") for name in ("mixture", "winner")]
SEVERAL += [(f"still {name}", how) for name in ("mixture", "winner", "parts") for how in ("two", *SPREAD)]


@pytest.mark.parametrize(("name", "how"), SEVERAL)
def test_several_sources_are_those_of_one_process(two, tiny, settings, name, how):
    """The shares too; a winner is one of several that score alike to rounding, which these do not."""
    if how == "spread then one":
        mf.transfer(**settings | recipe_ranks.several(tiny)[name], out=two / f"{name} {how}", resume=True)
    one, other = (RunFolder(two / f"{name} {count}") for count in ("one", how))
    assert Selection.load(one.selection) == Selection.load(other.selection)
    rows, others = ([row for row in folder.read_history() if "loss_G" in row] for folder in (one, other))
    assert [row["step"] for row in rows] == list(range(1, 5))
    sources = ["StyleGAN2Generator", "Conditional"]
    if name.startswith("still"):
        sources = ["Plain-1", "Conditional", "Plain-2"]
    for row, same in zip(rows, others, strict=True):
        assert [key for key in row if key.startswith("p_")] == [f"p_{source}" for source in sources]
        for key in row.keys() - {"seconds", "step", "stage"}:
            assert same[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5)
    for source in sources:
        states = [
            {**load_file(folder.last / source / "generator.safetensors"),
             **load_file(folder.last / source / "miner.safetensors")}
            for folder in (one, other)
        ]  # fmt: skip
        starts = load_file(one.mined / source / "generator.safetensors")
        starts |= {name: torch.zeros_like(t) for name, t in states[0].items() if name not in starts}
        assert distance(*states) < 1e-4 * distance(starts, states[0])


def test_a_run_goes_on_with_another_number_of_processes(two, settings):
    assert_same_run(two / "one", two / "one then two")
    mf.transfer(**settings, out=two / "two then one", resume=True)
    assert_same_run(two / "one", two / "two then one")


def test_a_killed_process_loses_nothing(two, settings):
    assert RunFolder(two / "killed").newest().name == "000004.pt"
    mf.transfer(**settings, out=two / "killed", resume=True)
    assert_same_run(two / "one", two / "killed")


def test_the_callers_group_gives_the_same_bits(two):
    one, other = weights(two / "two"), weights(two / "own group")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("variant", recipe_ranks.VARIANTS)
def test_every_rank_has_its_part_of_the_whole_batch(two, tiny, variant):
    one = recipe_ranks.one_step_of_each_stage(tiny, recipe_ranks.VARIANTS[variant])
    both = [torch.load(two / f"steps{rank}.pt", weights_only=True)[variant] for rank in (0, 1)]
    for rank, found in enumerate(both):
        own = Processes(rank, 2).own
        assert len(found["seen"]) == len(one["seen"])
        assert torch.equal(found["seen"][0], own(one["seen"][0])), "real images, shuffled and augmented"
        for part, whole in zip(found["seen"], one["seen"], strict=True):
            # a convolution of half the batch may sum in another order: 1e-6 of values about 1
            torch.testing.assert_close(part, own(whole), rtol=0, atol=2e-6)
        assert found["selected"] == one["selected"]
        for name, loss in one["losses"].items():
            torch.testing.assert_close(found["losses"][name], loss, rtol=1e-5, atol=1e-6)
        # With path length the rows' gradients differ by what a rank's samples move the length that it compares with, a
        # hundredth of the difference between its mean length and that of all.
        path_length = "path_length_weight" not in recipe_ranks.VARIANTS[variant]
        for key, relative in (("gradients", 1e-5), ("rows", 1e-2 if path_length else 1e-5)):
            whole, part = (torch.cat([g.flatten() for g in f[key]]) for f in (one, found))
            assert float((part - whole).norm()) < relative * float(whole.norm())
        torch.testing.assert_close(found["path length"], one["path length"], rtol=1e-5, atol=0)
        # one message of the critic and one of miner and rows, each with its loss; and the path length's mean
        critic, generator = found["trained"]
        assert found["sent"] == [critic + 1, *[1] * path_length, generator + 1]


@pytest.mark.parametrize("variant", [*recipe_ranks.VARIANTS, "two samples"])
def test_all_ranks_have_the_same_state(two, variant):
    """Also where path length has one sample, of the first process."""
    one, other = (torch.load(two / f"steps{rank}.pt", weights_only=True)[variant] for rank in (0, 1))
    for key in ("gradients", "rows"):
        assert all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True))
    assert one["path length"] == other["path length"]
    assert one["selected"] == other["selected"]
    assert one["losses"] == other["losses"]


def test_the_program_under_torchrun(two, settings, tmp_path):
    arguments = ["transfer", settings["source"], settings["images"], "--out", str(tmp_path / "run")]
    for name in settings.keys() - {"source", "images", "progress", "report"}:
        arguments += [f"--{name.replace('_', '-')}", str(settings[name])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minegan_fast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": recipe_ranks.LOOPBACK}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step ") == 1, "the first process alone prints the result"
    assert done.stderr.count("2 processes, 4 images of a step each") == 1
    assert len(Notes(tmp_path / "run" / "log.jsonl").read("intervals")) == 1, "the first process alone reports"
    assert (tmp_path / "run" / "report.html").is_file()
    one, other = weights(tmp_path / "run"), weights(two / "two")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("batch", [6, 5, 1])
@pytest.mark.parametrize(
    "draw",
    [
        lambda n: torch.randn(n, 3),
        lambda n: torch.rand((7, n)),
        lambda n: torch.rand_like(torch.empty(n, 1, 2)),
        lambda n: torch.empty(n, 4).normal_(1, 0.1),
        lambda n: torch.empty(n).uniform_(),
    ],
    ids=["randn", "rand", "rand_like", "normal_", "uniform_"],
)
def test_draws_are_parts_of_the_whole_draw(draw, batch):
    torch.manual_seed(1)
    whole, after = draw(batch), torch.rand(())
    axis = whole.shape.index(batch)
    for rank in (0, 1):
        processes = Processes(rank, 2)
        with processes.part(batch) as count:
            torch.manual_seed(1)
            if count == 0:
                continue
            part, then = draw(count), torch.rand(())
        assert torch.equal(part.movedim(axis, 0), processes.own(whole.movedim(axis, 0)))
        assert torch.equal(then, after), "the draws that follow are no longer those of one process"


def test_a_process_without_a_gpu_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process 2 .* there are 2: start no more .*--nproc-per-node"):
        choose_device("cuda", index=2)


def test_memory_is_that_of_a_part_of_the_batch():
    one, two = (Estimate(50, 100, [Work(0, 10), Work(20, 5, most=4)], 150, processes) for processes in (1, 2))
    assert one.total(10) == 250
    assert Estimate(50, 100, [Work(0, 10), Work(20, 5, most=4)], 150, left=0.5).needed(10) == 220
    assert (one.needed(10), two.needed(10), two.needed(11)) == (200, 150, 160)
    assert (one.largest_batch(), two.largest_batch()) == (5, 10)
    two.check(10)
    with pytest.raises(DoesNotFit, match="batch 10 would fit"):
        two.check(12)


def test_a_lost_process_is_named_in_our_words(tmp_path):
    """In a group of the caller's too. The message is that of gloo when its peer has gone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="another process of this run was lost") as found, join(False):
            raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
        assert "gloo" not in str(found.value)
        with pytest.raises(RuntimeError, match="another fault"), join(False):
            raise RuntimeError("another fault")
    finally:
        torch.distributed.destroy_process_group()
