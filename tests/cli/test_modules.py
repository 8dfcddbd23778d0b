"""A module of the user's own, named as FILE.py:FUNCTION."""

import sys

import pytest

from minegan_fast.cli.modules import named_module

GAN = """
from dataclasses import dataclass

import torch
from helper_of_gan import SIZE
from torch import nn


@dataclass
class Sizes:
    latent: "int" = SIZE


class Net(nn.Module):
    latent_dim, resolution, image_channels = Sizes().latent, 8, 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SIZE, 64)

    def forward(self, z):
        return self.layer(z).tanh().view(-1, 1, 8, 8)


def build(seed=1):
    torch.manual_seed(seed)
    return Net()


def other():
    return build(2)
"""


@pytest.fixture
def gan(tmp_path):
    (tmp_path / "helper_of_gan.py").write_text("SIZE = 6\n")
    file = tmp_path / "my_gan.py"
    file.write_text(GAN)
    path, modules = list(sys.path), set(sys.modules)
    yield file
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name == "helper_of_gan" or name.startswith("my_gan_"):
            del sys.modules[name]


def options(settings, *sources):
    """The command line of a tiny run on these sources, without a critic of a file."""
    leave = ("source", "critic", "progress", "report", "out", "images")
    rest = [x for n, v in settings.items() if n not in leave for x in (f"--{n.replace('_', '-')}", v)]
    where = sources if len(sources) == 1 else [x for source in sources for x in ("--source", source)]
    images = [settings["images"]] if len(sources) == 1 else ["--images", settings["images"]]
    return ["transfer", *where, *images, "--out", settings["out"], "--loss", "nonsaturating", *rest]


def test_a_run_of_a_module_from_the_command_line(call, gan, run_settings, tmp_path):
    source, run = f"{gan}:build", run_settings["out"]
    code, out, err = call(*options(run_settings, source), "--dry-run")
    assert code == 0, err
    assert "memory:" in out
    assert not run.exists()

    shorter = options(run_settings | {"finetune_steps": 2}, source)
    assert call(*shorter)[0] == 0
    code, _, err = call("transfer", "--out", run, "--resume", "--finetune-steps", 4)
    assert code == 1
    assert "name it again, as FILE.py:FUNCTION" in err
    code, _, err = call("transfer", source, "--out", run, "--resume", "--finetune-steps", 4)
    assert code == 0, err
    assert "resumed at step 6" in err

    code, _, err = call("sample", run, "--out", tmp_path / "s")
    assert code == 1
    assert "--source FILE.py:FUNCTION" in err
    code, _, err = call("sample", run, "--source", source, "--out", tmp_path / "s", "--seeds", "1-3")
    assert code == 0, err
    assert len(list((tmp_path / "s").glob("*-seed*.png"))) == 3
    arguments = ("--images", run_settings["images"], "--samples", 16)
    code, _, err = call("evaluate", run, "--source", source, *arguments)
    assert code == 0, err
    delta = run / "last" / "delta.safetensors"
    assert call("sample", delta, "--source", source, "--out", tmp_path / "d", "-n", 2)[0] == 0


def test_several_sources_of_modules_and_files(call, gan, run_settings, tiny, tmp_path):
    settings = run_settings | {"finetune_steps": 0}
    code, _, err = call(*options(settings, f"{gan}:build", tiny["source"], f"{gan}:other"))
    assert code == 0, err
    assert "3 sources: Net-1, source, Net-2" in err
    run, both = run_settings["out"], ("--source", f"{gan}:build", "--source", f"{gan}:other")
    for command in (
        ("sample", run, "--out", tmp_path / "s", "--by-source"),
        ("evaluate", run, "--images", tiny["images"]),
    ):
        code, _, err = call(*command)
        assert code == 1
        assert "source 1 of 3 of the run" in err
        code, _, err = call(*command, *both)
        assert code == 0, err


def test_other_texts_are_paths():
    for text in (None, "ffhq.pt", "a:b", "folder/", "x.py.pt:f"):
        assert named_module(text) == text


@pytest.mark.parametrize(
    ("content", "function", "message"),
    [
        ("def f():\n    return 3\n", "f", "returned int, not a torch.nn.Module with latent_dim, resolution"),
        ("def f():\n    raise KeyError('lost')\n", "f", r"failed: KeyError: 'lost' \(line 2; --debug shows all\)"),
        ("x = 1\nx / 0\n", "f", r"bad\.py failed: ZeroDivisionError: .* \(line 2; --debug"),
        ("def f(:\n", "f", r"failed: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "f", r"failed: SystemExit: 3 \(line 2"),
        ("def f():\n    pass\n", "g", "has no function 'g'"),
        ("f = 3\n", "f", "has no function 'f'"),
        ("", "", "has no function ''"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_a_line(gan, content, function, message):
    file = gan.with_name("bad.py")
    file.write_text(content)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message) as caught:
        named_module(f"{file}:{function}")
    assert "\n" not in str(caught.value)
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_files_that_are_not_there_and_files_without_a_function(gan):
    with pytest.raises(FileNotFoundError, match="check the path before the colon"):
        named_module(f"{gan.with_name('gone.py')}:f")
    with pytest.raises(ValueError, match="is Python: name the function"):
        named_module(str(gan))


def test_what_a_module_lacks_is_named_by_the_run(call, gan, run_settings):
    gan.write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 2)\n")
    code, _, err = call(*options(run_settings, f"{gan}:build"))
    assert code == 1
    assert "the source Linear has no latent_dim" in err
