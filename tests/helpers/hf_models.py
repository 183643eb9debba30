"""Whole directories of small Hugging Face models, written by `transformers` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.hf_directories import CONTEXT, SIDE, image_processor_file, tokenizer_files


def hf_config(kind: str, vocabulary_size: int, end_token: int, **changes: Any) -> dict[str, Any]:
    """Return the content of a small config.json."""
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": vocabulary_size,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": end_token,
        "bos_token_id": 0,
        "pad_token_id": end_token,
    }
    config: dict[str, Any] = {
        "model_type": kind,
        "text_config": tower | text,
        "vision_config": tower | {"image_size": SIDE, "patch_size": 8},
    }
    return config | ({"projection_dim": 12} if kind == "clip" else {}) | changes


def write_hf_directory(folder: Path, kind: str = "clip", *, seed: int = 0, **changes: Any) -> Any:
    """Write configuration, weights, tokenizer and image processor; return the model of `transformers`."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_files(folder, kind)
    image_processor_file(folder, kind)
    config = hf_config(kind, len(tokenizer), tokenizer.eos_token_id, **changes)
    classes: dict[str, tuple[Any, Any]] = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }
    build_config, build_model = classes[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(build_config.from_dict(config)).eval()
    model.save_pretrained(folder)
    return model
