"""Small directories of Hugging Face models, written by `transformers` itself."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

SIDE = 16
CONTEXT = 12


def tokenizer_files(folder: Path, kind: str = "clip", *, context: int = CONTEXT) -> Any:
    """Write a tokenizer, and return the tokenizer of `transformers`."""
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits
    if kind == "clip":
        signs = [
            "<|startoftext|>",
            "<|endoftext|>",
            *letters,
            *(f"{letter}</w>" for letter in letters),
            "re",
            "red</w>",
        ]
        vocabulary = {sign: number for number, sign in enumerate(signs)}
        merges = [("r", "e"), ("re", "d</w>")]
        tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context)
    else:
        # The tokenizers of SigLIP pad with the token that ends a caption, and have no token for the start.
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers, processors

        words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", *letters[1:]]
        library = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        library.normalizer = normalizers.Lowercase()
        library.pre_tokenizer = pre_tokenizers.Whitespace()
        library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=library, pad_token="</s>", eos_token="</s>", unk_token="<unk>", model_max_length=context
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def image_processor_file(folder: Path, kind: str = "clip", **changes: Any) -> Any:
    """Write preprocessor_config.json, and return the image processor of `transformers`."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    if kind == "clip":
        values: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        processor: Any = CLIPImageProcessorPil(**(values | changes))
    else:
        processor = SiglipImageProcessorPil(**({"size": {"height": SIDE, "width": SIDE}} | changes))
    processor.save_pretrained(folder)
    return processor


def config_file(folder: Path, kind: str = "clip", *, context: int = CONTEXT) -> None:
    """Write a config.json that is enough for the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": kind, "text_config": {"max_position_embeddings": context}}
    (folder / "config.json").write_text(json.dumps(content))
