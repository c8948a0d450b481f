"""Configurations of five earlier systems: their keys in their published layout, with numbers of our own."""

from __future__ import annotations

from pathlib import Path

BIONEMO1_BASE = """\
defaults:
  - _self_
name: esm2nv
do_training: True
trainer:
  devices: 2
  num_nodes: 1
  accelerator: gpu
  precision: 32
  log_every_n_steps: 20
  val_check_interval: 700
  limit_val_batches: 1.0
  accumulate_grad_batches: 4
  gradient_clip_val: 0.5
  benchmark: False
  max_steps: 10000
exp_manager:
  name: ${name}
  exp_dir: results/${.name}
  create_wandb_logger: True
  wandb_logger_kwargs:
    project: ${name}_pretraining
    offline: True
  resume_if_exists: True
  checkpoint_callback_params:
    monitor: val_loss
    save_top_k: 3
    mode: min
model:
  micro_batch_size: 2
  seq_length: 512
  num_layers: 6
  hidden_size: 320
  ffn_hidden_size: ${multiply:${model.hidden_size}, 4}
  num_attention_heads: 20
  position_embedding_type: rope
  hidden_dropout: 0
  attention_dropout: 0.0
  bias_gelu_fusion: False
  esm_gelu: True
  tensor_model_parallel_size: 1
  optim:
    name: fused_adam
    lr: 4e-4
    weight_decay: 0.02
    betas:
      - 0.9
      - 0.98
    sched:
      name: WarmupAnnealDecayHold
      warmup_steps: 200
      min_lr: 4e-5
      max_lr: 4e-4
      max_steps: 10000
      anneal_percentage: 0.10
  tokenizer:
    library: huggingface
    model_name: ???
  seed: 77
  data:
    dataset_path: ${oc.env:BIONEMO_HOME}/data
    num_workers: 8
    train:
      uf50_datapath: raw/uf50.fasta
      uf90_datapath: raw/uf90.fasta
      cluster_mapping_tsv: raw/mapping.tsv
      sort_fastas: True
      range: x[000..049]
    val:
      uf50_datapath: raw/uf50_valid.fasta
    modify_percent: 0.2
    mask_percent: 0.7
    perturb_percent: 0.2
    identity_percent: 0.1
  dwnstr_task_validation:
    enabled: False
"""

BIONEMO1_TASK = """\
name: esm2nv_flip
defaults:
  - base_config
do_testing: True
trainer:
  max_epochs: 20
  val_check_interval: 25
model:
  restore_encoder_path: models/650M.nemo
  encoder_frozen: True
  post_process: False
  micro_batch_size: 64
  global_batch_size: null
  loss_func: CrossEntropyLoss
  hidden_layer_size: 128
  dropout_rate: 0.1
  data:
    task_name: scl
    task_type: classification
    dataset_path: flip/${model.data.task_name}
    dataset: {train: x000, val: x000, test: x000}
    sequence_column: sequence
    target_column: ["scl_label"]
    target_sizes: [10]
    max_seq_length: ${model.seq_length}
  finetuning_optim:
    name: adam
    lr: 0.0005
    betas: [0.9, 0.999]
    eps: 1e-8
    weight_decay: 0.01
    sched: {name: WarmupAnnealing, min_lr: 0.00001, last_epoch: -1, warmup_steps: 10}
"""

BIONEMO1_LORA = """\
name: esm2nv_flip
trainer: {max_epochs: 5, devices: 1}
model:
  restore_encoder_path: models/8M.nemo
  encoder_frozen: False
  cnn_dim: 16
  dropout_rate: 0.25
  peft:
    enabled: True
    peft_scheme: lora
    restore_from_path: null
    lora_tuning: {adapter_dim: 8, adapter_dropout: 0.1, column_init_method: xavier, layer_selection: [1, 6]}
  data:
    task_name: secondary_structure
    task_type: token-level-classification
    dataset_path: flip/secondary_structure
    dataset: {train: x000, val: x000, test: x000}
    modify_percent: 0.0
    target_column: ["3state"]
    target_sizes: [3]
    mask_column: ["resolved"]
  finetuning_optim: {name: adam, lr: 0.0001}
"""

