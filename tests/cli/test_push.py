"""`minegan-fast push`, and what was shared as an argument of other commands."""

import os
import subprocess
import sys

import pytest
from hub_stand_in import TOKEN
from hub_stand_in import hub as hub_fixture

hub = hub_fixture


@pytest.fixture
def run(call, transfer, run_settings):
    assert call(*transfer, "--method", "minegan++")[0] == 0
    return run_settings["out"]


def test_a_folder_to_look_at_needs_no_client(call, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, out, err = call("push", run, "user/x", "--folder", tmp_path / "look", "--which", "last", "--samples", 20)
    assert code == 0, err
    assert out.endswith(f"written: {tmp_path / 'look'}; nothing was shared\n")
    assert "note: " in out
    names = {"README.md", "samples.png", "delta.safetensors", "miner.safetensors"}
    assert {path.name for path in (tmp_path / "look").iterdir()} == names

    code, out, err = call("push", run, "user/x")
    assert (code, out) == (1, "")
    assert "huggingface_hub, which is not here" in err
    assert "pip install 'minegan_fast[hub]'" in err
    code, _, err = call("sample", "hf://user/x", "--out", tmp_path / "s")
    assert code == 1
    assert "pip install 'minegan_fast[hub]'" in err
    assert call("push", run, "user/x", "--samples", 1)[0] == 1


def test_shared_and_sampled(call, run, run_settings, hub, tmp_path):
    code, out, err = call("push", run, "user/x", "--which", "last", "--license", "mit", "--private", "--samples", 20)
    assert code == 0, err
    assert out.endswith(f"shared: {hub.address}/user/x\n")
    assert hub.repos["user/x"]["private"]
    assert b'license: "mit"' in hub.files("user/x")["README.md"]
    source = run_settings["source"]
    code, out, err = call("sample", "hf://user/x", "--source", source, "--out", tmp_path / "s", "-n", 3)
    assert code == 0, err
    assert "3 images" in out
    call("sample", run, "--which", "last", "--out", tmp_path / "own", "-n", 3)
    for path in (tmp_path / "own").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes()


def test_as_a_program_that_asks_nothing(run, hub, tmp_path):
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def program(**environment):
        command = [sys.executable, "-m", "minegan_fast", "push", run, "user/x", "--which", "last", "--samples", "0"]
        return subprocess.run(
            command, env=os.environ | own | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    done = program()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"shared: {hub.address}/user/x\n")
    refused = program(HF_TOKEN="")
    assert refused.returncode == 1
    assert refused.stderr.endswith("error: you are not logged in to the Hub: run hf auth login, or set HF_TOKEN\n")
