"""Every recipe of docs/recipes.md runs as it is printed, and its checkpoints go on."""

import re
from pathlib import Path

import pytest
import torch

import minegan_fast as mf

TEXT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
NEEDS = {"accelerate": "accelerate", "Lightning": "lightning", "transformers": "transformers", "diffusers": "diffusers"}
NEEDS["The loop of NVIDIA's stylegan2-ada-pytorch"] = ""

# Other libraries warn of what is theirs.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("error:::minegan_fast")]


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_section_is_tried():
    assert NEEDS.keys() == SECTIONS.keys()
    assert all(len(blocks(body)) == 1 for body in SECTIONS.values())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(title, change): the names that the first block and the section's leave, whose code change() rewrites."""

    def run(title, change=lambda code: code):
        if NEEDS[title]:
            pytest.importorskip(NEEDS[title], reason=f"the recipe needs {NEEDS[title]}")
        names = {"__name__": "recipe"}
        exec(compile(blocks(TEXT)[0], "recipes.md, the first block", "exec"), names)
        exec(compile(change(blocks(SECTIONS[title])[0]), f"recipes.md, {title}", "exec"), names)
        return names

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return run


def instead(old, new):
    def change(code):
        assert code.count(old) == 1
        return code.replace(old, new)

    return change


def steps(finetuner):
    return max(int(state["step"].max()) for state in finetuner.state.values() if "step" in state)


@pytest.mark.parametrize("title", NEEDS)
def test_recipe(title, run):
    names = run(title)
    finetuner = names["finetuner"]
    assert isinstance(finetuner, mf.SparseFinetuner)
    assert 0.04 < finetuner.selection.density < 0.06
    assert steps(finetuner) >= 2
    (saved,) = Path().glob("*.safetensors")
    if finetuner.model is not names["G"]:  # its source is random
        return
    trained = {name: p.detach().clone() for name, p in finetuner.model.named_parameters()}
    source = mf.load_generator(names["data"].GENERATOR)
    assert sum(not torch.equal(p, trained[name]) for name, p in source.named_parameters()) > 5
    mf.load_delta(source, saved)
    assert all(torch.equal(p, trained[name]) for name, p in source.named_parameters())


def test_accelerate_goes_on(run):
    first = run("accelerate")["finetuner"]
    names = run("accelerate", lambda code: code.partition("for epoch")[0] + 'accelerator.load_state("checkpoint")\n')
    again = names["finetuner"]
    assert again.selection == first.selection
    assert steps(again) == steps(first)
    assert all(map(torch.equal, again.model.state_dict().values(), first.model.state_dict().values()))
    again.verify()


def test_lightning_goes_on(run):
    first = run("Lightning")["finetuner"]
    (checkpoint,) = Path("checkpoints").iterdir()
    longer = instead("max_epochs=2", "max_epochs=3")
    fit = instead("fit(Adapted(G, D), loader)", f"fit(Adapted(G, D), loader, ckpt_path={str(checkpoint)!r})")
    again = run("Lightning", lambda code: fit(longer(code)))["finetuner"]
    assert again.selection == first.selection
    assert steps(again) == steps(first) + 4


def test_transformers_goes_on(run):
    first = run("transformers")["finetuner"]
    longer, train = instead("max_steps=8", "max_steps=12"), instead("train()", "train(resume_from_checkpoint=True)")
    again = run("transformers", lambda code: train(longer(code)))["finetuner"]
    assert again.selection == first.selection
    assert steps(again) == steps(first) + 4
