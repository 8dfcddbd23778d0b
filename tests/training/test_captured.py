"""Steps as CUDA graphs: the bookkeeping with a stand-in for the graphs, and, on a GPU, the graphs themselves."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from feature_networks import GreyFeatures
from graphs_on_cpu import GraphsOnCPU
from torch import nn

import minegan_fast as mf
from minegan_fast.training import TransferConfig, prepared
from minegan_fast.training.captured import WARM_UP, CapturedSteps, CaptureError, CudaGraphs, obstacle
from minegan_fast.training.images import to_float
from minegan_fast.training.kernel_loss import KernelLoss
from minegan_fast.training.loss_features import LossFeatures
from minegan_fast.training.machine import Machine
from minegan_fast.training.processes import Processes
from minegan_fast.training.trainer import Trainer

MINING, FINETUNING = 10, 12
# Of each kind of step, with R1 and path length and without, there are enough to be captured and replayed.
SETTINGS = {
    "batch": 4, "score_samples": 4, "augment": "color,translation", "view_augment": "jitter", "r1_every": 2,
    "path_length_every": 2, "mining_steps": MINING, "finetune_steps": FINETUNING, "lr": 2**-9, "density": 0.3,
}  # fmt: skip
RECIPES = {
    "nonsaturating": {},
    "wgan": {"loss": "wgan"},
    "both losses": {"mmd_weight": 0.5, "finetune_loss": "hinge"},
    "sparse critic": {"train_critic": "sparse"},
    "the critic begins alone": {"critic_warmup": 7},
    "elastic weights": {"method": "ewc", "mining_steps": 0},
    "no miner, gains and shifts": {"method": "scale_shift", "mining_steps": 0},
    "mined w and constant": {"mine": "w", "mine_constant": True, "prior": "moments"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "kernel distance": {"loss": "mmd"},
    "kernel distance, then a critic": {"mining_loss": "mmd", "finetune_loss": "nonsaturating"},
}


def make(tiny, graphs, device="cpu", **settings):
    config = TransferConfig(**SETTINGS | settings)
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    networks = [copy.deepcopy(tiny[name]).to(device) for name in ("generator", "discriminator")]
    kernel = None
    if config.kernel:
        kernel = KernelLoss(LossFeatures(GreyFeatures().to(device), probe=to_float(images[:2]).to(device)), images)
    return Trainer(config, *networks, images, device, kernel=kernel, graphs=graphs)


def train(trainer, first: int = 0) -> list[torch.Tensor]:
    """Both stages from step `first` on, with a second selection near the end; the losses."""
    losses, config = [], trainer.config
    for number in range(first, config.total_steps):
        if number in (config.mining_steps, config.total_steps - 2):
            trainer.select()
        losses += [value.clone() for value in trainer.step(number).values()]
    return losses


def tensors(state) -> list[torch.Tensor]:
    """All tensors in a state dict."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        # The learning rate may be a number or a tensor.
        state = [value for name, value in state.items() if name != "lr"]
    return [t for part in state for t in tensors(part)] if isinstance(state, list | tuple) else []


def assert_equal(one: Trainer, other: Trainer):
    pairs = list(zip(tensors(one.state_dict()), tensors(other.state_dict()), strict=True))
    assert len(pairs) > 50
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_replays_take_all_that_changes_from_their_inputs(tiny, settings):
    """To the bit: the captured function of an earlier step does what the function of this step would."""
    graphs = GraphsOnCPU()
    plain, captured = make(tiny, None, **settings), make(tiny, graphs, **settings)
    assert all(map(torch.equal, train(plain), train(captured)))
    assert_equal(plain, captured)
    assert not captured.why_eager
    assert graphs.calls.count("replay") > graphs.calls.count("capture") > 0


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_what_a_step_writes_stays_where_it_is(tiny, settings):
    trainer = make(tiny, GraphsOnCPU(), **settings)

    def written() -> list[torch.Tensor]:
        found = [trainer.finite, trainer.path_length_mean, *trainer.average.mining_parameters()]
        for optimizer in trainer._rates():
            for group in optimizer.param_groups:
                found += [group["lr"], *group["params"], *(p.grad for p in group["params"] if p.grad is not None)]
                found += [t for p in group["params"] for t in optimizer.state[p].values()]
        return found

    if not trainer.config.mining_steps:
        trainer.select()
    first = trainer.alone.stop + 2
    for number in range(first):
        trainer.step(number)
    kept = written()  # while this holds them, no other tensor gets their memory
    for number in range(first, first + 2 * WARM_UP):
        trainer.step(number)
    assert len(kept) > 10
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in written()]


