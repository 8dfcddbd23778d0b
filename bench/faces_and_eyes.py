"""Two public GANs mined together for a hundred avatars: one of faces, 64 pixels, and one of painted eyes, 128 pixels
and 8 classes. The eyes must lose their share.

    python bench/faces_and_eyes.py --data avatars/       # where avatars/avataaars is drawn, see bench/quality.py --help

Writes bench/quality/faces-and-eyes.json. It needs the packages that bench/quality.py needs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import quality_networks as networks
import torch
from quality_settings import SETTINGS, Places, target

import minegan_fast as mf
from minegan_fast.files.atomic import atomic_path

OUT = Path(__file__).resolve().parent / "quality" / "faces-and-eyes.json"
COMMON = {"resize": 64, "batch": 16, "log_every": 1, "metrics": (), "eval_samples": 64}
SELECTORS = {"mixture": {"loss": "mmd"}, "winner": {"loss": "nonsaturating", "critic": "features"}}
MINING, SHOWN_STEPS = 50, (1, 10, 20, 50, 100, 200)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the folder avataaars")
    parser.add_argument("--steps", type=int, default=300, help="of both stages; the first has 50")
    arguments = parser.parse_args()
    places = Places(cache=arguments.data, data=arguments.data)
    images = target(SETTINGS["avataaars"], 100, 0, places).train
    features, rows = networks.efficientnet(0), []
    for selector, settings in SELECTORS.items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = mf.transfer(
                [networks.FaceGenerator(), networks.EyeGenerator()], images, Path(folder) / "run", device="cpu",
                loss_features=features, held_out=0.0, mining_steps=MINING, finetune_steps=arguments.steps - MINING,
                snapshot_every=arguments.steps, **COMMON, **settings,
            )  # fmt: skip
        faces = [row["p_FaceGenerator"] for row in result.history if "p_FaceGenerator" in row]
        steps = [step for step in (*SHOWN_STEPS, arguments.steps) if step <= arguments.steps]
        minutes = round((time.monotonic() - started) / 60, 1)
        shares = {step: round(faces[step - 1], 4) for step in steps}
        rows.append({"selector": selector, "faces": shares, "minutes": minutes})
        print(rows[-1], flush=True)
    with atomic_path(OUT) as temporary:
        temporary.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
