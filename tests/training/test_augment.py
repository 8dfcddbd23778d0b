import pytest
import torch

from minegan_fast.training.augment import diff_augment, parse_policy

WORDS = ("color", "translation", "cutout", "flip", "jitter")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, dtype=torch.float64):
    return torch.rand(*shape, generator=seeded(9), dtype=torch.float64).mul(2).sub(1).to(dtype)


@pytest.mark.parametrize("policy", [*WORDS, "color,translation,cutout", "flip,cutout"])
@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 1, 7, 5), (1, 4, 1, 3)])
def test_differentiable_twice(policy, shape):
    x = images(*shape).requires_grad_()

    def augment(x):
        # The square makes the second derivative other than zero.
        return diff_augment(x, policy, seeded(1)).square()

    assert torch.autograd.gradcheck(augment, (x,))
    assert torch.autograd.gradgradcheck(augment, (x,))


@pytest.mark.parametrize("policy", [*WORDS, "color,translation,cutout,flip"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_generator_decides_whatever_the_dtype(policy, dtype):
    x = images(6, 3, 16, 16)
    y = diff_augment(x.to(dtype), policy, seeded(2))
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert torch.equal(y, diff_augment(x.to(dtype), policy, seeded(2)))
    assert not torch.equal(y, diff_augment(x.to(dtype), policy, seeded(3)))
    # bfloat16 keeps 8 bits, and colour is a handful of operations.
    torch.testing.assert_close(y.double(), diff_augment(x, policy, seeded(2)), rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("policy", WORDS)
def test_samples_differ(policy):
    x = images(1, 3, 16, 16).expand(8, -1, -1, -1)
    y = diff_augment(x, policy, seeded())
    assert len(torch.unique(y, dim=0)) == (2 if policy == "flip" else 8)


def test_empty_policy_is_the_identity():
    x = images(2, 3, 4, 4)
    for policy in ("", " , "):
        assert diff_augment(x, policy) is x


def test_translation_shifts_and_fills_with_zeros():
    x = images(400, 2, 16, 12)
    y = diff_augment(x, "translation:0.25", seeded())
    padded = torch.nn.functional.pad(x, (3, 3, 4, 4))
    seen = set()
    for before, after in zip(padded, y, strict=True):
        shifts = [
            (4 - top, 3 - left)
            for top in range(9)
            for left in range(7)
            if torch.equal(before[:, top : top + 16, left : left + 12], after)
        ]
        assert len(shifts) == 1
        seen.update(shifts)
    assert len(seen) == 9 * 7  # 400 draws from 63: each comes with probability 0.998


def test_translation_gradient_does_not_depend_on_layout():
    x = images(4, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = diff_augment(x, "translation", seeded())
    weight = images(4, 3, 8, 8).flip(0)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    # The shift is linear, so <shift(x), w> = <x, shift'(w)>.
    torch.testing.assert_close((grad * x).sum(), (y * weight).sum())


@pytest.mark.parametrize(("policy", "side"), [("cutout", 8), ("cutout:0.3", 5), ("cutout:1", 16)])
def test_cutout_hides_one_rectangle(policy, side):
    x = torch.ones(300, 3, 16, 16)
    hidden = diff_augment(x, policy, seeded()) == 0
    assert (hidden == hidden[:, :1]).all()
    rows, columns = hidden[:, 0].any(2).sum(1), hidden[:, 0].any(1).sum(1)
    assert (hidden[:, 0].sum((1, 2)) == rows * columns).all()
    for extent in (rows, columns):
        assert extent.max() == side
        assert side // 2 <= extent.min() < side  # the centre stays inside


def test_flip_mirrors_with_its_probability():
    x = images(1000, 1, 2, 3)
    y = diff_augment(x, "flip:0.2", seeded())
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert (y == x).flatten(1).all(1).eq(~mirrored).all()
    assert 150 < mirrored.sum() < 250  # four standard deviations
    assert torch.equal(diff_augment(x, "flip:1", seeded()), x.flip(3))


def test_color_of_constant_images_is_brightness_alone():
    y = diff_augment(torch.zeros(500, 3, 2, 2), "color:0.5", seeded())
    shift = y[:, 0, 0, 0]
    torch.testing.assert_close(y, shift[:, None, None, None].expand_as(y))
    assert shift.abs().max() <= 0.25
    assert shift.std() == pytest.approx(0.5 / 12**0.5, rel=0.1)


def test_color_changes_saturation_and_contrast_within_their_range():
    # Two pixels of two channels around 0: saturation scales what the channels differ by, contrast what the pixels do.
    x = torch.tensor([[1.0, 3.0], [-3.0, -1.0]]).T.reshape(1, 2, 1, 2).expand(2000, -1, -1, -1)
    y = diff_augment(x, "color", seeded())
    grey = y.mean(1)[:, 0]
    contrast = (grey[:, 0] - grey[:, 1]) / (x.mean(1)[0, 0, 0] - x.mean(1)[0, 0, 1])
    saturation = (y[:, 0, 0, 0] - y[:, 1, 0, 0]) / (x[0, 0, 0, 0] - x[0, 1, 0, 0]) / contrast
    assert contrast.min() == pytest.approx(0.5, abs=0.01)
    assert contrast.max() == pytest.approx(1.5, abs=0.01)
    assert saturation.min() == pytest.approx(0.0, abs=0.01)
    assert saturation.max() == pytest.approx(2.0, abs=0.01)


def test_saturation_leaves_grey_images_alone():
    grey = images(4, 1, 6, 6)
    coloured = diff_augment(grey.expand(-1, 3, -1, -1), "color", seeded())
    torch.testing.assert_close(diff_augment(grey, "color", seeded()).expand(-1, 3, -1, -1), coloured)


def test_nan_outside_of_the_shifted_image_stays_outside():
    x = images(50, 1, 8, 8)
    x[:, :, 0, 0] = torch.nan
    y = diff_augment(x, "translation", seeded())
    assert (y.isnan().sum((1, 2, 3)) <= 1).all()


def test_batch_of_zero():
    assert diff_augment(torch.zeros(0, 3, 8, 8), "color,translation,cutout,flip").shape == (0, 3, 8, 8)


def test_default_generator_is_seeded_by_torch():
    x = images(2, 3, 8, 8)
    torch.manual_seed(5)
    first = diff_augment(x)
    torch.manual_seed(5)
    assert torch.equal(first, diff_augment(x))


@pytest.mark.gpu
def test_cpu_generator_serves_cuda():
    x = images(4, 3, 16, 16, dtype=torch.float32)
    policy = "color,translation,cutout,flip"
    torch.testing.assert_close(diff_augment(x.cuda(), policy, seeded()).cpu(), diff_augment(x, policy, seeded()))


def test_policies_are_parsed():
    assert parse_policy(" translation:0.1, color") == (("translation", 0.1), ("color", 1.0))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("colour", "unknown augmentation 'colour'.*color, translation, cutout, flip"),
        ("color;flip", "unknown augmentation"),
        ("cutout:1.5", "strength of 'cutout'.*at most 1, got '1.5'"),
        ("cutout:0", "strength of 'cutout'"),
        ("flip:", "strength of 'flip'"),
        ("flip:nan", "strength of 'flip'"),
        ("color:much", "strength of 'color'.*'much'"),
    ],
)
def test_wrong_policies_are_named(policy, message):
    with pytest.raises(ValueError, match=message):
        diff_augment(torch.zeros(2, 3, 8, 8), policy)


@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_wrong_images_are_named(x):
    with pytest.raises(ValueError, match=r"floating point \[B, C, H, W\]"):
        diff_augment(x)