def test_every_kind_of_step_has_its_graph(tiny):
    graphs = GraphsOnCPU()
    trainer = make(tiny, graphs, critic_warmup=8, r1_every=2, path_length_every=3)
    for number in range(8 + 4 * WARM_UP):
        trainer.step(number)
    assert graphs.calls.count("capture") == 4  # R1 or not, the critic alone or not
    trainer.select()
    assert graphs.calls[-1] == "forget"
    graphs.calls.clear()
    for number in range(20, 20 + 6 * (WARM_UP + 1)):
        trainer.step(number)
    assert graphs.calls.count("capture") == 4  # R1 or not, path length or not
    assert graphs.calls.count("warm up") == 4 * WARM_UP


@pytest.mark.parametrize("settings", [{}, {"loss": "mmd"}], ids=["nonsaturating", "kernel distance"])
@pytest.mark.parametrize("resumed", [True, False], ids=["to graphs", "from graphs"])
def test_a_run_goes_on_with_graphs_or_without(tiny, settings, resumed):
    """Learning rates and moments come to where the optimizers of the second part want them."""
    plain = make(tiny, None, **settings)
    train(plain)
    one, two = (make(tiny, GraphsOnCPU() if graphs else None, **settings) for graphs in (not resumed, resumed))
    for number in range(MINING + 3):
        if number == MINING:
            one.select()
        one.step(number)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    train(two, first=MINING + 3)
    assert_equal(plain, two)


def test_a_run_that_goes_on_forgets_its_graphs(tiny):
    """Optimizers have other moments then than those that the graphs read."""
    graphs = GraphsOnCPU()
    plain, trainer = make(tiny, None), make(tiny, graphs)
    for number in range(8):
        trainer.step(number)
        plain.step(number)
    trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert graphs.calls[-1] == "forget"
    for number in range(8, 12):
        trainer.step(number)
        plain.step(number)
    assert_equal(plain, trainer)


class Broken(GraphsOnCPU):
    """Its second capture fails. As on a GPU, nothing was computed until then."""

    def __init__(self):
        super().__init__()
        self.capturing, self.trainer = False, None

    def capture(self, function):
        if "capture" not in self.calls:
            return super().capture(function)
        memory = [*tensors(self.trainer.state_dict()), self.trainer.finite]
        before = [t.clone() for t in memory]
        self.capturing = True
        try:
            function()
        finally:
            self.capturing = False
            with torch.no_grad():
                for t, old in zip(memory, before, strict=True):
                    t.copy_(old)
        return pytest.fail("the capture did not fail")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("call", [1, 2, 3], ids=["in the critic's step", "in the generator's", "in path length"])
def test_after_a_capture_that_fails_the_run_goes_on_as_without(tiny, monkeypatch, precision, call):
    settings = {"precision": precision, "mining_steps": 0}
    graphs = Broken()
    plain, trainer = make(tiny, None, **settings), make(tiny, graphs, **settings)
    graphs.trainer, forward, calls = trainer, type(trainer.generator).forward, []

    def reads(self, *args, **keywords):
        if graphs.capturing:
            calls.append(1)
            if len(calls) == call:
                raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        return forward(self, *args, **keywords)

    monkeypatch.setattr(type(trainer.generator), "forward", reads)
    numbers = (
        1,
        2,
        1,
        2,
        1,
        2,
        1,
        2,
        3,
        4,
        5,
        6,
    )  # steps without lazy penalties are captured first, those with them fail
    for number in numbers[:-4]:
        if not trainer.finetuner:
            plain.select(), trainer.select()
        plain.step(number), trainer.step(number)
    assert len(calls) == call
    assert trainer.why_eager == "RuntimeError: operation not permitted when stream is capturing"
    graphs.calls.clear()
    for number in numbers[-4:]:
        assert all(map(torch.equal, plain.step(number).values(), trainer.step(number).values()))
    assert_equal(plain, trainer)
    assert trainer.finite
    assert not graphs.calls


