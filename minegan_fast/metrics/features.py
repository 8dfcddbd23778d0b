"""Images to features, by a network of the user's.

Two mistakes make published FIDs incomparable: an Inception that normalises with batch statistics, and images in [-1, 1]
given to a network that expects [0, 1]. Here the network always evaluates in eval mode, and images are always [-1, 1]
until the one conversion to the range that `normalize` says the network expects.
"""

import os
import warnings
import zipfile
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LIMIT = 16.0  # beyond it a float image is in [0, 255], not an unclamped generator's


def _imagenet(x):
    mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
    return ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


_NORMALIZE = {
    "[-1,1]": lambda x: x,
    "[0,1]": lambda x: (x + 1) / 2,
    "imagenet": _imagenet,
    "uint8": lambda x: ((x + 1) * 127.5).round().to(torch.uint8),
}


def _load_torchscript(path, device) -> nn.Module:
    """Only archives of torch.jit.save are opened: a pickle can run code when it is read."""
    if not os.path.isfile(path):
        raise ValueError(f"no file {path}: expected a TorchScript file of the feature network")
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    # An archive lies in one folder: TorchScript has NAME/constants.pkl and NAME/code/, torch.save NAME/data.pkl alone.
    if not any(name.endswith("/constants.pkl") for name in names) or not any("/code/" in name for name in names):
        raise ValueError(
            f"{path} is not a TorchScript file and was not opened. If it holds weights alone (a state dict), build the "
            f"network, load them with network.load_state_dict(torch.load(path, weights_only=True)) and pass the "
            f"network itself, or save torch.jit.script(network) once and pass that file"
        )
    try:
        return torch.jit.load(path, map_location=device)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as TorchScript: {str(error).strip().splitlines()[0]}") from error


class FeatureExtractor:
    """images [N, C, H, W] in [-1, 1] -> features [N, D], in batches, in eval mode, without gradient.

    path_or_module: an nn.Module (it stays on its device and keeps its mode: train or eval flags are put back after
        every call), or the path of a TorchScript file. A TorchScript file is a program: use one whose origin you trust.
        Files of weights alone (torchvision's or pytorch-fid's Inception) are refused with what to do: they need their
        network.
    batch: images evaluated at once.
    resolution: resize to this height and width first (int or pair); None: as they are. Antialiased, as PIL does.
    normalize: the range that the network expects: "[-1,1]" | "[0,1]" | "imagenet" ([0,1], then ImageNet's mean and
        deviation) | "uint8" (rounded to 0..255, uint8). A network that converts by itself is described by what it
        takes: pytorch-fid's InceptionV3 "[0,1]", torchvision's classifiers "imagenet", StyleGAN2-ADA's TorchScript
        Inception "uint8".
    channels: 3 repeats grey images to three channels; None: as they are ("imagenet" implies 3).
    interpolation: "bilinear" | "bicubic".
    device: where a file's network is loaded; None: CPU.

    The network may return [N, D], a map [N, D, h, w] (averaged over h and w), or a tuple or list whose first entry is
    one of these.
    """

    def __init__(
        self,
        path_or_module,
        batch=64,
        resolution=None,
        normalize="[-1,1]",
        channels=None,
        interpolation="bilinear",
        device=None,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if normalize not in _NORMALIZE:
            raise ValueError(f"unknown normalize {normalize!r}: one of {', '.join(_NORMALIZE)}")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}")
        if channels is None and normalize == "imagenet":
            channels = 3
        self.size = (resolution, resolution) if isinstance(resolution, int) else resolution
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"resolution must be a positive int or a pair (height, width), got {resolution!r}")
        if isinstance(path_or_module, nn.Module):
            if device is not None:
                raise ValueError("device is for files: a module stays where it is; move it with .to(device) yourself")
            self.module = path_or_module
        elif isinstance(path_or_module, (str, os.PathLike)):
            self.module = _load_torchscript(os.fspath(path_or_module), device or "cpu")
        else:
            raise TypeError(
                f"expected an nn.Module or the path of a TorchScript file, not {type(path_or_module).__name__}"
            )
        self.batch, self.normalize, self.channels, self.interpolation = batch, normalize, channels, interpolation

    def __call__(self, images) -> Tensor:
        """Features [N, D] on the network's device: float64 for a float64 network, else float32.

        images: tensor or array [N, C, H, W], floating point in [-1, 1], or uint8 in 0..255, on any device. Floats
        beyond [-1, 1] are clamped, as saving them would; far beyond, NaN, or of a wrong shape they raise ValueError;
        never below 0 they warn, as images in [0, 1] would.
        """
        images = torch.as_tensor(images)
        self._check(images)
        tensors = chain(self.module.parameters(), self.module.buffers())
        anchor = next((t for t in tensors if t.is_floating_point()), images.new_empty(0, dtype=torch.float32))
        # A frozen TorchScript module has no flag.
        modes = [(module, getattr(module, "training", False)) for module in self.module.modules()]
        self.module.eval()
        try:
            # Ambient autocast would make features depend on the caller's precision.
            with torch.no_grad(), torch.autocast(anchor.device.type, enabled=False):
                features = [self._batch(x, anchor) for x in images.split(self.batch)]
        finally:
            for module, training in modes:
                module.training = training
        return torch.cat(features)

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or images.numel() == 0:
            raise ValueError(f"images must be [N, C, H, W] with at least one image, got {list(images.shape)}")
        if self.channels is not None and images.shape[1] not in (1, self.channels):
            raise ValueError(
                f"images have {images.shape[1]} channels, the network takes {self.channels}: give 1 or {self.channels}"
            )
        if images.dtype == torch.uint8:
            return
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [-1, 1] or uint8, not {images.dtype}")
        low, high = images.aminmax()
        if not torch.isfinite(high - low):
            bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten()
            raise ValueError(f"{len(bad)} of {len(images)} images hold NaN or inf, the first is image {int(bad[0])}")
        if max(-low, high) > _LIMIT:
            raise ValueError(
                f"images reach from {low:.4g} to {high:.4g}, expected [-1, 1]: convert 0..255 by x / 127.5 - 1"
            )
        if low >= 0:
            warnings.warn("no pixel is below 0: images in [0, 1]? expected [-1, 1], convert by 2 * x - 1", stacklevel=3)

    def _batch(self, x: Tensor, anchor: Tensor) -> Tensor:
        N = len(x)
        uint8 = x.dtype == torch.uint8
        x = x.to(anchor.device, torch.float64 if anchor.dtype == torch.float64 else torch.float32)
        x = x / 127.5 - 1 if uint8 else x.clamp(-1, 1)
        if self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        if self.size is not None and x.shape[2:] != torch.Size(self.size):
            # Bicubic overshoots.
            x = F.interpolate(x, self.size, mode=self.interpolation, antialias=True).clamp(-1, 1)
        x = _NORMALIZE[self.normalize](x)
        features = self.module(x if self.normalize == "uint8" else x.to(anchor.dtype))
        if isinstance(features, (tuple, list)) and features:
            features = features[0]
        if not isinstance(features, Tensor):
            raise TypeError(
                f"the network must return a tensor or a tuple that begins with one, not {type(features).__name__}"
            )
        if features.dim() == 4:
            features = features.mean((2, 3))
        if features.dim() != 2 or len(features) != N:
            raise ValueError(
                f"the network must return [{N}, D] or [{N}, D, h, w] for {N} images, got {list(features.shape)}"
            )
        return features if features.dtype == torch.float64 else features.float()
