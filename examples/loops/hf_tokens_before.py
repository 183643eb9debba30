"""A causal language model of transformers in its Trainer, before the change."""

from __future__ import annotations

import sys

import numpy as np
from sentences import LENGTH, WORDS
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed


class Sentences(Dataset):
    """Sentences, as the entries that causal models take."""

    def __init__(self, path):
        self.tokens = np.load(path)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, row):
        return {"input_ids": self.tokens[row], "labels": self.tokens[row]}


def small_model():
    """Return a GPT-2 with random weights that trains on a CPU in seconds."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, **ends))


def make_trainer(sentences, test_sentences, folder, epochs=4, batch_size=32, accumulate=1):
    """Return the trainer of a new model."""
    set_seed(0)
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    return Trainer(
        model=small_model(),
        args=arguments,
        train_dataset=Sentences(sentences),
        eval_dataset=Sentences(test_sentences),
    )


def main(sentences, test_sentences, folder):
    """Train and export a model; return the trainer."""
    trainer = make_trainer(sentences, test_sentences, folder)
    trainer.train()
    trainer.save_model(f"{folder}/export")
    print(f"{folder}: loss on clean test sentences {trainer.evaluate()['eval_loss']:.4f}")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], "test.npy", sys.argv[2])
