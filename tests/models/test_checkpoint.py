import argparse
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from minegan_fast.files import atomic, reading
from minegan_fast.models import (
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    export_rosinality,
    has_discriminator,
    load_discriminator,
    load_generator,
    save_model,
)


@pytest.fixture
def generator():
    return StyleGAN2Generator(16, 9, mapping_layers=2, style_dim=11, channels={4: 6, 8: 5, 16: 3})


@pytest.fixture
def public():
    """As rosinality's programs build them: RGB, with z and w of one size."""
    return StyleGAN2Generator(16, 9, mapping_layers=2, channels={4: 6, 8: 5, 16: 3})


@pytest.fixture
def critic():
    return StyleGAN2Discriminator(16, channels={4: 7, 8: 5, 16: 3})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "network"


def assert_same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def doubled(state):
    return {name: 2 * tensor for name, tensor in state.items()}


def without_noises(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("noises.")}


def test_networks_are_taken_from_what_was_read_before(file, generator, critic, monkeypatch):
    save_model(file, generator, critic)
    contents = reading.read(file)
    monkeypatch.setattr(reading, "_read_file", lambda path: pytest.fail(f"{path} was read again"))
    assert has_discriminator(contents)
    for _ in range(2):
        assert_same(load_generator(contents), generator)
        assert_same(load_discriminator(contents), critic)


# This project's files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_come_back_bit_for_bit(file, generator, critic, dtype):
    generator, critic = generator.to(dtype), critic.to(dtype)
    assert save_model(str(file), generator, critic) == file
    before = torch.get_rng_state()
    g, d = load_generator(str(file)), load_discriminator(file)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(g, generator)
    assert_same(d, critic)
    assert (g.config, d.config) == (generator.config, critic.config)
    assert not g.training
    assert all(p.requires_grad and p.is_leaf for p in g.parameters())
    z = torch.randn(2, 9, dtype=dtype)
    assert torch.equal(d(g(z, noise="constant")), critic(generator(z, noise="constant")))
    assert_same(load_generator(file, family="stylegan2"), generator)


def test_one_network_a_file(file, generator, critic):
    save_model(file, generator)
    assert not has_discriminator(file)
    with pytest.raises(ValueError, match=r"network holds no discriminator, only a generator"):
        load_discriminator(file)
    save_model(file, critic)
    assert has_discriminator(file)
    assert_same(load_discriminator(file), critic)
    with pytest.raises(ValueError, match=r"network holds no generator, only a discriminator"):
        load_generator(file)


def test_a_loaded_network_does_not_depend_on_its_file(file, public):
    for write in (save_model, export_rosinality):
        write(file, public)
        g = load_generator(file)
        file.write_bytes(bytes(file.stat().st_size))
        g.__dict__["_buffers"].pop("latent_avg", None)  # which the export writes beside the network
        assert_same(g, public)


def test_a_subclass_is_saved_as_what_it_is(file, generator):
    generator.__class__ = type("Watched", (StyleGAN2Generator,), {})
    save_model(file, generator)
    assert type(load_generator(file)) is StyleGAN2Generator
    assert_same(load_generator(file), generator)


def test_what_cannot_be_saved_is_named(file, generator, critic):
    with pytest.raises(TypeError, match="for a Linear save its state_dict"):
        save_model(file, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="one generator, got two"):
        save_model(file, generator, generator)
    with pytest.raises(TypeError, match="takes a StyleGAN2Generator, got a StyleGAN2Discriminator"):
        export_rosinality(file, critic)
    with pytest.raises(TypeError, match="takes a StyleGAN2Discriminator, got a StyleGAN2Generator"):
        export_rosinality(file, generator, generator)
    assert not file.exists()


@pytest.mark.parametrize("write", [save_model, export_rosinality])
def test_places_that_cannot_be_written_are_named(tmp_path, public, write):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        write(tmp_path / "nowhere" / "g", public)
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write(tmp_path, public)


