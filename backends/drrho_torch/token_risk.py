"""The DRRho risk over the tokens of a batch, for causal language models.

A token is a sample: its excess loss is the learner's cross-entropy minus that of a frozen reference model. Shapes: B
sequences of L tokens, V words in the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from drrho_core import checks
from drrho_core.ambiguity import AmbiguitySet
from drrho_torch.arguments import check_tensor
from drrho_torch.risk import drrho_risk

IGNORED = -100


def token_losses(logits: Tensor, labels: Tensor, /) -> Tensor:
    """Return the cross-entropy of every token but the first, given the tokens before it.

    Parameters
    ----------
    logits : tensor, shape (B, L, V)
        The logits of the next word at each position, as causal models of transformers return them.
    labels : tensor of integers, shape (B, L)
        The words, in [0, V); -100 marks a token that does not count.

    Returns
    -------
    tensor, shape (B, L - 1)
        The losses in nats, float32 or wider; 0 for tokens that do not count.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor of these shapes.

    Examples
    --------
    >>> logits = torch.zeros(1, 3, 4)  # four words, all equally probable
    >>> [round(x, 4) for x in token_losses(logits, torch.tensor([[2, 0, -100]]))[0].tolist()]
    [1.3863, 0.0]
    """
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    checks.ndim("logits", logits, 3, "(sequences, length, vocabulary)")
    checks.shape("labels", labels, tuple(logits.shape[:2]), "(sequences, length)")
    # Position l predicts token l + 1. Half types would lose the small differences between losses.
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(wide.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")


def token_risk(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    reference_weight: float = 1.0,
) -> Tensor:
    """Return the DRRho risk of the tokens of a batch, differentiable in the learner's logits.

    Parameters
    ----------
    logits : tensor, shape (B, L, V)
        The learner's logits, as in `token_losses`.
    reference_logits : tensor, shape (B, L, V')
        The frozen reference model's logits of the same sequences. V' and the dtype may differ from the learner's.
    labels : tensor of integers, shape (B, L)
        The words, -100 for tokens that do not count, as in `token_losses`.
    ambiguity_set : AmbiguitySet
        The weights that the adversary may give to tokens, such as ``drrho_core.CVaR(0.6)``: the 60 % of tokens with the
        largest excess loss. ``CappedKLPenalty`` and ``KLPenalty`` weigh tokens smoothly, with and without a cap.
    reference_weight : float, default: 1.0
        lambda >= 0, the factor of the reference loss. With 0 the risk is that of distributionally robust optimisation.

    Returns
    -------
    tensor, shape ()
        The worst-case weighted mean of the excess losses over all tokens that count.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules, or if no token counts.

    Notes
    -----
    Selection of tokens by excess loss: RHO-1 (arXiv 2404.07965); the risk is that of DRRho (arXiv 2505.06699).

    Examples
    --------
    >>> from drrho_core import CVaR
    >>> labels = torch.tensor([[0, 1, 1]])
    >>> logits = torch.zeros(1, 3, 2, requires_grad=True)
    >>> reference_logits = torch.tensor([[[0.0, 4.0], [4.0, 0.0], [0.0, 0.0]]])  # the second token surprises it
    >>> risk = token_risk(logits, reference_logits, labels, CVaR(0.5))
    >>> risk.backward()
    >>> round(risk.item(), 4), logits.grad[0, :, 1].abs().tolist()
    (0.675, [0.5, 0.0, 0.0])
    """
    losses = token_losses(logits, labels)
    with torch.no_grad():
        reference_losses = token_losses(reference_logits.detach(), labels)
    counts = (labels[:, 1:] != IGNORED).reshape(-1)
    return drrho_risk(
        losses.reshape(-1),
        reference_losses.reshape(-1).to(losses.dtype),
        ambiguity_set,
        reference_weight=reference_weight,
        where=counts,
    )
