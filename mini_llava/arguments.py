"""Every flag of the trainer: three dataclasses, the presets of the two stages, and the parser.

The text under a field is its `--help`; its metadata say what values it takes and what it decides. Flag names are
LLaVA's where it has one and transformers' otherwise, so that the command lines of LLaVA's published scripts run as they
stand. A value is looked for on the command line, then in the `--config` file, then in the stage's preset, then here.
"""

import argparse
import dataclasses
import functools
import math
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .command_line import (
    HelpFormatter,
    Parser,
    ShowHelp,
    add_common_flags,
    add_flags,
    convert,
    describe,
    plain,
    unknown_flag,
)
from .errors import UserError
from .files import atomic_write
from .words import counted

# What is trained where neither flags nor a file name a model.
STAGE_CONFIGS = {stage: Path(__file__).with_name("demo") / f"stage{stage}.yaml" for stage in (1, 2)}

# What a flag decides. A resumed run compares its value with that of the run it resumes, unless it has one of these:
CONTENT = "content"  # it names what is compared itself: files, weights, the records it lets pass
ROUNDING = "rounding"  # how a step is computed, and its numbers by no more than rounding: it is said where it differs
NOTHING = "nothing"  # of the numbers: where, when and how fast things are read, written and shown, what is refused
# Or the name of another flag, which says what it comes to.


def flag(default, **metadata):
    """Return a field with this default.

    Args:
        metadata: `choices`, the values it may have; `positive`; `needs`, (another flag, the value of that one) without
            which it does nothing, or of which None is the one it must not have; `decides`, see above; `metavar`.
    """
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Model"""

    model_name_or_path: str | None = flag(None, decides=CONTENT)
    """Language model, or a LLaVA model: a hub name or a local directory. A language model is anything that
    AutoModelForCausalLM loads (lmsys/vicuna-7b-v1.5). A LLaVA model brings its projector and its vision tower; it has
    the layout of LLaVA's own code (liuhaotian/llava-v1.5-7b) or of transformers (llava-hf/llava-1.5-7b-hf), or is an
    output directory of stage 2."""

    vision_tower: str | None = flag(None, decides=CONTENT)
    """Vision tower: a hub name or local directory of a CLIP, SigLIP or DINOv2 model. An example is
    openai/clip-vit-large-patch14-336. The tower of a LLaVA or FastVLM model can be taken too (apple/FastVLM-0.5B, which
    needs timm). Not needed if model_name_or_path is a LLaVA model."""

    version: str | None = None
    """Conversation template of the training text. An unknown name lists the known ones; chat_template is the one that
    comes with the language model's tokenizer."""

    mm_projector_type: str = "linear"
    """Kind of projector: linear, mlp2x_gelu (or any depth, mlpNx_gelu) or identity."""

    mm_vision_select_layer: int = -1
    """Hidden state of the vision tower that the projector reads; LLaVA-1.5 uses -2, the second to last. FastVLM's tower
    has only its output, -1, which is used unless another layer is asked for; that is refused."""

    mm_vision_select_feature: str = flag("patch", choices=("patch", "cls_patch"))
    """Tokens of the vision tower to keep: patch drops the class token, and register tokens if the tower has them;
    cls_patch keeps them."""

    image_size: int | None = flag(None, positive=True)
    """Side length, in pixels, of the square images or tiles that the vision tower reads. Its position embeddings are
    interpolated to this size when it is loaded, and it is saved that way. Default: the size that it was trained
    with."""

    pretrain_mm_mlp_adapter: str | None = flag(None, decides=CONTENT)
    """Projector to start from: mm_projector.bin of stage 1 or of LLaVA, or its directory. It replaces the projector of
    a LLaVA model."""

    tune_mm_mlp_adapter: bool = False
    """Train the projector only, as stage 1 does."""

    freeze_mm_mlp_adapter: bool = False
    """Keep the projector frozen."""

    freeze_backbone: bool = False
    """Keep the whole language model frozen, including its output head, which stays trainable in LLaVA."""

    unfreeze_mm_vision_tower: bool = False
    """Train the vision tower as well."""

    attn_implementation: str | None = flag(
        None, choices=("sdpa", "flash_attention_2", "varlen", "eager"), decides=ROUNDING
    )
    """Attention kernel: sdpa, flash_attention_2, varlen or eager; default: the fastest that runs here. varlen is for
    packed batches: FlashAttention 4 if flash-attn-4 is installed, otherwise torch's own kernel. transformers has this
    flag in place of LLaVA's flash_attn flags."""

    trust_remote_code: bool = flag(False, decides=NOTHING)
    """Allow a model directory to run the Python code that it contains. Otherwise such code is refused, unless
    transformers has its own class for the model. The code can do whatever you can: read it before you allow it."""

    mm_patch_merge_type: str | None = flag(None, choices=("flat", "spatial", "spatial_unpad"))
    """With image_aspect_ratio anyres: how the features of an image's tiles are arranged. flat concatenates the tiles;
    spatial orders features by the rows of the image; spatial_unpad also removes the padding and adds a trained newline
    embedding after each row. Default: spatial_unpad, as in LLaVA-1.6."""

    mm_use_im_start_end: bool = False
    """Surround each image with the tokens <im_start> and <im_end>, as LLaVA's first models do."""

    resize_token_embeddings: bool = False
    """Add rows to the language model's embeddings and head for those tokens of its tokenizer that have none. A new row
    is the mean of the existing ones, and is trained where the language model is trained in full. Without this flag such
    a tokenizer is refused."""

    add_tokens: list[str] | None = flag(None, metavar="TOKEN")
    """Tokens to add to the tokenizer, such as "<loc0>" "<loc1>"; the tokenizer is saved with the result. Embeddings and
    head get a row for each, the mean of the existing rows; with lora_enable these rows are trained along with the
    adapters."""

    mm_use_im_patch_token: bool = False
    """Add the token <im_patch> to the vocabulary, where it only takes a place, as in LLaVA's first models."""