@pytest.mark.parametrize("write", [save_model, export_rosinality])
def test_a_full_disk_leaves_the_old_file(file, public, write):
    write(file, public)
    old = file.read_bytes()
    resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"network cannot be written .*is the disk full"):
            write(file, public)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == old
    assert os.listdir(file.parent) == [file.name]


def test_an_interrupt_leaves_the_old_file(file, generator, monkeypatch):
    save_model(file, generator)
    old = file.read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(file, generator)
    assert file.read_bytes() == old
    assert os.listdir(file.parent) == [file.name]


# Files of the public layout


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_file_gives_its_ema(file, generator, critic, zipped):
    optimizer = torch.optim.Adam(generator.parameters())
    generator(torch.randn(2, 9)).sum().backward()
    optimizer.step()
    content = {
        "g": doubled(generator.state_dict()),
        "d": critic.state_dict(),
        "g_ema": generator.state_dict(),
        "g_optim": optimizer.state_dict(),
        "d_optim": torch.optim.Adam(critic.parameters()).state_dict(),
        "args": argparse.Namespace(size=16, path="images", lr=0.002, mixing=0.9, ckpt=None),
        "ada_aug_p": 0.0,
    }
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    g, d = load_generator(file), load_discriminator(file)
    assert_same(g, generator)
    assert_same(d, critic)
    assert has_discriminator(file)
    assert g.config["channels"] == {"4": 6, "8": 5, "16": 3}
    assert (g.latent_dim, g.style_dim, g.resolution, g.config["mapping_layers"]) == (9, 11, 16, 2)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(file, generator, critic, prefix):
    torch.save(
        {k: {prefix + n: t for n, t in m.state_dict().items()} for k, m in (("g", generator), ("d", critic))}, file
    )
    assert_same(load_generator(file), generator)
    assert_same(load_discriminator(file), critic)


def test_bare_state_dicts(file, generator, critic):
    torch.save(generator.state_dict(), file)
    assert_same(load_generator(file), generator)
    assert not has_discriminator(file)
    save_file(critic.state_dict(), file)
    assert_same(load_discriminator(file), critic)


def test_the_other_architectures_are_told_by_their_keys(file):
    sizes = {"channels": {4: 6, 8: 5, 16: 3}}
    g = StyleGAN2Generator(16, 9, mapping_layers=2, **sizes, architecture="resnet")
    d = StyleGAN2Discriminator(16, **sizes, architecture="skip")
    torch.save({"g": g.state_dict(), "d": d.state_dict()}, file)
    assert_same(load_generator(file), g)
    assert_same(load_discriminator(file), d)
    assert load_generator(file).config == g.config


def test_noises_that_a_file_leaves_out_are_the_same_each_time(file, generator):
    torch.save({"g_ema": without_noises(generator.state_dict())}, file)
    a, b = load_generator(file), load_generator(file)
    assert_same(a, b)
    assert without_noises(a.state_dict()).keys() == without_noises(generator.state_dict()).keys()
    noise = torch.cat([n.flatten() for n in a.noises.buffers()])
    assert 0.8 < noise.std() < 1.2


def test_half_precision_becomes_float32(file, generator):
    torch.save({k: v.half() for k, v in generator.state_dict().items()}, file)
    g = load_generator(file)
    assert {p.dtype for p in g.state_dict().values()} == {torch.float32}
    assert torch.equal(g.input.input, generator.input.input.half().float())


@pytest.mark.parametrize("resolution", [8, 32])
def test_export_has_the_public_layout_and_loads_back(file, resolution):
    sizes = {"channel_base": 64, "channel_max": 9}
    g = StyleGAN2Generator(resolution, 10, mapping_layers=1, **sizes)
    d = StyleGAN2Discriminator(resolution, **sizes)
    export_rosinality(file, g, d)
    content = torch.load(file, weights_only=True)
    assert content.keys() == {"g_ema", "g", "latent_avg", "d", "g_optim", "d_optim"}
    assert content["g_ema"].keys() == g.state_dict().keys()
    assert torch.equal(content["latent_avg"], g.mean_latent()[0])
    loaded = load_generator(file)
    assert torch.equal(loaded.latent_avg, content["latent_avg"])
    export_rosinality(file, loaded)
    again = torch.load(file, weights_only=True)
    assert again["g_ema"].keys() == g.state_dict().keys()
    assert torch.equal(again["latent_avg"], content["latent_avg"])
    del loaded.latent_avg
    assert_same(loaded, g)
    export_rosinality(file, g, d)
    assert_same(load_discriminator(file), d)


