"""The shared checks of arguments: what they let pass, and what their messages say."""

import pytest
import torch

from minegan_fast.ops.checks import check_beside, check_factor, check_tensor

X = torch.zeros(2)


def test_what_is_right_passes():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        check_tensor(X.to(dtype), "x")
    check_beside(X, "b", X, "x")
    check_factor(1e-300, "gain")
    check_factor(0.0, "alpha", zero=True)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_tensor([1.0], "x"), TypeError, "x must be a float32, .* float16 tensor, got list"),
        (lambda: check_tensor(X.int(), "x"), TypeError, "x must be a float32, .* float16 tensor, got torch.int32"),
        (lambda: check_tensor(X.bool(), "b", True), TypeError, "b must be .* tensor or None, got torch.bool"),
        (lambda: check_beside(1.0, "b", X, "c", True), TypeError, "b must be a float32, .* or None, got float"),
        (
            lambda: check_beside(X.to("meta"), "b", X, "c"),
            ValueError,
            r"b must be on the device of c, cpu, got meta; move it with b.to\(c.device\)",
        ),
        (lambda: check_factor(0.0, "gain"), ValueError, "gain must be finite and > 0, got 0.0"),
        (lambda: check_factor(-0.5, "alpha", zero=True), ValueError, "alpha must be finite and >= 0, got -0.5"),
        (lambda: check_factor(float("inf"), "gain"), ValueError, "gain must be finite and > 0, got inf"),
        (lambda: check_factor(float("nan"), "alpha", zero=True), ValueError, "alpha must be finite and >= 0, got nan"),
    ],
)
def test_messages_name_the_argument_what_it_must_be_and_what_it_is(check, error, message):
    with pytest.raises(error, match=message):
        check()
