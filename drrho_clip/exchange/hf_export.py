"""A run as a Hugging Face directory: `transformers` reads from it a model with the features of the run."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer, ImageProcessor
from drrho_clip.errors import BadInput
from drrho_clip.exchange.hf_directory import WEIGHTS
from drrho_clip.exchange.start_values import bias_of_start
from drrho_clip.files.disk import write_atomic
from drrho_clip.files.outputs import check_folder, write_json
from drrho_clip.run import Run
from drrho_clip.run.temperature_figures import learned_bias_of, temperature_of
from drrho_clip.terminal.printing import say

__all__ = ["check_export", "export_to_hugging_face"]

# The classes of `transformers`, by the kind of the model.
_PROCESSORS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}
_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
# SigLIP was trained without a mask of the padding, so a tokenizer that returns a mask would change the features.
_INPUTS = {"clip": ("input_ids", "attention_mask"), "siglip": ("input_ids",)}


def check_export(run: Run, folder: Path) -> HuggingFaceTokenizer:
    """Return the tokenizer of a run; raise BadInput unless the run can be exported into a folder, new or empty."""
    tokenizer = run.tokenizer
    if run.spec.hf_config is None or not isinstance(tokenizer, HuggingFaceTokenizer):
        raise BadInput(
            f"run must have the encoders of a Hugging Face model (drrho train --model), got {run.folder} with the "
            f"architecture {run.spec.architecture}"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"out must be a new or empty folder, got {folder} with {min(os.listdir(folder))}")
    check_folder(folder, "out")
    return tokenizer


def export_to_hugging_face(run: Run, folder: Path, *, state: str = "best") -> None:
    """Write configuration, weights, tokenizer and image processor of a run, all of them or none.

    Parameters
    ----------
    run : Run
        A run with the architecture ``"hf"``.
    folder : Path
        A new or empty folder.
    state : {"best", "last", "reference"}
        The state whose parameters are written. The scale of the logits is the reciprocal of the temperature.

    Raises
    ------
    BadInput
        If the run has another architecture, if the folder holds a file, or if the checkpoint is missing or damaged.
    """
    tokenizer = check_export(run, folder)
    kind, text = run.spec.hf_sizes.kind, tokenizer.text
    weights = run.load_parameters(state) | _constants(run, state)
    config = {**(run.spec.hf_config or {}), "architectures": [_CLASSES[kind]], "dtype": run.config.dtype}
    processor = ImageProcessor.from_json(run.spec.image_processor or {})
    # All files are written into a folder beside the final place, which gets its name at the end.
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_json(temporary / "config.json", config, indent=2)
        write_json(temporary / "preprocessor_config.json", _processor_config(processor, kind), indent=2)
        write_json(temporary / "tokenizer_config.json", _tokenizer_config(run, tokenizer), indent=2)
        write_atomic(temporary / "tokenizer.json", text.encode())
        # `transformers` refuses files without this entry.
        write_atomic(temporary / WEIGHTS, safetensors.numpy.save(_in_order(weights), metadata={"format": "pt"}))
        # An empty folder would stand in the way.
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _constants(run: Run, state: str) -> dict[str, np.ndarray]:
    """Return the numbers that `transformers` needs for logits: a scale, and for SigLIP a bias."""
    # The logits of `transformers` are cosines multiplied by exp(logit_scale).
    scale = np.float32(math.log(1.0 / temperature_of(run, state)))
    if run.spec.hf_sizes.kind == "clip":
        return {"logit_scale": np.asarray(scale)}
    bias = learned_bias_of(run, state)
    if bias is None:
        bias = _bias_of_start(run)
    return {"logit_scale": np.asarray([scale]), "logit_bias": np.asarray(bias, np.float32).reshape(1)}


def _bias_of_start(run: Run) -> float:
    """Return the bias of the encoders with which a run started; 0 with a warning if it is no longer there."""
    try:
        return bias_of_start(run) or 0.0
    # The features do not depend on the bias, so the export goes on.
    except BadInput as error:
        say(f"warning: logit_bias is 0, because the bias of the start cannot be read: {error}", stream=sys.stderr)
        return 0.0


def _processor_config(processor: ImageProcessor, kind: str) -> dict[str, Any]:
    """Return the content of preprocessor_config.json."""
    resizes = processor.shortest_edge is not None or processor.height > 0
    size = {"height": processor.height, "width": processor.width}
    if processor.shortest_edge is not None:
        size = {"shortest_edge": processor.shortest_edge}
    crop = {"height": processor.image_size, "width": processor.image_size}
    # `transformers` would use its default for a size that is missing, so only unused sizes are left out.
    return {
        "image_processor_type": _PROCESSORS[kind],
        "do_convert_rgb": True,
        "do_resize": resizes,
        "do_center_crop": processor.crops,
        "do_rescale": True,
        "do_normalize": True,
        **({"size": size} if resizes else {}),
        **({"crop_size": crop} if processor.crops else {}),
        "resample": processor.resample,
        "rescale_factor": processor.scale,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }


def _in_order(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    # safetensors copies the memory of an array unchanged, so every array must be in C order.
    return {name: np.array(array, order="C", copy=None) for name, array in weights.items()}


def _tokenizer_config(run: Run, tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, with the class that reads tokenizer.json as it is."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "pad_token": tokenizer.padding,
        "padding_side": "right",
        "model_input_names": list(_INPUTS[run.spec.hf_sizes.kind]),
    }
    numbers = (run.spec.hf_config or {}).get("text_config") or {}
    # Programs that generate text ask for these tokens; the numbers of the tokens are in the text configuration.
    for name in ("bos_token", "eos_token"):
        if (token := tokenizer.token_of(numbers.get(f"{name}_id"))) is not None:
            config[name] = token
    return config
