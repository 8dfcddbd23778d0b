"""Files on the Hub, of a stand-in on this machine: what is read, what is refused, and in which words."""

import sys

import pytest
import torch
from hub_stand_in import hub as hub_fixture
from safetensors.torch import save

from minegan_fast.files import hub as own
from minegan_fast.files.reading import read

hub = hub_fixture
TENSORS = save({"a": torch.arange(4.0)}, {"said": "yes"})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf://user/name", ("user/name", None, "")),
        ("hf:/user/name", ("user/name", None, "")),
        ("hf://user/na.me-2@v1.0", ("user/na.me-2", "v1.0", "")),
        ("hf://user/name@a%2Fb/c/d.pt", ("user/name", "a/b", "c/d.pt")),
        ("hf://user/name@refs/pr/3/c", ("user/name", "refs/pr/3", "c")),
        ("hf://user/name/a/b.safetensors", ("user/name", None, "a/b.safetensors")),
    ],
)
def test_places(text, place):
    assert own.parse(text) == place
    assert own.is_named(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf://name", "hf://", "hf://user/", "hf://us er/name", "hf://user/name@", "hf://../name", "hf://user/a--b",
        "hf://user/name/../x", "hf://user/name//x", "hf://user/name/a\\b", "hf://user/name.git", "hf:///user/name",
        f"hf://user/{'a' * 100}", "hf://user/na\nme", "hf://üser/name",
    ],
)  # fmt: skip
def test_what_is_no_place(text):
    with pytest.raises(ValueError, match=r"on the Hub"):
        own.parse(text)


def test_paths_here_need_no_client(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert own.local(str(tmp_path), "x") == tmp_path
    with pytest.raises(ImportError, match=r"pip install 'minegan_fast\[hub\]'"):
        own.local("hf://user/name", "x")


def test_a_file_is_read_of_the_revision_that_is_named(hub):
    first = hub.commit("user/name", {"generator.safetensors": TENSORS})
    hub.commit("user/name", {"generator.safetensors": b"other", "in/a.safetensors": TENSORS})
    assert own.local("hf://user/name", "generator.safetensors").read_bytes() == b"other"
    contents = read(f"hf://user/name@{first}")
    assert contents.metadata == {"said": "yes"}
    assert torch.equal(contents.data["a"], torch.arange(4.0))
    assert read("hf://user/name/in/a.safetensors").metadata == {"said": "yes"}
    assert own.local("hf://user/name/in", "a.safetensors").read_bytes() == TENSORS


def test_a_file_that_is_too_large_is_not_downloaded(hub):
    hub.commit("user/name", {"x.pt": b"0" * 1000})
    with pytest.raises(ValueError, match="has 1,000 bytes, and what it is to be has at most 999"):
        own.local("hf://user/name", "x.pt", 999)
    assert [path for method, path in hub.seen if method == "GET"] == []
    assert own.local("hf://user/name", "x.pt", 1000).stat().st_size == 1000


@pytest.mark.parametrize("announced", [10, 5000])
def test_a_file_of_another_size_than_announced_is_not_taken(hub, announced):
    hub.commit("user/name", {"x.pt": b"0" * 1000})
    hub.lies["x.pt"] = announced
    with pytest.raises(ConnectionError, match="broke off"):
        own.local("hf://user/name", "x.pt", 1 << 20)


def test_what_is_not_there_is_named(hub, monkeypatch):
    hub.commit("user/name", {"x.pt": b"0"})
    hub.commit("user/secret", {"x.pt": b"0"})
    hub.repos["user/secret"]["private"] = True
    for text, told in [
        ("hf://user/none", "no model 'user/none', or it is private and the token here does not see it"),
        ("hf://user/name@v2", "'user/name' has no revision 'v2'"),
        ("hf://user/name/y.pt", "'user/name' has no file 'y.pt': name the one"),
    ]:
        with pytest.raises(FileNotFoundError, match=told):
            own.local(text, "x.pt")
    assert own.local("hf://user/secret", "x.pt").exists()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="no model 'user/secret', or it is private and you are not logged in"):
        own.local("hf://user/secret", "x.pt")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(PermissionError, match="does not take the token"):
        own.local("hf://user/name", "x.pt")


def test_without_the_hub_what_was_downloaded_before_is_taken(hub):
    hub.commit("user/name", {"x.pt": b"0", "y.pt": b"1"})
    own.local("hf://user/name", "x.pt")
    hub.broken = "resolve"
    with pytest.warns(UserWarning, match="does not answer, or broke off .* taken is what was downloaded"):
        assert own.local("hf://user/name", "x.pt").read_bytes() == b"0"
    with pytest.raises(ConnectionError, match=f"the Hub at {hub.address} does not answer"):
        own.local("hf://user/name", "y.pt")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConnectionError, match="does not answer"):
        own.local("hf://user/name", "y.pt")


def test_what_others_say_is_one_line():
    assert own._one_line("a\x1b[31m\nb\u202e  c" + "d" * 400) == "a [31m b c" + "d" * 290
