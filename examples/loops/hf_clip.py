"""A CLIP model of transformers in its Trainer, with DRRho's loss."""

from __future__ import annotations

import numpy as np
from drrho_torch import ContrastiveLoss
from drrho_torch.hugging_face import TrainerSteering
from pairs import HIDDEN, SIDE, VOCABULARY, write_pairs
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments, default_data_collator, set_seed


class Pairs(Dataset):
    """Images and captions, as the entries that CLIPModel takes."""

    def __init__(self, path):
        self.columns = dict(np.load(path))

    def __len__(self):
        return len(self.columns["images"])

    def __getitem__(self, row):
        return {
            "pixel_values": self.columns["images"][row],
            "input_ids": self.columns["captions"][row],
            "labels": row,
        }


def collate(entries):
    """Return a batch; the model returns its loss if the batch asks for it."""
    return {**default_data_collator(entries), "return_loss": True}


def small_model():
    """Return a CLIP model with random weights that trains on a CPU in seconds."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": HIDDEN,
        "bos_token_id": 0,
        "eos_token_id": VOCABULARY - 1,
    }
    vision = {**tower, "image_size": SIDE, "patch_size": SIDE // 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def make_trainer(pairs, folder, epochs=4, batch_size=64, accumulate=1, learning_rate=3e-3):
    """Return the trainer of a new model."""
    set_seed(0)
    dataset, model = Pairs(pairs), small_model()
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        save_strategy="epoch",
        label_names=["labels"],
        logging_steps=1,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    loss = ContrastiveLoss(len(dataset), temperature=0.07, radius=2.0)
    reference = tuple(np.load(f"{pairs}.npy"))
    steering = TrainerSteering(loss, logit_scale=model.logit_scale, reference=reference)
    return Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=dataset,
        eval_dataset=dataset,
        compute_loss_func=steering,
        callbacks=[steering],
    )


def main(pairs, folder, resume=False, epochs=4):
    """Train and export a model; return the trainer."""
    trainer = make_trainer(pairs, folder, epochs)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/export")
    return trainer


if __name__ == "__main__":
    write_pairs("pairs.npz")
    main("pairs.npz", "hf_clip")
