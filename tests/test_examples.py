"""The examples do what they say."""

import importlib.util
from pathlib import Path

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