BIONEMO2_TRAIN = """\
#!/bin/bash
STEPS=5000
train_esm2 \\
    --train-cluster-path data/train_clusters.parquet \\
    --train-database-path data/train.db \\
    --valid-cluster-path "data/valid clusters.parquet" \\
    --valid-database-path data/validation.db \\
    --precision=bf16-mixed \\
    --num-gpus 4 --tensor-model-parallel-size 2 \\
    --num-steps $STEPS --early-stop-on-step 4000 \\
    --warmup-steps 100 \\
    --micro-batch-size 16 --accumulate-grad-batches 2 \\
    --num-layers 12 --hidden-size 480 --ffn-hidden-size 1920 --num-attention-heads 20 \\
    --random-mask-strategy amino_acids_only \\
    --limit-val-batches 2 \\
    --weight-decay 0.1 \\
    --nsys-profiling \\
    --result-dir results --experiment-name mine | tee log.txt
"""

BIONEMO2_FINETUNE = """\
finetune_esm2 --restore-from-checkpoint-path checkpoints/8m --train-data-path train.csv \\
  --valid-data-path valid.csv --config-class ESM2FineTuneTokenConfig --task-type classification \\
  --label-column resolved_labels --cnn-num-classes 3 --lora-finetune --num-steps 50 --lr 5e-4 \\
  --micro-batch-size 8 --scale-lr-layer classification_head --lr-multiplier 10
"""

BIONEMO2_RECIPE = """\
{
  "data_config": {
    "micro_batch_size": 4, "result_dir": "./results", "num_dataset_workers": 8, "seq_length": 128,
    "train_cluster_path": "t.parquet", "train_database_path": "t.db",
    "valid_cluster_path": "v.parquet", "valid_database_path": "v.db",
    "min_seq_length": 256, "max_seq_length": 256, "random_mask_strategy": "all_tokens"
  },
  "parallel_config": {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "accumulate_grad_batches": 3,
    "ddp": "megatron", "remove_unused_parameters": true, "use_distributed_optimizer": true,
    "num_devices": 2, "num_nodes": 1
  },
  "training_config": {
    "max_steps": 1000, "limit_val_batches": 1.0, "val_check_interval": 100, "precision": "bf16-mixed",
    "accelerator": "gpu", "gc_interval": 0
  },
  "bionemo_model_config": {
    "initial_ckpt_path": null, "num_layers": 6, "hidden_size": 320, "ffn_hidden_size": 1280,
    "num_attention_heads": 20, "seq_length": 256, "hidden_dropout": 0.02, "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-05, "bias_activation_fusion": true, "activation_func": "gelu",
    "token_dropout": true, "kv_channels": null, "qk_layernorm": false
  },
  "optim_config": {
    "lr": 0.0004, "optimizer": "adam", "warmup_steps": 100, "lr_scheduler": "warmup_anneal", "max_steps": null
  },
  "experiment_config": {
    "save_every_n_steps": 50, "result_dir": "results", "experiment_name": "mine",
    "restore_from_checkpoint_path": null, "save_top_k": 2,
    "metric_to_monitor_for_checkpoints": "reduced_train_loss"
  },
  "wandb_config": {"entity": "us", "project": "esm2", "offline": true}
}
"""