@dataclass
class DataArguments:
    """Data"""

    data_path: list[str] | None = flag(None, decides=CONTENT)
    """Training records: one or more JSON or JSON-lines files in LLaVA's format."""

    image_folder: list[str] | None = flag(None, decides=CONTENT)
    """Image folder of each data file, in the same order; leave it out for text-only data."""

    follow_links: bool = flag(False, decides=CONTENT)
    """Follow symbolic links that lead out of the image folders. Otherwise such images are bad samples, because their
    names come with the data."""

    data_weights: list[float] | None = flag(None, metavar="X")
    """How often an epoch contains the records of each data file, in the same order. 2 takes every record twice; 0.5
    takes half of them, and the other half in the next epoch. Default: 1 for all."""

    exclude: list[str] | None = flag(None, decides=CONTENT)
    """Lists of records to leave out from the start: one that mini_llava.tools.doctor writes, or a skipped.jsonl."""

    image_aspect_ratio: str = flag("square", choices=("square", "pad", "anyres"))
    """square crops the centre, pad fills up to a square, anyres adds tiles. square resizes before it crops; pad fills
    with the processor's mean colour; anyres, as in LLaVA-1.6, takes the whole image and tiles of it, each of the
    tower's size."""

    image_grid_pinpoints: str | None = None
    """With image_aspect_ratio anyres: pixel sizes (width, height), multiples of the tile, that an image may be resized
    to; the best fitting one is used. Default: LLaVA-1.6's, for a tower of 336 pixels "[(336, 672), (672, 336), (672,
    672), (1008, 336), (336, 1008)]"."""

    group_by_modality_length: bool = False
    """Fill each global batch with image samples only or with text-only samples, of similar length."""

    model_max_length: int = flag(512, positive=True)
    """Longest sequence in tokens, image tokens included; longer ones are truncated."""

    packing: bool = flag(True, decides=ROUNDING)
    """Concatenate the samples of a micro-batch instead of padding them. Attention never crosses samples; this changes
    speed and memory, not the loss."""

    max_tokens_per_micro_batch: int | None = flag(None, positive=True, decides=ROUNDING)
    """Most tokens in a micro-batch, padding included. A step gets as many more micro-batches as that takes."""

    on_bad_sample: str = flag("error", choices=("error", "skip"), decides=NOTHING)
    """What to do with a bad record: error stops and names it, skip leaves it out. The global batch then shrinks, and
    the record is listed in skipped.jsonl."""

    max_skipped_share: float = flag(0.1, decides=NOTHING)
    """With on_bad_sample skip: the share of the samples of ten steps that may turn out bad while training. Above it the
    run saves its state and ends."""

    leave_unread: list[str] | None = flag(None, decides=CONTENT, metavar="NAME")
    """Keys and marks of records that look like media or a prompt and that you want ignored: video "<video>" system. A
    number in one stands for any number. Otherwise such records are bad samples."""

    dataloader_num_workers: int = flag(0, decides=NOTHING)
    """Processes that load, tokenize and preprocess samples ahead of the step."""

    dataloader_timeout: int = flag(300, positive=True, decides=NOTHING)
    """Seconds such a process may take to deliver; after that the run saves its state and ends, naming the records. NCCL
    waits 600 seconds."""

    sample_order: str | None = None
    """JSON file with the sample order of an earlier run to replay: a list of global batches of record indices."""

    eval_data_path: list[str] | None = flag(None, decides=NOTHING)
    """Held-out records to evaluate, one or more files. This is done before and after training, and between as
    eval_steps says. Their loss is measured, and the model's answer to the last question of each is compared with the
    one given. A record with the key "metric": "choice" is right if the letter is the same."""

    eval_image_folder: list[str] | None = flag(None, needs=("eval_data_path", None), decides=NOTHING)
    """Image folder of each file of eval_data_path, in the same order."""

    eval_version: str | None = flag(None, needs=("eval_data_path", None), decides=NOTHING)
    """Conversation template of the held-out questions. Default: the one trained with."""

    eval_max_samples: int | None = flag(None, positive=True, needs=("eval_data_path", None), decides=NOTHING)
    """Evaluate this many of the held-out records, chosen at random. Default: all."""

    eval_samples_shown: int = flag(8, needs=("eval_data_path", None), decides=NOTHING)
    """Held-out questions, the same at each evaluation, that TensorBoard and eval_samples.jsonl show with the model's
    answers."""

    lazy_preprocess: bool = flag(True, choices=(True,), decides=NOTHING)
    """Accepted as True only: records are always read and tokenized when they are needed, as LLaVA does with this
    flag."""


