#!/usr/bin/env bash
# A model on the tasks of FLIP: small heads on its frozen embeddings, with one-hot baselines and published figures beside.
#
#   examples/benchmarks/flip.sh --quick
#   MODEL=runs/mine@best MODE=probe,lora SEEDS=3 NPROC=8 examples/benchmarks/flip.sh
#
# --quick takes gb1 and secondary_structure with at most 500 training and 200 test proteins, some minutes on a CPU.
#
# Variables (defaults in brackets):
#   MODEL   a run, a checkpoint, or a model of another program; several with blanks between [facebook/esm2_t6_8M_UR50D]
#   SOURCE  directory of FLIP's published files, one folder for each task; `esm2mega prepare flip --download` gets them [flip]
#   TASKS   names as `esm2mega autoeval` takes them, such as flip/gb1:sampled,flip/scl [flip]
#   MODE    probe, finetune, lora, with commas between; for gb1 zero-shot too [probe]
#   SEEDS   heads of each model, for their spread [1]
#   OUT     directory of the results; started again, the script goes on with what is there [benchmarks/flip]
#   NPROC   data-parallel processes, one for each GPU [1]
#   PYTHON  interpreter of the environment that esm2mega is installed in [python]
# Further arguments are options of `esm2mega autoeval`, and overrides of the fine-tuning such as train.max_steps=500.
set -euo pipefail

MODEL=${MODEL:-facebook/esm2_t6_8M_UR50D}
SOURCE=${SOURCE:-flip}
TASKS=${TASKS:-flip}
MODE=${MODE:-probe}
SEEDS=${SEEDS:-1}
OUT=${OUT:-benchmarks/flip}
NPROC=${NPROC:-1}
PYTHON=${PYTHON:-python}

# The suite `quick` limits the proteins of its tasks.
if [[ ${1:-} == --quick ]]; then
  shift
  TASKS=quick
fi

launch=("$PYTHON" -m esm2mega)
((NPROC == 1)) || launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m esm2mega)
read -r -a models <<<"$MODEL"

# Tables of each task, embeddings or trainings, baselines; results.json, results.csv and the exact commands are in OUT.
"${launch[@]}" autoeval "${models[@]}" --tasks "$TASKS" --mode "$MODE" --source "$SOURCE" --out "$OUT" --seeds "$SEEDS" "$@"
