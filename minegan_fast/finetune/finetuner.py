"""`SparseFinetuner`: an optimizer that finds the neurons that matter for a target, and trains only them."""

import copy
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .._torch import PastSubclasses, UnscalingOptimizer, fill_with_zeros, own_grad
from ..collectives import active, average_gradients
from . import distributed, report, saving
from .arguments import check_arguments, check_options, check_scoring, refuse_rivals
from .delta import save_delta
from .evidence import WITHOUT_EVIDENCE, Evidence, check_dense
from .neurons import Member, filter_layers, find_layers, split_affine, split_groups
from .rows import ddp
from .rows.freezing import Held, check_parameters
from .rows.link import Link
from .rows.parameters import HeldWeight
from .samples.buffers import BufferCopy
from .samples.passes import collect
from .selection import Selection, choose, selection_by_hand
from .updates import Updates, ema_model

_living: "weakref.WeakSet[SparseFinetuner]" = weakref.WeakSet()


class SparseFinetuner(UnscalingOptimizer):
    """Trains the fraction `density` of a network's neurons and leaves all other parameters as they are, to the bit.

    A neuron is an output unit of a layer (see neurons.py). As a drop-in for `Adam(model.parameters(), lr)`, the first
    `score_steps` calls of `step()` move nothing: they score the neurons by the gradients that they are given, and the
    last of them selects. Or score by hand, `with ft.scoring(): loss.backward()` once per sample, then `select()`.

    Before the selection `param_groups` hold the dense weights, afterwards in the same lists the compact leaf
    parameters [k, ...] of the trained rows. What is excluded, was not trainable or is not selected is frozen from the
    selection on; parameters of other modules, or excluded ones, train densely once `add_param_group` has them.

    Rows of half-precision weights are float32 leaves, whose rounding the weights hold; the state dict keeps them, and
    they stay float32 through `model.half()` and `model.float()`. A CUDA graph can hold forward, backward and `step()`:
    give lr as a tensor on the GPU, take a step before the capture and keep the gradients' memory.

    A script that resumes has to save `state_dict()` beside the model's and to load both. The model's own state dict
    names no neurons: where it alone comes back, the first `score_steps` steps score and select anew, and other neurons
    may train than before. Weights that were adapted halfway look like those of a source, so every selection that
    `step()` makes says this in one line of the log.

    Args:
        model: any nn.Module, or a list of several; a wrapper of DataParallel, DDP or torch.compile is looked through.
        lr, betas, eps, weight_decay, momentum: of the optimizer; "adam" | "adamw" | "sgd", equal to torch.optim's.
        density: fraction that trains, 0 < density <= 1, of the neurons or the parameters as `budget` says.
        criterion: "fisher" | "gradient" | "saliency" | "movement" | "agreement" | "contrast" | "magnitude" | "random";
            equations in evidence.py. "contrast" also needs `with ft.scoring(of="source")`, in drop-in use before the
            first step.
        scope: "global": one ranking over all layers | "layer": the same fraction of every layer | "normalised": one
            ranking of the scores in units of their layer's mean.
        policy: "train_top" | "freeze_top": the lowest-scored fraction trains.
        include, exclude: fnmatch patterns on names of modules; one that matches a module holds for what is inside.
        score_steps: steps that score in drop-in use; a step without any gradient does not count.
        ema_decay: e += (1 - ema_decay) (w - e) after every step, for the trained neurons and added parameters.
        seed: of criterion "random".
        process_group: where given, `step()` averages the gradients over it, which a model under DDP does not need;
            `select()` always agrees over it, or over the default group where torch.distributed is initialised.
        affine: whether the parameters that are one number per neuron (biases, gains and shifts of norms, strengths of
            noise) train in all neurons; the selection and density then are about the rest, the rows of weights, and
            `select({})` trains the affine ones alone.
        groups: parts of the model with hyperparameters of their own, [{"include": patterns, "lr": ..., "weight_decay":
            ...}, ...]: each is a group of `param_groups`, behind the first one, which has all other layers.

    ValueError/TypeError where an argument is out of range or no neuron is left to train.
    """

    writes_through = True

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.0, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        optimizer: str = "adam",
        density: float = 0.05,
        budget: str = "neurons",
        criterion: str = "fisher",
        scope: str = "global",
        policy: str = "train_top",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        score_steps: int = 16,
        ema_decay: float | None = None,
        seed: int = 0,
        process_group: torch.distributed.ProcessGroup | None = None,
        affine: bool = False,
        groups: Iterable[Mapping] | None = None,
    ):
        check_arguments(
            optimizer, budget, criterion, scope, policy, lr, betas, eps, weight_decay, momentum, density, score_steps,
            ema_decay, affine,
        )  # fmt: skip
        if isinstance(model, list | tuple) and model and all(isinstance(m, nn.Module) for m in model):
            model = nn.ModuleList(model)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be an nn.Module, or a list of them (or an nn.ModuleList), got {type(model).__name__}; "
                "pass the models, not their parameters"
            )
        self.model = distributed.unwrap(model)
        check_parameters(self.model)
        self.layers = filter_layers(find_layers(self.model), include, exclude)
        if affine:
            self.layers = split_affine(self.layers)
        self.held = Held(self.model, self.layers)
        self.optimizer, self.density, self.budget, self.scope, self.policy = optimizer, density, budget, scope, policy
        self.score_steps, self.ema_decay, self.process_group = score_steps, ema_decay, process_group
        self.evidence = Evidence(criterion, self.layers, seed)
        self.evidence_used = self._scoring = self._released = self._unchecked = False
        refuse_rivals(self.held.trainable, lambda: [ft.held.trainable for ft in _living if not ft._released])
        parts = split_groups(self.layers, groups or [])
        self._own = len(parts)
        self._group = {m.name: i for i, (part, _) in enumerate(parts) for layer in part for m in layer.members}
        self.updates = Updates(optimizer, ema_decay)
        # drop-in "movement" gives the buffers of now back, not those after the first forward
        self.buffers = BufferCopy(self.model) if criterion == "movement" else None
        # As torch.optim has them: schedulers ask which of betas and momentum there is.
        own = {"momentum": momentum} if optimizer == "sgd" else {"betas": betas, "eps": eps}
        defaults = {"lr": lr, "weight_decay": weight_decay, **own}
        for _, options in parts:
            check_options(options, defaults, optimizer)
        dense = [[m.parameter for layer in part for m in layer.members] for part, _ in parts]
        super().__init__([{"params": p, **o} for p, (_, o) in zip(dense, parts, strict=True)], defaults)
        if process_group is not None or isinstance(lr, Tensor):
            # The skip at inf is then one decision of all ranks, and no question to the host where a graph captures it.
            # Otherwise GradScaler skips the step, as libraries expect that clip in between or count the skipped steps.
            self.unscale_in_step()
        _living.add(self)  # at the end: what could not be built is nobody's rival

    @property
    def criterion(self) -> str:
        return self.evidence.criterion

    @property
    def selection(self) -> Selection | None:
        """What trains, None while nothing is selected."""
        return self.held.selection

    @contextmanager
    def scoring(self, reduction: str = "mean", samples: int | None = None, of: str = "target"):
        """Every backward() inside is evidence; no weight moves and no gradient stays.

        For "fisher", "agreement" and "contrast" the pieces of evidence are samples: a backward() of a batch's loss
        counts as one of each sample's own, without a loop over them. Where a parameter meets the samples in a linear
        layer, an embedding of one label a sample, a convolution, a bias, an affine, or a normalisation's affine this is
        exact, also if it is scaled, normalised or shared before, and as far as the samples do not act on each other
        (batch norm in training mode, minibatch statistics). Anywhere else (an embedding of sequences, attention's and
        recurrent layers' own functions, a gradient of a gradient), and where axis 0 of the layer's input is not the
        batch, the square of the summed gradient stands for the sum of the squares, which is its mean where the samples'
        gradients are independent around zero; a UserWarning names these parameters.

        The other criteria take the gradient that a backward() brings as one piece. For "movement" each is one dense
        step, and leaving the block gives parameters and buffers their old bits back. Evidence of several blocks adds up
        until a selection uses it.

        Args:
            reduction: what the loss does with the samples' losses: "mean" | "sum". Only these three have to know.
            samples: how many are in each loss; None: as many as axis 0 of the layers' inputs has entries. 1 takes the
                gradient of each backward() as one piece, whatever the batch.
            of: whose samples they are: "target" | "source", which "contrast" alone compares; in any order. A selection
                uses up both.
        """
        self._check_usable("scoring()")
        if self._scoring:
            raise RuntimeError("scoring() is already open; leave the outer block first")
        check_scoring(reduction, samples, of, self.criterion)
        if self.evidence_used:
            self.evidence.clear()
            self.evidence_used = False
        self._finish_movement()
        self._scoring = True
        try:
            with collect(self.held, self.evidence.of(of), self.parameters(), self._dense_step, reduction, samples):
                yield self
        finally:
            self._scoring = False

    def scores(self) -> dict[str, Tensor]:
        """{layer: float32 [neurons]} on the CPU, from the evidence so far. RuntimeError where there is none."""
        return {name: score.cpu() for name, score in self.evidence.scores().items()}

    def select(self, selection: Selection | Mapping[str, object] | None = None) -> Selection:
        """Chooses the neurons that train from now on, by the scores, or those of `selection` or {layer: rows}.

        At a later selection kept neurons keep their moments and EMA, new ones start at zero, dropped ones keep their
        trained values and stop. Collective where torch.distributed is initialised: every rank selects the same.

        RuntimeError without evidence, inside scoring(), or where a candidate parameter was replaced; ValueError where
        scores are not finite (the evidence is dropped then); either or TypeError where a given selection does not fit
        the model. The model is unchanged.
        """
        self._check_usable("select()")
        if self._scoring:
            raise RuntimeError("select() inside scoring(): leave the block first, its evidence is complete then")
        self._finish_movement()
        if selection is None:
            several = active(self.process_group)
            if several and not self.evidence_used:
                self.evidence.reduce(self.process_group)
            scores = distributed.agree(self.scores(), self.process_group) if several else self.evidence.scores()
            try:
                selection = choose(scores, self.layers, self.density, self.budget, self.scope, self.policy)
            except ValueError:
                self.evidence.clear()  # what is not finite would stay so, however much is added
                raise
            self.evidence_used = True
        else:
            selection = selection_by_hand(selection, self.layers, self.budget)
            distributed.check_equal(selection, self.process_group)
        self._apply(selection)
        self._unchecked = True
        self.held.record(self._added())
        return selection

    def _added(self) -> set[int]:
        return {id(p) for group in self.added_groups for p in group["params"]}

    @property
    def own_groups(self) -> list[dict]:
        """The groups of the model's candidates, and after a selection of its leaves."""
        return self.param_groups[: self._own]

    @property
    def added_groups(self) -> list[dict]:
        return self.param_groups[self._own :]

    def _apply(self, selection: Selection):
        """Holds the model by `selection`, moves the state, and swaps the entries of the first group in place."""
        leaves = [[] for _ in self.own_groups]
        names = [m.name for layer in self.layers for m in layer.members]
        for name, (before, rows, leaf) in zip(names, self.held.apply(selection, self._added()), strict=True):
            if leaf is not None:
                leaves[self._group[name]].append(leaf)
            if leaf is not before:
                old = self.state.pop(before, None)
                if old and rows is not None and leaf is not None:
                    self.state[leaf] = saving.carry(old, rows, leaf.link.rows, leaf)
        for i, group in enumerate(self.own_groups):
            group["params"][:] = leaves[i]
        self.updates.forget()

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride] - torch has two overloads
        """One step: scores while nothing is selected, trains the selected rows afterwards.

        Parameters of added groups train in either case. A step that `torch.amp.GradScaler` marks by inf does nothing
        and does not count. RuntimeError inside scoring(), and before any parameter has had a gradient.
        """
        self._check_usable("step()")
        if self._scoring:
            raise RuntimeError("step() inside scoring(): gradients are evidence there; leave the block to train")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and self.process_group is not None:
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, group=self.process_group)
        if self.selection is not None:
            self._settle()
        else:
            # the host counts the evidence, so here it must know whether this step is one
            if found_inf is not None and found_inf.item():
                return loss
            self._unscale(scale)
            scale = found_inf = None
        if self.process_group is not None:
            self._unscale(scale)  # before the mean: after an inf, the ranks' scales differ
            scale = None
            average_gradients(self.param_groups, self.process_group)
        if self.selection is None:
            self._score_step()
        elif self._unchecked:
            self._unchecked = not distributed.check_gradients(self.param_groups, self.process_group)
        for i in range(0 if self.selection is not None else self._own, len(self.param_groups)):
            self.updates.step(i, self.param_groups[i], self.state, i < self._own, scale, found_inf)
        if self.selection is None and self.evidence.count >= self.score_steps:
            report.announce(self.select(), self.score_steps)
        return loss

    def _links(self) -> list[Link]:
        return [leaf.link for group in self.own_groups for leaf in group["params"]]

    def _settle(self):
        """Takes the gradients as others have left them; RuntimeError where a weight was replaced or left the model."""
        links = self._links()
        with PastSubclasses():
            if not all(link.in_place() for link in links):
                for link in links:
                    link.reclaim()
            self.held.check_modules(links)
            for link in links:
                if link.gradient.whole is not None or own_grad(link.weight) is not None:
                    link.gradient.settle()
                    link.gradient.end_step()

    @torch.no_grad()
    def _unscale(self, scale: Tensor | None):
        if scale is None:
            return
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(scale.double().reciprocal().float().to(p.grad.device))

    def _score_step(self):
        graded = [(m, m.parameter.grad) for x in self.layers for m in x.members if m.parameter.grad is not None]
        check_dense(graded)
        if not graded and self.criterion not in WITHOUT_EVIDENCE:
            if self.evidence.count == 0 and all(p.grad is None for p in self.parameters()):
                raise RuntimeError(
                    "step() before any evidence: no parameter has a gradient, so there is nothing to score the neurons "
                    "by; call backward() first, and let requires_grad be on for the model's parameters"
                )
            return
        if self.criterion == "movement":
            if not self.evidence.start:
                self.evidence.begin_movement()
                if self.buffers is not None and self.buffers.outdated(self.model):
                    self.buffers = BufferCopy(self.model)
            for member, grad in graded:
                self._dense_step(member, grad, self.state[member.parameter])
        self.evidence.add(graded)
        self.evidence.count += 1

    def _finish_movement(self):
        if self.evidence.start and self.buffers is not None:
            self.evidence.end_movement()
            self.buffers.restore(self.model)

    def _dense_step(self, member: Member, grad: Tensor, state: dict):
        self.updates.dense_step(member, grad, self.param_groups[self._group[member.name]], state)

    def zero_grad(self, set_to_none: bool = True):
        """As torch.optim has it, of leaves and weights alike."""
        if self.selection is None:
            return super().zero_grad(set_to_none)
        if not set_to_none:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            for grad in grads:
                _ = grad.requires_grad_(False) if grad.grad_fn is None else grad.detach_()
            with torch.no_grad():
                return fill_with_zeros(grads) if grads else None
        with PastSubclasses():
            for link in self._links():
                new = link.replacement()
                if new is not None:  # until the step: the graph of a loss may lead to it
                    new.grad = None
                link.gradient.write(None)
        for group in self.added_groups:
            for p in group["params"]:
                p.grad = None

    def add_param_group(self, param_group: dict):
        """Adds plain parameters, a miner's say, that train densely from the first step.

        They may be parameters of the model if they are none of its candidates: excluded, or frozen at construction.
        """
        if len(self.param_groups) >= self._own:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            param_group = {**param_group, "params": params}
            check_options(param_group, self.defaults, self.optimizer)
            plain = [p[1] if isinstance(p, tuple) else p for p in params]
            names = {id(m.parameter): m.name for layer in self.layers for m in layer.members}
            for p in plain:
                if id(p) in names:
                    raise ValueError(f"{names[id(p)]!r} is a candidate of this optimizer; exclude its module to add it")
            if any(p is q for p in plain for q in self.model.parameters()):
                self.held.begin()
            for p in plain:
                self.held.thaw(p)
        super().add_param_group(param_group)
        if self.selection is not None:
            ddp.changed(self.model)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a SparseFinetuner belongs to its model and is neither copied nor pickled; copy the model, build a "
            "SparseFinetuner on the copy and give it state_dict()"
        )

    def state_dict(self) -> dict:
        """Optimizer state, selection, evidence, EMA and hashes: all that a run needs to go on as if never stopped."""
        self._check_usable("state_dict()")
        for weight in [p for p in self.state if isinstance(p, HeldWeight)]:
            if self.state[weight]:
                raise RuntimeError(
                    "the optimizer's state was given an entry of a weight that trains by rows, which no step reads: "
                    "moments are those of the leaves, ft.parameters()"
                )
            del self.state[weight]  # someone only looked
        neurons = saving.describe(self.held, self.evidence, self.buffers)
        neurons |= {"optimizer": self.optimizer, "evidence_used": self.evidence_used}
        return {**super().state_dict(), "neurons": neurons}

    def load_state_dict(self, state_dict: dict):
        """Goes on where the state was saved. A selection in it is adopted where this optimizer has none.

        ValueError where the state is of another selection, another model or another kind of optimizer; nothing is
        changed then. The model's weights are its own state dict's affair, loaded before or after.
        """
        self._check_usable("load_state_dict()")
        selection = saving.check_fits(
            state_dict, self.held, self.budget, self.optimizer, self.criterion, len(self.param_groups)
        )
        if selection is not None and self.selection is None:
            self._apply(selection)
        # torch's own keeps tensors of the given state where they fit: two optimizers would then share their moments
        own = copy.deepcopy({name: state_dict[name] for name in ("state", "param_groups", "neurons")})
        neurons = own.pop("neurons")
        super().load_state_dict(own)
        self.updates.forget()
        saving.adopt(neurons, self.held, self.evidence, self.buffers)
        self.evidence_used = neurons["evidence_used"]

    def parameters(self) -> list[nn.Parameter]:
        """What trains: the compact leaves [k, ...] (before a selection the dense weights) and added parameters."""
        return [p for group in self.param_groups for p in group["params"]]

    def summary(self) -> str:
        """A table: layer, neurons trained/all, parameters trained/all, how its gradient was computed until now."""
        self._check_usable("summary()")
        return report.summary(self.held, self.evidence, self.added_groups)

    def verify(self):
        """Raises FrozenNeuronsChanged if a frozen value of a parameter differs from its bits at the selection.

        By 64-bit hashes of the rows. Buffers, such as batch-norm statistics, are no parameters. RuntimeError before a
        selection.
        """
        self._check_usable("verify()")
        self.held.verify()

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of dense training and of this: {"dense" | "sparse": {"weights", "gradients", "optimizer_state", "ema",
        "undo"}}. Sparse weights are the dense ones and the leaves; undo is what verify() and "movement" keep."""
        ema = self.ema_decay is not None
        return report.memory(self.held, self.evidence, self.optimizer, self.own_groups, self.added_groups, ema)

    def ema_model(self, module: nn.Module | None = None) -> nn.Module:
        """A plain deep copy with the EMA of the trained neurons and added parameters, and the live model's buffers.

        module: what to copy, the finetuned model by default; a module around it, or one of added parameters alone, a
        miner say, is possible too. RuntimeError without ema_decay.
        """
        if self.ema_decay is None:
            raise RuntimeError("there is no EMA; build the optimizer with ema_decay, 0.998 say")
        return ema_model(self.state, self.model if module is None else module)

    def save_delta(self, path: str | os.PathLike, ema: bool = False, part: tuple[str, nn.Module] | None = None):
        """Writes every row that was trained, or its average, as safetensors, atomically; see `load_delta`.

        part: the name of a module of the model, and that module as it was before anything trained. The file then is a
            delta of this module, for whoever has it alone; where nothing of it was trained, it changes nothing.
        """
        save_delta(self.held, self._added(), self.ema_model() if ema else self.model, path, part)

    def release(self):
        """Gives the plain model back: trained values in place, every parameter trainable as before."""
        if not self._released:
            self._finish_movement()
            self.held.release()
            self._released = True

    def _check_usable(self, what: str):
        if self._released:
            raise RuntimeError(f"{what} after release(): the model is plain again; build a new SparseFinetuner")
