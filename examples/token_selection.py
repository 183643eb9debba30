"""Select tokens by excess loss: a tiny language model learns from the tokens that are useful.

The corpus has 32 words. Most sentences follow a language in which a word depends on the two words before it. In 40 % of
the sentences half of the words are replaced by random words, as by typing errors or spam. A *reference model* was
trained on a quarter as many sentences, all clean. The learner trains on the noisy corpus in three ways:

    all tokens    the usual mean of the token losses
    high loss     the 60 % of each batch's tokens with the largest loss: more noise than in the whole batch
    high excess   the 60 % with the largest excess loss (loss minus reference loss): tokens that can still be learned

Tokens that the learner already predicts well have a small excess loss. Random tokens have a small excess loss too,
because the reference model cannot predict them either. Therefore a reference model improves the learner even if it is
worse than the final learner. Selecting tokens by excess loss is the idea of RHO-1 (arXiv 2404.07965), after RHO-LOSS
(arXiv 2206.07137).

Run it: ``python examples/token_selection.py`` (a few seconds, NumPy only).
"""

from __future__ import annotations

import numpy as np

from drrho_core import select_top_excess

WORDS, CLEAN, NOISY, LENGTH = 32, 150, 600, 20
KEEP, STEPS, BATCH, RATE = 0.6, 300, 1200, 60.0
METHODS = ("all tokens", "high loss", "high excess")


class Model:
    """A model with two tables; the logits of the next word are the sum of two rows, chosen by the two words before."""

    def __init__(self) -> None:
        self.tables = np.zeros((2, WORDS, WORDS))

    def losses(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of every token (n,) and the probabilities of all words (n, WORDS); tokens (n, 3)."""
        logits = self.tables[0, tokens[:, 1]] + self.tables[1, tokens[:, 0]]
        logits -= np.max(logits, axis=1, keepdims=True)
        log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        return -log_p[np.arange(len(tokens)), tokens[:, 2]], np.exp(log_p)

    def step(self, tokens: np.ndarray, kept: np.ndarray) -> None:
        """Take a step of gradient descent on the kept tokens; the gradient is probability minus one-hot target."""
        chosen = tokens[kept]
        slope = self.losses(chosen)[1] / len(chosen)
        slope[np.arange(len(chosen)), chosen[:, 2]] -= 1 / len(chosen)
        for table, before in zip(self.tables, (chosen[:, 1], chosen[:, 0]), strict=True):
            np.add.at(table, before, -RATE * slope)


def language(rng: np.random.Generator) -> np.ndarray:
    """Return the probabilities of the next word, given the previous two; (WORDS, WORDS, WORDS)."""
    logits = 2.5 * rng.normal(size=(WORDS, 1, WORDS)) + 1.5 * rng.normal(size=(1, WORDS, WORDS))
    p = np.exp(logits)
    return p / np.sum(p, axis=2, keepdims=True)


def corpus(p: np.ndarray, sentences: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens (n, 3), each with the two words before it, and whether noise replaced any of these words (n,)."""
    words = rng.integers(WORDS, size=(sentences, LENGTH))
    for place in range(2, LENGTH):
        cumulative = np.cumsum(p[words[:, place - 1], words[:, place - 2]], axis=1)
        words[:, place] = np.sum(cumulative < rng.uniform(size=(sentences, 1)) * cumulative[:, -1:], axis=1)
    touched = (rng.uniform(size=(sentences, 1)) < noise) & (rng.uniform(size=words.shape) < 0.5)
    words = np.where(touched, rng.integers(WORDS, size=words.shape), words)
    windows = np.stack([words[:, :-2], words[:, 1:-1], words[:, 2:]], axis=2).reshape(-1, 3)
    noisy = (touched[:, :-2] | touched[:, 1:-1] | touched[:, 2:]).reshape(-1)
    return windows, noisy


def train(
    method: str, tokens: np.ndarray, noisy: np.ndarray, reference: Model | None, seed: int
) -> tuple[Model, float]:
    """Train a model; return the model and the share of noisy tokens among the tokens that it learned from."""
    model, rng, learned = Model(), np.random.default_rng(seed), []
    for _ in range(STEPS):
        batch = rng.choice(len(tokens), size=BATCH, replace=False)
        kept = np.arange(BATCH)
        if method != "all tokens":
            loss = model.losses(tokens[batch])[0]
            reference_loss = np.zeros_like(loss) if method == "high loss" else reference.losses(tokens[batch])[0]
            kept = select_top_excess(loss, reference_loss, k=int(KEEP * BATCH))
        model.step(tokens[batch], kept)
        learned.append(np.mean(noisy[batch][kept]))
    return model, float(np.mean(learned))


def main(seed: int = 0) -> dict[str, tuple[float, float]]:
    """Run the comparison; return test loss and share of noisy tokens for each method."""
    rng = np.random.default_rng(seed)
    p = language(rng)
    clean, noisy, test = (corpus(p, *size, rng) for size in ((CLEAN, 0.0), (NOISY, 0.4), (1000, 0.0)))
    reference, _ = train("all tokens", *clean, Model(), seed)
    results = {"reference model": (float(np.mean(reference.losses(test[0])[0])), 0.0)}
    for method in METHODS:
        model, share = train(method, *noisy, reference, seed)
        results[method] = float(np.mean(model.losses(test[0])[0])), share
    print(f"{'':16}{'test loss':>10}{'noisy tokens learned from':>28}")
    for method, (loss, share) in results.items():
        print(f"{method:16}{loss:10.4f}{share:28.1%}")
    return results


if __name__ == "__main__":
    main()
