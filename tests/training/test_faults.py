"""What goes wrong for a user, and that nothing is lost: each a one-line error that names the remedy."""

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import minegan_fast as mf
from minegan_fast.models import StyleGAN2Discriminator, save_model
from minegan_fast.training import DoesNotFit, TrainingDiverged, estimate, folder, run
from minegan_fast.training.images import save_folder
from minegan_fast.training.trainer import Trainer

# A run in forked children, each killed at its k-th file, until one comes through. Prints how many died.
KILLED = """
import json, os, signal, sys
import torch
import minegan_fast as mf

settings, out = json.loads(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
replace, chmod = os.replace, os.chmod

def run(kill_at):
    count = 0
    def dying(step):
        def call(*args, **keywords):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **keywords)
        return call
    # chmod comes before the rename: half of the kills leave a temporary file, half a file without its successors.
    os.replace, os.chmod = dying(replace), dying(chmod)
    mf.transfer(**settings, out=out, resume=True)

killed = 0
for kill_at in (13, 30, 41, 22, 57, 38, 0):
    child = os.fork()
    if child == 0:
        try:
            run(kill_at)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killed += 1
    elif status:
        sys.exit("a child failed")
print(killed)
"""


def contents(folder: Path) -> dict[str, object]:
    """All that a run leaves, times, event files and what it said of being resumed aside."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "events" not in p.parts):
        name = str(path.relative_to(folder))
        if name == "log.jsonl":
            continue
        if path.suffix == ".pt":
            found[name] = plain(torch.load(path, weights_only=True))
        elif name == "history.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        else:
            found[name] = path.read_bytes()
    return found


def plain(state):
    """Nested state with bytes in the place of tensors, to be compared with ==."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), state.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, (list, tuple)) else state


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_it_ends_bit_identical(run_settings, tmp_path):
    out = run_settings.pop("out")
    arguments = json.dumps(run_settings), str(tmp_path / "killed")
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4, "the kills came too late to hit anything"

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mf.transfer(**run_settings, out=out)
    torch.set_num_threads(threads)
    whole, resumed = contents(out), contents(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []


def test_an_existing_run_is_not_overwritten(run_settings):
    mf.transfer(**{**run_settings, "finetune_steps": 0})
    with pytest.raises(ValueError, match="already holds a run"):
        mf.transfer(**run_settings)
    with pytest.raises(ValueError, match=r"other settings \(batch: 4 -> 8\)"):
        mf.transfer(**{**run_settings, "batch": 8, "resume": True})


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("broken", ["generate", "measure", "save_grid", "write_result"])
def test_what_ended_before_its_first_snapshot_is_no_run(run_settings, monkeypatch, broken, resume):
    with monkeypatch.context() as patch:
        patch.setattr(run, broken, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mf.transfer(**run_settings)
    assert (run_settings["out"] / "config.json").exists()
    changed = {**run_settings, "batch": 2, "finetune_steps": 0, "resume": resume}
    result = mf.transfer(**changed)
    assert json.loads((run_settings["out"] / "config.json").read_text())["batch"] == 2
    assert [row["step"] for row in result.history if "kid" in row] == [0, 2, 4]
    with pytest.raises(ValueError, match="already holds a run"):
        mf.transfer(**{**changed, "resume": False})
    for snapshot in (run_settings["out"] / "snapshots").iterdir():
        snapshot.unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        mf.transfer(**{**changed, "resume": False})


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_a_run_begins_is_refused(run_settings, monkeypatch, resume):
    pytest.importorskip("fcntl")
    out, generate = run_settings["out"], run.generate

    def meanwhile(*arguments):
        """Before the first snapshot of the run that goes on."""
        monkeypatch.setattr(run, "generate", generate)
        before = contents(out)
        with pytest.raises(ValueError, match=r"another process is writing a run to .*run.: wait for it, or choose"):
            mf.transfer(**{**run_settings, "resume": resume})
        assert contents(out) == before
        return generate(*arguments)

    monkeypatch.setattr(run, "generate", meanwhile)
    mf.transfer(**{**run_settings, "finetune_steps": 0})


def test_a_file_system_without_locks(run_settings, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert mf.transfer(**{**run_settings, "finetune_steps": 0}).history[-1]["step"] == 4
    monkeypatch.setattr(folder, "fcntl", None)  # as on Windows
    assert mf.transfer(**{**run_settings, "resume": True}).history[-1]["step"] == 8


def test_a_snapshot_of_another_version(run_settings):
    mf.transfer(**{**run_settings, "finetune_steps": 0})
    path = sorted((run_settings["out"] / "snapshots").iterdir())[-1]
    torch.save(torch.load(path, weights_only=True) | {"version": 1}, path)
    with pytest.raises(ValueError, match=r"snapshots are of version 1, this library goes on from 3"):
        mf.transfer(**{**run_settings, "finetune_steps": 0, "mining_steps": 6, "resume": True})


def test_other_images_on_resume(run_settings, tmp_path):
    mf.transfer(**{**run_settings, "finetune_steps": 0})
    folder = Path(run_settings["images"])
    config = json.loads((run_settings["out"] / "config.json").read_text())
    save_folder(tmp_path / "others", torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8))
    config["images"] = str(tmp_path / "others")
    (run_settings["out"] / "config.json").write_text(json.dumps(config))
    assert folder.is_dir()
    with pytest.raises(ValueError, match="other training images"):
        mf.transfer(**{**run_settings, "images": str(tmp_path / "others"), "finetune_steps": 0, "resume": True})


def test_a_damaged_snapshot_is_passed_over(run_settings):
    mf.transfer(**run_settings)
    newest = run_settings["out"] / "snapshots" / "000008.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"):
        result = mf.transfer(**{**run_settings, "resume": True})
    assert result.history[-1]["step"] == 8


def test_nan_losses_stop_and_keep_the_last_good_snapshot(run_settings, monkeypatch):
    step = Trainer.step

    def poisoned(self, number):
        if number == 5:
            with torch.no_grad():
                self.mined.mining_parameters()[0].fill_(float("nan"))
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(TrainingDiverged, match=r"000004\.pt.*smaller lr"):
        mf.transfer(**run_settings)
    assert sorted(p.name for p in (run_settings["out"] / "snapshots").iterdir()) == ["000002.pt", "000004.pt"]
    monkeypatch.setattr(Trainer, "step", step)
    assert mf.transfer(**{**run_settings, "resume": True}).history[-1]["step"] == 8


def test_full_disk(run_settings):
    """The file size limit makes write() fail as a full disk does; Python ignores its signal."""
    mf.transfer(**{**run_settings, "finetune_steps": 0})
    resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(RuntimeError, match=r"disk is full.*000004\.pt.*--resume"):
            mf.transfer(**{**run_settings, "resume": True})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(run_settings["out"].rglob(".*.tmp*")), "half-written files stay behind"
    assert mf.transfer(**{**run_settings, "resume": True}).history[-1]["step"] == 8


def test_no_space_left(run_settings, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.torch, "save", full)
    with pytest.raises(RuntimeError, match=r"disk is full.*there is no snapshot yet"):
        mf.transfer(**run_settings)


@pytest.mark.parametrize("below", [False, True], ids=["the folder", "a parent"])
def test_a_file_in_the_place_of_the_output(run_settings, tmp_path, below):
    (tmp_path / "taken").write_text("")
    out = tmp_path / "taken" / "run" if below else tmp_path / "taken"
    with pytest.raises(ValueError, match=r"cannot write the run.*--out"):
        mf.transfer(**{**run_settings, "out": out})


def test_a_run_that_does_not_fit_says_which_batch_would(run_settings, monkeypatch):
    memory = estimate.estimate_memory
    seen = []

    def scarce(*args):
        found = memory(*args)
        found.available = found.needed(3)
        seen.append(found)
        return found

    from minegan_fast.training import prepared

    monkeypatch.setattr(prepared, "estimate_memory", scarce)
    with pytest.raises(DoesNotFit, match=r"at batch 4, .* free: batch 3 would fit"):
        mf.transfer(**run_settings)
    assert max(work.per_sample for work in seen[0].work) > 8 * 8 * 4
    assert not run_settings["out"].exists()


def test_out_of_memory_on_the_way(run_settings, monkeypatch):
    def exhausted(self, number):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Trainer, "step", exhausted)
    with pytest.raises(DoesNotFit, match=r"out of memory at batch 4: batch 2 should fit; .*000000\.pt"):
        mf.transfer(**run_settings)