def test_a_safetensors_header_whose_length_reads_as_html(file, critic):
    """The length 15392 is stored as b" <\\0\\0\\0\\0\\0\\0"."""
    save_file(critic.state_dict(), file, {"note": ""})
    length = int.from_bytes(file.read_bytes()[:8], "little")
    save_file(critic.state_dict(), file, {"note": "x" * (15392 - length)})
    assert file.read_bytes()[:3] == b" <\0"
    assert_same(load_discriminator(file), critic)


# Bad input


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing"):
        load_generator(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder; give the checkpoint file in it"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not a checkpoint"),
        (b"\xef\xbb\xbf<html></html>", "is a web page, not a checkpoint"),
        (b"hello, this is no network", "neither a safetensors nor a PyTorch file .it begins with b'hello, this is n'"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "neither a safetensors nor a PyTorch file"),
        (b"PK\x03\x04" + bytes(200), "truncated, damaged or no file of torch.save"),
        (pickle.dumps([1], 2), "holds a list, expected a dict of tensors"),
        (pickle.dumps({"a": 1}, 5)[:-1], "truncated, damaged or no file of torch.save"),
        (b"\x10\0\0\0\0\0\0\0{not json at all", "not a whole safetensors file"),
    ],
)
def test_files_of_other_kinds(file, content, message):
    file.write_bytes(content)
    for read in (load_generator, load_discriminator, has_discriminator):
        with pytest.raises(ValueError, match=message) as caught:
            read(file)
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("kept", [1, 7, 100, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_files(file, generator, kind, kept):
    if kind == "safetensors":
        save_model(file, generator)
    else:
        torch.save({"g_ema": generator.state_dict()}, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"neither|truncated|not a whole safetensors file") as caught:
        load_generator(file)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_nothing_run(tmp_path, file, generator, kind):
    marker = tmp_path / "marker"
    content = {"g_ema": generator.state_dict(), "args": Malicious(f"touch {marker}")}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content["args"], 4))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    message = "was refused: its pickle asks for '(posix|nt).system', which is code"
    for read in (load_generator, load_discriminator, has_discriminator):
        with pytest.raises(ValueError, match=message):
            read(file)
    assert not marker.exists()
    if kind != "pickle":
        torch.load(file, weights_only=False)
        assert marker.exists(), "the file does no harm to anyone: the test shows nothing"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_gives_its_tensors(file, generator, zipped):
    torch.save({"g_ema": generator}, file, _use_new_zipfile_serialization=zipped)
    assert_same(load_generator(file), generator)
    torch.save(generator, file, _use_new_zipfile_serialization=zipped)
    assert_same(load_generator(file), generator)


@pytest.mark.parametrize(
    ("keys", "looks"),
    [
        (["conv1.weight", "bn1.weight", "layer1.0.conv1.weight"], "It looks like a ResNet classifier"),
        (["transform.0.weight", "transform.2.weight"], "It looks like a miner"),
        (["final_linear.0.weight"], "It looks like a stylegan2 discriminator"),
        (["a.weight", "b.weight"], "Its keys: "),
    ],
)
@pytest.mark.parametrize("container", [None, "g_ema", "netG"])
def test_other_architectures_are_recognised(file, keys, looks, container):
    state = {key: torch.zeros(2, 2) for key in keys}
    torch.save({container: state} if container else state, file)
    with pytest.raises(ValueError, match=looks) as caught:
        load_generator(file)
    message = str(caught.value)
    assert keys[0] in message
    would = message.partition("Keys that would have told: ")[2].split(", ")
    assert "conv1.conv.modulation.weight (stylegan2 generator)" in would
    assert len(would) == 10


