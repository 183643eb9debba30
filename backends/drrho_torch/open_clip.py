"""The contrastive loss with the call signature of open_clip's loss, for the training loops of open_clip and its forks.

These loops call ``loss(image_features=..., text_features=..., logit_scale=..., output_dict=True)``. Three things are
missing in this call: the rows of the samples in the data set, the features of the reference model, and the samples of
other processes. `OpenClipLoss` adds all three. This module does not import open_clip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drrho_core import checks, cosine_gamma, recommended_gamma_min
from drrho_torch.arguments import check_tensor
from drrho_torch.loss import ContrastiveLoss
from drrho_torch.whole_batch import check_loss, check_reference, check_rows, check_scale, gathered, reference_rows


class OpenClipLoss(nn.Module):
    """`ContrastiveLoss` in the place of open_clip's ``ClipLoss``.

    The training loop announces the rows of every batch: ``loss.announce(sample_index)``. It starts every epoch with
    ``loss.set_epoch(epoch)``. All other lines of the loop keep their form.

    Parameters
    ----------
    contrastive_loss : ContrastiveLoss
        The loss. Each call replaces its temperature by ``1 / logit_scale``.
    reference : object or pair of arrays of shape (n, r), optional
        Features of the frozen reference model for the whole data set: image and text features in the order of the
        rows, or an object such that ``reference[sample_index]`` returns both for a NumPy array of rows. The features
        are tensors or NumPy arrays.
    num_epochs : int, optional
        Epochs of the run, at least 1. If it is given, `set_epoch` also sets gamma by `drrho_core.cosine_gamma`.
    gamma_min : float, optional
        The last gamma of this schedule, in (0, 1]; by default `drrho_core.recommended_gamma_min`.

    Attributes
    ----------
    contrastive_loss : ContrastiveLoss
        The loss. Its estimates are part of ``state_dict()``.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    *Accumulated gradients* (``accum_freq``). open_clip encodes several batches without gradients, then encodes each of
    them again with gradients and calls the loss on the features of all of them each time. Only the last of these calls
    stores the estimates and gives a gradient to `logit_scale`, so the result is one step on the whole batch.

    *Several processes.* If `torch.distributed` is initialised, the features and the rows of all processes are
    gathered. The gradient of a process's own features is multiplied by the world size, because
    `DistributedDataParallel` and FSDP average the gradients. Then the parameters get the gradient of the whole batch.

    *Monitored numbers.* The loss is multiplied by the temperature, so it is not comparable with CLIP's own loss.

    Examples
    --------
    >>> images, texts = torch.eye(3).requires_grad_(), torch.eye(3)[[0, 2, 1]]  # two captions are swapped
    >>> loss = OpenClipLoss(ContrastiveLoss(10, temperature=0.07), num_epochs=30)
    >>> loss.set_epoch(0)
    >>> loss.announce(torch.tensor([4, 0, 7]))
    >>> losses = loss(images, texts, logit_scale=torch.tensor(2.0), output_dict=True)
    >>> {name: round(value.item(), 4) for name, value in losses.items()}
    {'contrastive_loss': 0.1446}
    """

    def __init__(
        self,
        contrastive_loss: ContrastiveLoss,
        *,
        reference: Any = None,
        num_epochs: int | None = None,
        gamma_min: float | None = None,
    ) -> None:
        super().__init__()
        if gamma_min is not None and num_epochs is None:
            raise ValueError("gamma_min must come with num_epochs, the number of epochs of the schedule")
        self.contrastive_loss = check_loss(contrastive_loss)
        self.reference = check_reference(reference, self.contrastive_loss.num_samples)
        self.num_epochs = None if num_epochs is None else checks.integer("num_epochs", num_epochs, minimum=1)
        if self.num_epochs is not None and gamma_min is None:
            gamma_min = recommended_gamma_min(self.num_epochs)
        self.gamma_min = None if gamma_min is None else checks.number("gamma_min", gamma_min, checks.UNIT_INTERVAL)
        self._announced: list[Tensor] = []
        self._calls = 0
        # Without a schedule, gamma is that of the loss, and `set_epoch` need not be called.
        self._has_gamma = self.num_epochs is None

    def set_epoch(self, epoch: int, /) -> None:
        """Start an epoch: set gamma, if the schedule is known, and forget batches whose loss was never computed.

        Parameters
        ----------
        epoch : int
            Number of finished epochs, >= 0.

        Raises
        ------
        TypeError, ValueError
            If `epoch` is no integer or negative.
        """
        epoch = checks.integer("epoch", epoch, minimum=0)
        if self.num_epochs is not None and self.gamma_min is not None:
            self.contrastive_loss.gamma = cosine_gamma(epoch, num_epochs=self.num_epochs, gamma_min=self.gamma_min)
        self._has_gamma = True
        self._announced, self._calls = [], 0

    def announce(self, sample_index: Tensor, /) -> None:
        """Name the rows of a batch that the loader has returned, before the loss of this batch is computed.

        Parameters
        ----------
        sample_index : tensor of integers, shape (b,)
            Stable row of every pair in the data set, as in `ContrastiveLoss.forward`.

        Raises
        ------
        TypeError, ValueError
            If `sample_index` is no tensor of integers with one axis.
        """
        check_rows("sample_index", sample_index)
        self._announced.append(sample_index)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of the announced batches, as `ContrastiveLoss.forward` does.

        Parameters
        ----------
        image_features, text_features : tensor, shape (b, d)
            This process's features of all announced batches, in the order of the announcements.
        logit_scale : tensor, shape () or (1,)
            1 / temperature. A scale that requires a gradient needs a `ContrastiveLoss` with a radius above 0.
        logit_bias : None
            A bias of the logits, which models for the sigmoid loss have, is refused: it has no effect on this loss.
        output_dict : bool
            True returns ``{"contrastive_loss": loss}``, False the loss alone.

        Returns
        -------
        tensor of shape (), or a mapping that holds it

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules, if the announced rows do not fit the features, or if `num_epochs` is
            given and `set_epoch` was never called.
        """
        if logit_bias is not None:
            raise ValueError("logit_bias must be None, because a bias has no effect on the contrastive loss")
        check_tensor("image_features", image_features)
        training = self.contrastive_loss.training
        if training and not self._has_gamma:
            raise ValueError(
                "set_epoch must be called at the start of every epoch, because num_epochs is given and the epoch sets "
                "gamma, got no call"
            )
        # The scale that is not learned in eval() needs no radius.
        check_scale(self.contrastive_loss, logit_scale if training else logit_scale.detach())
        rows = image_features.shape[0]
        sample_index = self._rows(rows) if training else torch.arange(rows)
        # With accumulated gradients, each announced batch gets one call on the features of all of them.
        self._calls += training
        is_last = not training or self._calls == len(self._announced)
        # Every call would add the whole gradient of the scale, which does not depend on the call. The factor 0 keeps
        # the scale in the graph, because DistributedDataParallel expects a gradient for every parameter.
        scale = logit_scale if is_last else logit_scale.detach() + 0.0 * logit_scale
        # Loaders name rows on the CPU, but processes with GPUs can exchange only tensors on GPUs.
        sample_index = sample_index.to(image_features.device)
        index, images, texts = (gathered(x) for x in (sample_index, image_features, text_features))
        loss = self.contrastive_loss(
            images,
            texts,
            index,
            reference_features=reference_rows(
                self.reference if training else None, index, images.device, self.contrastive_loss.num_samples
            ),
            temperature=1.0 / scale.reshape(()),
            gathered=True,
            update=is_last,
        )
        if is_last:
            self._announced, self._calls = [], 0
        return {"contrastive_loss": loss} if output_dict else loss

    def _rows(self, batch_size: int) -> Tensor:
        """Return the announced rows, after checking their number."""
        announced = sum(index.shape[0] for index in self._announced)
        if announced != batch_size:
            raise ValueError(
                f"announce must name the rows of the {batch_size} pairs of this call, once for every batch of the "
                f"loader, got {announced} rows in {len(self._announced)} calls since the last loss"
            )
        return torch.cat(self._announced)
