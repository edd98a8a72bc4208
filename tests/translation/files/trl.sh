#!/bin/bash
MODEL="llava-hf/llava-1.5-7b-hf"
accelerate launch --config_file examples/accelerate_configs/deepspeed_zero3.yaml \
    examples/scripts/sft_vlm.py \
    --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \
    --model_name_or_path $MODEL \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
    --output_dir LLaVA-1.5-7B-SFT \
    --dtype bfloat16 \
    --gradient_checkpointing \
    --use_peft --use_dora --lora_r 48 \
    --lora_target_modules q_proj v_proj up_proj
