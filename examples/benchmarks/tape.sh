#!/usr/bin/env bash
# A model on the tasks of TAPE: small heads on its frozen embeddings, beside TAPE's and ProteinLM's published figures.
#
#   examples/benchmarks/tape.sh --quick
#   MODEL="runs/mine runs/other" MODE=finetune TASKS=tape/stability,tape/fluorescence examples/benchmarks/tape.sh
#
# --quick takes stability and remote_homology with at most 500 training and 200 test proteins, some minutes on a CPU.
#
# Variables (defaults in brackets):
#   MODEL   a run, a checkpoint, or a model of another program; several with blanks between [facebook/esm2_t6_8M_UR50D]
#   SOURCE  directory of TAPE's databases, one folder for each task; `esm2mega prepare tape --download` gets them [tape]
#   TASKS   names as `esm2mega autoeval` takes them; contact_prediction has no probe [tape/stability,tape/fluorescence,tape/remote_homology,tape/secondary_structure]
#   MODE    probe, finetune, lora, with commas between [probe]
#   SEEDS   heads of each model, for their spread [1]
#   OUT     directory of the results; started again, the script goes on with what is there [benchmarks/tape]
#   NPROC   data-parallel processes, one for each GPU [1]
#   PYTHON  interpreter of the environment that esm2mega is installed in [python]
# Further arguments are options of `esm2mega autoeval`, and overrides of the fine-tuning such as train.max_steps=500.
set -euo pipefail

MODEL=${MODEL:-facebook/esm2_t6_8M_UR50D}
SOURCE=${SOURCE:-tape}
TASKS=${TASKS:-tape/stability,tape/fluorescence,tape/remote_homology,tape/secondary_structure}
MODE=${MODE:-probe}
SEEDS=${SEEDS:-1}
OUT=${OUT:-benchmarks/tape}
NPROC=${NPROC:-1}
PYTHON=${PYTHON:-python}

# The seed chooses which proteins are taken; scores of so few say little.
limits=()
if [[ ${1:-} == --quick ]]; then
  shift
  TASKS=tape/stability,tape/remote_homology
  limits=(--limit-train 500 --limit-valid 200 --limit-test 200)
fi

launch=("$PYTHON" -m esm2mega)
((NPROC == 1)) || launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m esm2mega)
read -r -a models <<<"$MODEL"

# Tables of each task, embeddings or trainings, baselines; results.json, results.csv and the exact commands are in OUT.
"${launch[@]}" autoeval "${models[@]}" --tasks "$TASKS" --mode "$MODE" --source "$SOURCE" --out "$OUT" --seeds "$SEEDS" \
  ${limits[@]+"${limits[@]}"} "$@"