def test_images_that_do_not_fit(run_settings):
    with pytest.raises(ValueError, match="8"):
        mf.transfer(**{**run_settings, "images": torch.rand(5, 1, 16, 16)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"loss": "lsgan"}, "nonsaturating, wgan, hinge"),
        ({"batch": 0}, "batch must be a whole number from 1"),
        ({"batch": "8"}, "batch must be a whole number or null, got '8'"),
        ({"density": "x"}, "density must be a number or null, got 'x'"),
        ({"lr": "x"}, "lr must be a number or null, got 'x'"),
        ({"augment": 1}, "augment must be a text, got 1"),
        ({"metrics": "fid"}, "metrics must be a list of words"),
        ({"held_out": True}, "held_out must be a number or a text"),
        ({"miner_width": 1.5}, "miner_width must be a whole number or null"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"mining_steps": 0, "finetune_steps": 0}, "nothing would train"),
        ({"metrics": ("fid", "lpips")}, "lpips"),
        ({"augment": "colour"}, "colour"),
        ({"held_out": 1.0}, "held_out"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"r1_gamma": -1.0}, "r1_gamma"),
        ({"train_critic": "some"}, "train_critic must be one of"),
        ({"criterion": "taste"}, "criterion must be one of"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"features": "inception"}, "inception"),
        ({"source": []}, "there is no source: give the path"),
        ({"source": "missing.pt"}, "no checkpoint at missing.pt"),
        ({"images": "missing/"}, "no image folder"),
        ({"held_out": "missing/"}, "no image folder"),
    ],
    ids=str,
)
def test_bad_settings(run_settings, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mf.transfer(**{**run_settings, **settings})
    assert not run_settings["out"].exists(), "a refused run leaves nothing behind"


def test_weights_with_nan_are_named(run_settings, tiny):
    broken = copy.deepcopy(tiny["generator"])
    with torch.no_grad():
        broken.conv1.conv.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the source's weights hold NaN or inf, in conv1\.conv\.weight: "):
        mf.transfer(**{**run_settings, "source": broken})
    assert not run_settings["out"].exists(), "a refused run leaves nothing behind"


def test_critic_of_another_size(run_settings, tmp_path):
    save_model(tmp_path / "d.safetensors", StyleGAN2Discriminator(16, 64, 8, 1))
    with pytest.raises(ValueError, match="resolution is 8 and 16"):
        mf.transfer(**{**run_settings, "critic": tmp_path / "d.safetensors"})


def test_critic_of_images_with_other_channels(run_settings, tmp_path):
    save_model(tmp_path / "d.safetensors", StyleGAN2Discriminator(8, 64, 8, image_channels=3))
    with pytest.raises(ValueError, match="generator and critic do not fit: image_channels is 1 and 3"):
        mf.transfer(**{**run_settings, "critic": tmp_path / "d.safetensors"})


class WithoutEmbeddings(torch.nn.Module):
    latent_dim, resolution, image_channels, num_classes = 4, 8, 1, 10

    def forward(self, z, y):
        return z.mean(1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_class_conditional_sources_without_embeddings_are_refused(run_settings):
    with pytest.raises(ValueError, match="class-conditional"):
        mf.transfer(**{**run_settings, "source": WithoutEmbeddings()})


def test_another_projects_safetensors(run_settings, tmp_path):
    save_file({"final_linear.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="looks like a stylegan2 discriminator"):
        mf.transfer(**{**run_settings, "source": tmp_path / "other.safetensors"})
