"""pytorch-pretrained-biggan: a state dict, `pytorch_model.bin`."""

from ..biggan_deep import BigGANDeepGenerator
from ._layout import Layout, State, highest


def _config(state: State) -> dict:
    layers = highest(state, r"generator\.layers\.(\d+)\..*") + 1
    names = [f"generator.layers.{i}" for i in range(layers)]
    # Two blocks for every size, of which the second doubles it.
    attended = [f"{name}.gamma" in state for name in names]
    blocks = [name for name, skip in zip(names, attended, strict=True) if not skip]
    before = [i - sum(attended[:i]) for i in range(layers) if attended[i]]
    class_dim, classes = state["embeddings.weight"].shape
    first = state[f"{blocks[0]}.conv_0.weight_orig"].shape[1]
    return {
        "resolution": 4 << len(blocks) // 2,
        "latent_dim": state["generator.gen_z.weight_orig"].shape[1] - class_dim,
        "class_dim": class_dim,
        "num_classes": classes,
        "channels": [first, *(state[f"{name}.conv_3.weight_orig"].shape[0] for name in blocks[1::2])],
        "attention": [4 << count // 2 for count in before],
        "steps": state["generator.bn.running_means"].shape[0],
    }


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project="pytorch-pretrained-biggan",
        role="generator",
        model=BigGANDeepGenerator,
        signature=("embeddings.weight", "generator.gen_z.weight_orig", "generator.bn.running_means"),
        containers=(),
        config=_config,
    ),
)