@dataclass
class TrainingArguments:
    """Training"""

    output_dir: str | None = flag(None, decides=NOTHING)
    """Directory of the run's files."""

    num_train_epochs: float = flag(1.0, positive=True, decides="max_steps")
    """Passes over the data; may be a fraction."""

    max_steps: int = -1
    """Optimizer steps in total; if positive, overrides num_train_epochs."""

    global_batch_size: int | None = flag(None, positive=True)
    """Samples per optimizer step, on all devices together. The preset's value holds on any number of devices, unless
    gradient_accumulation_steps is given."""

    per_device_train_batch_size: int = flag(8, positive=True, decides=ROUNDING)
    """Samples per micro-batch on one device. Packed, their number varies and this is its average."""

    gradient_accumulation_steps: int | None = flag(None, positive=True, decides="global_batch_size")
    """Micro-batches per optimizer step. Default: as many as the global batch needs. If given, the global batch is
    devices x per_device_train_batch_size x this, as in LLaVA."""

    learning_rate: float = 5e-5
    """Peak learning rate."""

    mm_projector_lr: float | None = None
    """Peak learning rate of the projector, if different."""

    mm_vision_tower_lr: float | None = None
    """Peak learning rate of the vision tower, if different."""

    weight_decay: float = 0.0
    """Weight decay of all trained parameters except norms and biases."""

    lora_enable: bool = False
    """Train low-rank adapters (LoRA) on the language model instead of its weights. Every linear layer except the head
    gets one."""

    lora_target_modules: list[str] | None = flag(None, needs=("lora_enable", True), metavar="NAME")
    """Linear layers of the language model that get adapters, by their full names or the ends of these: q_proj v_proj.
    Default, and all-linear: all except the head."""

    lora_vision_tower: bool = flag(False, needs=("lora_enable", True))
    """Train adapters of the same rank on the vision tower's linear layers too; in the saved result they are merged into
    its weights."""

    use_dora: bool = flag(False, needs=("lora_enable", True))
    """DoRA: train a magnitude for each output of an adapted weight; the adapter changes the direction only."""

    use_rslora: bool = flag(False, needs=("lora_enable", True))
    """rsLoRA: scale an adapter's output by lora_alpha / sqrt(lora_r) instead."""

    lora_r: int = flag(64, positive=True, needs=("lora_enable", True))
    """Rank of the adapters. Stage 2 with lora_enable uses 128, as LLaVA's finetune_lora.sh does."""

    lora_alpha: int = flag(16, positive=True, needs=("lora_enable", True))
    """An adapter's output is scaled by lora_alpha / lora_r. Stage 2 with lora_enable uses 256."""

    lora_dropout: float = flag(0.05, needs=("lora_enable", True))
    """Dropout before each adapter."""

    lora_bias: str = flag("none", choices=("none", "all", "lora_only"), needs=("lora_enable", True))
    """Biases of the language model to train along with the adapters: none, all, or lora_only (those of adapted
    layers)."""

    trainable_token_indices: list[str] | None = flag(None, needs=("lora_enable", True), metavar="TOKEN")
    """Tokens, or their ids, whose rows in embeddings and head are trained along with the adapters, as in PEFT. Those of
    add_tokens always are; otherwise LoRA trains no rows."""

    lora_weight_path: str = flag("", needs=("lora_enable", True), decides=CONTENT)
    """Directory of an earlier LoRA run, ours or LLaVA's, whose adapters and projector to start from."""

    bits: int = flag(16, choices=(4, 8, 16))
    """4 or 8 quantises the language model's frozen weights to as many bits (QLoRA); needs lora_enable and
    bitsandbytes."""

    double_quant: bool = flag(True, needs=("bits", 4))
    """With bits 4: quantise the quantisation constants as well."""

    quant_type: str = flag("nf4", choices=("nf4", "fp4"), needs=("bits", 4))
    """With bits 4: the data type, nf4 or fp4."""

    adam_beta1: float = 0.9
    """AdamW's decay rate of the first moment."""

    adam_beta2: float = 0.999
    """AdamW's decay rate of the second moment."""

    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""

    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 disables clipping, as LLaVA's scripts on DeepSpeed silently do."""

    lr_scheduler_type: str = flag("linear", choices=("cosine", "linear", "constant", "constant_with_warmup"))
    """Learning rate schedule: cosine, linear, constant or constant_with_warmup."""

    warmup_ratio: float = 0.0
    """Share of all steps over which the learning rate rises from 0."""

    warmup_steps: float = 0.0
    """Steps over which the learning rate rises, or, below 1, their share of all steps; overrides warmup_ratio, as in
    transformers."""

    loss_normalization: str = flag("global_batch", choices=("global_batch", "micro_batch"))
    """global_batch divides the sum of token losses by the trained tokens of the global batch; micro_batch is LLaVA's
    mean of the micro-batches' means, and needs --packing False."""

    bf16: bool = False
    """Compute in bfloat16; trained parameters keep an fp32 master copy. A GPU without bfloat16 uses fp16 instead."""

    fp16: bool = flag(False, decides="bf16")
    """Compute in float16 with loss scaling; trained parameters keep an fp32 master copy."""

    tf32: bool | None = None
    """Allow TF32 in fp32 matrix products (Ampere and later)."""

    gradient_checkpointing: bool = flag(False, decides=ROUNDING)
    """Recompute the language model's layers in backward to save memory. This is up to a third more work."""

    gradient_checkpointing_share: float = flag(1.0, decides=ROUNDING)
    """Share of the layers that gradient_checkpointing recomputes, spread evenly. The smaller the share, the faster the
    step and the more memory it needs."""

    use_liger_kernel: bool | None = flag(None, decides=ROUNDING)
    """Use Liger's fused RMSNorm, rotary embedding and SwiGLU. Default: on a GPU, if liger-kernel is installed, for the
    model families that were compared with it."""

    fp8: bool = flag(False, needs=("bits", 16), decides=ROUNDING)
    """Compute the language model's linear layers, except the head, in float8. Needs a GPU of compute capability 8.9 or
    later."""

    seed: int = 42
    """Seed of the sample order, of new weights and of dropout."""

    logging_steps: int = flag(1, positive=True, decides=NOTHING)
    """Steps between two log entries."""

    save_strategy: str = flag("steps", choices=("steps", "epoch", "no"), decides=NOTHING)
    """When to write a training state: steps, every save_steps; epoch, after each pass over the data; or no."""

    save_steps: float = flag(500, positive=True, decides=NOTHING)
    """Steps between two training states, or, below 1, their share of all steps. A crash costs at most this much
    work."""

    save_total_limit: int | None = flag(None, positive=True, decides=NOTHING)
    """Number of training states to keep. The oldest is deleted once the newest is complete. Default: all are kept."""

    export_format: str = flag("transformers", choices=("transformers", "llava"), decides=NOTHING)
    """Layout of stage 2's result: transformers (LlavaForConditionalGeneration), or llava for LLaVA's own code. python
    -m mini_llava.tools.export turns one into the other."""

    save_vision_tower: bool = flag(False, decides=NOTHING)
    """Write the vision tower's weights in LLaVA's layout even if they were not trained. transformers' layout always has
    them."""

    resume_from_checkpoint: str | None = flag(None, decides=NOTHING)
    """Training state to resume from: latest, or the path of a checkpoint directory. latest starts anew if there is
    none."""

    resume_ignore: list[str] | None = flag(None, decides=NOTHING, metavar="NAME")
    """What may differ from the run that wrote the checkpoint: names of flags, and the words data, images and model."""

    allow: list[str] | None = flag(
        None, choices=("template", "projector", "learning_rate", "adapters"), decides=NOTHING, metavar="CHECK"
    )
    """Contradictions that the checks before step 1 would refuse and that you intend. template: its end mark is not a
    token of this tokenizer; projector: it was trained with other parts; learning_rate: it is 0 in all steps; adapters:
    they do not reach all layers."""

    eval_steps: int = flag(0, needs=("eval_data_path", None), decides=NOTHING)
    """Steps between two evaluations; 0: only before and after training."""

    evaluation_strategy: str = flag("no", choices=("no", "steps"), decides=NOTHING)
    """steps evaluates every eval_steps steps, as eval_steps alone does; no is what LLaVA's scripts say."""

    report_to: str = flag("tensorboard", decides=NOTHING)
    """Tracker: tensorboard, wandb, another that accelerate knows, or none. log.jsonl is written in any case."""

    per_device_eval_batch_size: int = flag(16, positive=True, decides=NOTHING)
    """Held-out records whose images a device reads at once. Of their questions, as many are asked at once as fit the
    tokens of that many records of model_max_length."""

    background_save: bool = flag(True, decides=NOTHING)
    """Copy a training state to host memory, 12 bytes per trained parameter, and write it while the next steps run. With
    False, or where that much memory is not free, the run waits until it is written."""

    longest_batch_first: bool = flag(True, decides=NOTHING)
    """Before step 1, run the longest micro-batch, forward and backward, so that a run that needs too much memory
    ends at once and not after hours. This does not change the training."""


