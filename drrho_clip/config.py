"""The settings of a training run: a field of `TrainConfig` holds the default, the rule and the help of each setting.

The command line makes an option of every field, `TrainConfig` checks the values when it is built, and config.json keeps
them. To add a setting, add a field here and read it where it takes effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from drrho_clip.constants import AUGMENTATIONS, FULL, LARGEST_DEPTH, ORDERS, RESIZE_MODES
from drrho_clip.errors import BadInput
from drrho_clip.method_words import defaults_in_words, methods_in_words
from drrho_clip.methods import BASIC, DEFAULTS, DISTILL, LOG_SCALE, METHODS
from drrho_clip.options import FLAG, TEXT, at_least, choice, nearest_name, number, setting, setting_of, word_or
from drrho_clip.processes.judge import RANK_TIMEOUT
from drrho_clip.setting_rules import check_together
from drrho_core import cosine_gamma
from drrho_core.backend import default_backend
from drrho_core.contrastive.ranks import FORMS
from drrho_core.state import HOMES
from drrho_core.state.temperatures import SCHEMES

BUILT_IN_DATA = ("scenes", "scenes:reference", "digits", "digits:reference")
"""Names of built-in data; ``X:reference`` has pairs for training a reference model, none of which is in ``X``."""

TABLE = "a table"
"""The key, in `Setting.presets`, of the defaults for data that are not built in."""

SEED = at_least(0, most=2**63 - 1)
"""The rule of a seed: the libraries store seeds in 64 bits, of which one is the sign."""

# Larger values would exhaust the memory long before the first step.
_SCENES, _SIDE, _DEPTH = at_least(2, most=10_000_000), at_least(1, most=4096), at_least(0, most=LARGEST_DEPTH)
AUTO = "auto"
"""The value of a setting whose number the run chooses itself."""

_POSITIVE = number("> 0", lambda value: value > 0)
_NOT_NEGATIVE = number(">= 0", lambda value: value >= 0)
_FINITE = number("a finite number", lambda _: True)
_METHOD = choice(*METHODS)._replace(words=f"one of {', '.join(BASIC)}, or {DISTILL} and one of these", metavar="METHOD")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; ``drrho train --help`` explains each setting.

    Raises
    ------
    BadInput
        If a value breaks the rule of the setting, or if the values of several settings contradict each other.

    Examples
    --------
    >>> TrainConfig(data="digits", method="sogclr", backend="numpy").temperature
    0.07
    """

    # Data and method.
    data: str = setting(
        rule=TEXT,
        metavar="FILE|NAME",
        shown="none; required without --resume",
        help="A table of images and captions (CSV, TSV, JSON Lines or Parquet), a folder of images with text files "
        "beside them, tar shards such as 'shards-{000..099}.tar', a data set that the library datasets saved on "
        "disk, a folder with the IDX files of Fashion-MNIST, an index (drrho index), or a built-in data set: "
        + ", ".join(BUILT_IN_DATA)
        + ".",
    )
    validation: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE",
        later=True,
        shown="a tenth of the images of --data",
        help="A table with the same columns for validation. It must not share images with --data.",
    )
    image_column: str | None = setting(
        None,
        rule=TEXT,
        later=True,
        shown="the usual names",
        help="Column of a table that holds the paths of the images.",
    )
    caption_column: str | None = setting(
        None, rule=TEXT, later=True, shown="the usual names", help="Column of a table that holds the captions."
    )
    label_column: str | None = setting(
        None, rule=TEXT, later=True, shown='"label" if there is one', help="Column of a table that holds the classes."
    )
    max_unreadable: float = setting(
        0.001,
        rule=number("in [0, 1]", lambda value: 0 <= value <= 1),
        later=True,
        help="Largest share of the images of --data that may be unreadable. Another pair takes the place of a training "
        "pair whose image turns out to be unreadable; with more unreadable images the run stops.",
    )
    order: str = setting(
        "full",
        rule=choice(*ORDERS),
        later=True,
        help="Order of the samples in an epoch: full (all are mixed) or blocks (blocks of samples that are stored side "
        "by side are mixed within a window, for slow disks).",
    )
    workers: int = setting(
        0,
        rule=at_least(0, most=1024),
        later=True,
        help="Number of processes that read images; 0: threads of the run. The batches do not depend on this number.",
    )
    method: str = setting(
        "drrho",
        rule=_METHOD,
        help=f"Objective: {methods_in_words()}.",
    )
    reference: str | None = setting(
        None,
        rule=TEXT,
        metavar="MODEL|CACHE",
        help="The reference model: the folder of a run, a cache of drrho encode, hf:DIR (a CLIP or SigLIP directory of "
        "Hugging Face) or open_clip:NAME. It is required for drrho and for distillation. Other methods use it "
        "only for the settings drop_suspects and anchor_weights.",
    )
    as_reference: bool = setting(
        False,
        rule=FLAG,
        later=True,
        help="The run is to become a reference model: stop as soon as it learns wrong captions by heart.",
    )
    drop_suspects: str | float | None = setting(
        None,
        rule=word_or(AUTO, number("in (0, 1)", lambda value: 0 < value < 1)),
        metavar="auto|SHARE",
        later=True,
        help="Leave out this share of the training pairs: those that fit worst by the reference model. auto: 1.25 "
        "times the share of held-out pairs that fit worse than random pairs.",
    )
    anchor_weights: str | None = setting(
        None,
        rule=choice("reference", "posterior"),
        later=True,
        help="Training pairs that fit badly by the reference model get a small weight in the loss. reference: a fixed "
        "function of the fit. posterior: the probability that the caption belongs to the image; it is estimated from "
        "all training pairs.",
    )
    init: str | None = setting(
        None,
        rule=TEXT,
        metavar="RUN",
        later=True,
        help="Folder of another run whose best parameters this run starts from. The encoders must have the same sizes; "
        "the tokenizer of that run is used.",
    )
    init_estimates: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE",
        later=True,
        help="File of another program, LibAUC or the released code of DRRho-CLIP, whose inner estimates this run "
        "starts from. The file has one row per training pair, or one row per pair of the whole data.",
    )
    model: str | None = setting(
        None,
        rule=TEXT,
        metavar="MODEL",
        later=True,
        shown="the encoders of the settings architecture, width and depth",
        help="hf:DIR, the directory of a CLIP or SigLIP of the Hugging Face hub: gives encoders, tokenizer, image "
        "sizes and the weights to start from. tiny, small, ViT-S-16, ViT-B-32, ViT-B-16, or a CLIPConfig in a file "
        "that ends in .json: a new CLIP of that size, with a tokenizer that is trained on the captions. "
        "features:CACHE: perceptrons over features that drrho encode has stored; with --depth 0 they are linear.",
    )
    from_scratch: bool = setting(
        False, rule=FLAG, later=True, help="Start from random numbers instead of the weights of the model."
    )
    # Random numbers, and the content of built-in data.
    seed: int = setting(0, rule=SEED, help="Seed of the initial parameters and of the order of the batches.")
    data_seed: int = setting(0, rule=SEED, help="Seed of built-in data and of the split of a table.")
    train_size: int = setting(20_000, rule=_SCENES, help="Number of rendered scenes in the training data.")
    swapped_fraction: float = setting(
        0.3,
        rule=number("in [0, 1]", lambda value: 0 <= value <= 1),
        presets={TABLE: 0.0},
        help="Share of the training captions of built-in data and of IDX files that are swapped with each other.",
    )
    # Optimisation.
    epochs: int = setting(
        8,
        rule=at_least(1),
        presets={"digits": 60},
        shown="8; digits 60; a table 8 to 60, the more the smaller it is; a third of these with --as-reference",
        help="Number of passes over the training data.",
    )
    batch_size: int = setting(
        256,
        rule=at_least(2),
        presets={"digits": 128},
        help="Pairs per step. A last batch of fewer pairs is dropped. For a small table the default is smaller.",
    )
    learning_rate: float | str = setting(
        1e-3,
        rule=word_or(AUTO, _POSITIVE),
        metavar="auto|NUMBER",
        shown="0.001; a table 0.003, without --as-reference",
        help="Highest learning rate. The rate rises to this value in a linear warm-up, then falls to 0 along a cosine. "
        "auto: take the best of three rates in short trials, by R@1 on the held-out pairs.",
    )
    warmup_steps: int | None = setting(
        None,
        rule=at_least(0),
        presets={"digits": 20, "scenes": 50},
        shown="warmup_share of all steps; digits 20; scenes 50",
        help="Number of steps of the warm-up.",
    )
    warmup_share: float = setting(
        0.1,
        rule=number("in [0, 1)", lambda value: 0 <= value < 1),
        later=True,
        help="Share of the steps of the run that is warm-up, unless warmup_steps is given.",
    )
    patience: int = setting(
        0,
        rule=at_least(0),
        later=True,
        help="Number of epochs without a better validation R@1 after which the training stops; 0: no early stop.",
    )
    weight_decay: float = setting(
        0.1, rule=_NOT_NEGATIVE, help="Weight decay of AdamW, for parameters with two or more axes."
    )
    augment: str | None = setting(
        None,
        rule=choice(*AUGMENTATIONS),
        later=True,
        shown="no augmentation",
        help="crop: each epoch shows a random part of each training image; crop-flip: half of the parts are mirrored.",
    )
    augment_area: float = setting(
        0.5,
        rule=number("in (0, 1]", lambda value: 0 < value <= 1),
        later=True,
        help="Smallest share of an image that a random part may have.",
    )
    clip_norm: float = setting(
        0.0, rule=_NOT_NEGATIVE, later=True, help="Largest norm of the gradient of all parameters; 0: no clipping."
    )
    ema: float = setting(
        0.0,
        rule=number("in [0, 1)", lambda value: 0 <= value < 1),
        later=True,
        help="Weight of the old value in a moving average of the parameters, such as 0.999. The average is evaluated "
        "and exported; 0: no average.",
    )
    micro_batch: int = setting(
        0,
        rule=at_least(0),
        later=True,
        help="Samples whose activations are in memory at a time; the results are those of the whole batch. 0: all.",
    )
    precision: str = setting(
        FULL,
        rule=choice(FULL, "bf16", "fp16"),
        later=True,
        help="Number type in which the encoders compute; parameters, optimiser and loss stay in float32.",
    )
    form: str = setting(
        "reduce",
        rule=choice(*FORMS),
        later=True,
        help="How several processes share a batch: reduce (every process holds all texts of the batch) or ring (texts "
        "travel from process to process, for batches that are too large for one device).",
    )
    # Temperature.
    temperature: float = setting(
        None,
        rule=_POSITIVE,
        shown=f"{defaults_in_words('temperature')}; that of a pretrained model",
        help="Temperature tau; if the temperature is learned, this is the value at the start.",
    )
    temperature_scheme: str = setting(
        None,
        rule=choice(*SCHEMES, LOG_SCALE),
        later=True,
        shown=defaults_in_words("temperature_scheme"),
        help="fixed: the temperature is not learned; global: one temperature, learned by an optimiser of its own; "
        "per_sample: one learned temperature per sample and direction (not for clip); log_scale: the logarithm of 1 / "
        "temperature is learned together with the parameters, as in CLIP.",
    )
    temperature_learning_rate: float = setting(
        None,
        rule=_NOT_NEGATIVE,
        later=True,
        shown=defaults_in_words("temperature_learning_rate"),
        help="Learning rate of the learned temperature; per_sample needs a rate about 10 times as high.",
    )
    temperature_min: float = setting(
        None,
        rule=_POSITIVE,
        later=True,
        shown=defaults_in_words("temperature_min"),
        help="Lower bound of a learned temperature.",
    )
    temperature_slow_below: float | None = setting(
        None,
        rule=_POSITIVE,
        later=True,
        shown=defaults_in_words("temperature_slow_below"),
        help="While a global temperature is at or below this number, a third of its learning rate is used.",
    )
    temperature_max: float = setting(1.0, rule=_POSITIVE, later=True, help="Upper bound of a learned temperature.")
    radius: float = setting(
        None,
        rule=_NOT_NEGATIVE,
        later=True,
        shown=defaults_in_words("radius"),
        help="Size of the ambiguity set, the set of distributions over which the worst case is taken. If sogclr or "
        "drrho learns the temperature, the radius must be above 0 and should be below the logarithm of the batch size. "
        "Otherwise the radius must be 0.",
    )
    # Inner estimates and reference model, for sogclr and drrho.
    gamma_min: float = setting(
        None,
        rule=number("> 0 and at most 1", lambda value: 0 < value <= 1),
        shown=defaults_in_words("gamma_min"),
        help="Last value of gamma, the weight of the new value in an inner estimate (a running average). Gamma falls "
        "from 1 along a cosine. If gamma is 1, an estimate forgets all earlier values.",
    )
    gamma_schedule: str = setting(
        None,
        rule=choice("epoch", "step", "constant"),
        later=True,
        shown=defaults_in_words("gamma_schedule"),
        help="epoch: gamma falls along the cosine after each epoch; step: after each step; constant: gamma is always "
        "gamma_min.",
    )
    gamma_share: float = setting(
        None,
        rule=number("in (0, 1]", lambda value: 0 < value <= 1),
        later=True,
        shown=defaults_in_words("gamma_share"),
        help="Share of the epochs after which gamma has reached gamma_min.",
    )
    estimator: str = setting(
        "device",
        rule=choice(*HOMES),
        later=True,
        help="Place of the inner estimates: device (the memory of the library's device), host (the memory of the "
        "computer), file (a file in the folder of the run) or split (several processes store a part each on their "
        "device, of temperatures per sample, too). The results do not depend on the place.",
    )
    log_alpha: float = setting(
        10.0,
        rule=_FINITE,
        later=True,
        help="Logarithm of the step size alpha of scent: the larger, the closer gamma is to 1.",
    )
    super_batch: int = setting(
        None,
        rule=at_least(1, most=1000),
        later=True,
        shown=defaults_in_words("super_batch"),
        help="Batches from which rho, jest and jest-topk choose one batch.",
    )
    jest_chunks: int = setting(16, rule=at_least(1), later=True, help="Parts in which jest and jest-topk choose.")
    bias: float = setting(
        None,
        rule=_FINITE,
        later=True,
        shown=f"{defaults_in_words('bias')}; that of a pretrained model",
        help="Start value of the learned bias of siglip.",
    )
    distillation_weight: float = setting(
        1.0, rule=_NOT_NEGATIVE, later=True, help="Weight of the distillation loss in the methods distill:METHOD."
    )
    reference_temperature: float | None = setting(
        None,
        rule=_POSITIVE,
        later=True,
        shown="the temperature of the reference model",
        help="Temperature of the reference model's softmax in the methods distill:METHOD.",
    )
    reference_weight: float = setting(
        1.0, rule=_NOT_NEGATIVE, help="Weight lambda of the reference model in drrho: 0 ignores the model, 1 is DRRho."
    )
    eps: float = setting(
        0.0, rule=_NOT_NEGATIVE, help="Constant that the loss adds to an inner estimate before taking the logarithm."
    )
    # Encoders.
    architecture: str = setting(
        "conv",
        rule=choice("mlp", "conv"),
        presets={"digits": "mlp"},
        help="Encoders: conv (convolutions for images, a transformer for texts) or mlp (two multilayer perceptrons). "
        "A backend without conv uses mlp.",
    )
    image_size: int = setting(
        32, rule=_SIDE, presets={"digits": 8, TABLE: 64}, help="Side of the square images that the encoder reads."
    )
    resize: str = setting(
        "crop",
        rule=choice(*RESIZE_MODES),
        later=True,
        help="How images become square: crop (the central square; what lies outside is lost) or fit (the whole image "
        "between grey borders).",
    )
    feature_dim: int = setting(64, rule=at_least(1), help="Number of features of an image or a text.")
    width: int = setting(
        32, rule=at_least(1), help="Scale of the encoders: the sizes of all hidden layers are multiples of this number."
    )
    depth: int = setting(
        2,
        rule=_DEPTH,
        help="Number of blocks of the text transformer, or of hidden layers of a perceptron; 0 only for heads over "
        "stored features.",
    )
    # Library, dtype and files.
    backend: str = setting(
        rule=TEXT,
        default_factory=default_backend,
        shown="the preferred library of those installed",
        help="Array library.",
    )
    dtype: str = setting("float32", rule=choice("float32", "float64"), help="Floating dtype of the run.")
    checkpoint_every: int = setting(
        200, rule=at_least(1), help="Steps between two checkpoints; a checkpoint is also written after each epoch."
    )
    keep_last: int = setting(
        1,
        rule=at_least(1),
        later=True,
        help="Number of the last checkpoints that stay: the last, and before it checkpoint-stepN.safetensors.",
    )
    rank_timeout: float = setting(
        RANK_TIMEOUT,
        rule=number("in [1, 604800]", lambda value: 1 <= value <= 604_800),
        later=True,
        metavar="SECONDS",
        help="Seconds without progress after which one of several processes counts as hanging, and all of them stop; "
        "three times as many before the end of the first step.",
    )
    log_every: int = setting(10, rule=at_least(1), help="Steps between two lines of metrics.jsonl.")
    tensorboard: bool = setting(
        False,
        rule=FLAG,
        later=True,
        help="Write the lines of metrics.jsonl for TensorBoard as well, in OUT/tensorboard.",
    )
    wandb: str | None = setting(
        None,
        rule=TEXT,
        metavar="PROJECT",
        later=True,
        help="Project of Weights & Biases that gets the lines of metrics.jsonl as well, if wandb is installed.",
    )

    left_out: ClassVar[frozenset[str]] = frozenset()
    """The settings, of those whose default depends on the method, that were left out when the object was built."""

    def __post_init__(self) -> None:
        # Settings that the user has not named get the defaults of the method; a wrong method is refused below.
        changed = METHODS[self.method].defaults if self.method in METHODS else {}
        object.__setattr__(self, "left_out", frozenset(name for name in DEFAULTS if getattr(self, name) is None))
        for name in self.left_out:
            object.__setattr__(self, name, (DEFAULTS | dict(changed))[name])
        # The rule of each field is checked first, then the rules that hold for several fields together.
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                setting_of(option).rule.check(option.name, value)
        self._check_data()
        check_together(self)

    def _check_data(self) -> None:
        """Raise BadInput if a separate table is given for data that have a validation part of their own."""
        if self.data in BUILT_IN_DATA and self.validation is not None:
            raise BadInput(f"validation must be left out for built-in data, got {self.validation!r}")

    def to_json(self) -> dict[str, Any]:
        """Return all settings as a dictionary of numbers, strings and None."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build settings from the result of `to_json`, of this version or of an earlier one.

        A setting that the earlier version lacks gets the default, with which the run behaves as in that version.

        Raises
        ------
        BadInput
            If a setting is unknown, missing or bad.
        """
        later = {option.name for option in fields(cls) if setting_of(option).later}
        known = {option.name for option in fields(cls)}
        unknown = sorted(set(values) - known)
        differences = sorted((known - set(values) - later) | set(unknown))
        if differences:
            names = f"{', '.join(differences)}{nearest_name(unknown[0], known) if unknown else ''}"
            raise BadInput(f"the settings of a run must be those of this version, got a difference in {names}")
        return cls(**values)

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of a step (counted from 0): linear warm-up, then half a cosine to 0."""
        rate = float(self.learning_rate)
        warmup = round(self.warmup_share * total_steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def gamma_at(self, step: int, steps_per_epoch: int) -> float:
        """Return gamma, the weight of the new value in an inner estimate, at a step (counted from 0)."""
        if self.gamma_schedule == "constant":
            return self.gamma_min
        epoch = step // steps_per_epoch if self.gamma_schedule == "epoch" else step / steps_per_epoch
        return cosine_gamma(epoch, num_epochs=self.epochs * self.gamma_share, gamma_min=self.gamma_min)
