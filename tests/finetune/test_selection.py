"""From scores to rows: budgets, scopes, policies, ties, files, selections by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_networks import build
from torch import nn

from minegan_fast.finetune import Selection, SparseFinetuner
from minegan_fast.finetune.neurons import Member, NeuronGroup
from minegan_fast.finetune.selection import choose, selection_by_hand


def layers(**shapes):
    return [NeuronGroup(n, [Member(n, nn.Parameter(torch.zeros(shape)), 0)]) for n, shape in shapes.items()]


LAYERS = layers(b=(3, 10), a=(4, 2), c=(1,))
SCORES = {"a": torch.tensor([5.0, 1, 5, 0]), "b": torch.tensor([5.0, 7, 2]), "c": torch.tensor([3.0])}


def ranked(density, budget="neurons", scope="global", policy="train_top", scores=SCORES):
    selection = choose(scores, LAYERS, density, budget, scope, policy)
    return {n: r.tolist() for n, r in selection.rows.items()}


def test_global_ranking_breaks_ties_by_name_and_row():
    assert ranked(1 / 8) == {"b": [1]}
    assert ranked(2 / 8) == {"a": [0], "b": [1]}
    assert ranked(3 / 8) == {"a": [0, 2], "b": [1]}
    assert ranked(4 / 8) == {"a": [0, 2], "b": [0, 1]}
    assert ranked(5 / 8) == {"a": [0, 2], "b": [0, 1], "c": [0]}
    assert ranked(1e-9) == {"b": [1]}
    assert ranked(1.0) == {"a": [0, 1, 2, 3], "b": [0, 1, 2], "c": [0]}


def test_freeze_top_trains_the_lowest():
    assert ranked(3 / 8, policy="freeze_top") == {"a": [1, 3], "b": [2]}
    assert ranked(5 / 8, policy="freeze_top") == {"a": [0, 1, 3], "b": [2], "c": [0]}


def test_layer_scope_trains_the_same_fraction_of_each():
    assert ranked(0.5, scope="layer") == {"a": [0, 2], "b": [0, 1], "c": [0]}
    assert ranked(0.01, scope="layer", budget="parameters") == {"a": [0], "b": [1], "c": [0]}
    assert ranked(0.34, scope="layer", policy="freeze_top") == {"a": [3], "b": [2], "c": [0]}


def test_normalised_scores_are_compared_in_units_of_their_layers_mean():
    # a 20/11, 4/11, 20/11, 0; b 15/14, 21/14, 6/14; c 1
    assert ranked(3 / 8, scope="normalised") == {"a": [0, 2], "b": [1]}
    assert ranked(5 / 8, scope="normalised") == {"a": [0, 2], "b": [0, 1], "c": [0]}
    for scale in (1e-6, 1e6):
        scaled = {"a": SCORES["a"] * scale, "b": SCORES["b"], "c": SCORES["c"] / scale}
        for k in range(1, 9):
            assert ranked(k / 8, scope="normalised", scores=scaled) == ranked(k / 8, scope="normalised")
    assert ranked(10 / 39, "parameters", "normalised") == {"a": [0, 2], "b": [1]}
    assert ranked(2 / 8, scope="normalised", policy="freeze_top") == {"a": [1, 3]}
    none = SCORES | {"b": torch.zeros(3)}  # no gradient has reached it
    assert ranked(5 / 8, scope="normalised", scores=none) == {"a": [0, 1, 2, 3], "c": [0]}


def test_the_control_has_as_many_neurons_in_every_layer():
    selection = SparseFinetuner(build("convolutions"), criterion="random", budget="parameters", density=0.4).select()
    controls = [selection.shuffled(seed) for seed in (0, 0, 1)]
    for control in controls:
        assert control.counts() == selection.counts()
        assert control.density == selection.density
        assert all(r.tolist() == sorted(set(r.tolist())) for r in control.rows.values())
        assert SparseFinetuner(build("convolutions")).select(control) == control
    assert controls[0] == controls[1] != controls[2]
    assert selection not in controls
    drawn = torch.cat([Selection({"a": torch.arange(3)}, {"a": (10, 1)}).shuffled(i).rows["a"] for i in range(1000)])
    assert (drawn.bincount() / 1000 - 0.3).abs().max() < 0.06  # four deviations of a fair draw


def test_parameter_budget_is_reached_and_exceeded_by_less_than_a_neuron():
    # in ranking order the neurons cost 10, 2, 2, 10, 1, 10, 2, 2 of 39
    assert ranked(10 / 39, "parameters") == {"b": [1]}
    assert ranked(10.1 / 39, "parameters") == {"a": [0], "b": [1]}
    assert ranked(14 / 39, "parameters") == {"a": [0, 2], "b": [1]}
    assert ranked(15 / 39, "parameters") == {"a": [0, 2], "b": [0, 1]}
    assert ranked(1.0, "parameters") == ranked(1.0)


@given(st.data())
def test_any_budget(data):
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=5))
    some = layers(**{f"l{i}": size for i, size in enumerate(sizes)})
    scores = {
        layer.name: torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=layer.neurons, max_size=layer.neurons)))
        for layer in some
    }
    density = data.draw(st.floats(1e-3, 1))
    for policy in ("train_top", "freeze_top"):
        by_neurons = choose(scores, some, density, "neurons", "global", policy)
        count = sum(layer.neurons for layer in some)
        assert sum(len(r) for r in by_neurons.rows.values()) == max(1, round(density * count))
        by_parameters = choose(scores, some, density, "parameters", "global", policy)
        cost = {layer.name: layer.cost for layer in some}
        total = sum(layer.neurons * layer.cost for layer in some)
        taken = sum(len(r) * cost[n] for n, r in by_parameters.rows.items())
        assert by_parameters.density == taken / total
        assert taken >= density * total * (1 - 1e-9)
        sign = 1 if policy == "train_top" else -1
        inside = [(sign * scores[n][i].item(), n, i) for n, r in by_parameters.rows.items() for i in r.tolist()]
        last = min(inside, key=lambda s: (s[0], [-ord(c) for c in s[1]], -s[2]))
        assert taken - cost[last[1]] < density * total
        outside = [
            sign * s[i].item()
            for n, s in scores.items()
            for i in range(len(s))
            if (sign * s[i].item(), n, i) not in inside
        ]
        assert not outside or max(outside) <= last[0]


def test_random_control_matches_a_parameter_budget():
    net = build("convolutions")
    ft = SparseFinetuner(net, criterion="random", budget="parameters", density=0.3)
    selection = ft.select()
    trained = sum(p.numel() for p in ft.parameters())
    total = sum(p.numel() for p in build("convolutions").parameters())
    assert selection.density == trained / total
    assert 0 <= trained / total - 0.3 < max(layer.cost for layer in ft.layers) / total


def test_selection_properties_and_file(tmp_path):
    selection = choose(SCORES, LAYERS, 0.5, "parameters", "global", "train_top")
    assert selection.counts() == {"b": (2, 3), "a": (2, 4), "c": (0, 1)}
    assert selection.density == 24 / 39
    assert all(r.dtype == torch.int64 for r in selection.rows.values())
    selection.save(tmp_path / "s.safetensors")
    loaded = Selection.load(tmp_path / "s.safetensors")
    assert loaded == selection
    assert loaded.density == selection.density
    assert loaded != choose(SCORES, LAYERS, 0.1, "parameters", "global", "train_top")
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_files_that_are_no_selection(tmp_path):
    (tmp_path / "x").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="not a selection"):
        Selection.load(tmp_path / "x")
    ft = SparseFinetuner(build("mlp"))
    ft.select({"1.weight": [0]})
    ft.save_delta(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="holds no selection"):
        Selection.load(tmp_path / "d.safetensors")
    with pytest.raises(FileNotFoundError):
        Selection.load(tmp_path / "missing")


def test_selection_is_reused_and_given_by_hand(tmp_path):
    ft = SparseFinetuner(build("mlp"), criterion="random", density=0.4)
    selection = ft.select()
    selection.save(tmp_path / "s.safetensors")
    twin = SparseFinetuner(build("mlp", seed=5))
    assert twin.select(Selection.load(tmp_path / "s.safetensors")) == selection
    mask = torch.tensor([True, False, False, True, False, False, False])
    assert twin.select({"1.weight": mask, "3.weight": []}).rows["1.weight"].tolist() == [0, 3]
    assert twin.select({"1.weight": (5, 2)}).rows["1.weight"].tolist() == [2, 5]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({}, ValueError, "empty"),
        ({"1.weight": []}, ValueError, "empty"),
        ({"5.weight": [0]}, ValueError, r"'5.weight' is no layer.*1\.weight"),
        ({"1.bias": [0]}, ValueError, "follows the neurons of '1.weight'"),
        ({"1.weight": [7]}, ValueError, "out of range; it has rows 0 to 6"),
        ({"1.weight": [-1]}, ValueError, "out of range"),
        ({"1.weight": [1, 2, 1]}, ValueError, "duplicates"),
        ({"1.weight": [0.5]}, TypeError, "integers"),
        ({"1.weight": [True, False]}, TypeError, "mask of 7"),
        ({"1.weight": [[1]]}, TypeError, "integers"),
    ],
)
def test_wrong_selections_leave_the_model_as_it_is(rows, error, message):
    net = build("mlp")
    ft = SparseFinetuner(net)
    with pytest.raises(error, match=message):
        ft.select(rows)
    assert ft.selection is None
    assert all(p.requires_grad and type(p) is nn.Parameter for p in net.parameters())
    ft.select({"1.weight": [1]})
    with pytest.raises(error, match=message):
        ft.select(rows)
    assert ft.selection.rows["1.weight"].tolist() == [1]


@pytest.mark.parametrize("rows", [[1, 2], {"1.weight": None}, {"1.weight": "0"}])
def test_a_selection_of_a_wrong_kind(rows):
    with pytest.raises(TypeError, match=r"Selection or|must be integers"):
        SparseFinetuner(build("mlp")).select(rows)


def test_a_selection_of_another_model_is_refused():
    selection = SparseFinetuner(build("mlp"), criterion="random").select()
    wider = nn.Sequential(nn.Flatten(), nn.Linear(108, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    with pytest.raises(ValueError, match="another model"):
        SparseFinetuner(wider).select(selection)
    with pytest.raises(ValueError, match="no layer"):
        selection_by_hand({"0.weight": [0]}, SparseFinetuner(build("mlp")).layers, "neurons")
