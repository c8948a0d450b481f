#!/usr/bin/env bash
# A model on ProteinGym: variants scored without training, averaged as the leaderboard does, beside its published figures.
#
#   examples/benchmarks/proteingym.sh --quick
#   MODEL="runs/mine facebook/esm2_t33_650M_UR50D" NPROC=8 examples/benchmarks/proteingym.sh
#
# --quick takes the first assays of the reference file alone, whose mean is no figure of the leaderboard.
#
# Variables (defaults in brackets):
#   MODEL   a run, a checkpoint, or a model of another program; several with blanks between [facebook/esm2_t6_8M_UR50D]
#   SOURCE  directory of ProteinGym's DMS_substitutions.csv, and of one folder with the assays [proteingym]
#   ASSAYS  assays of --quick [3]
#   OUT     directory of the results; started again, the script goes on with what is there [benchmarks/proteingym]
#   NPROC   data-parallel processes, one for each GPU [1]
#   PYTHON  interpreter of the environment that esm2mega is installed in [python]
# Further arguments are options of `esm2mega autoeval`.
set -euo pipefail

MODEL=${MODEL:-facebook/esm2_t6_8M_UR50D}
SOURCE=${SOURCE:-proteingym}
ASSAYS=${ASSAYS:-3}
OUT=${OUT:-benchmarks/proteingym}
NPROC=${NPROC:-1}
PYTHON=${PYTHON:-python}

# A reference file of its own, beside a link to the assays.
if [[ ${1:-} == --quick ]]; then
  shift
  mkdir -p "$OUT/source"
  head -n "$((ASSAYS + 1))" "$SOURCE/DMS_substitutions.csv" >"$OUT/source/DMS_substitutions.csv"
  for folder in "$SOURCE"/*/; do ln -sfn "$(cd "$folder" && pwd)" "$OUT/source/$(basename "$folder")"; done
  SOURCE=$OUT/source
  OUT=$OUT/results
fi

launch=("$PYTHON" -m esm2mega)
((NPROC == 1)) || launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m esm2mega)
read -r -a models <<<"$MODEL"

# The scores of each assay, their correlations and means; results.json, results.csv and the exact commands are in OUT.
"${launch[@]}" autoeval "${models[@]}" --tasks proteingym --mode zero-shot --source "$SOURCE" --out "$OUT" "$@"