# LLaVA-1.5's published recipe: scripts/v1_5/pretrain.sh and finetune.sh of haotian-liu/LLaVA.
LLAVA_1_5 = dict(
    mm_projector_type="mlp2x_gelu",
    mm_vision_select_layer=-2,
    model_max_length=2048,
    num_train_epochs=1.0,
    weight_decay=0.0,
    warmup_ratio=0.03,
    lr_scheduler_type="cosine",
    bf16=True,
    tf32=True,
    gradient_checkpointing=True,
    dataloader_num_workers=4,
)
PRESETS = {
    1: LLAVA_1_5
    | dict(
        version="plain",
        tune_mm_mlp_adapter=True,
        image_aspect_ratio="square",
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        global_batch_size=256,
        output_dir="outputs/stage1",
    ),
    2: LLAVA_1_5
    | dict(
        version="v1",
        image_aspect_ratio="pad",
        group_by_modality_length=True,
        learning_rate=2e-5,
        per_device_train_batch_size=16,
        global_batch_size=128,
        output_dir="outputs/stage2",
    ),
}
# What scripts/v1_5/finetune_lora.sh has instead, taken in stage 2 with --lora_enable.
LORA_PRESET = dict(lora_r=128, lora_alpha=256, learning_rate=2e-4, mm_projector_lr=2e-5)


# A command line with `--lazy_preprocess`, which says nothing here, is of LLaVA's scripts. What it leaves out has there
# the default of these fields; scripts/pretrain.sh and finetune.sh, older than 1.5, leave out much.
OF_PRESETS = (
    *("mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio", "group_by_modality_length"),
    *("model_max_length", "learning_rate", "warmup_ratio", "lr_scheduler_type", "lora_r", "lora_alpha"),
)
ALSO = {"eval_strategy": "evaluation_strategy"}  # transformers' later name

PARTS = (ModelArguments, DataArguments, TrainingArguments)


@dataclass
class Arguments:
    """All resolved arguments of a run; `explicit` names those given on the command line or in the file."""

    stage: int
    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    explicit: set[str] = field(default_factory=set)
    is_demo: bool = False

    def as_dict(self) -> dict:
        """Return flag name to value, as a `--config` file would hold it."""
        values = {"stage": self.stage}
        for part in (self.model, self.data, self.training):
            values |= dataclasses.asdict(part)
        return values

    def replace(self, **values) -> "Arguments":
        """Return other arguments, in which these flags have these values."""
        parts = [
            dataclasses.replace(part, **{name: value for name, value in values.items() if hasattr(part, name)})
            for part in (self.model, self.data, self.training)
        ]
        return Arguments(self.stage, *parts, self.explicit, self.is_demo)

    def fixed_by(self, source) -> "Arguments":
        """Return other arguments, in which flags have the values that what a run starts from fixes.

        source: what `open_source` has found.
        """
        return self.replace(**source.fixed_flags())


def parse_arguments(
    command_line: list[str] | None = None, program: str = "train.py", of_tool: Collection[str] = ()
) -> Arguments:
    """Resolve command line over `--config` file over preset over default; a fault ends the program with a sentence.

    Args:
        program: what its errors are signed with.
        of_tool: flags that a tool has taken from the line before, see `Parser`.
    """
    parser = _build_parser(program)
    parser.of_tool = of_tool
    given = vars(parser.parse_args(command_line))
    stage, config_file = given.pop("stage", None), given.pop("config", None)
    try:
        return resolve(stage, given, config_file)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def resolve(stage: int | None, command_line: dict, config_file: str | None = None) -> Arguments:
    """Return the arguments of one run, whose stage may stand in the file. Raises UserError with a sentence."""
    from_file = read_config(config_file) if config_file else {}
    of_file = from_file.pop("stage", None)
    stage = of_file if stage is None else stage
    if stage is None:
        where = f"on the command line or as `stage: 2` in {config_file}" if config_file else "(see --help)"
        raise UserError(f"--stage is missing: give --stage 1 or --stage 2 {where}.")
    if stage not in PRESETS:
        raise UserError(f"{config_file}: stage must be 1 or 2, not {stage}.")
    if of_file not in (None, stage):
        raise UserError(f"{config_file} is written for stage {of_file}, which contradicts --stage {stage}.")
    is_demo = config_file is None and _wants_demo(command_line)
    if is_demo:
        from_file = read_config(str(STAGE_CONFIGS[stage]))
        from_file.pop("stage", None)
    explicit = from_file | command_line
    preset = PRESETS[stage] | (LORA_PRESET if stage == 2 and explicit.get("lora_enable") else {})
    if "lazy_preprocess" in explicit:
        _check_script(stage, preset, explicit)
    values = _give_way({f.name: f.default for f in flag_fields()} | preset | explicit, explicit.keys())
    parts = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)}) for kind in PARTS]
    arguments = Arguments(stage, *parts, explicit=set(explicit), is_demo=is_demo)
    _check(arguments)
    return arguments