BIONEMO2_NATIVE = """\
use_te: true
config_name_or_path: nvidia/esm2_t6_8M_UR50D
num_train_steps: 2_000
grad_acc_steps: 2
dataset:
  tokenizer_name: ${config_name_or_path}
  micro_batch_size: 4
  max_seq_length: 512
  mlm_probability: 0.15
  load_dataset_kwargs: {path: nvidia/esm2_uniref_pretraining_data, split: train, streaming: True}
wandb_init_args:
  name: ???
  project: mine
fp8_config: {enabled: true}
adamw_kwargs: {lr: 4e-4, fused: true, betas: [0.9, 0.98], eps: 1e-8, weight_decay: 0.01}
lr_scheduler_kwargs: {num_warmup_steps: 100, num_training_steps: 1_000}
checkpoint: {ckpt_dir: ckpt, resume_from_checkpoint: false, save_every_n_steps: 1_000, max_checkpoints: 5}
logger: {frequency: 100}
"""

CEREBRAS = """\
train_input:
    data_processor: "BertCSVDataProcessor"
    data_dir: "./deeploc2/train"
    batch_size: 432
    micro_batch_size: 54
    shuffle: True
    shuffle_seed: 1
eval_input:
    data_processor: "BertCSVDataProcessor"
    data_dir: "./deeploc2/test"
    batch_size: 432
model:
    attention_dropout_rate: 0.0
    disable_nsp: true
    dropout_rate: 0.0
    embedding_layer_norm: false
    encoder_nonlinearity: gelu
    filter_size: 5120
    hidden_size: 1280
    initializer_range: 0.02
    layer_norm_epsilon: 1.0e-05
    max_position_embeddings: 1026
    mixed_precision: true
    num_heads: 20
    num_hidden_layers: 33
    position_embedding_type: rotary
    rotary_dim: 64
    token_dropout: true
    use_final_layer_norm: true
    fp16_type: "cbfloat16"
    vocab_size: 33
    num_labels: 2
    freeze_pretrained_model: False
    classifier_dropout: 0.4
optimizer:
    optimizer_type: "Adam"
    betas: [0.9, 0.98]
    eps: 1.0e-8
    weight_decay: 0.01
    learning_rate:
        - {scheduler: "Linear", initial_learning_rate: 0.0, end_learning_rate: 1.0e-5, total_iters: 500}
        - {scheduler: "Linear", initial_learning_rate: 1.0e-5, end_learning_rate: 1.0e-6, total_iters: 4500}
        - {scheduler: "Linear", initial_learning_rate: 1.0e-6, end_learning_rate: 4.0e-7, total_iters: 15000}
    loss_scaling_factor: "dynamic"
runconfig:
    num_steps: 1000
    log_steps: 1
    checkpoint_steps: 1000
    eval_frequency: 50
    seed: 1
    model_dir: "./model_dir"
    disable_strict_checkpoint_loading: True
    load_checkpoint_states: model
    checkpoint_path: "esm2.mdl"
    num_act_servers: 1
"""

CEREBRAS_TRAINER = """\
trainer:
  init:
    backend: {backend_type: CSX}
    model_dir: ./model_dir
    seed: 1
    model:
      name: "esm2"
      dropout_rate: 0.0
      filter_size: 1920
      hidden_size: 480
      max_position_embeddings: 1026
      mixed_precision: true
      num_heads: 20
      num_hidden_layers: 12
      position_embedding_type: rotary
      rotary_dim: 24
    optimizer: {Adam: {betas: [0.9, 0.98], eps: 1.0e-08, weight_decay: 0.01}}
    schedulers:
    - SequentialLR:
        schedulers:
        - LinearLR: {initial_learning_rate: 0.0, end_learning_rate: 4.0e-4, total_iters: 2000}
        - LinearLR: {initial_learning_rate: 4.0e-4, end_learning_rate: 4.0e-5, total_iters: 450000}
    precision: {enabled: true, fp16_type: cbfloat16, loss_scaling_factor: dynamic}
    loop: {max_steps: 500000, eval_frequency: 10000}
    checkpoint: {steps: 10000}
    logging: {log_steps: 100}
  fit:
    train_dataloader: &loader
      data_processor: BertHDF5DataProcessor
      data_dir: ./hdf5
      batch_size: 2048
    val_dataloader: *loader
"""

