"""How much memory a training run needs, from the settings and the sizes alone.

The parts, in bytes, with n_all pairs in all splits, n training pairs, b pairs per batch, P parameters in A arrays, w
bytes per number, i + a numbers per pair (`activations_per_pair`: i for input and features, a for the layers), r
features of the reference model:

    images              n_all s s C                 all images in memory, as bytes; 0 if they stay on the disk; with
                                                `--augment` on a table the originals, at most 2 GiB
    parameters          P w
    optimiser           2 P w                       both moments of AdamW
    gradients           P w
    update              u P w                       new parameters and moments beside the old ones; temporary arrays
    activations         f w (b i + m h a)           m pairs per micro-batch, m = b without; h = 0.55 for half types
    super-batch         f w (c i + m h g), as far as it is above the activations; see below
    batch               2 f b b w                   similarities and weights of all pairs of a batch; with
                                                micro-batches only the excess over their activations
    moving average      4 P w                       the average before and after a step, and the copy in a checkpoint
    checkpoint          6 P w - min(3 P w, t)       a copy of parameters and moments, and the content of the file;
                                                t: activations, super-batch and batch together
    inner estimates     2 n w                       with `--estimator split` n / W in place of n
    temperatures        4 n w                       the same, temperatures per sample and their momenta
    reference features  2 n r w
    exchange            with W ranks that share each batch; see below
    library             fixed + A per_array         memory that the library takes at the first step; encoders of Hugging
                                                    Face take hf_fixed more

With W ranks (processes that train together) b is the number of the own pairs, B = W b, and everything but the batch is
as with one rank. The logits of the own images take 2 f b B w bytes in the form reduce, 2 f b b w in the form ring. The
exchange takes P w bytes for the gradients in one message, and

    reduce    (2 d + r) B w     features of all texts, then their gradients, as blocks and joined
    ring      (9 d + 6 r) b w   texts and gradients of the own rank and of another, in messages and beside them

A method that selects first encodes a super-batch of c pairs without a gradient, which takes g numbers per pair for the
widest layer. The super-batch stays in memory during the step of the chosen pairs.

The parts are added, although a checkpoint is written between two steps: the allocator of the process keeps the memory
of a step. The copy of the state is made of blocks that fit into the memory of the activations, which are gone by then;
the content of the file is a single block, for which the allocator asks for new memory. The properties of the libraries
(u, f, fixed, per_array, hf_fixed: `drrho_core.backend.WorkingMemory`) were measured on the CPU with
`benchmarks/memory.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.constants import FULL
from drrho_clip.epoch_length import pairs_per_step
from drrho_clip.methods import METHODS
from drrho_clip.models import ModelSpec, parameter_shapes
from drrho_core.backend import Backend, WorkingMemory

__all__ = ["DataSizes", "MemoryPart", "activations_per_pair", "memory_of_run", "parameter_count"]

# Measured: a layer in a half type needs a little more than half of the memory, because the weights are there twice.
_HALF = 0.55


class DataSizes(NamedTuple):
    """The sizes of the data of a run, by the names of the arguments of `memory_of_run`."""

    num_pairs: int
    num_images: int = 0
    original_bytes: int = 0
    reference_features: int | None = None


class MemoryPart(NamedTuple):
    """A part of the memory of a run: a name and a number of bytes."""

    name: str
    num_bytes: int


def memory_of_run(
    config: TrainConfig,
    spec: ModelSpec,
    backend: Backend,
    *,
    num_pairs: int,
    num_images: int,
    original_bytes: int = 0,
    reference_features: int | None = None,
    num_ranks: int = 1,
    form: str = "reduce",
) -> list[MemoryPart]:
    """Return the parts of the memory that a run needs at the peak, beyond the imported libraries.

    Parameters
    ----------
    config : TrainConfig
        The settings.
    spec : ModelSpec
        The sizes of the encoders.
    backend : Backend
        The array library.
    num_pairs : int
        Number n of training pairs.
    num_images : int
        Number of images that the run keeps in memory, in the size of the model.
    original_bytes : int
        Bytes of the images that the run keeps in memory in their original size.
    reference_features : int, optional
        Number r of features of the reference model, if the method uses the features.
    num_ranks : int
        Number W of processes that train together; W divides the batch.
    form : {"reduce", "ring"}
        The way in which the processes share a batch; see `drrho_core.sharded_contrastive_step`.

    Returns
    -------
    list of MemoryPart
        Parts of at least one byte, whose sum is the peak.
    """
    library = getattr(backend, "working_memory", WorkingMemory())
    hf_fixed = library.hf_fixed if spec.architecture == "hf" else 0.0
    item = 8 if config.dtype == "float64" else 4
    parameters = item * parameter_count(spec)
    batch_size = config.batch_size // num_ranks
    scale = library.activation_factor * item
    kept, layers = _kept_per_pair(spec), activations_per_pair(spec) - _kept_per_pair(spec)
    half = 1.0 if config.precision == FULL else _HALF
    together = min(config.micro_batch or batch_size, batch_size)
    step, selection = batch_size * kept + together * half * layers, 0.0
    # Micro-batches keep nothing of the layers while the loss is computed.
    matrices = 2.0 * batch_size * (batch_size if form == "ring" else config.batch_size)
    if config.micro_batch:
        matrices = max(0.0, matrices - together * half * layers)
    if config.super_batch > 1:
        drawn = pairs_per_step(config) // num_ranks
        step += drawn * kept
        # The super-batch passes the encoders at once, unless there are micro-batches.
        at_once = min(config.micro_batch or drawn, drawn)
        # Every rank compares all pairs of the super-batch.
        similarities = 4.0 * pairs_per_step(config) ** 2
        selection = drawn * kept + max(at_once * half * _widest_layer(spec), similarities)
    passed = [round(scale * count) for count in (step, max(0.0, selection - step), matrices)]
    # Each process stores the numbers of all samples, or of its part.
    stored = -(-num_pairs // num_ranks) if config.estimator == "split" else num_pairs
    parts = {
        "images": num_images * spec.image_size**2 * spec.channels + original_bytes,
        "parameters": parameters,
        "optimiser": 2 * parameters,
        "gradients": parameters,
        "update": round(library.update_factor * parameters),
        "activations": passed[0],
        "super-batch": passed[1],
        "batch": passed[2],
        "moving average": 4 * parameters if config.ema > 0 else 0,
        # Three numbers per parameter are copied once, into memory that the step has left, and serialised once.
        "checkpoint": 2 * 3 * parameters - min(3 * parameters, sum(passed)),
        "inner estimates": 2 * item * stored if METHODS[config.method].keeps_estimates else 0,
        "temperatures": 4 * item * stored if config.temperature_scheme == "per_sample" else 0,
        "reference features": 2 * item * num_pairs * (reference_features or 0),
        "exchange": item * _exchanged(spec, batch_size, reference_features or 0, num_ranks, form),
        "library": round(library.fixed + hf_fixed + library.per_array * len(parameter_shapes(spec))),
    }
    return [MemoryPart(name, size) for name, size in parts.items() if size > 0]


def _exchanged(spec: ModelSpec, num_local: int, reference_dim: int, num_ranks: int, form: str) -> int:
    """Return how many numbers the messages of a step need; none without other ranks."""
    if num_ranks == 1:
        return 0
    if form == "ring":
        texts = (9 * spec.feature_dim + 6 * reference_dim) * num_local
    else:
        texts = (2 * spec.feature_dim + reference_dim) * num_local * num_ranks
    return parameter_count(spec) + texts


def parameter_count(spec: ModelSpec) -> int:
    """Return the number P of parameters of a pair of encoders."""
    return sum(math.prod(shape) for shape in parameter_shapes(spec).values())


def activations_per_pair(spec: ModelSpec) -> int:
    """Return how many numbers a step keeps of one pair, in both encoders, at the start of the backward pass.

    Examples
    --------
    >>> spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, width=16, depth=1)
    >>> activations_per_pair(spec)
    660
    """
    inputs, features = _inputs_per_pair(spec), 4 * spec.feature_dim
    if spec.stored_features is not None:
        # Heads read rows of stored features, which are there twice like other inputs.
        rows = 2 * (spec.stored_features["image"] + spec.stored_features["text"])
        return int(rows) + 2 * spec.depth * 2 * spec.hidden + features
    if spec.architecture == "mlp":
        # Each layer of each tower keeps its output; the gradient of the output is as large.
        return inputs + spec.vocabulary_size + 2 * spec.depth * 2 * spec.hidden + features
    if spec.architecture == "hf":
        sizes = spec.hf_sizes
        towers = ((sizes.grid**2 + 1, sizes.image), (sizes.context_length, sizes.text))
        blocks = sum(_transformer(tokens, tower.width, tower.depth, tower.heads) for tokens, tower in towers)
        return inputs + blocks + features
    side, count = spec.image_size, 0
    for channels in (spec.width, 2 * spec.width, 4 * spec.width):
        side = (side + 1) // 2
        count += 2 * side * side * channels
    text = _transformer(spec.context_length, spec.text_width, spec.depth, spec.heads)
    return inputs + count + text + features


def _inputs_per_pair(spec: ModelSpec) -> int:
    # The batch is there twice: as NumPy made it, and as an array of the library.
    return 2 * spec.image_size**2 * spec.channels


def _kept_per_pair(spec: ModelSpec) -> int:
    """Return how many numbers of a pair are in memory whatever the size of the micro-batches: input and features."""
    return _inputs_per_pair(spec) * (spec.stored_features is None) + 4 * spec.feature_dim


def _widest_layer(spec: ModelSpec) -> int:
    """Return how many numbers the encoders need at a time for a pair whose gradient is not asked for."""
    if spec.architecture == "conv":
        # The first stage is the widest: its input, its output and a temporary array.
        side = (spec.image_size + 1) // 2
        return 3 * side * side * spec.width
    if spec.architecture == "hf":
        sizes = spec.hf_sizes
        return max(
            _transformer(sizes.grid**2 + 1, sizes.image.width, 1, sizes.image.heads),
            _transformer(sizes.context_length, sizes.text.width, 1, sizes.text.heads),
        )
    return 3 * spec.hidden


def _transformer(tokens: int, width: int, depth: int, heads: int) -> int:
    """Return the numbers that the blocks of a transformer keep of a row of tokens.

    A block keeps about 17 numbers per token and unit of width: two inputs and two outputs of norms, queries, keys and
    values twice, the output of the attention twice, and the hidden units before and after the activation; and two
    numbers per head and pair of tokens: the scores and their softmax. Source of the count: Korthikanti et al.,
    "Reducing activation recomputation in large transformer models" (2022, arXiv 2205.05198), equation 1, which has 34
    bytes at 2 bytes per number.
    """
    return depth * tokens * (17 * width + 2 * heads * tokens)
