"""Fine-tune a tiny ESM-2 on ten sequences, each labelled with length / 100, and predict them again.

The smallest run of the Python interface: seconds on a laptop. Give the directory to write to, and a
checkpoint (esm2mega, Hugging Face, fair-esm, …) to start from; without one the encoder starts at random.

    python examples/finetune_regression.py runs/finetune_regression [CHECKPOINT]
"""

import sys

from esm2mega.finetuning import infer_model, train_model

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


def main(run_dir: str, init_from: str | None) -> None:
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
    trained = train_model(settings, train=data)
    print(f"checkpoint {trained.checkpoint}, training loss {trained.metrics['loss']:.4f}")
    for (sequence, value), predicted in zip(data, infer_model(trained.checkpoint, SEQUENCES), strict=True):
        print(f"{value:.2f} {predicted:.2f} {sequence[:40]}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
