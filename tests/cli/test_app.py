"""The program as its users meet it: exit codes, one-line errors, help with an example."""

import json
import types

import pytest
import torch

import minegan_fast
from minegan_fast.cli import doctor
from minegan_fast.training import estimate

COMMANDS = (
    "demo", "transfer", "sample", "interpolate", "evaluate", "report", "push", "convert", "export", "inspect", "doctor",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_common_options(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"Example: minegan-fast {command}" in out
    if command not in ("report", "convert", "export", "inspect"):
        assert "--device" in out
    if command not in ("report", "convert", "export", "inspect", "doctor"):
        assert "--seed" in out


def test_transfer_sample_evaluate(call, transfer, run_settings, tmp_path):
    code, out, err = call(*transfer)
    assert code == 0, err
    assert "kid" in out
    assert "finetuning: 4/4 steps" in err, "no plain progress lines off a terminal"

    run = run_settings["out"]
    code, out, _ = call("sample", run, "--out", tmp_path / "s", "-n", 5)
    assert code == 0
    assert len(list((tmp_path / "s").glob("*.png"))) == 6
    assert (tmp_path / "s" / "grid.png").exists()

    code, _, err = call("sample", run, "--out", tmp_path / "s", "--by-source")
    assert (code, err) == (1, "error: --by-source is for a run with several sources, and this one has one\n")

    assert not (run / "report.html").exists()
    code, out, err = call("report", run)
    assert (code, out, err) == (0, f"written: {run / 'report.html'}\n", "")
    assert "<h1>run</h1>" in (run / "report.html").read_text()
    code, _, err = call("report", tmp_path)
    assert (code, err) == (1, f"error: no run in {str(tmp_path)!r}: give the folder that transfer wrote\n")

    delta = run / "last" / "delta.safetensors"
    assert call("sample", delta, "--source", run_settings["source"], "--out", tmp_path / "d", "-n", 2)[0] == 0

    images, numbers = run_settings["images"], tmp_path / "m.json"
    code, out, err = call("evaluate", run, "--images", images, "--samples", 20, "--json", numbers)
    assert code == 0, err
    report = json.loads(numbers.read_text())
    assert {"fid", "kid", "kmmd", "mv"} <= set(report["metrics"])
    assert "kmmd" in out
    assert all(f"note: {note[:40]}" in out for note in report["notes"])


def test_a_run_of_the_original_code_is_sampled(call, tiny, tmp_path):
    layers = {f"transform.{i}.weight": torch.randn(8, 8) for i in (0, 2)}
    layers |= {f"transform.{i}.bias": torch.randn(8) for i in (0, 2)}
    torch.save({"g_ema": tiny["generator"].state_dict(), "miner": layers}, tmp_path / "100000.pt")
    code, out, err = call("sample", tmp_path / "100000.pt", "--out", tmp_path / "s", "-n", 3)
    assert code == 0, err
    assert "3 images" in out


def test_config_file_with_options_that_win(call, transfer, run_settings, tmp_path):
    assert call(*transfer)[0] == 0
    again = tmp_path / "again"
    config = run_settings["out"] / "config.json"
    code, _, err = call("transfer", "--config", config, "--out", again, "--finetune-steps", 0)
    assert code == 0, err
    written = json.loads((again / "config.json").read_text())
    assert written["finetune_steps"] == 0
    assert written["batch"] == run_settings["batch"]
    code, _, err = call("transfer", "--resume", "--out", run_settings["out"])
    assert code == 0, err


def test_dry_run(call, transfer, run_settings):
    code, out, err = call(*transfer, "--dry-run")
    assert code == 0, err
    assert "time:" in out
    assert "memory:" in out
    assert not run_settings["out"].exists()


@pytest.mark.parametrize(
    ("step", "told"), [(0.001, "time: 0.008 seconds of"), (5.0, "time: 40 seconds of"), (9.0, "time: 1.2 minutes of")]
)
def test_the_time_of_a_short_run_is_told_in_seconds(call, transfer, monkeypatch, step, told):
    memory = estimate.Estimate(1 << 20, 1 << 20, [estimate.Work(0, 1 << 20)], available=1 << 30)
    monkeypatch.setattr("minegan_fast.training.recipe.dry_run", lambda *_: (memory, step, step))
    assert told in call(*transfer, "--dry-run")[1]


def test_version(call):
    code, out, _ = call("--version")
    assert (code, out) == (0, f"minegan-fast {minegan_fast.__version__}\n")


def test_doctor_says_what_is_there_and_why_not(call):
    code, out, _ = call("doctor")
    assert code == 0
    for word in ("torch", "reference", "cpp", "triton", "cuda", "bias_act", "nvcc"):
        assert word in out


@pytest.mark.parametrize(("hip", "build"), [(None, "CUDA 12.6"), ("6.4", "ROCm 6.4")])
def test_doctor_names_the_build_and_what_a_gpu_cannot_run(monkeypatch, hip, build):
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.6")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.report()["devices"]["cuda"] == f"torch is built for {build}, but no GPU or driver is there"

    properties = types.SimpleNamespace(name="P100", total_memory=2**34, major=6, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(doctor, "gpu_report", lambda index: {"triton": f"{index} is too old", "cuda": "available"})
    devices = doctor.report("cpu")["devices"]
    assert devices["cuda:0"] == f"P100, 16 GiB, {'ROCm 6.4' if hip else 'sm_60'}"
    assert devices["cuda:0 without triton"] == "0 is too old"
    assert "cuda:0 without cuda" not in devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transfer", "nope.pt", "images", "--out", "RUN"], "no checkpoint at nope.pt"),
        (["transfer", "--out", "RUN"], "source is missing"),
        (["transfer", "SOURCE", "nowhere", "--out", "RUN"], "no image folder"),
        (["transfer", "SOURCE", "IMAGES", "--out", "RUN", "--density", "1.5"], "density"),
        (["transfer", "SOURCE", "IMAGES", "--out", "SOURCE"], "cannot write the run"),
        (["transfer", "SOURCE", "IMAGES", "--out", "RUN", "--config", "nope.json"], "no configuration"),
        (["sample", "nowhere", "--out", "RUN"], "no best result"),
        (["sample", "CRITIC", "--out", "RUN"], "holds no generator"),
        (["sample", "SOURCE", "--out", "RUN", "--seeds", "1,2-"], "--seeds must be numbers and ranges"),
        (["sample", "SOURCE", "--out", "RUN", "--truncation", "nan"], "truncation must be a number"),
        (["sample", "SOURCE", "--out", "RUN", "--class", "3"], "has no classes"),
        (["sample", "SOURCE", "--out", "RUN", "--noise", "loud"], "noise must be one of"),
        (["interpolate", "SOURCE", "--out", "RUN", "--seeds", "1"], "from two seeds on"),
        (["interpolate", "SOURCE", "--out", "RUN", "--format", "mp4"], "--format must be one of gif, webp, none"),
        (["sample", "best/delta.safetensors", "--out", "RUN"], "results from before stage 2 have no delta"),
        (["evaluate", "nowhere", "--images", "IMAGES"], "no best result"),
        (["doctor", "--device", "abacus"], "abacus"),
    ],
)
def test_a_mistake_is_one_line_and_a_failure(call, tiny, tmp_path, arguments, message):
    places = {"SOURCE": tiny["source"], "CRITIC": tiny["critic"], "IMAGES": tiny["images"], "RUN": tmp_path / "run"}
    code, out, err = call(*(places.get(a, a) for a in arguments))
    assert code == 1
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


def test_interrupt_tells_how_to_go_on(call, monkeypatch, transfer):
    from minegan_fast.training.trainer import Trainer

    def interrupted(self, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupted)
    code, _, err = call(*transfer)
    assert code == 130
    assert "--resume" in err


def test_nothing_to_resume_is_said(call, transfer):
    code, _, err = call(*transfer, "--resume")
    assert code == 0
    assert "nothing to resume" in err


def test_unknown_option_is_a_failure(call):
    code, _, err = call("transfer", "--speed", "9")
    assert code == 2
    assert "--speed" in err


def test_config_with_unknown_settings(call, tmp_path):
    (tmp_path / "c.json").write_text('{"densitty": 0.1}')
    code, _, err = call("transfer", "--config", tmp_path / "c.json", "--out", tmp_path / "run")
    assert code == 1
    assert "densitty" in err


def test_convert_and_inspect(call, run_settings, tmp_path):
    out = tmp_path / "converted.safetensors"
    code, said, err = call("convert", run_settings["source"], out, "--only", "generator")
    assert code == 0, err
    assert "generator: weights from" in said
    code, said, _ = call("inspect", out)
    assert code == 0
    for words in ("family", "stylegan2", "8 x 8, 1 channels", "none (unconditional)"):
        assert words in said
    code, said, _ = call("inspect", out, "--json")
    assert code == 0
    (network,) = json.loads(said)["networks"]
    assert (network["role"], network["resolution"], network["missing"]) == ("generator", 8, [])
    code, _, err = call("convert", run_settings["source"], out)
    assert code == 1
    assert err.startswith("error: ")
    assert "--force" in err
    assert call("convert", run_settings["source"], out, "--force")[0] == 0
    out.write_bytes(b"<html>")
    code, _, err = call("inspect", out)
    assert code == 1
    assert "is a web page, not a checkpoint" in err


def test_inspect_exits_with_1_where_a_network_is_not_whole(call, tiny, tmp_path):
    weights = tiny["generator"].state_dict()
    del weights["conv1.activate.bias"]
    torch.save(weights, tmp_path / "lacking.pt")
    for options in ((), ("--json",)):
        code, said, _ = call("inspect", tmp_path / "lacking.pt", *options)
        assert code == 1
        assert "conv1.activate.bias" in said


def test_inspect_names_a_few_of_many_tensors(call, tmp_path):
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(40)}, tmp_path / "foreign.pt")
    code, said, _ = call("inspect", tmp_path / "foreign.pt")
    assert code == 1
    assert "and 24 more" in said
    assert len(said.splitlines()) < 30
    _, said, _ = call("inspect", tmp_path / "foreign.pt", "--json")
    assert len(json.loads(said)["others"]) == 40


