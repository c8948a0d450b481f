#!/usr/bin/env bash
# A model on DeepLoc 2: ten locations in the cell, and whether a protein is bound to a membrane, split by homology.
#
#   examples/benchmarks/deeploc2.sh --quick
#   MODEL=runs/mine MODE=finetune NPROC=8 examples/benchmarks/deeploc2.sh
#
# --quick takes at most 500 training and 200 test proteins, some minutes on a CPU.
#
# Variables (defaults in brackets):
#   MODEL   a run, a checkpoint, or a model of another program; several with blanks between [facebook/esm2_t6_8M_UR50D]
#   SOURCE  directory of Swissprot_Train_Validation_dataset.csv; `esm2mega prepare deeploc2 --download` gets it [deeploc2]
#   TASKS   labels to predict, with commas between [deeploc2,deeploc2:membrane]
#   MODE    probe, finetune, lora, with commas between [probe]
#   SEEDS   heads of each model, for their spread [1]
#   OUT     directory of the results; started again, the script goes on with what is there [benchmarks/deeploc2]
#   NPROC   data-parallel processes, one for each GPU [1]
#   PYTHON  interpreter of the environment that esm2mega is installed in [python]
# Further arguments are options of `esm2mega autoeval`, and overrides of the fine-tuning such as train.max_steps=500.
set -euo pipefail

MODEL=${MODEL:-facebook/esm2_t6_8M_UR50D}
SOURCE=${SOURCE:-deeploc2}
TASKS=${TASKS:-deeploc2,deeploc2:membrane}
MODE=${MODE:-probe}
SEEDS=${SEEDS:-1}
OUT=${OUT:-benchmarks/deeploc2}
NPROC=${NPROC:-1}
PYTHON=${PYTHON:-python}

# The seed chooses which proteins are taken; scores of so few say little.
limits=()
if [[ ${1:-} == --quick ]]; then
  shift
  limits=(--limit-train 500 --limit-valid 200 --limit-test 200)
fi

launch=("$PYTHON" -m esm2mega)
((NPROC == 1)) || launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m esm2mega)
read -r -a models <<<"$MODEL"

# Partition 3 of the table is for validation, 4 for the test; results.json, results.csv and the exact commands are in OUT.
"${launch[@]}" autoeval "${models[@]}" --tasks "$TASKS" --mode "$MODE" --source "$SOURCE" --out "$OUT" --seeds "$SEEDS" \
  ${limits[@]+"${limits[@]}"} "$@"
