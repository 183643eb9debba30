"""DRRho's losses for the Trainer of transformers, which needs the extra ``hf``.

`transformers.Trainer` takes a function for the loss, ``compute_loss_func(outputs, labels)``, and callbacks. The label
of a pair is the row of the pair in the data set, so the loss finds the estimates of the pair. `TrainerSteering` is
both, function and callback. No part of it belongs to the model, so the exported model contains no estimates.

`TokenRiskTrainer` trains causal language models with the DRRho risk over tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode

from drrho_core import checks, cosine_gamma, recommended_gamma_min
from drrho_core.ambiguity import AmbiguitySet
from drrho_torch.loss import ContrastiveLoss
from drrho_torch.token_risk import IGNORED, token_risk
from drrho_torch.whole_batch import check_loss, check_reference, check_rows, check_scale, gathered, reference_rows

ESTIMATES = "estimates.safetensors"
# A pair without other pairs has no negatives, so the loss is not defined.
LONE_PAIR = (
    "every batch of the training must have at least 2 pairs (dataloader_drop_last=True in TrainingArguments leaves out "
    "a short last batch; per_device_train_batch_size must be at least 2)"
)


class TrainerSteering(TrainerCallback):
    """The loss of a CLIP or SigLIP model in a `transformers.Trainer`, with the schedule of gamma and the checkpoints.

    Pass the object twice: ``Trainer(..., compute_loss_func=steering, callbacks=[steering])``. Each entry of the data
    set has the key ``labels``, an integer: the row of the pair. `TrainingArguments` need ``label_names=["labels"]``
    for a loss in evaluations.

    Parameters
    ----------
    contrastive_loss : ContrastiveLoss
        The loss. The Trainer's run moves it to the device of the training.
    logit_scale : Parameter of shape (), optional
        Logarithm of 1 / temperature, ``model.logit_scale`` of transformers' models. It replaces the temperature of the
        loss, and is learned if it requires a gradient; then the loss needs a radius above 0. None: the temperature is
        that of the loss.
    reference : object or pair of arrays of shape (n, r), optional
        Features of the frozen reference model, as in `drrho_torch.OpenClipLoss`.
    gamma_min : float, optional
        The last gamma of FastCLIP's schedule, in (0, 1]; by default `drrho_core.recommended_gamma_min` for the number
        of epochs of the run. 1 turns the moving averages off.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    Every checkpoint folder of the Trainer gets the file ``estimates.safetensors``. A run that resumes reads it from
    ``output_dir/checkpoint-<step>``. For a checkpoint elsewhere, call `load` before ``train``.

    With ``gradient_accumulation_steps`` = A the optimiser averages the gradients of A batches, and the samples of a
    batch are compared with each other only. `drrho_torch.micro_batches`, in a loop of your own, compares the samples of
    all A batches. In a run of several processes the samples of all processes are compared with each other.
    """

    def __init__(
        self,
        contrastive_loss: ContrastiveLoss,
        *,
        logit_scale: Tensor | None = None,
        reference: Any = None,
        gamma_min: float | None = None,
    ) -> None:
        self.contrastive_loss = check_loss(contrastive_loss)
        self.reference = check_reference(reference, self.contrastive_loss.num_samples)
        self.gamma_min = None if gamma_min is None else checks.number("gamma_min", gamma_min, checks.UNIT_INTERVAL)
        self.logit_scale = logit_scale
        if logit_scale is not None:
            check_scale(contrastive_loss, logit_scale)
        # A checkpoint file holds tensors; an estimator that keeps its numbers in a file of its own has none.
        if not all(isinstance(value, Tensor) for value in contrastive_loss.state_dict().values()):
            raise TypeError("contrastive_loss must keep its estimates in tensors, got one with another estimator")
        self._is_loaded = False
        self._is_callback = False

    def __call__(
        self, outputs: Mapping[str, Tensor], labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a batch; the Trainer calls this method.

        Parameters
        ----------
        outputs : mapping
            The model's outputs with ``image_embeds`` and ``text_embeds``, (b, d) each, of unit norm.
        labels : tensor of integers, shape (b,)
            Rows of the pairs.
        num_items_in_batch : int or tensor, optional
            Number of pairs of the optimiser's step, over all accumulated batches and, as the Trainer counts them, all
            processes.

        Returns
        -------
        tensor, shape ()
            The loss. With accumulated gradients it is divided by the number of accumulated batches. Without gradients
            (an evaluation) it is the loss of the batch alone, without a reference, and no estimate changes. A batch of
            one pair has no negatives: in an evaluation its loss is 0, as that of CLIP is.

        Raises
        ------
        TypeError, ValueError
            If the labels are missing, if `ContrastiveLoss.forward` refuses them, if a batch of the training has one
            pair, or if the Trainer trains without this object among the callbacks.
        """
        if labels is None:
            raise ValueError(
                "labels must hold the row of every pair, got None: add 'labels' to the data set's entries (of the "
                "evaluation, too), return them from your own collate function, and pass label_names=['labels'] to "
                "TrainingArguments, because the Trainer removes columns that it does not know"
            )
        check_rows("labels", labels)
        training = torch.is_grad_enabled()
        if training and not self._is_callback:
            raise ValueError(
                "callbacks of the Trainer must contain the object that is compute_loss_func, callbacks=[steering], "
                "got none: gamma would not change, and checkpoints would have no estimates"
            )
        self.contrastive_loss.train(training)
        rows = labels.shape[0]
        index, images, texts = (gathered(x) for x in (labels, outputs["image_embeds"], outputs["text_embeds"]))
        if index.shape[0] == 1 and not training:
            return images.new_zeros(())
        if index.shape[0] == 1:
            raise ValueError(f"{LONE_PAIR}, got a batch of 1")
        loss: Tensor = self.contrastive_loss(
            images,
            texts,
            index,
            reference_features=reference_rows(
                self.reference if training else None, index, images.device, self.contrastive_loss.num_samples
            ),
            temperature=None if self.logit_scale is None else torch.exp(-self.logit_scale),
            gathered=True,
        )
        # The Trainer adds up what this method returns for the batches of a step.
        return loss if num_items_in_batch is None else loss * rows / num_items_in_batch

    def load(self, checkpoint: str | os.PathLike[str], /) -> None:
        """Read the estimates of a checkpoint folder.

        Parameters
        ----------
        checkpoint : path
            A folder that the Trainer has written with this callback.

        Raises
        ------
        FileNotFoundError
            If the folder has no estimates.
        ValueError
            If the estimates belong to a data set of another size.
        """
        path = Path(checkpoint) / ESTIMATES
        if not path.is_file():
            raise FileNotFoundError(
                f"checkpoint must be a folder with {ESTIMATES}, got {checkpoint} (a checkpoint elsewhere: call "
                "load(folder) before train; a run without estimates: start a new one)"
            )
        self.contrastive_loss.load_state_dict(load_file(path))
        self._is_loaded = True

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note that the Trainer calls this object, and refuse ways to use several devices that are not tested.

        Raises
        ------
        ValueError
            If the Trainer uses FSDP or DeepSpeed, or several GPUs in one process.
        """
        del state, control
        self._is_callback = True
        # Both may replace parameters, so that the object `logit_scale` is no longer the one that is trained.
        is_deepspeed = args.deepspeed_plugin is not None
        if args.fsdp or is_deepspeed or args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
            raise ValueError(
                "several devices must be used by DistributedDataParallel (torchrun), because the loss needs the "
                f"batches of all devices and the parameters as they are, got fsdp={args.fsdp!r}, "
                f"DeepSpeed {is_deepspeed}, {args.n_gpu} GPUs in one process"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Move the loss to the device of the training, and read the estimates if the run resumes.

        Raises
        ------
        ValueError
            If `logit_scale` is no parameter of the Trainer's model, or if the last batch of an epoch has one pair.
        """
        del control
        self._is_callback = True
        model, loader = parts.get("model"), parts.get("train_dataloader")
        learned = self.logit_scale is not None and self.logit_scale.requires_grad
        if model is not None and learned and not any(p is self.logit_scale for p in model.parameters()):
            raise ValueError(
                "logit_scale must be a parameter of the model that the Trainer trains, such as model.logit_scale, got "
                "a tensor of another model (model_init and wrappers make new parameters)"
            )
        # Several processes fill up the last batch with pairs of the first.
        dataset = getattr(loader, "dataset", None)
        pairs = len(dataset) if isinstance(dataset, Sized) else 0
        if args.world_size == 1 and not args.dataloader_drop_last and pairs % args.train_batch_size == 1:
            raise ValueError(f"{LONE_PAIR}, got {pairs} pairs in batches of {args.train_batch_size}")
        self.contrastive_loss.to(args.device)
        if state.global_step > 0 and not self._is_loaded:
            self.load(_folder(args, state))
        self._is_loaded = False

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set gamma for the epoch."""
        del args, control
        epochs = max(1, state.num_train_epochs)
        gamma_min = recommended_gamma_min(epochs) if self.gamma_min is None else self.gamma_min
        self.contrastive_loss.gamma = cosine_gamma(int(state.epoch or 0), num_epochs=epochs, gamma_min=gamma_min)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the estimates into the checkpoint folder; the file appears only when it is complete."""
        del control
        if not state.is_world_process_zero:
            return
        path = _folder(args, state) / ESTIMATES
        partial = path.with_suffix(".partial")
        tensors = {name: value.detach().cpu() for name, value in self.contrastive_loss.state_dict().items()}
        save_file(tensors, partial)
        partial.replace(path)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint of the present step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class TokenRiskTrainer(Trainer):
    """A `transformers.Trainer` for causal language models that minimises the DRRho risk over the tokens of a batch.

    Make it as a `Trainer`, then call `steer`. Evaluations return the usual mean of the token losses.
    """

    _reference_model: PreTrainedModel | None = None

    def steer(
        self, reference_model: PreTrainedModel, ambiguity_set: AmbiguitySet, /, *, reference_weight: float = 1.0
    ) -> None:
        """Train on the risk of the excess loss from now on.

        Parameters
        ----------
        reference_model : PreTrainedModel
            The frozen reference model: a causal language model with the learner's tokenizer. It is moved to the device
            of the training and put into ``eval()``.
        ambiguity_set : AmbiguitySet
            The weights of the tokens, as in `drrho_torch.token_risk`.
        reference_weight : float, default: 1.0
            lambda >= 0, as in `drrho_torch.token_risk`.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules.
        """
        if not isinstance(reference_model, PreTrainedModel):
            raise TypeError(f"reference_model must be a model of transformers, got {type(reference_model).__name__}")
        if not isinstance(ambiguity_set, AmbiguitySet):
            raise TypeError(f"ambiguity_set must be an AmbiguitySet, such as CVaR(0.6), got {ambiguity_set!r}")
        self._reference_weight = checks.number("reference_weight", reference_weight, checks.NOT_NEGATIVE)
        self._ambiguity_set = ambiguity_set
        self._reference_model = reference_model.to(self.args.device).eval().requires_grad_(False)  # type: ignore[arg-type]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the risk of a batch; the Trainer calls this method.

        Parameters
        ----------
        model : Module
            The learner.
        inputs : dict
            Arguments of the model, with ``labels``.
        return_outputs : bool
            True returns the model's outputs as well.
        num_items_in_batch : int or tensor, optional
            Number of tokens of the optimiser's step. A batch of n tokens contributes n times its risk, divided by this
            number.

        Returns
        -------
        tensor of shape (), or a pair of tensor and outputs
        """
        if self._reference_model is None or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**arguments)
        with torch.no_grad():
            reference = self._reference_model(**arguments)
        loss = token_risk(
            outputs.logits, reference.logits, labels, self._ambiguity_set, reference_weight=self._reference_weight
        )
        if num_items_in_batch is not None:
            loss = loss * (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
            # The number then includes the tokens of all processes, and the processes' gradients are averaged.
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss
