"""Flags of LLaVA's scripts and of transformers' TrainingArguments that are not here: what is done instead."""

_LAUNCHER = "several processes are started by python -m mini_llava.launch --config_file accelerate_configs/... train.py"
_FIXED = "this is fixed: "
ELSEWHERE = {
    "dry_run": "python -m mini_llava.tools.plan with the same flags plans a run.",
    **dict.fromkeys(
        ("accelerate_config", "num_gpus", "gpu_memory_gib", "gpu_name", "expected_mfu"),
        "it is a flag of python -m mini_llava.tools.plan, which plans a run.",
    ),
    "deepspeed": "ZeRO is chosen by the launcher's config: python -m mini_llava.launch --config_file "
    "accelerate_configs/zero3.yaml train.py ... (also zero2.yaml, zero3_offload.yaml; a DeepSpeed JSON is named in "
    "such a file as deepspeed_config_file).",
    **dict.fromkeys(
        ("fsdp", "fsdp_config"), "FSDP is not supported; ZeRO-3 partitions the same: accelerate_configs/zero3.yaml."
    ),
    **dict.fromkeys(("local_rank", "use_cpu", "no_cuda"), f"{_LAUNCHER}; cpu.yaml is for the CPU."),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        f"DDP is set up by the program; {_LAUNCHER}.",
    ),
    "accelerator_config": f"{_LAUNCHER}.",
    "run_name": "a run is named by its --output_dir, where log, curves and TensorBoard's files go (wandb: WANDB_NAME).",
    "logging_dir": "TensorBoard's files are in runs/ of --output_dir.",
    **dict.fromkeys(("logging_first_step", "log_level", "disable_tqdm"), "every --logging_steps steps are logged."),
    "logging_strategy": "give --logging_steps; every entry is in log.jsonl too.",
    "save_only_model": "a state holds the optimizer too, so that it can be resumed; with --save_strategy no only the "
    "result is written.",
    "save_safetensors": f"{_FIXED}weights and states are safetensors.",
    "save_on_each_node": "all machines share one --output_dir.",
    "load_best_model_at_end": "the last state is the result; summary.json names the best evaluation, and "
    "--save_strategy steps keeps states for mini_llava.tools.export.",
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "summary.json names the best evaluation."),
    "overwrite_output_dir": "use --resume_from_checkpoint latest to go on, or another --output_dir.",
    "ignore_data_skip": f"{_FIXED}a resumed run goes on with the record it had come to.",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "it always trains; --eval_data_path evaluates too."),
    "eval_accumulation_steps": "evaluation keeps sums only; --per_device_eval_batch_size bounds its memory.",
    "optim": f"{_FIXED}AdamW with fp32 masters (--adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay).",
    **dict.fromkeys(("optim_args", "adafactor", "lr_scheduler_kwargs"), f"{_FIXED}AdamW and --lr_scheduler_type."),
    "gradient_checkpointing_kwargs": "give --gradient_checkpointing True, and --gradient_checkpointing_share.",
    "auto_find_batch_size": "--longest_batch_first shows at once what does not fit, and python -m "
    "mini_llava.tools.plan says what would; --max_tokens_per_micro_batch bounds a micro-batch.",
    "torch_compile": "nothing is compiled; --packing and --use_liger_kernel are what makes it faster.",
    "neftune_noise_alpha": "noise on embeddings is not implemented.",
    "label_smoothing_factor": "the loss is the plain cross entropy; docs/extending.md shows where another one goes.",
    "remove_unused_columns": f"{_FIXED}a record is read whole.",
    **dict.fromkeys(("group_by_length", "length_column_name"), "use --group_by_modality_length, as in LLaVA."),
    **dict.fromkeys(
        (
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_drop_last",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        "the loader is set up by the program; its flags are --dataloader_num_workers and --dataloader_timeout.",
    ),
    "data_seed": "--seed is the seed of the order too.",
    "optim_target_modules": f"{_FIXED}AdamW over all that is trained.",
    "average_tokens_across_devices": f"{_FIXED}--loss_normalization global_batch is the mean over all devices' tokens.",
    "activation_checkpointing": "it is --gradient_checkpointing.",
    "activation_checkpointing_kwargs": "give --gradient_checkpointing True, and --gradient_checkpointing_share.",
    **dict.fromkeys(
        ("torch_compile_backend", "torch_compile_mode"),
        "nothing is compiled; --packing and --use_liger_kernel are what makes it faster.",
    ),
    "liger_kernel_config": "--use_liger_kernel takes all of its kernels that were compared.",
    "use_cache": f"{_FIXED}training has no cache, and results have it switched on.",
    "torch_empty_cache_steps": "--longest_batch_first and --max_tokens_per_micro_batch keep memory within bounds.",
    **dict.fromkeys(
        ("log_on_each_node", "log_level_replica", "verbose_logging"), "rank 0 logs, every --logging_steps steps."
    ),
    "logging_nan_inf_filter": f"{_FIXED}a loss that is not finite ends the run, and says why.",
    "include_num_input_tokens_seen": "tokens are counted in log.jsonl and summary.json.",
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "--report_to names the tracker; its project is a variable of its own (WANDB_PROJECT).",
    ),
    **dict.fromkeys(
        ("eval_delay", "eval_on_start", "prediction_loss_only", "batch_eval_metrics", "include_for_metrics"),
        "--eval_data_path is evaluated before the first step and after the last one, --eval_steps says when between.",
    ),
    **dict.fromkeys(
        ("eval_do_concat_batches", "eval_use_gather_object", "label_names"), "evaluation is set up by the program."
    ),
    "enable_jit_checkpoint": "a signal lets a run write its state and end; --resume_from_checkpoint latest goes on.",
    "restore_callback_states_from_checkpoint": "there are no callbacks; --resume_from_checkpoint restores all.",
    **dict.fromkeys(("parallelism_config", "ddp_static_graph"), f"{_LAUNCHER}."),
    **dict.fromkeys(
        ("train_sampling_strategy", "group_by_varlen"),
        "the order is LLaVA's: --group_by_modality_length, and --sample_order replays one.",
    ),
    **dict.fromkeys(("debug", "skip_memory_metrics"), "log.jsonl has memory and speed; non-finite values are named."),
    "full_determinism": "--seed decides order, new weights and dropout; on a CPU runs are equal to the last bit.",
    "half_precision_backend": "choose the precision with --bf16 or --fp16.",
    "fp16_full_eval": "evaluation computes as training does.",
    "bf16_full_eval": "evaluation computes as training does.",
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
            *("hub_private_repo", "hub_always_push", "hub_revision"),
        ),
        "nothing is uploaded; hf upload NAME OUTPUT_DIR does it afterwards.",
    ),
    "cache_dir": "models from the hub are kept where HF_HOME says: HF_HOME=DIR python train.py ...",
    "model_base": "--model_name_or_path is what a run starts from; mini_llava.tools.chat and export take --model_base.",
    "model_path": "use --model_name_or_path.",
    "model_max_len": "it is --model_max_length.",
    "mpt_attn_impl": "attention is --attn_implementation.",
    "use_flash_attn": "use --attn_implementation flash_attention_2.",
    "attn_impl": "use --attn_implementation.",
    "mm_tunable_parts": "what is trained is chosen by --tune_mm_mlp_adapter, --freeze_mm_mlp_adapter, "
    "--freeze_backbone, --unfreeze_mm_vision_tower and --lora_enable.",
    "unfreeze_language_model": "it is trained in stage 2 unless --freeze_backbone True.",
    **dict.fromkeys(
        ("tune_vision_tower", "tune_mm_mlp_and_vision_tower", "tune_mm_vision"), "it is --unfreeze_mm_vision_tower."
    ),
    "tune_entire_model": "stage 2 with --unfreeze_mm_vision_tower True trains all.",
    **dict.fromkeys(
        ("freeze_vision_tower", "freeze_vit"), "the tower is frozen unless --unfreeze_mm_vision_tower True."
    ),
    "freeze_llm": "it is --freeze_backbone.",
    **dict.fromkeys(
        ("mm_resampler_type", "mm_perceiver_depth", "mm_qformer_depth", "tune_mm_vision_resampler"),
        "there is no resampler; --mm_projector_type chooses the projector.",
    ),
    **dict.fromkeys(
        ("video_folder", "video_fps", "frames_upbound", "force_sample", "add_time_instruction", "add_faster_video"),
        "videos are not read; several images may stand in a record.",
    ),
    **dict.fromkeys(("mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride"), "videos are not read."),
    **dict.fromkeys(("hd", "image_split_resolution"), "LLaVA's own code never reads it; see --image_aspect_ratio."),
    "prompt_version": "it is --version.",
    **dict.fromkeys(("tokenizer_name", "use_fast_tokenizer", "use_fast"), "the model's own tokenizer is taken."),
    **dict.fromkeys(
        ("torch_dtype", "dtype", "compute_dtype"), "choose the precision with --bf16 or --fp16; masters are fp32."
    ),
    **dict.fromkeys(("use_peft", "use_lora"), "it is --lora_enable."),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "use --bits, with --lora_enable True."),
    "lora_modules_to_save": "with adapters the projector is trained whole, and --trainable_token_indices names rows.",
    "resize_vocab": "it is --resize_token_embeddings.",
    **dict.fromkeys(
        ("s2", "s2_scales"), "S2 features are not implemented; for more detail use --image_aspect_ratio anyres."
    ),
    "image_crop_resolution": "use --image_size for the tower's size.",
    "is_multimodal": "a record with an image is multimodal, one without is text.",
    "early_mix_text": "text records may stand in --data_path; --data_weights mixes files.",
    "modules_to_save": "with adapters the projector is trained whole, and with --lora_bias biases.",
    "max_seq_length": "it is --model_max_length.",
    "per_gpu_train_batch_size": "it is --per_device_train_batch_size.",
    "train_batch_size": "use --global_batch_size, which counts all devices.",
}
