"""Images to features, by a network of the user's.

Two mistakes make published FIDs incomparable: an Inception that normalises with batch statistics, and images in [-1, 1]
given to a network that expects [0, 1]. Here the network always evaluates in eval mode, and images are always [-1, 1]
until the one conversion to the range that `normalize` says the network expects. A third is resizing without a low-pass
filter (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").
"""

import os
import warnings
import zipfile
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.reading import read
from ._inputs import Array, as_tensor
from .inception import SMALLEST, from_weights, is_inception, shortened

_LIMIT = 16.0  # beyond it a float image is in [0, 255], not an unclamped generator's


def _imagenet(x):
    # Channel by channel: a tensor of the means would be copied to a GPU at every call.
    statistics = zip(x.unbind(-3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    return torch.stack([((channel + 1) / 2 - mean) / std for channel, mean, std in statistics], -3)


_NORMALIZE = {
    "[-1,1]": lambda x: x,
    "[0,1]": lambda x: (x + 1) / 2,
    "[0,255]": lambda x: (x + 1) * 127.5,
    "imagenet": _imagenet,
    "tensorflow": lambda x: (x * 127.5 - 0.5) / 128,
    "uint8": lambda x: ((x + 1) * 127.5).round().to(torch.uint8),
}

# What suits a network that nothing is known of, NVIDIA's, and each set of weights of Inception v3.
_INCEPTION = {"size": (299, 299), "channels": 3, "interpolation": "bicubic", "quantize": True}
_DEFAULTS = {
    None: {"size": None, "channels": None, "interpolation": "bilinear", "quantize": False, "normalize": "[-1,1]"},
    "nvidia": {"size": None, "channels": 3, "interpolation": "bilinear", "quantize": True, "normalize": "uint8"},
    "torchvision": {**_INCEPTION, "normalize": "[-1,1]"},
    "fid": {**_INCEPTION, "normalize": "tensorflow"},
}


def _is_nvidias(module: nn.Module) -> bool:
    """Whether this is a TorchScript network of StyleGAN2-ADA's metrics, which gives classes unless asked otherwise."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    return any(argument.name == "return_features" for argument in module.forward.schema.arguments)


def _load(path, device) -> tuple[nn.Module, str | None]:
    """(network, variant of Inception or None) of a file; a file of weights is read as data, and nothing in it runs."""
    if not os.path.isfile(path):
        raise ValueError(
            f"no file {path}: expected a TorchScript file of the feature network or a file of Inception's weights"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # no archive, or a damaged one, which can raise anything: the reader of weights says so
        names = []
    # An archive lies in one folder: TorchScript has NAME/constants.pkl and NAME/code/, torch.save NAME/data.pkl alone.
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        try:
            return torch.jit.load(path, map_location=device), None
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read as TorchScript: {str(error).strip().splitlines()[0]}") from error
    try:
        contents = read(path).data
    except ValueError as error:
        raise ValueError(f"{error} (expected a TorchScript file or a file of Inception's weights)") from None
    for state in (contents, *contents.values()):
        if not isinstance(state, dict):
            continue
        state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
        if is_inception(state):
            try:
                return from_weights(state, device)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    raise ValueError(
        f"{path} is no TorchScript file and holds no Inception v3 under torchvision's names, but "
        f"{shortened(contents, 4) or 'nothing'}. For another network build it, load its weights with "
        f"network.load_state_dict(torch.load(path, weights_only=True)) and pass the network itself, or save "
        f"torch.jit.script(network) once and pass that file"
    )


class FeatureExtractor:
    """images [N, C, H, W] in [-1, 1] -> features [N, D], in batches, in eval mode, without gradient.

    path_or_module: an nn.Module (it stays on its device and keeps its mode: train or eval flags are put back after
        every call), the path of a TorchScript file, or the path of a file of weights of Inception v3 (torch.save of a
        state dict, or safetensors), whose features are the 2048 pooled ones: torchvision's ImageNet weights or
        `pt_inception-2015-12-05` of pytorch-fid, told by fc.weight. Weights are read as data, whoever wrote the file.
        A TorchScript file is a program: use one whose origin you trust.
    batch: images evaluated at once.
    resolution: resize to this height and width first (int or pair). None: as they are; for Inception's weights 299.
    normalize: the range that the network expects: "[-1,1]" | "[0,1]" | "imagenet" ([0,1], then ImageNet's mean and
        deviation) | "[0,255]" | "tensorflow" ([0,255], then (x - 128) / 128) | "uint8" (rounded to 0..255).
        None: "[-1,1]"; for FID's weights "tensorflow". A network that converts by itself is described by what it takes:
        pytorch-fid's InceptionV3 "[0,1]", torchvision's classifiers "imagenet". Of torchvision's Inception a file holds
        the weights alone, without its conversion of ImageNet's range to [-1, 1].
    channels: 3 repeats grey images to three channels. None: as they are; "imagenet" and Inception's weights imply 3.
    interpolation: "bilinear" | "bicubic". None: "bilinear"; for Inception's weights "bicubic".
    device: where a file's network is loaded; None: CPU.
    antialias: resize as PIL does, by a kernel that grows with the scale. False: as PyTorch does, from the nearest
        pixels alone (align_corners=False).
    quantize: round floating point images to the 256 values of an image file before anything else. None: False; for
        Inception's weights True.

    For Inception's weights the defaults are those of clean-fid (Parmar et al. 2022), which sees image files: 8 bits,
    resized in floating point by PIL's bicubic kernel, clamped, and for FID's weights the range of the TensorFlow graph.
    What pytorch-fid computes is interpolation="bilinear", antialias=False, normalize="[-1,1]".

    A TorchScript network whose forward has an argument `return_features`, as those of StyleGAN2-ADA's metrics
    (`inception-2015-12-05.pt`, `vgg16.pt`), is asked for them, and its defaults are that project's: uint8, 3 channels,
    resized by the network itself. What clean-fid computes with this Inception is resolution=299,
    interpolation="bicubic", normalize="[0,255]".

    The attribute `variant` says what was recognised: "torchvision", "fid", "nvidia" or None.

    The network may return [N, D], a map [N, D, h, w] (averaged over h and w), or a tuple or list whose first entry is
    one of these.
    """

    def __init__(
        self,
        path_or_module: str | os.PathLike | nn.Module,
        batch: int = 64,
        resolution: int | tuple[int, int] | None = None,
        normalize: str | None = None,
        channels: int | None = None,
        interpolation: str | None = None,
        device: str | torch.device | None = None,
        antialias: bool = True,
        quantize: bool | None = None,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if normalize not in (None, *_NORMALIZE):
            raise ValueError(f"unknown normalize {normalize!r}: one of {', '.join(_NORMALIZE)}")
        if interpolation not in (None, "bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}")
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"resolution must be a positive int or a pair (height, width), got {resolution!r}")
        self.variant = None
        if isinstance(path_or_module, nn.Module):
            if device is not None:
                raise ValueError("device is for files: a module stays where it is; move it with .to(device) yourself")
            self.module = path_or_module
        elif isinstance(path_or_module, (str, os.PathLike)):
            self.module, self.variant = _load(os.fspath(path_or_module), device or "cpu")
        else:
            raise TypeError(
                f"expected an nn.Module or the path of a TorchScript file or of Inception's weights, not "
                f"{type(path_or_module).__name__}"
            )
        if _is_nvidias(self.module):
            self.variant = "nvidia"
        default = _DEFAULTS[self.variant]
        self.batch, self.antialias = batch, antialias
        self.size = size or default["size"]
        self.normalize = normalize or default["normalize"]
        self.channels = channels or default["channels"] or (3 if self.normalize == "imagenet" else None)
        self.interpolation = interpolation or default["interpolation"]
        self.quantize = default["quantize"] if quantize is None else quantize
        if self.variant in ("torchvision", "fid"):
            if min(self.size) < SMALLEST:
                raise ValueError(
                    f"Inception v3 takes {SMALLEST}x{SMALLEST} pixels and more, got resolution {resolution!r}"
                )
            if self.channels != 3 or self.normalize == "uint8":
                raise ValueError(
                    f"Inception's weights take 3 channels of floats, got channels={channels!r}, normalize={normalize!r}"
                )

    def __call__(self, images: Array) -> Tensor:
        """Features [N, D] on the network's device: float64 for a float64 network, else float32.

        images: tensor or array [N, C, H, W], floating point in [-1, 1], or uint8 in 0..255, on any device. Floats
        beyond [-1, 1] are clamped, as saving them would; far beyond, NaN, or of a wrong shape they raise ValueError;
        never below 0 they warn, as images in [0, 1] would.
        """
        images = as_tensor(images, "images")
        self._check(images)
        anchor = self.anchor(images)
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

    def prepare(self, x: Tensor, as_saved: bool = True) -> Tensor:
        """Images [B, C, H, W], floating point in [-1, 1] -> what the network takes: range, size, channels and dtype.

        as_saved: clamped and, where `quantize` says so, rounded, as an image file would hold them. False: neither, nor
        what else has no gradient; "uint8" then is [0, 255] unrounded.
        """
        dtype = self.anchor(x).dtype
        if as_saved:
            x = x.clamp(-1, 1)
            if self.quantize:
                x = ((x + 1) * 127.5).round() / 127.5 - 1
        if self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        if self.size is not None and x.shape[2:] != torch.Size(self.size):
            x = F.interpolate(x, self.size, mode=self.interpolation, antialias=self.antialias)
            x = x.clamp(-1, 1) if as_saved else x  # bicubic overshoots
        x = _NORMALIZE["[0,255]" if self.normalize == "uint8" and not as_saved else self.normalize](x)
        return x if x.dtype == torch.uint8 else x.to(dtype)

    def anchor(self, images: Tensor) -> Tensor:
        """A tensor of the network's dtype and device: its first one of floats, else a float32 one beside images."""
        tensors = chain(self.module.parameters(), self.module.buffers())
        return next((t for t in tensors if t.is_floating_point()), images.new_empty(0, dtype=torch.float32))

    def _batch(self, x: Tensor, anchor: Tensor) -> Tensor:
        N = len(x)
        uint8 = x.dtype == torch.uint8
        x = x.to(anchor.device, torch.float64 if anchor.dtype == torch.float64 else torch.float32)
        x = self.prepare(x / 127.5 - 1 if uint8 else x)
        features = self.module(x, return_features=True) if self.variant == "nvidia" else self.module(x)
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