# The bookkeeping.


def counted(x, seen):
    seen.append(float(x))
    return {"twice": 2 * x}


def test_a_kind_is_captured_after_its_warm_up_and_replayed_with_new_inputs():
    graphs, seen = GraphsOnCPU(), []
    steps = CapturedSteps(graphs)
    found = [steps.run("a", lambda x: counted(x, seen), [torch.tensor(float(i))])["twice"] for i in range(6)]
    assert [float(x) for x in found] == [0, 2, 4, 6, 8, 10], "a value was overwritten by a later step"
    assert graphs.calls == ["warm up"] * WARM_UP + ["capture", "replay", "replay", "replay"]
    assert seen == [0, 1, 2, 3, 4, 5]


def test_kinds_are_captured_apart_and_forgotten_together():
    graphs = GraphsOnCPU()
    steps = CapturedSteps(graphs)
    for i in range(WARM_UP):
        for kind in "ab":
            steps.run(kind, lambda x: {"x": x + 1}, [torch.tensor(float(i))])
    assert graphs.calls == 2 * WARM_UP * ["warm up"]
    assert steps.run("a", lambda x: {"x": x + 1}, [torch.tensor(5.0)])["x"] == 6
    assert steps.run("b", lambda x: {"x": x - 1}, [torch.tensor(5.0)])["x"] == 4
    graphs.calls.clear()
    steps.forget()
    steps.run("a", lambda x: {"x": x + 1}, [torch.tensor(5.0)])
    assert graphs.calls == ["forget", "warm up"]


def test_without_graphs_every_step_runs_as_it_is():
    seen, steps = [], CapturedSteps()
    for i in range(2 * WARM_UP):
        steps.run("a", lambda x: counted(x, seen), [torch.tensor(float(i))])
    steps.forget()
    assert len(seen) == 2 * WARM_UP


def test_a_step_that_waits_is_not_captured():
    seen, steps = [], CapturedSteps(GraphsOnCPU(waits="module.py:3"))
    for i in range(WARM_UP):
        steps.run("a", lambda x: counted(x, seen), [torch.tensor(float(i))])
    with pytest.raises(CaptureError, match=r"waits for the GPU \(module.py:3\)"):
        steps.run("a", lambda x: counted(x, seen), [torch.tensor(9.0)])
    assert seen == [0, 1, 2]


def test_the_reason_is_the_first_line_of_what_the_capture_raised():
    class Refuses(GraphsOnCPU):
        def capture(self, function):
            raise ValueError("no graph today\nbut a long explanation")

    seen, steps = [], CapturedSteps(Refuses())
    for i in range(WARM_UP):
        steps.run("a", lambda x: counted(x, seen), [torch.tensor(float(i))])
    with pytest.raises(CaptureError, match=r"^ValueError: no graph today$"):
        steps.run("a", lambda x: counted(x, seen), [torch.tensor(9.0)])
    assert seen == [0, 1, 2]


class Cuda:
    """What CudaGraphs calls of torch.cuda, without a GPU. The end of a capture raises where the capture has failed."""

    def __init__(self, monkeypatch):
        self.calls, self.default_generators, self.current = [], [self], "main"
        for name in (
            "Stream", "stream", "current_stream", "graph_pool_handle", "CUDAGraph", "graph", "default_generators",
            "get_sync_debug_mode", "set_sync_debug_mode",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        self.device = torch.device("cuda", 0)

    def Stream(self, device):  # noqa: N802
        return self

    def current_stream(self, device):
        return self

    def wait_stream(self, other):
        self.calls.append("wait")

    @contextmanager
    def stream(self, stream):
        self.current = "side"
        yield
        self.current = "main"

    def graph_pool_handle(self):
        return len(self.calls)

    def CUDAGraph(self):  # noqa: N802
        return self

    def replay(self):
        self.calls.append("replay")

    @contextmanager
    def graph(self, graph, pool, stream):
        self.calls.append("begin")
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.calls.append("end")

    def clone_state(self):
        return "a new state"

    def graphsafe_set_state(self, state):
        self.calls.append(state)

    def get_sync_debug_mode(self):
        return 0

    def set_sync_debug_mode(self, mode):
        self.calls.append(mode)
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)


