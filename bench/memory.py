"""What a run is estimated to need, and what it takes, for a network of every family, at its smallest and at 256 pixels.

    python bench/memory.py [--only NAME ...] [--gpu]

Each run is a process of its own: random networks, written as a file with their critic; 64 random images; both stages,
a snapshot in each, and R1 and path length where the family has them. On the CPU the peak is that of the resident set,
on a GPU that of the allocator. Writes bench/quality/memory.json.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import minegan_fast as mf
from minegan_fast import models
from minegan_fast.files.atomic import atomic_path
from minegan_fast.models import save_model
from minegan_fast.training import prepared

OUT = Path(__file__).resolve().parent / "quality" / "memory.json"
WIDE = {"channel_base": 16384, "channel_max": 512}
ADVERSARIAL, KERNEL = {"loss": "nonsaturating"}, {"loss": "mmd", "loss_features": "critic"}


def stylegan(family: str, resolution: int):
    generator = {"stylegan": models.StyleGANGenerator, "stylegan2": models.StyleGAN2Generator}[family]
    critic = {"stylegan": models.StyleGANDiscriminator, "stylegan2": models.StyleGAN2Discriminator}[family]
    return generator(resolution, **WIDE), critic(resolution, **WIDE)


def pgan(resolution: int):
    return models.PGANGenerator(resolution, **WIDE), models.PGANDiscriminator(resolution, **WIDE)


def biggan(resolution: int):
    width, classes = (64, 10) if resolution < 256 else (96, 1000)
    return (
        models.BigGANGenerator(resolution, num_classes=classes, channel_width=width),
        models.BigGANDiscriminator(resolution, num_classes=classes, channel_width=width),
    )


def dcgan():
    return models.DCGANGenerator(), models.DCGANDiscriminator()


# {name: (the networks, batch, settings)}
RUNS = {
    "stylegan2 8": (lambda: stylegan("stylegan2", 8), 16, ADVERSARIAL),
    "stylegan2 32": (lambda: stylegan("stylegan2", 32), 16, ADVERSARIAL),
    "stylegan2 64": (lambda: stylegan("stylegan2", 64), 8, ADVERSARIAL),
    "stylegan2 64 mmd": (lambda: stylegan("stylegan2", 64), 32, KERNEL),
    "stylegan2 256": (lambda: stylegan("stylegan2", 256), 4, ADVERSARIAL),
    "stylegan2 256 mmd": (lambda: stylegan("stylegan2", 256), 8, KERNEL | {"part": 4}),
    "stylegan 8": (lambda: stylegan("stylegan", 8), 16, ADVERSARIAL),
    "stylegan 256": (lambda: stylegan("stylegan", 256), 4, ADVERSARIAL),
    "pgan 8": (lambda: pgan(8), 16, ADVERSARIAL),
    "pgan 256": (lambda: pgan(256), 4, ADVERSARIAL),
    "biggan 32": (lambda: biggan(32), 16, {"loss": "hinge", "mined_class": "0"}),
    "biggan 256": (lambda: biggan(256), 2, {"loss": "hinge", "mined_class": "0"}),
    "dcgan 64": (dcgan, 64, ADVERSARIAL),
    "dcgan 64 dense": (dcgan, 64, ADVERSARIAL | {"density": 1.0}),
}


def write(name: str, path: Path) -> None:
    """Writes the networks of a run, in a process of its own: what measures never held them."""
    torch.manual_seed(0)
    generator, critic = (network.eval() for network in RUNS[name][0]())
    save_model(path, generator, critic)
    print(generator.resolution, getattr(generator, "image_channels", 3))


def one(name: str, device: str) -> dict:
    """The row of a run, in this process."""
    _, batch, settings = RUNS[name]
    estimates, estimate_memory = [], prepared.estimate_memory

    def noted(*args):
        estimates.append(estimate_memory(*args))
        return estimates[-1]

    prepared.estimate_memory = noted
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        written = subprocess.run([sys.executable, __file__, "--write", str(source), "--one", name], check=True,
                                 capture_output=True, text=True)  # fmt: skip
        resolution, channels = map(int, written.stdout.split())
        images = torch.rand(64, channels, resolution, resolution) * 2 - 1
        settings = {"batch": batch, "mining_steps": 2, "finetune_steps": 3, "snapshot_every": 100, "critic_warmup": 0,
                    "score_samples": 4, "views": 1, "r1_every": 2, "path_length_every": 2, "eval_samples": 128,
                    "held_out": 0.25, "density": 0.05} | settings  # fmt: skip
        mf.transfer(source, images, Path(folder) / "run", device=device, progress=False, **settings)
    (found,) = estimates
    if device == "cpu":
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    return {"run": name, "batch": batch, "device": device, "estimated": found.total(batch), "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS, metavar="NAME")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if arguments.gpu else "cpu"
    if arguments.write:
        write(arguments.one, arguments.write)
        return 0
    if arguments.one:
        print(json.dumps(one(arguments.one, device)))
        return 0
    rows = []
    for name in arguments.only:
        command = [sys.executable, __file__, "--one", name, *(["--gpu"] if arguments.gpu else [])]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            print(found.stderr[-2000:], file=sys.stderr)
            return 1
        rows.append(json.loads(found.stdout.splitlines()[-1]))
        row = rows[-1]
        print(f"{name:20} {row['estimated'] / 2**20:8.0f} {row['peak'] / 2**20:8.0f} MiB "
              f"{row['estimated'] / row['peak']:.2f}", flush=True)  # fmt: skip
    if arguments.only == list(RUNS):
        with atomic_path(OUT) as temporary:
            temporary.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
