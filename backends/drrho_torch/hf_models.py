"""CLIP and SigLIP of the library `transformers` as pure functions of a flat mapping of tensors.

The modules of `transformers` hold no numbers here: they stand on the device "meta", and `torch.func.functional_call`
gives them the parameters of each call. Shapes: batch b, image side s, C channels, L tokens, feature_dim d.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from drrho_clip.errors import MissingExtra
from drrho_clip.models import NORM_EPSILON, ModelSpec, parameter_shapes
from drrho_core.backend import Parameters, Pullback
from drrho_torch.pullback import with_pullback


class HuggingFaceModel:
    """CLIP or SigLIP of `transformers`; see `drrho_core.backend.Model`.

    The encoders run as in evaluation, so dropout, which config.json may ask for, is off.

    Parameters
    ----------
    spec : ModelSpec
        The encoders, with architecture ``"hf"``.

    Raises
    ------
    ValueError
        If the architecture is another, or `transformers` refuses the configuration; in the methods, if images or texts
        do not have the shape of the spec.
    MissingExtra
        If the library `transformers` is not installed.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.hf_config is None:
            raise ValueError(f"architecture must be 'hf' for HuggingFaceModel, got {spec.architecture!r}")
        self.spec = spec
        self._module = _Features(_empty_model(spec))
        self._names = list(parameter_shapes(spec))

    def encode(self, parameters: Parameters, images: Tensor, texts: Tensor, /) -> tuple[Tensor, Tensor, Pullback]:
        """Return image features, text features, both (b, d), and the pullback of this call, to be called once."""
        own = {name: parameters[name] for name in self._names}
        return with_pullback(lambda leaves: (self._images(leaves, images), self._texts(leaves, texts)), own)

    def encode_images(self, parameters: Parameters, images: Tensor, /) -> Tensor:
        """Return features (b, d) of images (b, s, s, C)."""
        with torch.no_grad():
            return self._images(parameters, images)

    def encode_texts(self, parameters: Parameters, texts: Tensor, /) -> Tensor:
        """Return features (b, d) of tokens (b, L)."""
        with torch.no_grad():
            return self._texts(parameters, texts)

    def _images(self, parameters: Parameters, images: Tensor) -> Tensor:
        self.spec.check_images(images)
        # `transformers` expects the axes (b, C, s, s).
        return self._call(parameters, "get_image_features", pixel_values=images.permute(0, 3, 1, 2))

    def _texts(self, parameters: Parameters, texts: Tensor) -> Tensor:
        self.spec.check_texts(texts)
        return self._call(parameters, "get_text_features", input_ids=texts)

    def _call(self, parameters: Parameters, method: str, **inputs: Tensor) -> Tensor:
        """Return the features of a method of the module, divided by their length."""
        device = next(iter(inputs.values())).device
        values = {f"model.{name}": parameters[name] for name in self._names}
        # The positions 0, 1, ... are the only buffers of the modules.
        for name, buffer in self._module.named_buffers():
            values[name] = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        x: Tensor = torch.func.functional_call(self._module, values, (method,), inputs)
        return x / torch.sqrt(torch.sum(x * x, dim=1, keepdim=True) + NORM_EPSILON)


class _Features(nn.Module):
    """A module that calls a named method of a model: `functional_call` itself calls `forward` only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, **inputs: Tensor) -> Tensor:
        features: Tensor = getattr(self.model, method)(**inputs).pooler_output
        return features


def _empty_model(spec: ModelSpec) -> nn.Module:
    """Return the model of `transformers` without numbers: building it takes neither memory nor random draws."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("a Hugging Face model", "transformers", "hf") from None
    kinds: dict[str, tuple[Any, Any]] = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }
    build_config, build_model = kinds[spec.hf_sizes.kind]
    # `transformers` warns about token numbers that only matter for generating text.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        config = build_config.from_dict(dict(spec.hf_config or {}))
        # The eager attention of `transformers` computes its softmax in float32, also in a float64 run.
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model: nn.Module = build_model(config)
    # `transformers` raises errors of many classes for values that it does not know.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"hf_config must be a configuration that transformers accepts, got: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.eval()
