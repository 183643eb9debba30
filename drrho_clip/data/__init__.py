"""Data sets, preprocessing, tokens and batches.

Three families of data sets follow one protocol: rendered scenes, scikit-learn's digits, and the user's own images and
captions (a table, a folder, tar shards, or an index of these). Rendering scenes
needs NumPy only. The library `tokenizers` splits captions, scikit-learn has the digits, and Pillow reads image files;
the extra `train` installs these three.
"""

from __future__ import annotations

from drrho_clip.data.arrays import ArrayDataset, exchange_captions, swap_captions
from drrho_clip.data.digits import digit_splits, digits
from drrho_clip.data.division import pair_splits
from drrho_clip.data.index import open_index
from drrho_clip.data.labels import label_key
from drrho_clip.data.loader import BatchSource, HostBatch, batches
from drrho_clip.data.pairs import DEFAULT_PROMPT, PairsDataset, read_pairs
from drrho_clip.data.preprocess import normalise, resize, to_channels
from drrho_clip.data.protocol import (
    Dataset,
    DataSplits,
    Sample,
    Tokenizer,
    UnreadableImage,
    ZeroShot,
    captions_of,
    channels_of,
    first_rows,
    image_names,
)
from drrho_clip.data.scenes import scene_splits, scenes
from drrho_clip.data.sources import open_data
from drrho_clip.data.tokenizer import LONGEST_CONTEXT, WordTokenizer, same_text
from drrho_clip.data.unreadable import readable_rows

__all__ = [
    "DEFAULT_PROMPT",
    "LONGEST_CONTEXT",
    "ArrayDataset",
    "BatchSource",
    "DataSplits",
    "Dataset",
    "HostBatch",
    "PairsDataset",
    "Sample",
    "Tokenizer",
    "UnreadableImage",
    "WordTokenizer",
    "ZeroShot",
    "batches",
    "captions_of",
    "channels_of",
    "digit_splits",
    "digits",
    "exchange_captions",
    "first_rows",
    "image_names",
    "label_key",
    "normalise",
    "open_data",
    "open_index",
    "pair_splits",
    "read_pairs",
    "readable_rows",
    "resize",
    "same_text",
    "scene_splits",
    "scenes",
    "swap_captions",
    "to_channels",
]
