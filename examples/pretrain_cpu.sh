#!/usr/bin/env bash
# Pretrain ESM-2 on the CPU of one machine: FASTA -> token stores -> training -> evaluation -> plot.
#
#   examples/pretrain_cpu.sh                 simulated proteins and the tiny model, some minutes on 2 cores
#   FASTA=my.fasta.gz STEPS=10000 examples/pretrain_cpu.sh
#
# Variables (defaults in brackets):
#   FASTA     input, .gz too [empty: simulate 40 protein families]
#   OUT       directory for everything; what is in it is not made again, and training resumes [pretrain_cpu]
#   CONFIG    a shipped configuration or a YAML file [pretrain_esm2_tiny]
#   STEPS     optimizer steps, of which a tenth are warm-up [400]
#   VAL_SIZE  proteins held out for validation [100]
#   NPROC     processes; they share every layer, so it must divide the number of heads [2]
#   PYTHON    interpreter of the environment that esm2mega is installed in [python]
# Further arguments are configuration overrides, such as optim.lr=5e-4 data.max_seq_length=256.
set -euo pipefail

FASTA=${FASTA:-}
OUT=${OUT:-pretrain_cpu}
CONFIG=${CONFIG:-pretrain_esm2_tiny}
STEPS=${STEPS:-400}
VAL_SIZE=${VAL_SIZE:-100}
NPROC=${NPROC:-2}
PYTHON=${PYTHON:-python}

# One thread per process: more would make the processes fight for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

eval_every=$((STEPS / 5 > 0 ? STEPS / 5 : 1))
mkdir -p "$OUT"

if [[ -z $FASTA ]]; then
  FASTA=$OUT/simulated.fasta
  [[ -e $FASTA ]] || "$PYTHON" -m esm2mega.quickstart.simulate "$FASTA" --families 40 --members 50 --seed 1 \
    --median-length 130 --length-sigma 0.3 --min-length 70 --max-length 220
fi

[[ -e $OUT/store ]] || "$PYTHON" -m esm2mega prepare fasta "$FASTA" --out "$OUT/store" --val-size "$VAL_SIZE"

"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m esm2mega pretrain \
  --config "$CONFIG" \
  run_dir="$OUT/run" \
  data.train="$OUT/store/train" \
  data.valid="$OUT/store/valid" \
  parallel.tensor_model_parallel_size="$NPROC" \
  train.max_steps="$STEPS" \
  train.eval_every="$eval_every" \
  schedule.warmup_steps="$((STEPS / 10))" \
  "$@"

# A checkpoint loads at any layout: one process is enough to evaluate.
"$PYTHON" -m esm2mega evaluate "$OUT/run" --data "$OUT/store/valid" --out "$OUT/evaluation.json"
"$PYTHON" -m esm2mega plot "$OUT/run"
