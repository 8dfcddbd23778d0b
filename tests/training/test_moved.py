"""Runs whose folders, sources and images are elsewhere when they go on, and runs whose files are damaged."""

import errno
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_run import RUN
from typer.testing import CliRunner

import minegan_fast as mf
from minegan_fast.cli.app import app
from minegan_fast.files import atomic
from minegan_fast.models import save_model
from minegan_fast.training import run as running
from minegan_fast.training import transfer
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.images import save_folder
from minegan_fast.training.results import open_result

SHORT = {"finetune_steps": 2}
CRITIC = {"loss": "nonsaturating", "features": "critic"}


def begin(place: Path, tiny: dict, **settings) -> dict:
    """A run with its inputs in one folder, whose source's file holds the critic; its arguments."""
    place.mkdir()
    save_model(place / "source.safetensors", tiny["generator"], tiny["discriminator"])
    shutil.copytree(tiny["images"], place / "images")
    arguments = {**RUN, **SHORT, "source": place / "source.safetensors", "images": place / "images", **settings}
    transfer(**arguments, out=place / "run")
    return arguments


def command(*words) -> str:
    """What the program says; an error is raised as it came."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.output


def steps_of(folder: Path) -> int:
    return max(json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines())


@pytest.mark.parametrize("settings", [CRITIC, {"loss": "mmd", "loss_features": "critic"}], ids=["critic", "kernel"])
def test_a_run_goes_on_wherever_it_lies(tmp_path, tiny, settings):
    """All inputs moved with it; then only the images are left, elsewhere; the steps are those of a run that stayed."""
    arguments = begin(tmp_path / "here", tiny, **settings)
    transfer(**arguments | {"finetune_steps": 4}, out=tmp_path / "here" / "run", resume=True)
    stayed = load_file(tmp_path / "here" / "run" / "last" / "generator.safetensors")
    shutil.rmtree(tmp_path / "here" / "run")
    transfer(**arguments, out=tmp_path / "here" / "run")

    (tmp_path / "here").rename(tmp_path / "there")
    command("sample", tmp_path / "there" / "run", "--out", tmp_path / "samples", "-n", 2)
    evaluate = "evaluate", tmp_path / "there" / "run", "--images", tmp_path / "there" / "images", "--samples", 8
    command(*evaluate)
    shutil.copytree(tmp_path / "there", tmp_path / "again")

    command("transfer", "--out", tmp_path / "there" / "run", "--resume", "--finetune-steps", 3)
    assert steps_of(tmp_path / "there" / "run") == 7
    (tmp_path / "again" / "source.safetensors").unlink()
    shutil.rmtree(tmp_path / "there")
    command(*(str(word).replace("there", "again") for word in evaluate))
    images = (tmp_path / "again" / "images").rename(tmp_path / "pictures")
    command("transfer", "--images", images, "--out", tmp_path / "again" / "run", "--resume", "--finetune-steps", 4)
    moved = load_file(tmp_path / "again" / "run" / "last" / "generator.safetensors")
    assert all(torch.equal(moved[name], stayed[name]) for name in stayed)


def test_several_sources_go_on_without_their_files(tmp_path, tiny):
    place = tmp_path / "here"
    place.mkdir()
    sources = [place / "a.safetensors", place / "b.safetensors"]
    save_model(sources[0], tiny["generator"], tiny["discriminator"])
    save_model(sources[1], tiny["generator"])
    arguments = {**RUN, "finetune_steps": 0, "loss": "mmd", "loss_features": "critic", "features": "pixels"}
    transfer(sources, tiny["images"], place / "run", **arguments)
    for path in sources:
        path.unlink()
    place.rename(tmp_path / "there")
    command("transfer", "--out", tmp_path / "there" / "run", "--resume", "--mining-steps", 5)
    rows = [json.loads(line) for line in (tmp_path / "there" / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 5
    assert {"p_a", "p_b"} <= set(rows[-2])


@pytest.mark.parametrize("what", ["images", "source", "held_out"])
def test_other_contents_are_named(tmp_path, tiny, what):
    save_folder(tmp_path / "held", torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8))
    arguments = begin(tmp_path / "here", tiny, **CRITIC, held_out=str(tmp_path / "held"))
    if what == "source":
        other = mf.load_generator(tiny["source"])
        with torch.no_grad():
            next(other.parameters()).add_(1)
        save_model(arguments["source"], other, tiny["discriminator"])
    else:
        folder = arguments["images"] if what == "images" else tmp_path / "held"
        next(folder.glob("*.png")).unlink()
    with pytest.raises(ValueError, match="began with other") as caught:
        transfer(**arguments | {"finetune_steps": 9}, out=tmp_path / "here" / "run", resume=True)
    assert str(tmp_path) in str(caught.value)
    assert json.loads((tmp_path / "here" / "run" / "config.json").read_text())["finetune_steps"] == 2


def test_a_source_that_is_given_wins_over_the_stored_one(tmp_path, tiny):
    begin(tmp_path / "here", tiny, **CRITIC)
    elsewhere = tmp_path / "elsewhere.safetensors"
    (tmp_path / "here" / "source.safetensors").rename(elsewhere)
    shutil.rmtree(tmp_path / "here" / "run" / "source")
    evaluate = "evaluate", tmp_path / "here" / "run", "--images", tmp_path / "here" / "images", "--samples", 8
    with pytest.raises(FileNotFoundError, match="source"):
        command(*evaluate)
    command(*evaluate, "--source", elsewhere)


def test_without_a_snapshot_nothing_is_written_over_results(tmp_path, tiny):
    arguments = begin(tmp_path / "here", tiny, **CRITIC)
    folder = tmp_path / "here" / "run"
    for snapshot in (folder / "snapshots").iterdir():
        snapshot.write_bytes(b"not one" * 99)
    (folder / ".half.tmp.pt").write_bytes(b"left by a kill")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"holds best/, last/, mined/, history\.jsonl up to step 6"):
            transfer(**arguments | {"finetune_steps": 9}, out=folder, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["flip", "text", "list", "lacks", "empty", "short"])
def test_a_damaged_snapshot_gives_way_to_the_one_before(tmp_path, damage):
    folder = RunFolder(tmp_path)
    folder.create()
    for step in (999_999, 1_000_000):
        folder.save_snapshot(step, {"weights": torch.ones(1000), "step": step}, keep=2)
    newest = folder.newest()
    assert newest.name == "1000000.pt"
    whole = bytearray(newest.read_bytes())
    if damage == "flip":
        whole[whole.find(b"\x00\x00\x80\x3f" * 8) + 402] ^= 1
        newest.write_bytes(whole)
    elif damage == "list":
        torch.save([1, 2], newest)
    elif damage == "lacks":
        torch.save({"step": 1}, newest)
    else:
        newest.write_bytes({"text": b"hello" * 100, "empty": b"", "short": whole[:-40]}[damage])
    with pytest.warns(UserWarning, match="1000000.pt is damaged"):
        step, state = folder.load_snapshot(("weights",))
    assert step == 999_999
    assert bool((state["weights"] == 1).all())


@pytest.mark.parametrize("damage", ["weight", "shape", "finetuner", "best", "contents"])
def test_a_snapshot_whose_inside_does_not_fit_is_named(tmp_path, tiny, damage):
    arguments = begin(tmp_path / "here", tiny, **CRITIC)
    folder = RunFolder(tmp_path / "here" / "run")
    path = folder.newest()
    state = torch.load(path, weights_only=True)
    generator = state["trainer"]["generator"]
    if damage == "weight":
        del generator["conv1.conv.weight"]
    elif damage == "shape":
        generator["conv1.conv.weight"] = torch.zeros(3)
    elif damage == "finetuner":
        state["trainer"]["finetuner"] = [1]
    elif damage == "best":
        state["best"] = 5
    else:
        state["contents"] = "text"
    torch.save(state, path)
    if damage == "contents":  # whose images are known by the other entry
        assert transfer(**arguments, out=folder.path, resume=True).history
        return
    with pytest.raises(ValueError, match=r"the snapshot of step 6 .* does not fit this run"):
        transfer(**arguments, out=folder.path, resume=True)


def test_a_snapshot_under_another_name_is_passed_over(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create()
    folder.save_snapshot(4, {"step": 4}, keep=2)
    folder.newest().rename(folder.snapshots / "000007.pt")
    with pytest.warns(UserWarning, match="it is of step 4, and has another name"):
        assert folder.load_snapshot() is None


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    folder = RunFolder(tmp_path)
    lines = ['{"step": 1}', "5", '{"a": 1}', '{"step": "x"}', "\xff", '{"step": 2}', '{"step": 3, "k']
    folder.history.write_text("\n".join(lines), encoding="latin-1")
    with pytest.warns(UserWarning, match="is no row and is passed over"):
        assert [row["step"] for row in folder.read_history()] == [1, 2]


def test_a_lost_best_row_is_found_again(tmp_path, tiny):
    arguments = begin(tmp_path / "here", tiny, **CRITIC)
    folder = tmp_path / "here" / "run"
    (folder / "history.jsonl").write_text("")
    result = transfer(**arguments | {"finetune_steps": 4}, out=folder, resume=True)
    assert result.step in [row["step"] for row in result.history if "kid" in row]
    assert "kid" in result.metrics


def test_no_delta_lies_beside_a_generator_of_another_step(tmp_path, tiny, monkeypatch):
    """Whenever the writing is cut off: where there is a delta, it makes that generator of the source."""
    arguments = begin(tmp_path / "here", tiny, **CRITIC, method="minegan++")
    folder = tmp_path / "here" / "run"
    source = tmp_path / "here" / "source.safetensors"
    replace, seen = atomic.os.replace, []

    def looked_at(*places):
        for result in ("last", "best"):
            delta = folder / result / "delta.safetensors"
            if delta.exists():
                made = mf.load_generator(source)
                mf.load_delta(made, delta)
                there = mf.load_generator(folder / result / "generator.safetensors")
                pairs = zip(made.parameters(), there.parameters(), strict=True)
                seen.append(all(torch.equal(a, b) for a, b in pairs))
        replace(*places)

    monkeypatch.setattr(atomic.os, "replace", looked_at)
    transfer(**arguments | {"finetune_steps": 6}, out=folder, resume=True)
    assert seen
    assert all(seen)


def test_a_full_disk_is_named_by_every_writer(tmp_path, tiny, monkeypatch):
    generator = mf.load_generator(tiny["source"])
    optimizer = mf.SparseFinetuner(generator, density=0.5)
    selection = optimizer.select({"style.1.weight": [0]})

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(atomic, "save_file", full)
    writers = {
        "selection": lambda: selection.save(tmp_path / "selection.safetensors"),
        "delta": lambda: optimizer.save_delta(tmp_path / "delta.safetensors"),
        "network": lambda: save_model(tmp_path / "network.safetensors", tiny["generator"]),
    }
    for name, write in writers.items():
        with pytest.raises(OSError, match="No space left on device") as caught:
            write()
        assert caught.value.errno == errno.ENOSPC
        assert name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_pytorchs_writer_on_a_full_disk_is_named_too(tmp_path, tiny, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(running.torch, "save", full)
    with pytest.raises(RuntimeError, match="the disk is full"):
        begin(tmp_path / "here", tiny, **CRITIC)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path_length_weight", math.nan), ("path_length_weight", -1.0), ("seed", 2**70), ("eval_samples", 10**15),
        ("grid", 10**12), ("miner_depth", 10**6), ("beta1", math.nan), ("beta2", 1.0), ("lr", math.inf),
        ("mining_steps", 2**70), ("miner_width", 0), ("batch", 10**15), ("r1_gamma", math.inf), ("ema_decay", math.nan),
        ("lr", 10**400), ("path_length_weight", 10**400),
        ("explore", math.nan), ("density", math.nan), ("held_out", math.nan),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused_at_once(tmp_path, tiny, name, value):
    with pytest.raises(ValueError, match=name):
        transfer(**{**RUN, "source": tiny["source"], "images": tiny["images"], name: value}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_result_opens_without_anything_else(tmp_path, tiny):
    begin(tmp_path / "here", tiny, **CRITIC)
    for name in ("source.safetensors", "images"):
        path = tmp_path / "here" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "here" / "run").rename(tmp_path / "alone")
    assert open_result(tmp_path / "alone").sample(2).shape == (2, 1, 8, 8)
