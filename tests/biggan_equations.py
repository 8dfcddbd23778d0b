"""BigGAN's equations, plain, on a dict of float64 tensors; and its public key lists, by rule."""

import itertools

import torch
from torch.nn import functional as F

GENERATOR = {32: [4] * 4, 64: [16, 16, 8, 4, 2], 128: [16, 16, 8, 4, 2, 1], 256: [16, 16, 8, 8, 4, 2, 1]}
GENERATOR[512] = [*GENERATOR[256], 1]
CRITIC = {32: [4] * 4, 64: [1, 2, 4, 8, 16], 128: [1, 2, 4, 8, 16, 16], 256: [1, 2, 4, 8, 8, 16, 16]}
CRITIC[512] = [1, *CRITIC[256]]


def normalised(shapes, name, *shape, bias=True):
    shapes[f"{name}.weight"] = shape
    if bias:
        shapes[f"{name}.bias"] = shape[:1]
    shapes[f"{name}.u0"], shapes[f"{name}.sv0"] = (1, shape[0]), (1,)


def attention(shapes, name, c):
    shapes[f"{name}.gamma"] = ()
    for part, out, inner in (("theta", c // 8, c), ("phi", c // 8, c), ("g", c // 2, c), ("o", c, c // 2)):
        normalised(shapes, f"{name}.{part}", out, inner, 1, 1, bias=False)


def block(shapes, name, cin, hidden, cout, shortcut=True):
    normalised(shapes, f"{name}.conv1", hidden, cin, 3, 3)
    normalised(shapes, f"{name}.conv2", cout, hidden, 3, 3)
    if shortcut:
        normalised(shapes, f"{name}.conv_sc", cout, cin, 1, 1)


def generator_keys(resolution, ch, chunk, shared, classes, attend, image_channels=3, hierarchical=True):
    """{key: shape} of BigGAN-PyTorch's G; `attend` the size of the map that attention follows."""
    c = [ch * m for m in GENERATOR[resolution]]
    shapes = {"shared.weight": (classes, shared)} if shared else {}
    normalised(shapes, "linear", 16 * c[0], chunk)
    condition = shared + (chunk if hierarchical else 0)
    for i, (cin, cout) in enumerate(itertools.pairwise(c)):
        block(shapes, f"blocks.{i}.0", cin, cout, cout)
        for bn, n in (("bn1", cin), ("bn2", cout)):
            name = f"blocks.{i}.0.{bn}"
            shapes[f"{name}.stored_mean"] = shapes[f"{name}.stored_var"] = (n,)
            for part in ("gain", "bias"):
                if shared:
                    normalised(shapes, f"{name}.{part}", n, condition, bias=False)
                else:
                    shapes[f"{name}.{part}.weight"] = (classes, n)
        if 8 << i == attend:
            attention(shapes, f"blocks.{i}.1", cout)
    for part in ("gain", "bias", "stored_mean", "stored_var"):
        shapes[f"output_layer.0.{part}"] = (c[-1],)
    normalised(shapes, "output_layer.2", image_channels, c[-1], 3, 3)
    return shapes


def critic_keys(resolution, ch, classes, attend, image_channels=3):
    """{key: shape} of BigGAN-PyTorch's D; attention behind the first map of that size."""
    c = [image_channels] + [ch * m for m in CRITIC[resolution]]
    shapes = {}
    for i, (cin, cout) in enumerate(itertools.pairwise(c)):
        halves = i < (2 if resolution == 32 else len(c) - 2)
        block(shapes, f"blocks.{i}.0", cin, cout, cout, shortcut=halves or cin != cout)
        if resolution >> (i + 1) == attend:
            attention(shapes, f"blocks.{i}.1", cout)
    normalised(shapes, "linear", 1, c[-1])
    normalised(shapes, "embed", classes, c[-1], bias=False)
    return shapes


def random_state(shapes, dtype=torch.float64):
    """Weights of the size that keeps activations alive, variances above zero."""
    state = {}
    for name, shape in shapes.items():
        fan = torch.Size(shape[1:]).numel()
        state[name] = torch.randn(shape, dtype=dtype) * (1 if name.endswith("u0") else fan**-0.5 if fan > 1 else 0.5)
        if name.endswith(("stored_var", "running_vars")):
            state[name] = state[name].abs() + 0.5
    return state


def weight(state, name):
    """W / σ, σ of one power iteration from u0, by matrix products."""
    w = state[f"{name}.weight"]
    if f"{name}.u0" not in state:
        return w
    m, u = w.reshape(len(w), -1), state[f"{name}.u0"][0]
    v = m.T @ u
    v = v / v.norm()
    u = m @ v
    u = u / u.norm()
    return w / (u @ m @ v)


def conv(state, name, x):
    w = weight(state, name)
    return F.conv2d(x, w, state.get(f"{name}.bias"), padding=w.shape[-1] // 2)


def batch_norm(state, name, x, gain, shift, eps, batch):
    if batch:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = state[f"{name}.stored_mean"], state[f"{name}.stored_var"]
    x = (x - mean[None, :, None, None]) / (var[None, :, None, None] + eps).sqrt()
    return gain[..., None, None] * x + shift[..., None, None]


def attend(x, theta, phi, g, gamma, o):
    """x [B, C, H, W]; theta, phi, g, o functions; one pixel of the query at a time would be the same, by einsum."""
    b, _, h, w = x.shape
    pool = lambda t: t.reshape(*t.shape[:2], h // 2, 2, w // 2, 2).amax((3, 5)).flatten(2)  # noqa: E731
    weights = torch.einsum("bkq,bkp->bqp", theta(x).flatten(2), pool(phi(x))).exp()
    weights = weights / weights.sum(2, keepdim=True)
    mixed = torch.einsum("bcp,bqp->bcq", pool(g(x)), weights)
    return x + gamma * o(mixed.reshape(b, -1, h, w))


def attended(state, name, x):
    parts = {p: (lambda t, p=p: conv(state, f"{name}.{p}", t)) for p in ("theta", "phi", "g", "o")}
    return attend(x, parts["theta"], parts["phi"], parts["g"], state[f"{name}.gamma"], parts["o"])


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halved(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def generator(state, z, c, hierarchical=True, batch=False):
    """Images; c class embeddings [B, E], or labels where the network has no shared embedding."""
    blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    chunks = z.chunk(blocks + 1, 1) if hierarchical else [z] + [z[:, :0]] * blocks

    def conditional(name, x, condition):
        gain, shift = (
            weight(state, f"{name}.{p}")[condition]
            if condition.ndim == 1
            else condition @ weight(state, f"{name}.{p}").T
            for p in ("gain", "bias")
        )
        return batch_norm(state, name, x, 1 + gain, shift, 1e-5, batch)

    x = (chunks[0] @ weight(state, "linear").T + state["linear.bias"]).reshape(len(z), -1, 4, 4)
    for i in range(blocks):
        condition = c if c.ndim == 1 else torch.cat((c, chunks[i + 1]), 1)
        name = f"blocks.{i}.0"
        y = conv(state, f"{name}.conv1", doubled(conditional(f"{name}.bn1", x, condition).clamp(min=0)))
        y = conv(state, f"{name}.conv2", conditional(f"{name}.bn2", y, condition).clamp(min=0))
        x = y + conv(state, f"{name}.conv_sc", doubled(x))
        if f"blocks.{i}.1.gamma" in state:
            x = attended(state, f"blocks.{i}.1", x)
    gain, shift = (state[f"output_layer.0.{p}"][None] for p in ("gain", "bias"))
    x = batch_norm(state, "output_layer.0", x, gain, shift, 1e-5, batch).clamp(min=0)
    return conv(state, "output_layer.2", x).tanh()


def critic(state, x, labels=None):
    """Logits [B]."""
    blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    halves = 2 if x.shape[-1] == 32 else blocks - 1
    for i in range(blocks):
        name = f"blocks.{i}.0"
        y = conv(state, f"{name}.conv2", conv(state, f"{name}.conv1", x.clamp(min=0) if i else x).clamp(min=0))
        if f"{name}.conv_sc.weight" in state:
            x = conv(state, f"{name}.conv_sc", x)
        x = halved(x) + halved(y) if i < halves else x + y
        if f"blocks.{i}.1.gamma" in state:
            x = attended(state, f"blocks.{i}.1", x)
    h = x.clamp(min=0).sum((2, 3))
    logits = (h @ weight(state, "linear").T + state["linear.bias"])[:, 0]
    return logits if labels is None else logits + (weight(state, "embed")[labels] * h).sum(1)
