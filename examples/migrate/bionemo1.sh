#!/usr/bin/env bash
# What BioNeMo 1 did with ESM-2 (esm2nv), in the order of its guide: UniRef, pretraining, a .nemo model, embeddings, FLIP.
#
#   UNIREF=uniref202104 FLIP=flip NEMO=esm2nv_650M.nemo FASTA=mine.fasta VALID=held_out.fasta examples/migrate/bionemo1.sh
#
# Variables (defaults in brackets):
#   UNIREF        directory with the FASTA files of UniRef50 and UniRef90 and their mapping, see below [uniref]
#   FLIP          directory with a directory for each task of FLIP, as published [flip]
#   TASKS         tasks of FLIP, of which secondary_structure is one [secondary_structure scl meltome]
#   FLIP_OPTIONS  options of `esm2mega prepare flip`, such as --allow-other-sizes [empty]
#   FINETUNE      configuration overrides of the trainings on FLIP, such as train.max_epochs=1 [empty]
#   NEMO          .nemo archive of BioNeMo 1, packed or not [esm2nv.nemo]
#   FASTA         proteins to train on and to embed [proteins.fasta]
#   VALID         proteins for validation, which are left out of training [valid.fasta]
#   OUT           directory to make, for everything [bionemo1]
#   CONFIG        configuration of pretraining, of the same size as NEMO [pretrain_esm2_650M]
#   STEPS         optimizer steps of each pretraining [500]
#   NPROC         processes, which are data parallel [2]
#   PYTHON        interpreter of the environment that esm2mega is installed in [python]
# Further arguments are configuration overrides of both pretrainings, such as train.micro_batch_size=2.
set -euo pipefail

UNIREF=${UNIREF:-uniref}
FLIP=${FLIP:-flip}
TASKS=${TASKS:-secondary_structure scl meltome}
FLIP_OPTIONS=${FLIP_OPTIONS:-}
FINETUNE=${FINETUNE:-}
NEMO=${NEMO:-esm2nv.nemo}
FASTA=${FASTA:-proteins.fasta}
VALID=${VALID:-valid.fasta}
OUT=${OUT:-bionemo1}
CONFIG=${CONFIG:-pretrain_esm2_650M}
STEPS=${STEPS:-500}
NPROC=${NPROC:-2}
PYTHON=${PYTHON:-python}

esm2mega() { "$PYTHON" -m esm2mega "$@"; }
torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$@"; }

# One thread per process: more would make the processes fight for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# pretrain.py do_preprocessing=True do_training=False: UniRef90 members of UniRef50 clusters.
esm2mega prepare uniref --uf50 "$UNIREF/uniref50_train_filt.fasta" --uf90 "$UNIREF/ur90_ur50_sampler.fasta" \
  --mapping "$UNIREF/mapping.tsv" --valid "$UNIREF/uniref50_valid.fasta" --out "$OUT/uniref"

# pretrain.py do_training=True: a cluster is drawn, then one of its members.
torchrun -m esm2mega pretrain --config "$CONFIG" run_dir="$OUT/pretrained" \
  data.train="$OUT/uniref/train" data.valid="$OUT/uniref/valid" \
  train.max_steps="$STEPS" schedule.warmup_steps="$((STEPS / 10))" "$@"

# pretrain.py do_testing=True.
esm2mega evaluate "$OUT/pretrained" --data "$OUT/uniref/valid" --out "$OUT/pretrained/test.json"

# pretrain.py do_preprocessing=True do_training=True restore_from_path=X.nemo: files in the place of stores.
esm2mega pretrain --config "$CONFIG" run_dir="$OUT/continued" init_from="$NEMO" \
  data.train="$FASTA" data.valid="$UNIREF/uniref50_valid.fasta" data.cache_dir="$OUT/prepared" \
  train.max_steps="$STEPS" schedule.warmup_steps="$((STEPS / 10))" "$@"

# Stores of files for each split; the proteins of the others are left out of training.
esm2mega prepare fasta "$FASTA" --valid "$VALID" --out "$OUT/store"

# python -m bionemo.model.infer: NAME_hiddens.h5 and NAME_embeddings.h5.
torchrun -m esm2mega embed "$NEMO" "$FASTA" --out "$OUT/proteins.h5" --layout bionemo --compression gzip

# downstream_flip.py: a head on a frozen encoder.
# shellcheck disable=SC2086  # FLIP_OPTIONS and FINETUNE hold several words, or none
for task in $TASKS; do
  esm2mega prepare flip "$task" --source "$FLIP/$task" --out "$OUT/flip/$task" $FLIP_OPTIONS
  esm2mega finetune --config "flip_$task" run_dir="$OUT/$task" init_from="$NEMO" finetune.mode=frozen \
    data.train="$OUT/flip/$task/train.csv" data.valid="$OUT/flip/$task/valid.csv" \
    data.test="$OUT/flip/$task/test.csv" $FINETUNE
done

# downstream_flip.py --config-name=downstream_sec_str_LORA.
# shellcheck disable=SC2086
esm2mega finetune --config flip_secondary_structure run_dir="$OUT/lora" init_from="$NEMO" \
  finetune.mode=lora lora.rank=32 optim.lr=1e-4 \
  data.train="$OUT/flip/secondary_structure/train.csv" data.valid="$OUT/flip/secondary_structure/valid.csv" \
  data.test="$OUT/flip/secondary_structure/test.csv" $FINETUNE

# New proteins, with the adapters and the head that were trained.
esm2mega predict "$OUT/lora" "$FASTA" --out "$OUT/states.csv"

# On to BioNeMo 2.
esm2mega convert "$OUT/pretrained" "$OUT/bionemo2" --to nemo2 --verify