def test_graphs_are_captured_on_a_stream_of_their_own(monkeypatch):
    cuda = Cuda(monkeypatch)
    graphs = CudaGraphs(cuda.device)
    values, replay = graphs.capture(lambda: {"stream": cuda.current})
    assert values == {"stream": "side"}
    assert cuda.calls == ["wait", "begin", "end", "wait"]
    replay()
    assert cuda.calls[-1] == "replay"


def test_a_capture_that_fails_raises_its_cause_and_leaves_the_random_numbers_usable(monkeypatch):
    cuda = Cuda(monkeypatch)

    def fails():
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        CudaGraphs(cuda.device).capture(fails)
    assert cuda.calls == ["wait", "begin", "wait", "a new state"]


def test_a_warm_up_notes_where_it_waits_and_keeps_other_warnings(monkeypatch):
    cuda = Cuda(monkeypatch)

    def waits():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        return {"stream": cuda.current}

    with pytest.warns(UserWarning, match="another") as warned:
        values, found = CudaGraphs(cuda.device).warm_up(waits)
    assert len(warned) == 1
    assert values == {"stream": "side"}
    assert found == f"test_captured.py:{waits.__code__.co_firstlineno + 2}"
    assert cuda.calls == ["wait", "warn", 0, "wait"]
    assert CudaGraphs(cuda.device).warm_up(dict) == ({}, "")


def test_adam_is_told_of_a_capture_and_of_its_end(monkeypatch):
    parameter, told = nn.Parameter(torch.ones(2)), []
    parameter.grad = torch.ones(2)
    adam = torch.optim.Adam([parameter], fused=True)
    adam.register_step_pre_hook(lambda *_: told.append(adam.param_groups[0]["capturable"]))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    machine = Machine(TransferConfig(), torch.device("cuda"), Processes(), scaler, fixed=True)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        machine.update(torch.zeros(()), adam)
        assert not adam.param_groups[0]["capturable"]
    assert told == [False, True]


def test_what_cannot_be_captured_says_why():
    cpu, cuda, alone = torch.device("cpu"), torch.device("cuda"), Processes()
    config, kernel = TransferConfig(), TransferConfig(loss="mmd", batch=8)
    assert obstacle(config, cuda, alone) == obstacle(kernel, cuda, alone) == ""
    assert "on cpu" in obstacle(config, cpu, alone)
    assert "2 processes" in obstacle(config, cuda, Processes(0, 2))
    assert "part 4" in obstacle(TransferConfig(loss="mmd", batch=8, part=4), cuda, alone)
    assert obstacle(TransferConfig(loss="mmd", batch=8, part=8), cuda, alone) == ""


# Whole runs.


@pytest.fixture
def run(run_settings, tmp_path, capsys):
    """Runs in the folder of this name, and gives the files of its last state and what it said."""

    def call(name, **settings):
        mf.transfer(**run_settings | {"progress": True, "snapshot_every": 99, "out": tmp_path / name} | settings)
        last = tmp_path / name / "last"
        return {path.name: path.read_bytes() for path in last.iterdir()}, capsys.readouterr().err

    return call


def test_on_a_cpu_the_run_says_why_and_computes_the_same(run):
    plain, said = run("plain")
    assert "CUDA graphs" not in said
    files, said = run("captured", cuda_graphs=True)
    assert said.count("no CUDA graphs: the run is on cpu") == 1
    assert files == plain