def test_resuming_what_is_not_there(call, tmp_path):
    code, _, err = call("transfer", "--out", tmp_path / "nowhere", "--resume")
    assert code == 1
    assert "there is no run in" in err


def test_the_choice_of_averaged_weights_is_said(call, tiny, tmp_path):
    weights = tiny["generator"].state_dict()
    torch.save({"g": weights, "g_ema": weights}, tmp_path / "training.pt")
    code, out, err = call("convert", tmp_path / "training.pt", tmp_path / "out.safetensors")
    assert code == 0
    said = "averaged weights (EMA) from 'g_ema' in training.pt, the layout of rosinality/stylegan2-pytorch; the raw"
    assert said in err
    assert said in out


def test_export_names_its_files_and_refuses_in_one_line(call, transfer, run_settings, tmp_path):
    assert call(*transfer)[0] == 0
    run, delta = run_settings["out"], run_settings["out"] / "last" / "delta.safetensors"
    code, out, err = call("export", run, tmp_path / "out", "--to", "nvidia", "--which", "last")
    assert code == 0, err
    for name in ("network.pkl", "miner.safetensors", "miner.pt"):
        assert f"written: {tmp_path / 'out' / name}" in out
        assert (tmp_path / "out" / name).is_file()
    assert "note: the discriminator is" in out
    code, _, err = call("export", delta, tmp_path / "d", "--to", "safetensors", "--source", run_settings["source"])
    assert code == 0, err
    code, out, err = call("export", run, tmp_path / "grey", "--to", "rosinality")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "images of 1 channels, and it has RGB; take nvidia or safetensors" in err
    assert not (tmp_path / "grey").exists()
    code, _, err = call("export", run, tmp_path / "out", "--to", "nvidia")
    assert (code, err.count("\n")) == (1, 1)
    assert "name a new folder" in err