def _check_script(stage: int, preset: dict, given: dict) -> None:
    """Raise UserError for a command line of LLaVA's scripts that leaves out what a preset changes."""
    defaults = {f.name: f.default for f in flag_fields() if f.name in OF_PRESETS}
    if "mm_projector_lr" in preset:  # without it the projector has the rate of the rest
        defaults["mm_projector_lr"] = given.get("learning_rate", defaults["learning_rate"])
    left = [name for name in defaults if name not in given and preset.get(name, defaults[name]) != defaults[name]]
    if left:
        theirs, ours = (" ".join(f"--{name} {values[name]}" for name in left) for values in (defaults, preset))
        raise UserError(
            f"--lazy_preprocess comes from LLaVA's scripts, where flags that are left out mean {theirs}; here stage "
            f"{stage} means {ours}, as LLaVA-1.5 does. Add those that you want, or leave --lazy_preprocess out."
        )


def _wants_demo(given: dict) -> bool:
    """True if no model and no data flag is given; all of them: False; some: an error that names the missing ones."""
    needed = ("model_name_or_path", "data_path")
    if not any(name in given for name in (*needed, "vision_tower", "image_folder", "pretrain_mm_mlp_adapter")):
        return True
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise UserError(
            f"{' and '.join(missing)} missing: give a language model with --vision_tower, or a LLaVA model, and the "
            "data; without any of them the embedded demo is trained."
        )
    return False


def read_config(path: str) -> dict:
    """Read a `--config` file: flag names to values, checked like the command line. Raises UserError, a sentence."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines.")
    kinds = {f.name: kind for f, kind in _fields()} | {"stage": int}
    values = {}
    for written, value in content.items():
        name = ALSO.get(written, written)
        if name not in kinds:
            raise UserError(f"--config {path}: {unknown_flag(str(name), kinds)}")
        try:
            values[name] = convert(kinds[name], value)
        except (ValueError, TypeError):
            raise UserError(f"--config {path}: {name}: {value!r} is not {describe(kinds[name])}.") from None
    return values


def parse_for_a_tool(command_line: list[str], tool: str, of_tool: Collection[str] = ()) -> Arguments:
    """Return `train.py`'s arguments for a tool that shows what a run does: of stage 2 if no stage is named."""
    parser = _build_parser(tool)
    parser.of_tool = of_tool
    named, file = (getattr(parser.parse_args(command_line), name, None) for name in ("stage", "config"))
    try:
        named = named or (file and read_config(file).get("stage"))
    except ValueError as error:
        parser.error(str(error))
    return parse_arguments(command_line if named else ["--stage", "2", *command_line], tool, of_tool)


def check_values(*parts) -> None:
    """Raise UserError for a value that is none of its field's choices, or has to be positive; each with a sentence.

    parts: dataclasses of flags.
    """
    for part in parts:
        for f in dataclasses.fields(part):
            value, known = getattr(part, f.name), f.metadata.get("choices")
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            if known and (unknown := sorted(set(values) - set(known))):
                kind = f.metadata.get("metavar", "value").lower()
                raise UserError(f"--{f.name} {unknown[0]}: known {kind}s are {', '.join(map(str, known))}.")
            if f.metadata.get("positive") and value <= 0:
                raise UserError(f"--{f.name} must be positive, not {value}.")


def _check_needs(arguments: Arguments) -> None:
    """Raise UserError for a flag that does nothing, because another one has not the value it needs."""
    values = arguments.as_dict()
    for f in flag_fields():
        other, needed = f.metadata.get("needs", (None, None))
        if other is None or values[f.name] == f.default:
            continue
        if needed is None and values[other] is None:
            raise UserError(f"--{f.name} needs --{other}.")
        if needed is not None and f.name in arguments.explicit and values[other] != needed:
            raise UserError(f"--{f.name} {values[f.name]} does nothing without --{other} {needed}.")


def _check(arguments: Arguments) -> None:
    """Raise UserError, a sentence, for flags that are missing or contradict each other."""
    values = arguments.as_dict()
    check_values(arguments.model, arguments.data, arguments.training)
    for name in ("model_name_or_path", "data_path", "version"):
        if not values[name]:
            raise UserError(f"--{name} is missing.")
    for name in ("model_name_or_path", "vision_tower"):
        check_model_place(f"--{name}", values[name])
    for check in (_check_model, _check_training, _check_data, _check_needs, _check_evaluation):
        check(arguments)