def test_a_run_whose_steps_wait_says_so_once_and_computes_the_same(run, monkeypatch):
    monkeypatch.setattr(prepared, "obstacle", lambda *_: "")
    monkeypatch.setattr(prepared, "CudaGraphs", lambda _: GraphsOnCPU(waits="a.py:1"))
    settings = {"lr": 2**-9, "mining_steps": 5, "finetune_steps": 0, "r1_every": 1}
    plain, _ = run("plain", **settings)
    files, said = run("captured", cuda_graphs=True, **settings)
    assert said.count("no CUDA graphs from step 3 on: a step waits for the GPU (a.py:1)") == 1
    assert files == plain


def test_a_run_may_be_resumed_with_graphs_or_without():
    assert TransferConfig(cuda_graphs=True).differences(TransferConfig()) == []


# On a GPU.


def assert_close(plain: Trainer, captured: Trainer, start: Trainer):
    """A hundredth of what the run has moved. A rounding may turn the step of a gradient near zero round, but a step of
    the twenty that does something else is more."""
    for part in ("generator", "mined", "average"):
        a, b, c = (tensors(trainer.state_dict()[part]) for trainer in (plain, captured, start))
        distance = sum(float((x - y).abs().sum()) for x, y in zip(a, b, strict=True))
        assert distance <= 0.01 * sum(float((x - y).abs().sum()) for x, y in zip(a, c, strict=True)), part


@pytest.mark.gpu
@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_captured_steps_are_the_eager_ones_to_rounding(tiny, settings):
    device = torch.device("cuda", torch.cuda.current_device())
    settings = {"lr": 2**-12, **settings}
    start, plain = (make(tiny, None, device, **settings) for _ in range(2))
    captured = make(tiny, CudaGraphs(device), device, **settings)
    torch.testing.assert_close(train(captured), train(plain), rtol=1e-2, atol=1e-3)
    assert not captured.why_eager
    assert_close(plain, captured, start)
    captured.finetuner.verify()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"loss": "mmd"}], ids=["nonsaturating", "kernel distance"])
def test_a_run_on_a_gpu_goes_on_with_graphs(tiny, settings):
    device = torch.device("cuda", torch.cuda.current_device())
    settings = {"lr": 2**-12, **settings}
    start, plain, two = (make(tiny, None, device, **settings) for _ in range(3))
    train(plain)
    one, two = (make(tiny, CudaGraphs(device), device, **settings) for _ in range(2))
    for number in range(MINING):
        one.step(number)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    train(two, first=MINING)
    assert not two.why_eager
    assert_close(plain, two, start)


@pytest.mark.gpu
def test_a_replayed_step_neither_waits_nor_copies(tiny):
    """The host asks for nothing in twenty steps, and torch would raise where it did."""
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = make(tiny, CudaGraphs(device), device, r1_every=2, path_length_every=2)
    trainer.select()
    for number in range(2 * (WARM_UP + 1)):
        trainer.step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(20):
            trainer.step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not trainer.why_eager
    assert trainer.finite


class Reads(nn.Module):
    """A generator that asks for a number of its own."""

    def __init__(self, generator, how):
        super().__init__()
        self.generator, self.how = generator, how
        self.latent_dim, self.resolution, self.image_channels = generator.latent_dim, 8, 1

    def forward(self, z):
        images = self.generator(z)
        if self.how == "always":
            images.sum().item()
        elif torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return images


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["always", "in the capture"])
def test_a_module_that_cannot_be_captured_trains_as_without(tiny, how):
    """The generator of random numbers serves on, too."""
    device, trainers = torch.device("cuda", torch.cuda.current_device()), []
    for graphs in (None, None, CudaGraphs(device)):
        networks = tiny | {"generator": Reads(tiny["generator"], how)}
        trainers.append(make(networks, graphs, device, lr=2**-12, mining_steps=8))
    start, plain, captured = trainers
    for number in range(12):
        plain.step(number), captured.step(number)
    assert ("waits for the GPU" if how == "always" else "Error") in captured.why_eager
    assert torch.rand(3, device=device).isfinite().all()
    a, b, c = ([*t.mined.miner.parameters()] for t in (plain, captured, start))
    distance = sum(float((x - y).abs().sum()) for x, y in zip(a, b, strict=True))
    assert distance <= 0.01 * sum(float((x - y).abs().sum()) for x, y in zip(a, c, strict=True))
