"""The public names and the arguments that are promised to stay: names, order, defaults; more may come behind."""

import importlib
import inspect

import pytest

import minegan_fast as mf
from minegan_fast.ops._op import Op

REQUIRED = inspect.Parameter.empty
FOLLOWS_MEASUREMENTS = object()  # the default may change with what is measured
MINER = {
    "latent_dim": REQUIRED,
    "depth": 2,
    "width": None,
    "input_dim": None,
    "output_dim": None,
    "activation": "relu",
    "residual": True,
}
LOADED = {"path": REQUIRED, "family": None}
PROMISED = {
    "Miner": MINER,
    "MinerBank": {"n": REQUIRED, **MINER},
    "Mined": {"generator": REQUIRED, "miner": REQUIRED, "class_miner": None},
    "Mined.sample": {"self": REQUIRED, "batch": REQUIRED, "generator": None},
    "MultiGenerator": {"generators": REQUIRED, "bank": None},
    "MultiGenerator.best": {"self": REQUIRED, "u": REQUIRED, "critic": REQUIRED},
    "SparseFinetuner": {
        "model": REQUIRED,
        "lr": 2e-3,
        "betas": (0.0, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "optimizer": "adam",
        "density": 0.05,
        "budget": "neurons",
        "criterion": FOLLOWS_MEASUREMENTS,
        "scope": FOLLOWS_MEASUREMENTS,
        "policy": "train_top",
        "include": None,
        "exclude": None,
        "score_steps": 16,
        "ema_decay": None,
        "seed": 0,
        "process_group": None,
    },
    "load_delta": {"model": REQUIRED, "path": REQUIRED, "scale": 1.0, "strict": True},
    "unload_delta": {"model": REQUIRED},
    "mmd2": {"x": REQUIRED, "y": REQUIRED, "kernel": "gaussian", "bandwidth": None, "unbiased": True},
    "interpolate": {"real": REQUIRED, "fake": REQUIRED, "alpha": None, "generator": None},
    "gradient_penalty": {"critic": REQUIRED, "real": REQUIRED, "fake": REQUIRED, "center": 1.0},
    "r1_penalty": {"critic": REQUIRED, "real": REQUIRED},
    "path_length_penalty": {"images": REQUIRED, "latents": REQUIRED, "mean": 0.0, "decay": 0.01, "generator": None},
    "dragan_penalty": {"critic": REQUIRED, "real": REQUIRED},
    "load_generator": LOADED,
    "load_discriminator": LOADED,
    "save_model": {"path": REQUIRED, "generator": REQUIRED},
    "use_backend": {"name": REQUIRED},
    "backends": {},
    "transfer": {
        "source": REQUIRED,
        "images": REQUIRED,
        "out": REQUIRED,
        "critic": None,
        **dict.fromkeys(("mining_steps", "finetune_steps", "density", "batch", "lr", "loss"), FOLLOWS_MEASUREMENTS),
        "device": None,
        "seed": 0,
        "resume": False,
        "progress": True,
        "snapshot_every": FOLLOWS_MEASUREMENTS,
        "metrics": ("fid", "kid", "kmmd", "mv"),
    },
    "metrics.kid": {"x": REQUIRED, "y": REQUIRED, "subsets": 100, "subset_size": 1000, "seed": 0},
    "metrics.kmmd": {"x": REQUIRED, "y": REQUIRED, "sigma": 1.0},
    "metrics.fid": {"x": REQUIRED, "y": REQUIRED},
    "metrics.mean_variance": {"x": REQUIRED},
    "metrics.FeatureExtractor": {"path_or_module": REQUIRED},
}
METHODS = {
    "SparseFinetuner": (
        "step zero_grad state_dict load_state_dict add_param_group scoring select scores parameters summary verify "
        "memory ema_model save_delta release"
    ),
    "Selection": "save load counts",
    "MultiGenerator": "sample best probabilities",
}
OTHERS = {"FrozenNeuronsChanged", "LazyPenalty", "Selection", "layers", "lazy_adam", "load_mined", "metrics", "models"}


def found(name: str):
    value = mf
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_names():
    """A new public name belongs here as well as into __all__."""
    assert {name for name in PROMISED if "." not in name} | OTHERS == set(mf.__all__)
    for owner, names in METHODS.items():
        assert not [name for name in names.split() if not hasattr(found(owner), name)]


@pytest.mark.parametrize("name", PROMISED)
def test_arguments(name):
    present = list(inspect.signature(found(name)).parameters.values())
    promised = PROMISED[name]
    assert [p.name for p in present[: len(promised)]] == list(promised)
    for parameter, default in zip(present, promised.values(), strict=False):
        if default is FOLLOWS_MEASUREMENTS:
            assert parameter.default is not REQUIRED, parameter.name
        else:
            assert parameter.default == default, parameter.name
    behind = [p for p in present[len(promised) :] if p.kind is not p.VAR_KEYWORD]
    assert not [p.name for p in behind if p.default is REQUIRED], "an argument that was added must be optional"


@pytest.mark.parametrize("name", sorted(set(mf.__all__) - {"FrozenNeuronsChanged", "layers", "metrics", "models"}))
def test_annotated(name):
    signature = inspect.signature(getattr(mf, name))
    assert not [p.name for p in signature.parameters.values() if p.annotation is REQUIRED]
    if not inspect.isclass(getattr(mf, name)):
        assert signature.return_annotation is not REQUIRED


def test_an_op_keeps_the_signature_of_its_reference():
    op = importlib.import_module("minegan_fast.ops.bias_act").bias_act_forward
    assert isinstance(op, Op)
    assert inspect.signature(op) == inspect.signature(op.reference)
    assert list(inspect.signature(op).parameters) == ["x", "b", "y", "dim", "slope", "gain"]