def test_a_critic_asked_from_a_generators_file(file, generator):
    torch.save({"g_ema": generator.state_dict()}, file)
    with pytest.raises(ValueError, match=r"no discriminator of a layout known.* looks like a stylegan2 generator"):
        load_discriminator(file)


def test_keys_and_shapes_that_differ_are_named(file, generator):
    state = generator.state_dict()
    del state["convs.1.noise.weight"], state["to_rgbs.0.conv.modulation.bias"]
    state |= {"extra.weight": torch.zeros(1), "conv1.activate.bias": torch.zeros(4)}
    state["to_rgb1.bias"] = torch.zeros(1, 3, 1, 1, dtype=torch.int64)
    torch.save({"g_ema": state}, file)
    with pytest.raises(ValueError, match="does not fit a StyleGAN2Generator") as caught:
        load_generator(file)
    for part in (
        "missing: convs.1.noise.weight, to_rgbs.0.conv.modulation.bias;",
        "unexpected: extra.weight;",
        "conv1.activate.bias is [4], expected [6]",
        "to_rgb1.bias holds torch.int64, expected floats",
    ):
        assert part in str(caught.value)


def test_a_state_that_gives_no_sizes(file, generator, critic):
    state = generator.state_dict()
    del state["style.1.weight"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"looks like a stylegan2 generator of .* but lacks 'style.1.weight'"):
        load_generator(file)
    torch.save(generator.state_dict() | {"to_rgb1.conv.weight": torch.zeros(())}, file)
    with pytest.raises(ValueError, match="its weights have too few dimensions"):
        load_generator(file)
    state = {k: v for k, v in critic.state_dict().items() if not k.startswith(("convs.1.", "convs.2."))}
    torch.save(state, file)
    with pytest.raises(ValueError, match="cannot be built: resolution must be a power of two >= 8, got 4"):
        load_discriminator(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"resolution": 24}}, "cannot be built: resolution must be a power of two >= 8, got 24"),
        ({"config": {"resolution": 16, "depth": 3}}, "cannot be built: .*'depth'"),
        ({"config": {"resolution": 1024, "channels": {"4": 2**24}}}, "does not fit a StyleGAN2Generator of its size"),
        ({"config": {"resolution": 1024, "channels": {"4": 2**62}}}, "cannot be built"),
        ({"family": "stylegan9"}, "the family 'stylegan9' is unknown to this version, which reads: .*stylegan2"),
        ({"config": None}, "its metadata is damaged"),
        ({"family": []}, "its metadata is damaged"),
        ({"config": {"resolution": 8, "mapping_layers": 20000}}, "describes a StyleGAN2Generator of 20000 layers"),
    ],
)
def test_damaged_descriptions(file, generator, change, message):
    save_model(file, generator)
    entry = {"family": "stylegan2", "config": generator.config} | change
    save_file(load_file(file), file, {"modules": json.dumps({"generator": entry})})
    with pytest.raises(ValueError, match=message):
        load_generator(file)


@pytest.mark.parametrize("modules", ["{", "[]", '{"generator": 3}', '{"generator": {"family": "stylegan2"}}'])
def test_damaged_metadata(file, generator, modules):
    save_file({"generator.a": torch.zeros(1)}, file, {"modules": modules})
    with pytest.raises(ValueError, match="its metadata is damaged"):
        load_generator(file)


def test_another_family_than_asked_for(file, generator):
    save_model(file, generator)
    with pytest.raises(ValueError, match="holds a stylegan2 generator, not biggan; leave family=None"):
        load_generator(file, family="biggan")


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3])
def test_not_a_dict(file, content):
    torch.save(content, file)
    with pytest.raises(ValueError, match=f"holds a {type(content).__name__}, expected a dict of tensors"):
        load_generator(file)
