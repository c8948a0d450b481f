"""Fine-tune a tiny ESM-2 on ten sequences, each labelled with length / 100, and predict them again.

The smallest run of the Python interface: seconds on a laptop. Give the directory to write to, and a
checkpoint (esm2mega, Hugging Face, fair-esm, …) to start from; without one the encoder starts at random. With
--lora the encoder stays as it is and adapters are trained beside it, which needs a checkpoint.

    python examples/finetune_regression.py runs/finetune_regression [CHECKPOINT] [--lora]
"""

import argparse

from esm2mega import infer_model, train_model
from esm2mega.config.schema import LoRAConfig

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


def main(run_dir: str, init_from: str | None, lora: bool) -> None:
    """Train 50 steps, then predict from the checkpoint."""
    settings = [
        f"run_dir={run_dir}",
        "task.kind=regression",
        "data.max_seq_length=128",
        "train.micro_batch_tokens=512",
        "train.global_batch_tokens=512",
        "train.max_steps=50",
        "optim.lr=3e-4",
        "schedule.name=constant",
        "schedule.warmup_steps=0",
    ]
    settings.append(f"init_from={init_from}" if init_from else "model.size=tiny")
    data = [(sequence, len(sequence) / 100) for sequence in SEQUENCES]
    trained = train_model(settings, train=data, lora=LoRAConfig(rank=8, alpha=16) if lora else None)
    print(f"checkpoint {trained.checkpoint}, training loss {trained.metrics['loss']:.4f}")
    for (sequence, value), predicted in zip(data, infer_model(trained.checkpoint, SEQUENCES), strict=True):
        print(f"{value:.2f} {predicted:.2f} {sequence[:40]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", help="directory to write to")
    parser.add_argument("init_from", nargs="?", help="checkpoint to start from")
    parser.add_argument("--lora", action="store_true", help="train adapters and the head")
    main(**vars(parser.parse_args()))
