#!/usr/bin/env bash
# Pretrain ESM-2 on several machines with torchrun: run this on every machine, at about the same time.
#
#   node 0:  NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 STORE=/data/store examples/pretrain_torchrun_multinode.sh
#   node 1:  NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 STORE=/data/store examples/pretrain_torchrun_multinode.sh
#
# The machines meet at MASTER_ADDR:MASTER_PORT (c10d rendezvous). STORE and RUN_DIR must be the same
# directories on all of them, on a shared file system: every process reads the store, and all of them write
# the checkpoint together.
#
# Variables (defaults in brackets):
#   STORE           directory made by `esm2mega prepare fasta` with --val-size: train and valid [required]
#   NNODES          number of machines [1]
#   NODE_RANK       number of this machine, from 0; machine 0 must be MASTER_ADDR [0]
#   MASTER_ADDR     host name or address of machine 0 that the others can reach [localhost]
#   MASTER_PORT     a free TCP port there [29500]
#   RUN_ID          keeps two runs apart that share MASTER_ADDR and MASTER_PORT [esm2mega]
#   NPROC_PER_NODE  processes per machine, or "gpu" for one per GPU [gpu with an NVIDIA GPU, else 1]
#   TP              tensor parallelism; keep it within one machine [1]
#   CONFIG          a shipped configuration or a YAML file [pretrain_esm2_650M]
#   RUN_DIR         checkpoints, log and report [runs/multinode]
#   PYTHON          interpreter of the environment that esm2mega is installed in [python]
# Further arguments are configuration overrides, such as train.global_batch_tokens=2097152.
#
# Machines with several networks: name the interface in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
set -euo pipefail

: "${STORE:?set STORE to the directory made by 'esm2mega prepare fasta … --out DIR --val-size N'}"
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
RUN_ID=${RUN_ID:-esm2mega}
TP=${TP:-1}
CONFIG=${CONFIG:-pretrain_esm2_650M}
RUN_DIR=${RUN_DIR:-runs/multinode}
PYTHON=${PYTHON:-python}
if [[ -z ${NPROC_PER_NODE:-} ]]; then
  NPROC_PER_NODE=1
  if nvidia-smi --list-gpus >/dev/null 2>&1; then NPROC_PER_NODE=gpu; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The rendezvous numbers the ranks; NODE_RANK only says who opens the port. torchrun would guess it from host
# names, which fails behind aliases and in containers.
is_host=$([[ $NODE_RANK == 0 ]] && echo true || echo false)

exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NNODES" \
  --nproc-per-node "$NPROC_PER_NODE" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-id "$RUN_ID" \
  --rdzv-conf "is_host=$is_host" \
  -m esm2mega pretrain \
  --config "$CONFIG" \
  run_dir="$RUN_DIR" \
  data.train="$STORE/train" \
  data.valid="$STORE/valid" \
  parallel.tensor_model_parallel_size="$TP" \
  "$@"