ESM2FA = """\
model:
  model_name: "facebook/esm2_t30_150M_UR50D"
  max_position_embeddings: 1026
  max_batch_size: 8192
  use_fa: false
  hidden_dropout_prob: 0.0
training:
  evaluation_strategy: "steps"
  gradient_accumulation_steps: 32
  learning_rate: 4e-4
  optimizer: {beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: 0.01}
  gradient_clipping: 0.5
  lr_scheduler: "cosine"
  schedule_steps: 1000
  max_steps: 2000
  warmup_steps: 25
  mlm_probability: 0.2
  logging_steps: 1
  eval_steps: 100
  save_steps: 200
  save_total_limit: 6
  output_dir: "./runs/mine"
  metric_for_best_model: "eval_loss"
  early_stopping: {enabled: true, patience: 3, threshold: 0.01}
  mixed_precision: "fp16"
  dataloader_num_workers: 4
  seed: 100
data:
  chunk_size: 100000
"""

TRAINER = """\
output_dir: out
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
learning_rate: 1e-4
max_steps: 1000
warmup_ratio: 0.06
lr_scheduler_type: linear
adam_beta2: 0.98
bf16: true
logging_steps: 10
save_steps: 100
save_total_limit: 3
report_to: [wandb]
dataloader_num_workers: 4
"""

PROTEINLM = """\
#!/bin/bash
DATA_PATH=data/pfam_text_document
CHECKPOINT_PATH=checkpoints
MICRO_BATCH_SIZE=4
rm -rf $CHECKPOINT_PATH
python -m torch.distributed.launch $DISTRIBUTED_ARGS \\
       pretrain_tape.py \\
       --num-layers 16 \\
       --attention-dropout 0.1 --hidden-dropout 0.1 \\
       --hidden-size 1024 \\
       --num-attention-heads 16 \\
       --layernorm-epsilon 1e-12 \\
       --micro-batch-size $MICRO_BATCH_SIZE \\
       --global-batch-size $(($MICRO_BATCH_SIZE*$WORLD_SIZE)) \\
       --seq-length 2176 \\
       --max-position-embeddings 2176 \\
       --train-iters 1000000 \\
       --save $CHECKPOINT_PATH \\
       --load ${CHECKPOINT_PATH} \\
       --data-path $DATA_PATH \\
       --vocab-file <Specify path to iupac_vocab.txt> \\
       --split 32593668,1715454,44311 \\
       --lr 0.0001 --lr-decay-style linear --min-lr 1.0e-5 \\
       --lr-decay-iters 990000 --lr-warmup-fraction .01 \\
       --weight-decay 1e-2 --clip-grad 1.0 \\
       --log-interval 1 --save-interval 1000 --eval-interval 100 --eval-iters 10 \\
       --fp16 \\
       --checkpoint-activations |& tee -a log
"""

TAPE = """\
python tape_train.py transformer remote_homology --from_pretrained models/converted \\
  --batch_size 64 --num_train_epochs 20 --learning_rate 0.00004 --output_dir results --warmup_steps 500 \\
  --gradient_accumulation_steps 8 --patience 5
"""

FILES = {
    "base_config.yaml": BIONEMO1_BASE,
    "flip_scl.yaml": BIONEMO1_TASK,
    "flip_lora.yaml": BIONEMO1_LORA,
    "train_esm2.sh": BIONEMO2_TRAIN,
    "finetune_esm2.sh": BIONEMO2_FINETUNE,
    "recipe.json": BIONEMO2_RECIPE,
    "native_te.yaml": BIONEMO2_NATIVE,
    "params_classifier.yaml": CEREBRAS,
    "params_trainer.yaml": CEREBRAS_TRAINER,
    "esm2fa.yaml": ESM2FA,
    "trainer.yaml": TRAINER,
    "pretrain_tape.sh": PROTEINLM,
    "tape_train.sh": TAPE,
}


def write_all(folder: Path) -> Path:
    """Write all files into a folder, as Hydra needs them, and return the folder."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder
