#!/usr/bin/env bash
# What BioNeMo 2 did with ESM-2: UniRef clusters, pretraining, inference, fine-tuning, LoRA, the tutorial, conversion.
#
#   UNIREF=2024_03 CHECKPOINT=esm2_650m TRAIN=train.csv VALID=valid.csv PROTEINS=new.csv examples/migrate/bionemo2.sh
#
# Variables (defaults in brackets):
#   UNIREF      directory with train_clusters.parquet, train.db, valid_clusters.parquet and validation.db [uniref]
#   CHECKPOINT  directory of a checkpoint of BioNeMo 2, with context/ and weights/ [nemo2]
#   TRAIN       CSV to fine-tune on, with the columns sequences and labels [train.csv]
#   VALID       the same for validation [valid.csv]
#   PROTEINS    CSV of proteins to embed and to predict, with the column sequences [proteins.csv]
#   PROTEIN     protein whose single substitutions are scored [MKTAYIAKQRQISFVKSHFSRQ]
#   FINETUNE    configuration overrides of the two trainings on TRAIN, such as train.max_epochs=3 [empty]
#   OUT         directory to make, for everything [bionemo2]
#   CONFIG      configuration of pretraining, of the same size as CHECKPOINT [pretrain_esm2_650M]
#   STEPS       optimizer steps of each training [500]
#   NPROC       processes, which are data parallel [2]
#   PYTHON      interpreter of the environment that esm2mega is installed in [python]
# Further arguments are configuration overrides of both pretrainings, such as train.micro_batch_size=2.
set -euo pipefail

UNIREF=${UNIREF:-uniref}
CHECKPOINT=${CHECKPOINT:-nemo2}
TRAIN=${TRAIN:-train.csv}
VALID=${VALID:-valid.csv}
PROTEINS=${PROTEINS:-proteins.csv}
PROTEIN=${PROTEIN:-MKTAYIAKQRQISFVKSHFSRQ}
FINETUNE=${FINETUNE:-}
OUT=${OUT:-bionemo2}
CONFIG=${CONFIG:-pretrain_esm2_650M}
STEPS=${STEPS:-500}
NPROC=${NPROC:-2}
PYTHON=${PYTHON:-python}

esm2mega() { "$PYTHON" -m esm2mega "$@"; }
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$@"; }

# One thread per process: more would make the processes fight for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The four files of train_esm2 become token stores, once.
esm2mega prepare uniref --train-cluster-path "$UNIREF/train_clusters.parquet" \
  --train-database-path "$UNIREF/train.db" --valid-cluster-path "$UNIREF/valid_clusters.parquet" \
  --valid-database-path "$UNIREF/validation.db" --out "$OUT/uniref"

# train_esm2.
torchrun -m esm2mega pretrain --config "$CONFIG" run_dir="$OUT/pretrained" \
  data.train="$OUT/uniref/train" data.valid="$OUT/uniref/valid" \
  train.max_steps="$STEPS" schedule.warmup_steps="$((STEPS / 10))" "$@"

# train_esm2 --restore-from-checkpoint-path.
esm2mega pretrain --config "$CONFIG" run_dir="$OUT/continued" init_from="$CHECKPOINT" \
  model.activation=gelu_tanh data.train="$OUT/uniref/train" data.valid="$OUT/uniref/valid" \
  train.max_steps="$STEPS" schedule.warmup_steps="$((STEPS / 10))" "$@"

# infer_esm2 --include-hiddens --include-embeddings --include-logits.
torchrun -m esm2mega embed "$CHECKPOINT" "$PROTEINS" --out "$OUT/proteins.h5" \
  --include residue,pooled,logits --sequence-column sequences

# finetune_esm2 --config-class ESM2FineTuneSeqConfig --encoder-frozen.
# shellcheck disable=SC2086  # FINETUNE holds several words, or none
esm2mega finetune run_dir="$OUT/frozen" init_from="$CHECKPOINT" finetune.mode=frozen task.kind=regression \
  data.sequence_column=sequences 'task.target_columns=[labels]' data.train="$TRAIN" data.valid="$VALID" \
  optim.lr=4e-4 schedule.name=constant schedule.warmup_steps=0 train.max_steps="$STEPS" \
  checkpoint.best_metric=valid_loss train.early_stopping.patience=0 $FINETUNE

# finetune_esm2 --lora-finetune.
# shellcheck disable=SC2086
esm2mega finetune run_dir="$OUT/lora" init_from="$CHECKPOINT" finetune.mode=lora lora.rank=32 \
  'lora.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]' task.kind=regression \
  data.sequence_column=sequences 'task.target_columns=[labels]' data.train="$TRAIN" data.valid="$VALID" \
  optim.lr=4e-4 schedule.name=constant schedule.warmup_steps=0 train.max_steps="$STEPS" \
  checkpoint.best_metric=valid_loss train.early_stopping.patience=0 $FINETUNE

# infer_esm2 --config-class ESM2FineTuneSeqConfig --lora-checkpoint-path: the base is found by itself.
esm2mega predict "$OUT/lora" "$PROTEINS" --out "$OUT/predictions.csv"

# The tutorial of fine-tuning by classes, with inference of the adapters.
"$PYTHON" "$(dirname "$0")/../finetune_regression.py" "$OUT/tutorial" "$CHECKPOINT"

# The notebook on mutants: every single substitution.
esm2mega score "$CHECKPOINT" --sequence "$PROTEIN" --out "$OUT/scan.csv"

# convert_esm2 convert-nemo-to-hf.
esm2mega convert "$CHECKPOINT" "$OUT/hf" --to hf

# And back to their programs: what was trained here, as context/ and weights/.
esm2mega convert "$OUT/continued" "$OUT/nemo2" --to nemo2
