"""The directory of a Hugging Face model: config.json, tokenizer.json, the settings of the images, and the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer, ImageProcessor, read_model_config
from drrho_clip.errors import BadInput
from drrho_clip.files.json_files import read_json
from drrho_clip.models import ModelSpec, parameter_shapes
from drrho_clip.terminal.safe_text import brief

__all__ = ["WEIGHTS", "HuggingFaceDirectory", "open_hf_directory", "read_weights"]

WEIGHTS = "model.safetensors"
"""The file of the weights, if they are not divided into several files."""

# The training has a temperature of its own, and the positions 0, 1, ... are no weights.
_CONSTANTS = ("logit_scale", "logit_bias", "position_ids")

# safetensors writes numbers with the lowest byte first, on every machine.
_DTYPES: dict[str, Any] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


class HuggingFaceDirectory(NamedTuple):
    """The parts of a Hugging Face directory that are not weights.

    Attributes
    ----------
    folder : Path
        The directory.
    spec : ModelSpec
        The encoders, and the way in which they read images.
    tokenizer : HuggingFaceTokenizer
        The tokenizer of the text encoder.
    """

    folder: Path
    spec: ModelSpec
    tokenizer: HuggingFaceTokenizer


def open_hf_directory(folder: str | Path) -> HuggingFaceDirectory:
    """Read configuration, tokenizer and image processor of a CLIP or SigLIP directory; the weights are not read.

    Raises
    ------
    BadInput
        If a file is missing or damaged, if the model is of another kind, or if the files do not fit together.
    MissingExtra
        If the library `tokenizers` is not installed.
    """
    # Every file has a message of its own; the cheap files come first, and nothing else is read here.
    folder = Path(folder)
    config = read_model_config(folder)
    processor = ImageProcessor.read(folder)
    try:
        spec = ModelSpec.of_hugging_face(config, processor.to_json())
    except BadInput as error:
        raise BadInput(f"{folder / 'config.json'}: {error}") from None
    if processor.image_size != spec.image_size:
        raise BadInput(
            f"{folder}: the image processor must give images of the size {spec.image_size} of config.json, got "
            f"{processor.image_size}"
        )
    tokenizer = HuggingFaceTokenizer.read(folder)
    check_tokenizer(tokenizer, spec, str(folder))
    return HuggingFaceDirectory(folder, spec, tokenizer)


def check_tokenizer(tokenizer: HuggingFaceTokenizer, spec: ModelSpec, owner: str) -> None:
    """Raise BadInput unless the text encoder can read the tokens of a tokenizer; `owner` has both."""
    if tokenizer.vocabulary_size > spec.vocabulary_size:
        raise BadInput(
            f"{owner}: the tokenizer must have at most {spec.vocabulary_size} tokens (vocab_size), got "
            f"{tokenizer.vocabulary_size}"
        )
    # Without this token every text would get the feature of the first token, which is equal for all texts.
    end = spec.hf_sizes.end_token
    if spec.hf_sizes.kind == "clip" and end != 2 and end not in tokenizer.encode(["a"]):
        raise BadInput(f"{owner}: the tokenizer must end a text with the token eos_token_id ({end}), got other tokens")


def read_weights(folder: str | Path, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Read the weights of a Hugging Face directory.

    Parameters
    ----------
    folder : path
        The directory, with model.safetensors or with model.safetensors.index.json and the files named there.
    spec : ModelSpec
        The encoders of the directory.

    Returns
    -------
    dict of str to ndarray
        The parameters by name, float32 or float64, in the order of `parameter_shapes`.

    Raises
    ------
    BadInput
        If a file is missing or damaged, if a weight is missing, unknown, of another shape or dtype, or not finite.
    """
    folder = Path(folder)
    shapes = parameter_shapes(spec)
    weights: dict[str, np.ndarray] = {}
    for file in _files(folder):
        for name, array in _tensors(file):
            if name.rpartition(".")[2] in _CONSTANTS:
                continue
            if name not in shapes:
                raise BadInput(f"{file} must hold the weights of config.json, got another weight {brief(name)}")
            if array.shape != shapes[name]:
                raise BadInput(f"{file}: {name} must have shape {shapes[name]}, got {array.shape}")
            if not np.isfinite(array).all():
                raise BadInput(f"{file}: {name} must be finite, got numbers that are not")
            weights[name] = array
    # A random number in place of a missing weight would be a fault that no message names.
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise BadInput(
            f"{folder} must hold all weights of config.json, got no {missing[0]} ({len(missing)} are missing)"
        )
    return {name: weights[name] for name in shapes}


def read_constant(folder: str | Path, name: str) -> float | None:
    """Return logit_scale or logit_bias of a directory, or None if the weights have no such number."""
    for file in _files(Path(folder)):
        for tensor, array in _tensors(file):
            if tensor == name and array.size == 1:
                return float(array.reshape(()))
    return None


def _files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if not (folder / WEIGHTS).exists() and index.exists():
        places = read_json(index, "the index of the weights")
        places = places.get("weight_map") if isinstance(places, Mapping) else None
        if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
            raise BadInput(f"{index} must have a weight_map with names of files, got {brief(places)}")
        # Only files of the directory itself are read.
        return [folder / Path(name).name for name in dict.fromkeys(places.values())]
    return [folder / WEIGHTS]


def _tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of a safetensors file; NumPy has no bfloat16, so such numbers become float32."""
    if not file.is_file():
        raise BadInput(
            f"{file} must hold the weights, got no such file; with transformers, "
            "AutoModel.from_pretrained(DIR).save_pretrained(DIR) writes it"
        )
    try:
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, OSError) as error:
        raise BadInput(f"{file} must be an undamaged safetensors file, got: {str(error).splitlines()[0]}") from None
    for name, entry in entries:
        if name.rpartition(".")[2] == "position_ids":
            continue
        yield name, _array(file, name, entry)


def _array(file: Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    data, kind = entry["data"], entry["dtype"]
    if kind == "BF16":
        # A bfloat16 is the upper half of a float32.
        array: np.ndarray = (np.frombuffer(data, np.dtype("<u2")).astype(np.uint32) << 16).view(np.float32)
    elif kind in _DTYPES:
        wide: np.ndarray = np.frombuffer(data, _DTYPES[kind])
        array = wide.astype(np.float32) if kind == "F16" else wide
    else:
        raise BadInput(f"{file}: {name} must be F64, F32, F16 or BF16, got {brief(kind)}")
    return array.reshape(entry["shape"])