def _check_model(arguments: Arguments) -> None:
    model, training = arguments.model, arguments.training
    if model.tune_mm_mlp_adapter and model.freeze_mm_mlp_adapter:
        raise UserError("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter together leave nothing to train.")
    if model.tune_mm_mlp_adapter and model.unfreeze_mm_vision_tower:
        raise UserError("--tune_mm_mlp_adapter trains the projector only; --unfreeze_mm_vision_tower contradicts it.")
    if training.lora_enable and model.tune_mm_mlp_adapter:
        raise UserError(
            "--tune_mm_mlp_adapter (stage 1's preset) trains the projector only; --lora_enable contradicts it: use "
            "--stage 2 or --tune_mm_mlp_adapter False."
        )
    if model.add_tokens and (model.tune_mm_mlp_adapter or model.freeze_backbone):
        raise UserError("--add_tokens: the new rows are trained along with the language model, which is frozen here.")
    if training.lora_vision_tower and model.unfreeze_mm_vision_tower:
        raise UserError("--unfreeze_mm_vision_tower trains the tower in full; --lora_vision_tower contradicts it.")
    if training.lora_enable and model.freeze_backbone:
        raise UserError("--freeze_backbone keeps the language model as it is; --lora_enable contradicts it.")
    if training.bits != 16 and not training.lora_enable:
        raise UserError(f"--bits {training.bits} freezes the quantised weights: it needs --lora_enable True.")
    if training.lora_weight_path and model.pretrain_mm_mlp_adapter:
        raise UserError("--lora_weight_path brings a projector of its own: leave --pretrain_mm_mlp_adapter out.")
    if not 0 <= training.lora_dropout < 1:
        raise UserError(f"--lora_dropout must be at least 0 and below 1, not {training.lora_dropout}.")


def _check_training(arguments: Arguments) -> None:
    training, share = arguments.training, arguments.training.gradient_checkpointing_share
    comparable = {name for name in arguments.as_dict() if compared_as(name)}
    comparable |= {"data", "images", "model", "per_device_train_batch_size"}
    if unknown := sorted(set(training.resume_ignore or []) - comparable):
        raise UserError(
            f"--resume_ignore {unknown[0]}: it is not compared with a checkpoint; known names are "
            f"{', '.join(sorted(comparable))}."
        )
    if not 0 < share <= 1:
        raise UserError(f"--gradient_checkpointing_share {share}: give a share of the layers above 0 and up to 1.")
    if share < 1 and not training.gradient_checkpointing:
        raise UserError("--gradient_checkpointing_share has no effect with --gradient_checkpointing False.")
    if isinstance(training.save_steps, float) and not training.save_steps < 1:
        raise UserError(f"--save_steps {training.save_steps:g}: give whole steps, or below 1 a share of all steps.")
    if training.bf16 and training.fp16:
        raise UserError("--bf16 and --fp16 cannot both be True.")
    if training.loss_normalization == "micro_batch" and arguments.data.packing:
        raise UserError("--loss_normalization micro_batch is defined for padded batches: use --packing False.")


def _check_data(arguments: Arguments) -> None:
    data = arguments.data
    if read := sorted({"image", "conversations", "<image>"} & set(data.leave_unread or [])):
        raise UserError(f"--leave_unread {read[0]}: this is always read; name keys and marks that are not.")
    if not 0 <= data.max_skipped_share <= 1:
        raise UserError(f"--max_skipped_share {data.max_skipped_share}: give a share of the samples, from 0 to 1.")
    if data.data_weights is None:
        return
    if len(data.data_weights) != len(data.data_path):
        raise UserError(
            f"--data_weights lists {counted(len(data.data_weights), 'number')} and --data_path "
            f"{counted(len(data.data_path), 'file')}; they are matched by position, so give one number for each file."
        )
    if wrong := [weight for weight in data.data_weights if not 0 < weight < math.inf]:
        raise UserError(f"--data_weights {wrong[0]:g}: weights must be above 0; leave a file out to skip it.")
    if data.sample_order:
        raise UserError("--sample_order fixes the order of the records; --data_weights contradicts it.")


def _check_evaluation(arguments: Arguments) -> None:
    data, training = arguments.data, arguments.training
    for name, value in (("eval_samples_shown", data.eval_samples_shown), ("eval_steps", training.eval_steps)):
        if value < 0:
            raise UserError(f"--{name} must not be negative, found {value}.")
    if training.evaluation_strategy == "steps" and training.eval_steps == 0:
        raise UserError("--evaluation_strategy steps needs --eval_steps.")
    if training.eval_steps > 0 and training.evaluation_strategy == "no":
        raise UserError(
            f"--eval_steps {training.eval_steps} evaluates during training, --evaluation_strategy no does "
            "not: leave one of them out."
        )


def _give_way(values: dict, explicit: Collection[str]) -> dict:
    """Return the values of all flags, with those that nobody gave changed to what others mean."""
    changed = {}
    if values["bf16"] and values["fp16"] and not {"bf16", "fp16"} <= explicit:
        changed["bf16"] = False  # the preset's, against a flag
    if values["loss_normalization"] == "micro_batch" and "packing" not in explicit:
        changed["packing"] = False
    if values["data_weights"] == [1.0] * len(values["data_path"] or []) and not values["sample_order"]:
        changed["data_weights"] = None  # the same order as without, and the same run when it is resumed
    if isinstance(values["save_steps"], float) and values["save_steps"].is_integer():
        changed["save_steps"] = int(values["save_steps"])
    if values["eval_steps"] > 0 and "evaluation_strategy" not in explicit:
        changed["evaluation_strategy"] = "steps"
    return values | changed


