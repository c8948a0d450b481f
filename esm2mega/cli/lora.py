"""Defines the commands `lora merge`, `lora export` and `lora import`.

Importing them needs neither torch nor numpy.
"""

from __future__ import annotations

from pathlib import Path

import click

from esm2mega.cli.group import group, single_process
from esm2mega.config.schema import TASK_KINDS
from esm2mega.config.task import PAIR_KIND
from esm2mega.errors import UserError

_CLASSIFIER_KINDS = [kind for kind in TASK_KINDS if kind != PAIR_KIND]


@group(short_help="Merge adapters into their base, or export and import them as PEFT.")
def lora() -> None:
    """Merge, export or import low-rank adapters (LoRA)."""


@lora.command("merge", short_help="Combine base and adapters in one checkpoint.")
@click.argument("checkpoint")
@click.option("--out", required=True, metavar="DIR", help="Checkpoint to create.")
@click.option("--base", metavar="PATH", help="Checkpoint of the base [default: its path during training].")
@single_process
def lora_merge_command(checkpoint: str, out: str, base: str | None) -> None:
    """Merge the adapters of CHECKPOINT into the weights of their base, as an ordinary checkpoint.

    Example: esm2mega lora merge runs/adapted --out adapted_whole
    """
    from esm2mega.lora.merge import merge

    click.echo("\n".join(merge(checkpoint, Path(out), base)))


@lora.command("export", short_help="Write adapters as a Hugging Face PEFT directory.")
@click.argument("checkpoint")
@click.option("--out", required=True, metavar="DIR", help="PEFT directory to create.")
@click.option(
    "--bare", is_flag=True, help="Export for EsmModel, the encoder without a head (FEATURE_EXTRACTION)."
)
@click.option("--license", metavar="ID", help="Licence for the model card, such as apache-2.0.")
@single_process
def lora_export_command(checkpoint: str, out: str, bare: bool, license: str | None) -> None:
    """Write the adapters of CHECKPOINT for peft, for EsmForMaskedLM or another ESM model with a head.

    Example: esm2mega lora export runs/adapted --out adapted_peft
    """
    from esm2mega.lora.hf_peft import export_adapters

    click.echo("\n".join(export_adapters(checkpoint, Path(out), bare, license)))


@lora.command("import", short_help="Read adapters from a Hugging Face PEFT directory.")
@click.argument("source", metavar="PEFT_DIR")
@click.option("--base", required=True, metavar="CHECKPOINT", help="Base of the adapters, in any format.")
@click.option("--out", required=True, metavar="DIR", help="Adapter checkpoint to create.")
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out tensors that are not adapters.")
@click.option(
    "--task", type=click.Choice(_CLASSIFIER_KINDS), help="What the classifier predicts, as task.kind."
)
@click.option("--labels", metavar="NAME,…", help="Names of the outputs [default: LABEL_0, LABEL_1, …].")
@single_process
def lora_import_command(
    source: str, base: str, out: str, drop: tuple[str, ...], task: str | None, labels: str | None
) -> None:
    """Make an adapter checkpoint from PEFT_DIR, a directory that peft saved.

    Example: esm2mega lora import my_peft --base facebook/esm2_t6_8M_UR50D --out adapted
    """
    from esm2mega.lora.hf_head import Meaning
    from esm2mega.lora.hf_peft import import_adapters

    if labels is not None and task is None:
        raise UserError(f"--labels {labels} needs --task, which says what is labelled; give --task too")
    meaning = None if task is None else Meaning(task, None if labels is None else labels.split(","))
    click.echo("\n".join(import_adapters(Path(source), base, Path(out), drop, meaning)))
