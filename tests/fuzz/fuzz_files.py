"""Damaged files of every kind that is read here: no traceback, no hang, no crash.

    python tests/fuzz/fuzz_files.py [--files 3000] [--minutes M] [--seed S] [--only KIND ...]

Makes one whole file of each kind, damages copies of it (bytes flipped, cut off, doubled, blocks swapped, numbers made
huge), and reads each as a user would: in a worker process of limited memory, with a limit of time. What a reader may
say is ValueError, FileNotFoundError or another OSError; all else is a fault, and is printed with the seed that makes
it again. A run is damaged within its folder, and then sampled, evaluated and resumed.
"""

import argparse
import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import minegan_fast as mf
from minegan_fast.finetune import Selection
from minegan_fast.metrics import FeatureStatistics
from minegan_fast.mining import load_bank, load_mined, load_miner, save_miner
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator, export_rosinality, inspect, save_model
from minegan_fast.training import load_config
from minegan_fast.training.config import TransferConfig
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.images import load_images, save_folder
from minegan_fast.training.results import evaluate_result, open_result

ALLOWED = (ValueError, OSError)  # a user's mistake, and a file that cannot be read
MEMORY, SECONDS = 3 << 30, 10.0
SIZES = {"channel_base": 64, "channel_max": 8, "image_channels": 1}
RUN = {
    "mining_steps": 1, "finetune_steps": 1, "batch": 4, "snapshot_every": 1, "eval_samples": 8, "grid": 4,
    "score_samples": 4, "loss": "nonsaturating", "features": "pixels", "metrics": (), "progress": False,
}  # fmt: skip


