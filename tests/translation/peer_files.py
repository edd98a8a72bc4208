"""Settings of other tools as people have them: by their names, with values away from our defaults."""

from __future__ import annotations

LLAMA_FACTORY = """
### model
model_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct
image_max_pixels: 262144
video_max_pixels: 16384
trust_remote_code: true
flash_attn: fa2

### method
stage: sft
do_train: true
finetuning_type: lora
use_dora: true
lora_rank: 12
lora_alpha: 36
lora_target: all
use_rslora: true
deepspeed: examples/deepspeed/ds_z3_config.json

### dataset
dataset: mine, theirs
dataset_dir: sets
media_dir: sets/pictures
template: qwen2_vl
cutoff_len: 3072
max_samples: 1000
val_size: 0.1
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 3

### output
output_dir: saves/qwen2_5vl-7b/dora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 2e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
weight_decay: 0.05
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 250
"""

DATASET_INFO = """
{
  "mine": {"file_name": "mine.json", "formatting": "sharegpt",
           "columns": {"messages": "messages", "images": "images"},
           "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
  "theirs": {"hf_hub_url": "OWNER/NAME", "formatting": "sharegpt",
             "columns": {"messages": "talk", "images": "images"}}
}
"""

TRL = """
model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct
dtype: bfloat16
dataset_name: OWNER/NAME
dataset_train_split: part
use_peft: true
use_dora: true
lora_r: 24
lora_alpha: 48
lora_dropout: 0.1
lora_target_modules: [q_proj, v_proj]
lora_modules_to_save: [embed_tokens]
load_in_4bit: true
output_dir: trained
learning_rate: 1.0e-4
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_steps: 700
lr_scheduler_type: cosine
warmup_steps: 20
max_length: 2048
assistant_only_loss: true
attn_implementation: flash_attention_2
eval_strategy: "no"
"""

TRL_SCRIPT = """#!/bin/bash
MODEL="llava-hf/llava-1.5-7b-hf"
accelerate launch --config_file examples/accelerate_configs/deepspeed_zero3.yaml \\
    examples/scripts/sft_vlm.py \\
    --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \\
    --model_name_or_path $MODEL \\
    --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \\
    --output_dir LLaVA-1.5-7B-SFT \\
    --dtype bfloat16 \\
    --gradient_checkpointing \\
    --use_peft --use_dora --lora_r 48 \\
    --lora_target_modules q_proj v_proj up_proj
"""

MS_SWIFT = """
# 22GiB
CUDA_VISIBLE_DEVICES=0 \\
MAX_PIXELS=1003520 \\
swift sft \\
    --model Qwen/Qwen2.5-VL-7B-Instruct \\
    --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite#20000' \\
    --tuner_type lora \\
    --use_dora true \\
    --torch_dtype bfloat16 \\
    --num_train_epochs 1 \\
    --per_device_train_batch_size 3 \\
    --learning_rate 1e-4 \\
    --lora_rank 10 \\
    --lora_alpha 40 \\
    --target_modules all-linear \\
    --freeze_vit false \\
    --gradient_accumulation_steps 16 \\
    --eval_steps 50 \\
    --save_steps 50 \\
    --save_total_limit 2 \\
    --logging_steps 5 \\
    --max_length 2048 \\
    --output_dir output \\
    --warmup_ratio 0.05 \\
    --dataset_num_proc 4 \\
    --dataloader_num_workers 4
"""

LLAVA = """#!/bin/bash

deepspeed llava/train/train_mem.py \\
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \\
    --deepspeed ./scripts/zero3.json \\
    --model_name_or_path lmsys/vicuna-13b-v1.5 \\
    --version v1 \\
    --data_path ./playground/data/llava_v1_5_mix665k.json \\
    --image_folder ./playground/data \\
    --vision_tower openai/clip-vit-large-patch14-336 \\
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin \\
    --mm_projector_type mlp2x_gelu \\
    --mm_vision_select_layer -2 \\
    --mm_use_im_start_end False \\
    --mm_use_im_patch_token False \\
    --image_aspect_ratio pad \\
    --group_by_modality_length True \\
    --bf16 True \\
    --output_dir ./checkpoints/llava-v1.5-13b-lora \\
    --num_train_epochs 1 \\
    --per_device_train_batch_size 16 \\
    --per_device_eval_batch_size 4 \\
    --gradient_accumulation_steps 1 \\
    --evaluation_strategy "no" \\
    --save_strategy "steps" \\
    --save_steps 50000 \\
    --save_total_limit 1 \\
    --learning_rate 2e-4 \\
    --weight_decay 0. \\
    --warmup_ratio 0.03 \\
    --lr_scheduler_type "cosine" \\
    --logging_steps 1 \\
    --tf32 True \\
    --model_max_length 2048 \\
    --gradient_checkpointing True \\
    --dataloader_num_workers 4 \\
    --lazy_preprocess True \\
    --report_to wandb
"""
