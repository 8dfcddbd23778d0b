"""Writers of NVIDIA's pickles for the tests: networks as their programs pickle them, from this project's tensors."""

import contextlib
import pickle
import sys
import types
from collections import OrderedDict

import torch
from torch import nn


@contextlib.contextmanager
def named(module, name, thing):
    """While it lasts, `thing` is what pickle finds as `module.name`, and is written under that name."""
    parents = [".".join(module.split(".")[: i + 1]) for i in range(module.count(".") + 1)]
    before = {parent: sys.modules.get(parent) for parent in parents}
    for parent in parents:
        sys.modules.setdefault(parent, types.ModuleType(parent))
    thing.__module__, thing.__qualname__, thing.__name__ = module, name, name
    setattr(sys.modules[module], name, thing)
    try:
        yield
    finally:
        for parent, old in before.items():
            if old is None:
                del sys.modules[parent]


def _reconstruct(meta):
    raise AssertionError("reading a file called a function that it names")


class _Persistent:
    """An object that is pickled as its source text, its class's name and its state."""

    def __init__(self, class_name, parameters=(), buffers=(), modules=(), **others):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "import os\nos.system('never run')\n",
            "class_name": class_name,
            "state": others
            | {
                "training": False,
                "_parameters": OrderedDict(parameters),
                "_buffers": OrderedDict(buffers),
                "_non_persistent_buffers_set": set(),
                "_backward_hooks": OrderedDict(),
                "_modules": OrderedDict(modules),
            },
        }

    def __reduce__(self):
        return _reconstruct, (self.meta,)


class _EasyDict(dict):
    pass


def module_tree(tensors, buffers):
    """A persistent network of {"a.b.weight": tensor}; names that end in one of `buffers` are buffers."""
    parameters, kept, children = {}, {}, {}
    for name, tensor in tensors.items():
        head, _, tail = name.partition(".")
        if tail:
            children.setdefault(head, {})[tail] = tensor
        elif head in buffers:
            kept[head] = tensor
        else:
            parameters[head] = nn.Parameter(tensor)
    modules = {name: module_tree(inner, buffers) for name, inner in children.items()}
    return _Persistent("Module", parameters, kept, modules, _init_kwargs=_EasyDict(channel_base=32768))


def write_torch_pickle(path, **networks):
    """A file of StyleGAN2-ADA for PyTorch: {"G": ..., "D": ..., "G_ema": ..., "training_set_kwargs": ...}."""
    buffers = ("resample_filter", "noise_const", "w_avg")
    with (
        named("torch_utils.persistence", "_reconstruct_persistent_obj", _reconstruct),
        named("dnnlib.util", "EasyDict", _EasyDict),
    ):
        content = {name: module_tree(tensors, buffers) for name, tensors in networks.items()}
        content |= {"training_set_kwargs": _EasyDict(path="faces.zip", use_labels=False), "augment_pipe": None}
        path.write_bytes(pickle.dumps(content))


class _Network:
    def __init__(self, variables, components, **static_kwargs):
        self.variables, self.components, self.static_kwargs = variables, components, static_kwargs

    def __getstate__(self):
        return {
            "version": 4,
            "name": "G",
            "static_kwargs": _EasyDict(self.static_kwargs),
            "components": _EasyDict(self.components),
            "build_module_src": "import os\nos.system('never run')\n",
            "build_func_name": "G_main",
            "variables": list(self.variables.items()),
        }


def network_tree(tensors, components=("mapping", "synthesis"), **static_kwargs):
    """A TensorFlow network of {"a/b/weight": tensor}; what begins with a component's name lies in that component."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    inner = {
        part: {k[len(part) + 1 :]: v for k, v in arrays.items() if k.startswith(part + "/")} for part in components
    }
    own = {k: v for k, v in arrays.items() if k.split("/")[0] not in components}
    parts = {part: _Network(variables, {}, **static_kwargs) for part, variables in inner.items() if variables}
    return _Network(own, parts, **static_kwargs)


def write_tf_pickle(path, *networks, protocol=4):
    """A file of StyleGAN2 for TensorFlow: the triple (G, D, Gs)."""
    with named("dnnlib.tflib.network", "Network", _Network), named("dnnlib.util", "EasyDict", _EasyDict):
        path.write_bytes(pickle.dumps(networks, protocol))


def tf_of(state):
    """This project's StyleGAN2 tensors, by the rules of TensorFlow's program: [k, k, in, out], [in, out], bias - 1."""
    out, size = {}, max(t.shape[-1] for name, t in state.items() if name.startswith("noises."))
    for name, t in state.items():
        key, *_ = [*_tf_names(name, size), None]
        if key is None:
            continue
        if key.endswith("mod_bias"):
            t = t - 1
        elif key.endswith("noise_strength"):
            t = t[0]
        elif t.ndim >= 4 and key.endswith("weight"):
            t = t.reshape(t.shape[-4:]).permute(2, 3, 1, 0)
            t = t.flip(0, 1) if "Conv0_up" in key else t
        elif key.endswith("weight"):
            t = t.T
        elif key.endswith("ToRGB/bias"):
            t = t.flatten()
        out[key] = t.contiguous()
    return out


def ada_of(state):
    """This project's StyleGAN2 tensors, by the rules of the PyTorch program."""
    out, size = {}, max(t.shape[-1] for name, t in state.items() if name.startswith("noises."))
    for name, t in state.items():
        key, *_ = [*_ada_names(name, size), None]
        if key is None:
            continue
        if key.endswith("noise_strength"):
            t = t[0]
        elif key.endswith("noise_const") or key == "synthesis.b4.const":
            t = t.reshape(t.shape[-3:] if key.endswith("const") and "noise" not in key else t.shape[-2:])
        elif key.endswith("torgb.bias"):
            t = t.flatten()
        elif t.ndim == 5:
            t = t[0]
        elif key.endswith("resample_filter"):
            t = t / t.sum()
        out[key] = t.contiguous()
    return out


def _place(name, size):
    """(resolution of a layer's output, its rest) of a generator's parameter; None for what is in no layer."""
    head, _, rest = name.partition(".")
    if head == "to_rgb":
        return size, "rgb", rest
    if head in ("conv1", "to_rgb1"):
        return 4, "conv" if head == "conv1" else "rgb", rest
    number, _, rest = rest.partition(".")
    if head == "skips":
        return 8 << int(number), "skip", {"0.weight": "conv.weight", "1.kernel": "conv.blur.kernel"}[rest]
    if head == "to_rgbs":
        return 8 << int(number), "rgb", rest
    if head == "convs" and rest.startswith(("conv.", "noise.", "activate.")):
        return 8 << int(number) // 2, "up" if int(number) % 2 == 0 else "conv", rest
    return None


PARTS = {
    "conv.weight": ("weight", "weight"),
    "conv.modulation.weight": ("mod_weight", "affine.weight"),
    "conv.modulation.bias": ("mod_bias", "affine.bias"),
    "noise.weight": ("noise_strength", "noise_strength"),
    "activate.bias": ("bias", "bias"),
    "bias": ("bias", "bias"),
    "conv.blur.kernel": (None, "resample_filter"),
}


def _tf_names(name, size):
    if place := _place(name, size):
        r, kind, rest = place
        layer = {"up": "Conv0_up", "rgb": "ToRGB", "skip": "Skip", "conv": "Conv" if r == 4 else "Conv1"}[kind]
        if rest in PARTS and PARTS[rest][0]:
            yield f"synthesis/{r}x{r}/{layer}/{PARTS[rest][0]}"
    elif name.startswith("style."):
        _, number, part = name.split(".")
        yield f"mapping/Dense{int(number) - 1}/{part}"
    elif name.startswith("noises."):
        yield f"synthesis/noise{name.split('_')[1]}"
    elif name == "input.input":
        yield "synthesis/4x4/Const/const"
    elif name.startswith("embed."):
        yield f"mapping/LabelEmbed/{name.split('.')[1]}"


def _ada_names(name, size):
    if place := _place(name, size):
        r, kind, rest = place
        layer = {"up": "conv0", "rgb": "torgb", "skip": "skip", "conv": "conv1"}[kind]
        if rest in PARTS:
            yield f"synthesis.b{r}.{layer}.{PARTS[rest][1]}"
        elif rest == "upsample.kernel":
            yield f"synthesis.b{r}.resample_filter"
    elif name.startswith("style."):
        _, number, part = name.split(".")
        yield f"mapping.fc{int(number) - 1}.{part}"
    elif name.startswith("noises."):
        k = int(name.split("_")[1])
        yield f"synthesis.b{4 << (k + 1) // 2}.conv{1 if k % 2 == 0 else 0}.noise_const"
    elif name == "input.input":
        yield "synthesis.b4.const"
    elif name.startswith("embed."):
        yield f"mapping.{name}"


def critic_of(state, resolution, tf):
    """This project's discriminator's tensors, by the rules of TensorFlow's program or of the PyTorch one."""
    blocks = {f"convs.{i}": resolution >> (i - 1) for i in range(1, resolution.bit_length() - 2)}
    out = {}
    for name, t in state.items():
        head, rest = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
        part = name.split(".")[-1]
        if head == "downsample.kernel":
            if tf:
                continue
            key = f"b{resolution}.resample_filter"
        elif head.startswith("embed"):
            key = f"LabelEmbed/{part}" if tf else f"mapping.{name}"
        elif head.startswith("class_mapping"):
            i = int(head.split(".")[1]) - 1
            key = f"Mapping{i}/{part}" if tf else f"mapping.fc{i}.{part}"
        elif head.startswith("from_rgbs"):
            r = resolution >> int(head.split(".")[1]) + 1
            key = f"{r}x{r}/FromRGB/{part}" if tf else f"b{r}.fromrgb.{part}"
        elif head == "convs.0":
            key = f"{resolution}x{resolution}/FromRGB/{part}" if tf else f"b{resolution}.fromrgb.{part}"
        elif head in blocks:
            r, (layer, _, _) = blocks[head], rest.split(".")
            theirs = {
                "conv1": ("Conv0", "conv0"),
                "conv2": ("Conv1_down", "conv1"),
                "skip": ("Skip", "skip"),
            }[layer][not tf]
            if part == "kernel" and tf:
                continue
            part = "resample_filter" if part == "kernel" else part
            key = f"{r}x{r}/{theirs}/{part}" if tf else f"b{r}.{theirs}.{part}"
        elif head.startswith("final_conv"):
            key = f"4x4/Conv/{part}" if tf else f"b4.conv.{part}"
        else:
            first = head == "final_linear.0"
            key = f"{'4x4/Dense0' if first else 'Output'}/{part}" if tf else f"b4.{'fc' if first else 'out'}.{part}"
        if tf and t.ndim == 4:
            t = t.permute(2, 3, 1, 0)
        elif tf and t.ndim == 2:
            t = t.T
        out[key] = t.contiguous()
    if not tf:
        out |= {f"b{r}.conv0.resample_filter": torch.ones(4, 4) / 16 for r in blocks.values()}
    return out
