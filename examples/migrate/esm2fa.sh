#!/usr/bin/env bash
# What ESM2-FA does, from its data to a model of Hugging Face: FASTA or shards -> stores and refined FASTA -> pretraining
# with the architecture of a published model -> evaluation of the best weights -> export. docs/migrate/esm2fa.md explains it.
#
#   TRAIN=train.fasta VALID=valid.fasta examples/migrate/esm2fa.sh
#   TRAIN=shards/train VALID=shards/val NPROC=8 ACCUMULATE=4 examples/migrate/esm2fa.sh
#
# Variables (defaults in brackets):
#   TRAIN       FASTA, or a directory of shards that data_processing.py wrote []
#   VALID       the same for validation []
#   MODEL       published name, or a directory with config.json: the architecture, with random weights [facebook/esm2_t33_650M_UR50D]
#   OUT         directory for everything; what is in it is not made again, and training resumes [esm2fa]
#   NPROC       data-parallel processes, one for each GPU [1]
#   ACCUMULATE  packs of 8192 tokens that each process takes in a step [32]
#   PRECISION   bf16, or fp16 on GPUs without it [bf16]
#   PYTHON      interpreter of the environment that esm2mega is installed in [python]
# Further arguments are configuration overrides, such as optim.lr=1e-4 train.max_steps=100000.
set -euo pipefail

: "${TRAIN:?set TRAIN to a FASTA or a directory of shards}"
: "${VALID:?set VALID to a FASTA or a directory of shards}"
MODEL=${MODEL:-facebook/esm2_t33_650M_UR50D}
OUT=${OUT:-esm2fa}
NPROC=${NPROC:-1}
ACCUMULATE=${ACCUMULATE:-32}
PRECISION=${PRECISION:-bf16}
PYTHON=${PYTHON:-python}

launch=("$PYTHON" -m esm2mega)
((NPROC == 1)) || launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m esm2mega)
mkdir -p "$OUT"

# data_processing.py: token stores in place of shards, and the FASTA of the pieces that training takes.
[[ -e $OUT/train ]] || "$PYTHON" -m esm2mega prepare fasta "$TRAIN" --out "$OUT/train" \
  --refined "$OUT/train_refined.fasta" --max-length 1024
[[ -e $OUT/valid ]] || "$PYTHON" -m esm2mega prepare fasta "$VALID" --out "$OUT/valid"

# train.py: the values of its config.yaml.
"${launch[@]}" pretrain --config base \
  run_dir="$OUT/run" seed=100 \
  model.from="$MODEL" model.precision="$PRECISION" \
  data.train="$OUT/train/train" data.valid="$OUT/valid/train" \
  data.max_seq_length=1026 data.crop=chunk data.random_residues=all \
  train.micro_batch_tokens=8192 train.global_batch_tokens="$((8192 * ACCUMULATE * NPROC))" \
  train.max_steps=200000 train.eval_every=1000 train.early_stopping.patience=3 \
  optim.lr=4e-4 optim.betas='[0.9, 0.95]' optim.clip_grad=0.5 \
  schedule.name=cosine_plateau schedule.warmup_steps=2500 schedule.decay_steps=100000 \
  checkpoint.save_every=1000 checkpoint.keep_last=6 \
  "$@"

# train.py --eval_only, with the best weights.
"$PYTHON" -m esm2mega evaluate "$OUT/run@best" --data "$OUT/valid/train" --out "$OUT/evaluation.json"

# The model as its Trainer saved it.
[[ -e $OUT/hf ]] || "$PYTHON" -m esm2mega convert "$OUT/run@best" "$OUT/hf" --to hf
