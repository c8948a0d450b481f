"""Fine-tune a tiny ESM-2 on ten sequences, each with the value length / 100, by classes of one's own.

The smallest run of `esm2mega.finetune.classes`: seconds on a laptop. Loss, head, model, configuration and
adapters are classes below, to be changed. First the head is trained on a frozen encoder, then adapters are
trained beside the encoder of that checkpoint; both predict the sequences again. Give the directory to write
to, and a checkpoint (esm2mega, Hugging Face, fair-esm, …) to start from; without one the encoder is random.

    python examples/finetune_regression.py runs/examples [CHECKPOINT]

The same script runs on several processes with torchrun.
"""

import argparse
from dataclasses import dataclass

import torch

from esm2mega.finetune.classes import (
    FineTuneConfig,
    FineTuneDataModule,
    FineTuneModel,
    InMemorySingleValueDataset,
    LoRATransform,
    LossReduction,
    TaskHead,
    infer_model,
    train_model,
)
from esm2mega.model import pooling

SEQUENCES = [
    "TLILGWSDKLGSLLNQLAIANESLGGGTIAVMAERDKEDMELDIGKMEFDFKGTSVI",
    "LYSGDHSTQGARFLRDLAENTGRAEYELLSLF",
    "GRFNVWLGGNESKIRQVLKAVKEIGVSPTLFAVYEKN",
    "DELTALGGLLHDIGKPVQRAGLYSGDHSTQGARFLRDLAENTGRAEYELLSLF",
    "KLGSLLNQLAIANESLGGGTIAVMAERDKEDMELDIGKMEFDFKGTSVI",
    "LFGAIGNAISAIHGQSAVEELVDAFVGGARISSAFPYSGDTYYLPKP",
    "LGGLLHDIGKPVQRAGLYSGDHSTQGARFLRDLAENTGRAEYELLSLF",
    "LYSGDHSTQGARFLRDLAENTGRAEYELLSLF",
    "ISAIHGQSAVEELVDAFVGGARISSAFPYSGDTYYLPKP",
    "SGSKASSDSQDANQCCTSCEDNAPATSYCVECSEPLCETCVEAHQRVKYTKDHTVRSTGPAKTGKVTVKTKMA",
]
SETTINGS = [
    "data.max_seq_length=128",
    "train.micro_batch_tokens=512",
    "train.global_batch_tokens=512",
    "data.allow_overlap=true",  # the same proteins are trained on and validated
]


class MeanSquaredError(LossReduction):
    """The mean over the labels of a micro-batch; the sum over all of them is what is minimised."""

    def forward(self, batch, forward_out):
        loss = torch.nn.functional.mse_loss(forward_out, batch["labels"])
        return loss, {"avg": loss}


class LengthHead(TaskHead):
    """Mean over residues, 256, ReLU, dropout, one output."""

    def __init__(self, config, device):
        super().__init__(config, device)
        self.dense = torch.nn.Linear(config.hidden_size, 256)
        self.dropout = torch.nn.Dropout(config.ft_dropout)
        self.output = torch.nn.Linear(256, 1)

    def features(self, hidden_states, segments):
        return pooling.mean_of_residues(hidden_states, segments)  # [n, h]

    def predict(self, features, segments):
        return self.output(self.dropout(torch.relu(self.dense(features))))  # [n, 1]


class LengthModel(FineTuneModel):
    """ESM-2 with this head."""

    head_cls = LengthHead


@dataclass
class LengthConfig(FineTuneConfig):
    """What is trained: this model with this loss."""

    model_cls: type = LengthModel

    def get_loss_reduction_class(self):
        return MeanSquaredError


class EncoderLoRA(LoRATransform):
    """Adapters beside a frozen encoder; the token table is trained with them and the head."""

    def selective_freeze(self, module, name, prefix):
        if name == "encoder":
            module.requires_grad_(False)
        return module


def show(checkpoint, metrics, data, data_module):
    """Predict from a checkpoint with nothing skipped; print value and prediction of each sequence."""
    config = LengthConfig(initial_ckpt_path=checkpoint, initial_ckpt_skip_keys_with_these_prefixes=[])
    print(f"checkpoint {checkpoint}, validation loss {metrics['valid_loss']:.4f}")
    for (sequence, value), predicted in zip(data, infer_model(config, data_module), strict=False):
        print(f"{value:.2f} {predicted:.2f} {sequence[:40]}")


def main(experiment_dir: str, init_from: str | None) -> None:
    """Train 50 steps on a frozen encoder and 50 with adapters, and predict after each."""
    data = [(sequence, len(sequence) / 100) for sequence in SEQUENCES]
    dataset = InMemorySingleValueDataset(data)
    data_module = FineTuneDataModule(dataset, dataset, dataset)

    settings = [*SETTINGS, "optim.lr=2e-3"] + ([] if init_from else ["model.size=tiny"])
    config = LengthConfig(initial_ckpt_path=init_from, encoder_frozen=True, overrides=settings)
    checkpoint, metrics, _ = train_model("length", experiment_dir, config, data_module, n_steps_train=50)
    show(checkpoint, metrics, data, data_module)

    # The head goes on as well, since no prefix is skipped.
    config = LengthConfig(
        initial_ckpt_path=checkpoint, initial_ckpt_skip_keys_with_these_prefixes=[], overrides=SETTINGS
    )
    checkpoint, metrics, _ = train_model(
        "length_lora", experiment_dir, config, data_module, n_steps_train=50, transform=EncoderLoRA(rank=8)
    )
    show(checkpoint, metrics, data, data_module)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment_dir", help="directory to write to")
    parser.add_argument("init_from", nargs="?", help="checkpoint to start from")
    main(**vars(parser.parse_args()))