def whole_files(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """{kind: (file, what reads it)}; of a run the file is within its folder, and the reader gets the file."""
    torch.manual_seed(0)
    g = StyleGAN2Generator(8, 8, mapping_layers=1, latent_avg=True, **SIZES).eval()
    d = StyleGAN2Discriminator(8, **SIZES).eval()
    save_model(folder / "network.safetensors", g, d)
    rgb = SIZES | {"image_channels": 3}
    export_rosinality(
        folder / "public.pt", StyleGAN2Generator(8, 8, mapping_layers=1, **rgb), StyleGAN2Discriminator(8, **rgb)
    )
    torch.save(
        {"g_ema": g.state_dict(), "args": argparse.Namespace(size=8)},
        folder / "legacy.pt",
        _use_new_zipfile_serialization=False,
    )
    optimizer = mf.SparseFinetuner(g, density=0.3)
    selection = optimizer.select({"style.1.weight": [0, 3]})
    selection.save(folder / "selection.safetensors")
    optimizer.save_delta(folder / "delta.safetensors")
    optimizer.release()
    save_miner(folder / "miner.safetensors", mf.Miner(8))
    save_miner(folder / "bank.safetensors", mf.MinerBank(2, 8))
    FeatureStatistics.of(torch.randn(20, 4)).save(folder / "statistics.npz")
    save_folder(folder / "images", torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8))
    mf.transfer(folder / "network.safetensors", folder / "images", folder / "run", **RUN)
    run = RunFolder(folder / "run")

    def checkpoint(path):
        mf.load_generator(path)
        inspect(path)

    def delta(path):
        mf.load_delta(mf.load_generator(folder / "network.safetensors"), path)

    def config(path):
        TransferConfig(**load_config(path))

    def resumed(path):
        copy = path.parents[1] if path.parent.name == "snapshots" else path.parent
        settings = RUN | {"finetune_steps": 2}
        mf.transfer(folder / "network.safetensors", folder / "images", copy, resume=True, **settings)

    def shown(path):
        open_result(path.parents[1], "best").sample(2)
        evaluate_result(path.parents[1], "best", "cpu", None, None, folder / "images", 4, None, 0)

    def statistics(path):
        if os.environ.get("MINEGAN_FUZZ_PLANTED"):  # for the test of this file
            {}[path]
        FeatureStatistics.load(path)

    def images(path):
        load_images(path.parent, 8, 1)

    return {
        "safetensors": (folder / "network.safetensors", checkpoint),
        "torch.save": (folder / "public.pt", checkpoint),
        "legacy torch.save": (folder / "legacy.pt", checkpoint),
        "selection": (folder / "selection.safetensors", Selection.load),
        "delta": (folder / "delta.safetensors", delta),
        "miner": (folder / "miner.safetensors", lambda path: (load_miner(path), load_mined(path, g))),
        "bank": (folder / "bank.safetensors", load_bank),
        "statistics": (folder / "statistics.npz", statistics),
        "config": (run.config, config),
        "history": (run.history, resumed),
        "snapshot": (run.newest(), resumed),
        "configuration of a run": (run.config, resumed),
        "result": (run.best / "generator.safetensors", shown),
        "miner of a result": (run.best / "miner.safetensors", shown),
        "image": (min((folder / "images").iterdir()), images),
    }  # fmt: skip


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with one to four faults, most of them near the head, where a file says what it is."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        end = chance.choice((len(data), min(len(data), 2000), min(len(data), 200)))
        at = chance.randrange(end)
        match chance.randrange(9):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice(b"\x00\xff\x7f\x80{}[]\"'0-9.eN")
            case 2:
                del data[at:]
            case 3:
                del data[at : at + chance.randrange(1, 64)]
            case 4:
                data[at:at] = data[at : at + chance.randrange(1, 300)]
            case 5:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 16)))
            case 6:
                data[at : at + 8] = chance.choice((b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")))
            case 7:  # a number of the text becomes another
                digits = [i for i in range(at, min(at + 400, len(data))) if 48 <= data[i] <= 57]
                if digits:
                    i = chance.choice(digits)
                    data[i : i + 1] = chance.choice((b"9" * 20, b"-1", b"0", b"1e999", b"null", b'"x"', b"[]"))
            case 8:
                other = chance.randrange(len(data))
                size = chance.randrange(1, 128)
                data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    return bytes(data)


def work(folder: str, jobs, results) -> None:
    """A process that reads what it is sent. It has a copy of the whole files of its own."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    torch.set_num_threads(1)
    kinds = whole_files(Path(folder))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    results.put(("ready", sorted(kinds), ""))
    while (job := jobs.get()) is not None:
        kind, seed = job
        path, read = kinds[kind]
        run = Path(folder) / "run"
        inside = run in path.parents
        place = Path(folder) / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        if inside:
            shutil.copytree(run, place)
            target = place / path.relative_to(run)
        elif kind == "image":
            shutil.copytree(path.parent, place)
            target = place / path.name
        else:
            place.mkdir()
            target = place / path.name
        target.write_bytes(damaged(path.read_bytes(), random.Random(f"{kind} {seed}")))
        started, fault = time.monotonic(), ""
        try:
            read(target)
            said = "read"
        except ALLOWED as error:
            said = "refused"
            if not str(error).strip():
                said, fault = "fault", f"an error without words: {type(error).__name__}"
        except Exception:
            said, fault = "fault", traceback.format_exc()
        seconds = time.monotonic() - started
        if seconds > SECONDS:
            said, fault = "hang", f"{seconds:.0f} s"
        results.put((said, job, fault))


class Worker:
    """A process that is replaced where it hangs or dies."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None

    def start(self) -> list[str]:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self.jobs, self.results = context.Queue(), context.Queue()
        self.process = context.Process(target=work, args=(str(self.folder), self.jobs, self.results), daemon=True)
        self.process.start()
        return self.results.get(timeout=300)[1]

    def ask(self, job: tuple[str, int]) -> tuple[str, str]:
        """(what came of it, the fault)."""
        self.jobs.put(job)
        deadline = time.monotonic() + 3 * SECONDS
        while time.monotonic() < deadline:
            try:
                said, _, fault = self.results.get(timeout=0.2)
                return said, fault
            except Exception:  # queue.Empty
                if not self.process.is_alive():
                    code = self.process.exitcode
                    self.start()
                    return "crash", f"the process ended with {code}"
        self.start()
        return "hang", f"nothing for {3 * SECONDS:.0f} s"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def fuzz(count: int, minutes: float | None, seed: int, only: list[str], folder: Path) -> tuple[Counter, list[str]]:
    """({what came: how often}, faults, each with the job that makes it again)."""
    worker = Worker(folder)
    kinds = [kind for kind in worker.start() if not only or kind in only]
    if not kinds:
        worker.close()
        raise SystemExit(f"no such kind: {', '.join(only)}")
    found, faults, end = Counter(), [], time.monotonic() + 60 * (minutes or 1e9)
    for number in range(count):
        if time.monotonic() > end:
            break
        job = kinds[number % len(kinds)], seed + number // len(kinds)
        said, fault = worker.ask(job)
        found[said] += 1
        if fault:
            faults.append(f"{job}: {said}: {fault}")
            print(faults[-1], flush=True)
    worker.close()
    return found, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="KIND")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, faults = fuzz(arguments.files, arguments.minutes, arguments.seed, arguments.only, Path(folder) / "work")
    print(f"{sum(found.values())} damaged files: {', '.join(f'{n} {said}' for said, n in sorted(found.items()))}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
