#!/usr/bin/env bash
# What ProteinLM does, from its data to scores on TAPE: PFAM -> pretraining -> the files of its TAPE -> fine-tuning on
# TAPE's tasks -> their test splits -> fine-tuned models in the files of its TAPE. docs/migrate/proteinlm.md explains it.
#
#   PFAM=pfam_text_document.idx TAPE=data examples/migrate/proteinlm.sh
#
# Variables (defaults in brackets):
#   PFAM     the indexed data set that tools/preprocess_data.py wrote, or any file of sequences []
#   SPLIT    train,valid,test proteins of PFAM, one behind the other [32593668,1715454,44311]
#   TAPE     directory of TAPE's data, with a folder for each task []
#   TASKS    tasks of TAPE to fine-tune on [fluorescence stability remote_homology secondary_structure contact]
#   OPTIONS  overrides of every fine-tuning []
#   OUT      directory for everything; what is in it is not made again, and training resumes [proteinlm]
#   CONFIG   configuration of the pretraining [pretrain_proteinlm_200M]
#   PYTHON   interpreter of the environment that esm2mega is installed in [python]
# Further arguments are overrides of the pretraining, such as train.max_steps=1000.
set -euo pipefail

: "${PFAM:?set PFAM to the data set that tools/preprocess_data.py wrote}"
: "${TAPE:?set TAPE to the directory of the data of TAPE}"
SPLIT=${SPLIT:-32593668,1715454,44311}
TASKS=${TASKS:-fluorescence stability remote_homology secondary_structure contact}
OPTIONS=${OPTIONS:-}
OUT=${OUT:-proteinlm}
CONFIG=${CONFIG:-pretrain_proteinlm_200M}
PYTHON=${PYTHON:-python}

mkdir -p "$OUT"
read -r -a options <<<"$OPTIONS"
read -r -a tasks <<<"$TASKS"

# Pretraining: the three parts of PFAM lie one behind the other in the published data set.
[[ -e $OUT/pfam ]] || "$PYTHON" -m esm2mega prepare fasta "$PFAM" --split "$SPLIT" --out "$OUT/pfam"
"$PYTHON" -m esm2mega pretrain --config "$CONFIG" run_dir="$OUT/pretrained" \
  data.train="$OUT/pfam/train" data.valid="$OUT/pfam/valid" data.test="$OUT/pfam/test" "$@"

# megatron-converter.py: the pretrained model as ProteinLM's TAPE reads it, with both models run and compared.
[[ -e $OUT/for_tape ]] ||
  "$PYTHON" -m esm2mega convert "$OUT/pretrained" "$OUT/for_tape" --to proteinlm --verify

for task in "${tasks[@]}"; do
  name=$task
  [[ $task != contact ]] || name=contact_prediction
  folder=$OUT/$task

  # tape_train.py: the data of the task as tables, one for each published split, and a model with ProteinLM's head.
  source=$TAPE/${name%_8}
  [[ $task != contact ]] || source=$TAPE/proteinnet
  [[ -e $folder/data ]] || "$PYTHON" -m esm2mega prepare tape "$name" --source "$source" --out "$folder/data"
  "$PYTHON" -m esm2mega finetune --config "tape_$task" init_from="$OUT/pretrained" run_dir="$folder/run" task.head=proteinlm \
    data.train="$folder/data/train.csv" data.valid="$folder/data/valid.csv" data.test=null ${options[@]+"${options[@]}"}

  # tape_eval.py: all test splits, with the metrics, targets and predictions of each in a file.
  splits=()
  for table in "$folder/data"/*.csv; do
    split=$(basename "$table" .csv)
    [[ $split == train || $split == valid ]] || splits+=(--data "$table" --out "$folder/$split.json")
  done
  "$PYTHON" -m esm2mega evaluate "$folder/run" "${splits[@]}"

  # The fine-tuned model, with its head, as ProteinLM's TAPE reads it.
  [[ -e $folder/for_tape ]] ||
    "$PYTHON" -m esm2mega convert "$folder/run" "$folder/for_tape" --to proteinlm --verify
done
