#!/usr/bin/env bash
# The way of Cerebras' Model Zoo with ESM-2 and DeepLoc 2: data -> fine-tuning -> evaluation -> classifier file.
#
#   CHECKPOINT=pytorch_model_to_cs-2.3.mdl examples/migrate/cerebras.sh
#   CHECKPOINT=esm2_t30_150M_UR50D CONFIG=deeploc2_150M examples/migrate/cerebras.sh
#
# Variables (defaults in brackets):
#   CHECKPOINT  the pretrained model: a .mdl with its .yaml beside it, or any other format that is read [required]
#   SOURCE      DeepLoc 2's table, Swissprot_Train_Validation_dataset.csv [empty: download it]
#   OUT         directory for everything; training resumes in it [cerebras]
#   CONFIG      deeploc2_650M, deeploc2_150M, or deeploc2 for a model of any size [deeploc2_650M]
#   PYTHON      interpreter of the environment that esm2mega is installed in [python]
# Further arguments are configuration overrides of the training, such as optim.lr=2e-5 train.max_steps=2000.
set -euo pipefail

: "${CHECKPOINT:?set CHECKPOINT to the pretrained model}"
SOURCE=${SOURCE:-}
OUT=${OUT:-cerebras}
CONFIG=${CONFIG:-deeploc2_650M}
PYTHON=${PYTHON:-python}

# deeploc2_data.py: our tables, and the directories with meta.dat that the Model Zoo's loader reads.
mkdir -p "$OUT"
source_option=(--download)
if [[ -n $SOURCE ]]; then source_option=(--source "$SOURCE"); fi
[[ -e $OUT/tables ]] || "$PYTHON" -m esm2mega prepare deeploc2 "${source_option[@]}" \
  --valid-fraction 0.1 --features "$OUT/features" --out "$OUT/tables"

# run.py --mode train --checkpoint_path: the encoder is taken, whatever head lies beside it.
"$PYTHON" -m esm2mega finetune --config "$CONFIG" \
  run_dir="$OUT/run" \
  init_from="$CHECKPOINT" \
  finetune.strict=false \
  data.train="$OUT/features/train" \
  data.valid="$OUT/features/valid" \
  data.test="$OUT/features/test" \
  "$@"

# run.py --mode eval: accuracy and f1_micro are eval/accuracy and eval/f1_score there.
"$PYTHON" -m esm2mega evaluate "$OUT/run" --data "$OUT/features/test" --out "$OUT/metrics.json"

# The classifier as a file of the Model Zoo.
[[ -e $OUT/classifier.mdl ]] || "$PYTHON" -m esm2mega convert "$OUT/run" "$OUT/classifier.mdl" --to cerebras --verify
