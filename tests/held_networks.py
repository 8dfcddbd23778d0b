"""Whether a network holds the tensors of another."""

import collections

import torch


def times(model, factor):
    return collections.OrderedDict((k, t * factor) for k, t in model.state_dict().items())


def assert_holds(model, source, factor=1.0):
    expected = times(source, factor)
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