def decides(name: str) -> str | None:
    """Return what a flag decides: CONTENT, ROUNDING, NOTHING, the name of another one, or None: its value counts."""
    return _metadata(name).get("decides", NOTHING if name == "stage" else None)


def compared_as(name: str) -> str | None:
    """Return the flag as which a resumed run compares this one, itself or what it comes to; None where it does not."""
    decided = decides(name)
    return name if decided is None else None if decided in (CONTENT, ROUNDING, NOTHING) else decided


def choices(name: str) -> tuple:
    """Return the values that a flag may have."""
    return _metadata(name)["choices"]


def check_model_place(what: str, value: str | None) -> None:
    """Raise UserError for a path that is not a model's directory; a hub name is asked for when it is read.

    what: the flag, for the sentence.
    """
    path = Path(value or ".")
    if value and (value.startswith(("/", ".", "~")) or path.exists()) and not (path / "config.json").is_file():
        found = "a directory without config.json" if path.is_dir() else "not a directory"
        raise UserError(f"{what} {path} is {found}; give a model's directory or its name on the hub.")


# --- the parser ------------------------------------------------------------------------------------------------------


# What `--help` shows, each flag with the first sentence of its text and its presets.
COMMON_FLAGS = {
    "Model": ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "version"),
    "Data": ("data_path", "image_folder", "image_aspect_ratio", "model_max_length", "dataloader_num_workers"),
    "What is trained": ("tune_mm_mlp_adapter", "unfreeze_mm_vision_tower", "lora_enable"),
    "Steps": (
        *("num_train_epochs", "max_steps", "global_batch_size", "per_device_train_batch_size"),
        *("learning_rate", "mm_projector_lr", "bf16", "gradient_checkpointing"),
    ),
    "Held-out records": ("eval_data_path", "eval_image_folder", "eval_steps"),
    "What is written": ("output_dir", "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to"),
}


def _build_parser(program: str = "train.py") -> Parser:
    """Return the parser of all flags, whose `--help` shows the common ones and `--help_all` all of them.

    program: which its errors are signed with.
    """
    parser = _parser_without_flags()
    parser.prog = program
    parser.description = parser.epilog = None  # nobody would read them around a hundred flags
    for part in PARTS:
        add_flags(parser, part, (PRESETS[1], PRESETS[2]))
    for other, name in ALSO.items():
        parser.add_argument(f"--{other}", dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _build_common_parser() -> argparse.ArgumentParser:
    parser = _parser_without_flags()
    add_common_flags(parser, PARTS, (PRESETS[1], PRESETS[2]), COMMON_FLAGS)
    return parser


def _parser_without_flags() -> Parser:
    parser = Parser(
        prog="train.py",
        description=(
            "Train a LLaVA-1.5 style vision-language model. Stage 1 trains the projector between a frozen vision "
            "tower and a frozen language model; stage 2 trains projector and language model on visual instructions."
        ),
        epilog=(
            "Without model and data flags a miniature demo is trained. Your own data: python train.py --stage 1 "
            "--model_name_or_path lmsys/vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336 "
            "--data_path captions.json --image_folder images. All other flags: python train.py --help_all"
        ),
        allow_abbrev=False,
        add_help=False,
        formatter_class=HelpFormatter,
        usage="python train.py --stage {1,2} [flags]\n"
        "       python -m mini_llava.launch --config_file accelerate_configs/FILE.yaml train.py --stage {1,2} [flags]",
    )
    parser.add_argument(
        "-h", "--help", action=ShowHelp, build=_build_common_parser, help="show the flags that most runs need, and exit"
    )
    parser.add_argument("--help_all", action=ShowHelp, build=_build_parser, help="show all flags, and exit")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=argparse.SUPPRESS, help="preset to use; may be in --config instead"
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="YAML file with any of these flags"
    )
    return parser


@functools.cache
def _fields() -> list[tuple[dataclasses.Field, type]]:
    """Every field with its type."""
    hints = [(kind, typing.get_type_hints(kind)) for kind in PARTS]
    return [(f, plain(of_kind[f.name])) for kind, of_kind in hints for f in dataclasses.fields(kind)]


def flag_fields() -> list[dataclasses.Field]:
    """Return the fields of all flags but `--stage`."""
    return [f for f, _ in _fields()]


def _metadata(name: str) -> Mapping:
    return next((f.metadata for f in flag_fields() if f.name == name), {})


def save_arguments(arguments: Arguments, path: Path, extra: dict) -> None:
    """Write every resolved argument, and under `run` what else describes the run, as YAML.

    Raises OSError: a sentence that names the file. An older one is replaced by the whole new one or not at all.
    """
    try:
        with atomic_write(path) as file:
            file.write(yaml.safe_dump(arguments.as_dict() | {"run": extra}, sort_keys=False).encode())
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}. Make room, or choose another --output_dir."
        ) from error
