"""LoRA: adapters in the language model, their directories (ours and LLaVA's are the same, PEFT's others), and merging.

Replaces the LoRA half of LLaVA's `train.py` and of its `load_pretrained_model`. There layers are matched by the end of
their name (and so in the vision tower too), checkpoints lack projector and tokenizer, and loading is not strict. The
layers are PEFT's, put into the language model in place, so that its own class stays outermost.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..arguments import TrainingArguments
from ..errors import UserError
from ..files import staged
from ..formats.adapters import PREFIX, AdapterFile, name_inside_llava, read_adapter
from ..formats.layouts import ADAPTER_CONFIG, ADAPTER_FILES
from ..formats.tokenizers import load_tokenizer
from ..formats.weights import write_json
from ..formats.write import Description, begin_directory, llava_config, save_transformers
from ..model.llava import LlavaModel
from ..model.projector import gathered, gathered_state_dict, is_main_process, list_some, read_tensors
from ..model.vision_tower import VisionTower, published_name
from .image_tokens import add_token_rows, set_rows
from .tiles import NEWLINE_KEY
from .token_rows import TokenRows, ids_of_setting, peft_names, peft_setting

OTHERS_FILE = "non_lora_trainables.bin"
# What `add_lora` sets: older releases of PEFT stumble over settings that they do not know.
VARIANTS = ("use_dora", "use_rslora")
ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "base_model_name_or_path")
ADAPTER_FOLDER = "adapter"  # beside a base in transformers' layout
PROJECTOR, TOWER, TOKENS = "mm_projector.", "vision_tower.vision_tower.", "embed_tokens.weight"


# ----------------------------------------------------------------------------------------------- adding and merging


def linear_layers(language_model: nn.Module) -> list[str]:
    """Return the full names of the linear layers that get adapters: all but the output head."""
    head = language_model.get_output_embeddings()
    # Quantised layers are subclasses of nn.Linear too.
    return [name for name, m in language_model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def adapted_layers(language_model: nn.Module, targets: list[str] | None) -> list[str]:
    """Return the full names of the linear layers that `--lora_target_modules` asks for.

    Raises:
        UserError: one of `targets` is no such layer; the sentence lists those that there are.
    """
    layers = linear_layers(language_model)
    if not targets or "all-linear" in targets:
        return layers
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            instead = " --lora_vision_tower True adds adapters to the vision tower." if "vision" in target else ""
            raise UserError(
                f"--lora_target_modules {target}: the language model has no such linear layer; known are {known}, all "
                f"but the head.{instead}"
            )
    return [name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)]


def add_lora(language_model: nn.Module, base: str, training: TrainingArguments, dtype: torch.dtype) -> None:
    """Put a new adapter beside the linear layers that are asked for, and leaves nothing else of the model trainable.

    Every rank calls it, before the model is handed to DeepSpeed; a language model that ZeRO-3 partitioned while it was
    read is fine. The first product changes nothing, since one factor of each adapter is zero.

    Args:
        base: what the language model was read from, for `base_model_name_or_path`.
        training: its `lora_` fields, and `seed` for the adapters: reading a model may or may not have drawn from the
            global generator.
        dtype: of adapters and trained biases: fp32 where they are their own masters.
    """
    layers = adapted_layers(language_model, training.lora_target_modules)
    _note_base(language_model)
    _add(language_model, layers, training, dtype, training.lora_bias, base)


def add_tower_lora(tower: VisionTower, training: TrainingArguments, dtype: torch.dtype) -> None:
    """Put a new adapter beside each linear layer of the tower that its features depend on, as `add_lora` does.

    Raises UserError for a tower without such layers.
    """
    unused = tower.unused_parameters()
    linear = [name for name, module in tower.model.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linear if f"model.{name}.weight" not in unused]
    if not layers:
        raise UserError("--lora_vision_tower: the features of this vision tower depend on no linear layer.")
    _add(tower.model, layers, training, dtype)


def _add(
    module: nn.Module,
    layers: list[str],
    training: TrainingArguments,
    dtype: torch.dtype,
    bias: str = "none",
    base: str | None = None,
) -> None:
    from peft import LoraConfig  # takes seconds to import, and most runs have no adapters

    config = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        bias=bias,
        target_modules=layers,
        use_dora=training.use_dora,
        use_rslora=training.use_rslora,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # they are drawn on the CPU
        torch.manual_seed(training.seed)
        _inject(module, config, dtype)


def _note_base(language_model: nn.Module) -> None:
    planned = language_model.get_input_embeddings().weight.is_meta
    language_model.base_fingerprint = None if planned else fingerprint(language_model)


def _inject(module: nn.Module, config, dtype: torch.dtype) -> None:
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    planned = next(module.parameters()).is_meta  # by tools.plan, without values
    inject_adapter_in_model(config, module, low_cpu_mem_usage=planned)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            # Inputs would be cast to the adapter's fp32 and back by autocast: the same numbers at three times the
            # memory.
            layer.cast_input_dtype_enabled = False
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def adapters(module: nn.Module) -> dict[str, nn.Module]:
    """Return PEFT's layers inside a module by the full name of the linear layer they stand for."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


@torch.no_grad()
def merge_lora(model: LlavaModel, dtype: torch.dtype) -> LlavaModel:
    """Add each adapter's product to its weight, in fp32, and casts the whole model once; the model is changed.

    Raises UserError for a quantised language model: merge into the one that it was quantised from.
    """
    for name, layer in adapters(model.language_model).items():
        base = layer.get_base_layer()
        if type(base) is not nn.Linear:
            raise UserError(
                f"{name} is a {type(base).__name__}, which has no plain weight: adapters are merged into the model as "
                "it was before it was quantised (--bits 16)."
            )
        base.weight.data = _merged(layer, base.weight, _factors(layer)).to(dtype)
        model.language_model.set_submodule(name, base)
    del model.language_model.peft_config, model.language_model.base_fingerprint
    model.requires_grad_(False).to(dtype)
    write_new_tokens(model)
    return model


def _factors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return what an adapter consists of, by kind."""
    [adapter] = layer.active_adapters
    kinds = {kind: getattr(layer, kind) for kind in ("lora_A", "lora_B", "lora_magnitude_vector")}
    return {kind: of_kind[adapter].weight for kind, of_kind in kinds.items() if adapter in of_kind}


def _merged(layer: nn.Module, weight: torch.Tensor, factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a weight and its adapter as one matrix, fp32."""
    [adapter] = layer.active_adapters
    weight = weight.float() + layer.scaling[adapter] * (factors["lora_B"].float() @ factors["lora_A"].float())
    if "lora_magnitude_vector" in factors:  # DoRA
        weight *= (factors["lora_magnitude_vector"].float() / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


def write_new_tokens(model: LlavaModel) -> None:
    """Put the rows of tokens that were trained beside adapters into the embeddings and the head."""
    if model.new_tokens is not None:
        model.new_tokens.write_into(model.language_model)
        model.new_tokens = None


def fingerprint(language_model: nn.Module) -> str:
    """Return a digest of the word embeddings, rounded to bfloat16: it differs for two models of the same shape.

    Rounded, so that a model read in another precision is still the same one. Adapters do not change it. All ranks must
    call it.
    """
    weight = language_model.get_input_embeddings().weight
    with gathered(weight):
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        return hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- writing


def save_lora(directory: str | Path, model: LlavaModel, description: Description) -> str:
    """Write a LoRA run as LLaVA lays it out, whole without the run: adapter, projector, config and tokenizer.

    `adapter_model.safetensors` and `adapter_config.json` are PEFT's; `non_lora_trainables.bin` has the projector,
    trained or not, and the tower's weights if it was trained, its adapters merged: no reader of this layout knows
    adapters there. `config.json` is the LLaVA model's. Every rank calls it (ZeRO-3 gathers, one tensor at a time), the
    main process writes. Return a line about it.
    """
    directory = Path(directory)
    [(adapter, config)] = model.language_model.peft_config.items()
    trained = [(name, p) for name, p in model.language_model.named_parameters() if p.requires_grad]
    adapter_weights = [(PREFIX + _peft_name(name, adapter), parameter) for name, parameter in trained]
    adapter_weights += [(PREFIX + name, parameter) for name, parameter in peft_names(model).items()]
    tower, in_tower = _trained_in_tower(model.vision_tower), adapters(model.vision_tower.model)
    factors = [((name, kind), p) for name, layer in in_tower.items() for kind, p in _factors(layer).items()]
    others = [(f"{PREFIX}model.{PROJECTOR}{name}", parameter) for name, parameter in model.projector.named_parameters()]
    if model.image_newline is not None:
        others.append((f"{PREFIX}model.{NEWLINE_KEY}", model.image_newline.weight))
    if model.use_im_start_end:
        others.append((PREFIX + "model." + TOKENS, model.language_model.get_input_embeddings().weight))

    def tower_key(name: str) -> str:
        return f"{PREFIX}model.{TOWER}{published_name(model.vision_tower.model.config, name)}"

    others += [(tower_key(name), parameter) for name, parameter in tower]
    if is_main_process():
        begin_directory(directory)
    adapter_weights, others, factors = (dict(gathered_state_dict(each)) for each in (adapter_weights, others, factors))
    if is_main_process():
        for name, layer in in_tower.items():
            of_layer = {kind: tensor for (owner, kind), tensor in factors.items() if owner == name}
            key = tower_key(f"{name}.weight")
            others[key] = _merged(layer, others[key], of_layer)
        if model.use_im_start_end:  # no need of the other rows, which are the base's
            key = PREFIX + "model." + TOKENS
            others[key] = others[key][model.first_image_token :][:2].clone()
        with staged(directory) as staging:
            save_file(adapter_weights, staging / ADAPTER_FILES[0], metadata={"format": "pt"})
            torch.save(others, staging / OTHERS_FILE)
            description.tokenizer.save_pretrained(staging)
        # The full names: PEFT would keep the shortest endings that fit this language model, and apply them to the
        # tower too when they are read beside one.
        changed = {"target_modules": sorted(adapters(model.language_model)), "inference_mode": True}
        settings = {key: value for key, value in config.to_dict().items() if key in ADAPTER_SETTINGS}
        settings |= {key: True for key in VARIANTS if getattr(config, key)}
        settings |= {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | peft_setting(model)
        write_json(directory, ADAPTER_CONFIG, settings | changed)
        llava = llava_config(model, description)
        llava.pop("quantization_config", None)  # the adapters fit the unquantised model as well
        llava |= {
            "unfreeze_mm_vision_tower": bool(tower),
            "added_tokens": model.added_tokens,
            "base_fingerprint": model.language_model.base_fingerprint,
        }
        write_json(directory, "config.json", llava)
    return (
        f"Adapter, projector, config and tokenizer are in {directory}; they belong to {config.base_model_name_or_path}."
    )


def _trained_in_tower(tower: VisionTower) -> list[tuple[str, nn.Parameter]]:
    """Return the tower's weights that differ from the published ones; all that are used where it has adapters."""
    named = list(tower.model.named_parameters())
    if not adapters(tower.model):
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]
    named, unused = [(name.replace(".base_layer.", "."), p) for name, p in named], tower.unused_parameters()
    return [(name, p) for name, p in named if ".lora_" not in name and f"model.{name}" not in unused]


def save_beside_base(directory: str | Path, model: LlavaModel, description: Description) -> str:
    """Write a LoRA model for PEFT and vLLM: all but the adapters as transformers' LLaVA, them in its folder `adapter`.

    The projector and whatever else was trained in full are in the base: vLLM takes no adapter that brings modules of
    its own (PEFT's `modules_to_save`). On one process; `model` is left without its adapters. Return a line about it.

    Raises:
        UserError: transformers' layout cannot express the model.
    """
    directory = Path(directory)
    [config], layers, tensors = model.language_model.peft_config.values(), adapters(model.language_model), {}
    if config.use_dora:
        raise UserError("--adapters: vLLM does not take DoRA's adapters; --merge adds them to their base.")
    for name, layer in layers.items():
        [adapter] = layer.active_adapters
        for factor in ("lora_A", "lora_B"):
            weight = getattr(layer, factor)[adapter].weight
            tensors[f"{PREFIX}{name_inside_llava(name)}.{factor}.weight"] = weight.detach().contiguous()
        model.language_model.set_submodule(name, layer.get_base_layer())
    del model.language_model.peft_config, model.language_model.base_fingerprint
    write_new_tokens(model)
    save_transformers(directory, model, description)
    (directory / ADAPTER_FOLDER).mkdir(exist_ok=True)
    with staged(directory / ADAPTER_FOLDER) as staging:
        save_file(tensors, staging / ADAPTER_FILES[0], metadata={"format": "pt"})
    kept = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
    settings = {key: value for key, value in config.to_dict().items() if key in kept and value}
    for pattern in settings.keys() & {"rank_pattern", "alpha_pattern"}:
        settings[pattern] = {name_inside_llava(name): value for name, value in settings[pattern].items()}
    of_base = {"base_model_name_or_path": str(directory.resolve()), "bias": "none", "inference_mode": True}
    # Full names: endings would fit layers of the tower, too.
    targets = {"target_modules": sorted(name_inside_llava(name) for name in layers)}
    write_json(directory / ADAPTER_FOLDER, ADAPTER_CONFIG, {"peft_type": "LORA", **settings, **of_base, **targets})
    return (
        f"The base, with the trained projector, is in {directory}, its adapters in {directory / ADAPTER_FOLDER}: for "
        "PeftModel.from_pretrained on transformers' LLaVA, and vLLM's --lora-modules."
    )


# ---------------------------------------------------------------------------------------------------------- reading


def base_of(directory: str | Path) -> str:
    """Return the name or path of the language model that a LoRA directory belongs to."""
    base = _read_json(Path(directory), ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{Path(directory) / ADAPTER_CONFIG} has no base_model_name_or_path: name the base yourself.")
    return base


def load_lora(model: LlavaModel, directory: str | Path, dtype: torch.dtype) -> None:
    """Add the adapters of a LoRA directory to `model`, its base, and reads projector and tower from there.

    Of what PEFT saved on transformers' LLaVA, adapters of projector and tower are merged at once.

    Raises UserError or FileNotFoundError for anything missing, surplus or of another shape, and if `model` is not the
    base that the directory belongs to; the model is of no use then.
    """
    from peft import LoraConfig

    directory = Path(directory)
    settings = _read_json(directory, ADAPTER_CONFIG)
    _check_settings(directory, settings)
    saved, config = read_adapter(directory), LoraConfig.from_pretrained(str(directory))
    config.inference_mode, config.trainable_token_indices = False, None
    if saved.inside_llava:
        for part in ("projector", "vision_tower"):
            _merge_at_once(getattr(model, part), saved, part, config)
        _name_for_language_model(config, saved)
    else:
        _check_base(model, directory)
    _note_base(model.language_model)
    try:
        _inject(model.language_model, config, dtype)
    except ValueError as error:  # PEFT found no layer of these names
        raise UserError(f"{directory / ADAPTER_CONFIG} does not fit the language model: {error}") from None
    llava = {} if saved.inside_llava else _read_json(directory, "config.json")
    start_end, patch = (bool(llava.get(f"mm_use_im_{kind}")) for kind in ("start_end", "patch_token"))
    if added := llava.get("added_tokens", patch + 2 * start_end):
        add_token_rows(model, load_tokenizer(directory), added, (start_end, patch))
    if ids := ids_of_setting(settings.get("trainable_token_indices"), str(directory / ADAPTER_CONFIG)):
        model.new_tokens = TokenRows(model.language_model, ids, dtype, with_head=True)
    _fill(model, directory, saved)


def start_from(model: LlavaModel, directory: str | Path) -> None:
    """Fill the adapters that `model` got from `add_lora`, its projector and its tower from a LoRA directory.

    Before the model is handed to DeepSpeed. Raises UserError as `load_lora` does, and for another rank or alpha.
    """
    directory = Path(directory)
    settings, [config] = _read_json(directory, ADAPTER_CONFIG), model.language_model.peft_config.values()
    _check_settings(directory, settings)
    saved = read_adapter(directory)
    if not saved.inside_llava:
        _check_base(model, directory)
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise UserError(f"{directory / ADAPTER_CONFIG} has {key}, which no flag sets: merge it (tools.export).")
    for part in ("projector", "vision_tower"):
        if layers := saved.adapted(part):
            raise UserError(
                f"{saved.path} has adapters of the {part.replace('_', ' ')} ({list_some(list(layers.values()))}), "
                "which are not trained here: python -m mini_llava.tools.export --merge makes a model of them and their "
                "base, to start from."
            )
    mine = {"r": config.r, "lora_alpha": config.lora_alpha} | {key: getattr(config, key) for key in VARIANTS}
    for key, value in mine.items():
        flag = "lora_r" if key == "r" else key
        if settings.get(key, False) != value:
            raise UserError(f"{directory / ADAPTER_CONFIG} has {key} {settings.get(key)}, but --{flag} is {value}.")
    theirs = ids_of_setting(settings.get("trainable_token_indices"), str(directory / ADAPTER_CONFIG))
    mine = model.new_tokens.ids.tolist() if model.new_tokens is not None else []
    if theirs != mine:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} has trainable_token_indices {theirs}, but here the rows of tokens {mine} "
            "are trained: give the same --trainable_token_indices."
        )
    _fill(model, directory, saved)


def _check_settings(directory: Path, settings: dict) -> None:
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{directory / ADAPTER_CONFIG} has peft_type {kind}; only LORA can be read here.")
    projector = ("multi_modal_projector", "linear_1", "linear_2")
    if other := [name for name in settings.get("modules_to_save") or [] if name.split(".")[-1] not in projector]:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} has modules_to_save {', '.join(other)}; of modules trained in full only the "
            "projector (multi_modal_projector) can be read here."
        )


def _name_for_language_model(config, saved: AdapterFile) -> None:
    """Make PEFT's settings for transformers' LLaVA those of the language model alone, by the names in the file.

    There targets may be endings or a pattern, which fit layers of the tower too, or begin with names that are not here.
    """
    layers = saved.adapted("language_model")
    config.target_modules = list(layers)
    ranks = {name: saved.parts["language_model"][f"{name}.lora_A.weight"][1].shape[0] for name in layers}
    alphas = {name: _alpha(config, there) for name, there in layers.items()}
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    config.modules_to_save = config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _alpha(config, layer: str) -> float:
    """Return an adapter's alpha, given the name that PEFT had for its layer."""
    from peft.utils.other import get_pattern_key

    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)


@torch.no_grad()
def _merge_at_once(module: nn.Module, saved: AdapterFile, part: str, config) -> None:
    """Add the products of a part's adapters to its weights, and take them out of `saved`."""
    names, tensors = dict(module.named_parameters()), saved.parts[part]
    if config.use_dora and saved.adapted(part):
        raise UserError(f"{saved.path} has DoRA adapters of the {part.replace('_', ' ')}; only LoRA can be read there.")
    if part == "vision_tower":
        names = {published_name(module.model.config, name): p for name, p in module.model.named_parameters()}
        names = {name.removeprefix("vision_model."): parameter for name, parameter in names.items()}
    for name, there in saved.adapted(part).items():
        down, up = (tensors.pop(f"{name}.lora_{factor}.weight", (None, None))[1] for factor in "AB")
        weight = names.get(f"{name}.weight")
        if down is None or up is None or weight is None or weight.shape != (up.shape[0], down.shape[1]):
            raise UserError(f"{saved.path} has an adapter of {there}, which does not fit this model's {part}.")
        scaling = _alpha(config, there) / len(down) ** (0.5 if config.use_rslora else 1)
        weight.copy_(weight.float() + scaling * (up.float() @ down.float()))


def _fill(model: LlavaModel, directory: Path, saved: AdapterFile) -> None:
    file = saved.path
    [adapter] = model.language_model.peft_config
    targets = peft_names(model)
    for name, parameter in model.language_model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            targets[_peft_name(name, adapter)] = parameter
    found = {}
    for name, (key, tensor) in saved.parts["language_model"].items():
        if name not in targets:  # older PEFT had no level between an adapted layer and its bias
            name = name.removesuffix("bias") + "base_layer.bias" if name.endswith(".bias") else name
        found[name] = key, tensor
    _copy_all(file, targets, found)
    if saved.inside_llava:
        if saved.parts["vision_tower"] or saved.parts["image_newline"]:
            keys = [key for part in ("vision_tower", "image_newline") for key, _ in saved.parts[part].values()]
            raise UserError(f"{file} also holds {list_some(keys)}, for which this model has no place.")
        if saved.parts["projector"]:
            _copy_all(file, dict(model.projector.named_parameters()), saved.parts["projector"])
        return

    file = directory / OTHERS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {OTHERS_FILE}: the projector is missing.")
    targets = {PROJECTOR + name: parameter for name, parameter in model.projector.named_parameters()}
    if model.image_newline is not None:
        targets[NEWLINE_KEY] = model.image_newline.weight
    tower = {
        TOWER + published_name(model.vision_tower.model.config, name): (name, parameter)
        for name, parameter in model.vision_tower.model.named_parameters()
    }
    found = {}
    for key, tensor in read_tensors(file).items():
        found[key.removeprefix("base_model.").removeprefix("model.").removeprefix("model.")] = key, tensor
    if model.use_im_start_end:
        if TOKENS not in found:
            raise UserError(f"{file} has no rows for <im_start> and <im_end> ({TOKENS}).")
        set_rows(model, found.pop(TOKENS)[1])
    if any(name.startswith(TOWER) for name in found):
        unused = model.vision_tower.unused_parameters()
        for there, (name, parameter) in tower.items():
            if there in found or f"model.{name}" not in unused:
                targets[there] = parameter
    _copy_all(file, targets, found)


def _peft_name(name: str, adapter: str) -> str:
    """Return the name that PEFT gives a parameter of an adapted language model in its files."""
    name = name.replace(f".{adapter}.", ".")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


def _check_base(model: LlavaModel, directory: Path) -> None:
    """Raise UserError naming the first differences between the base at hand and the one of the directory."""
    theirs, mine = _read_json(directory, "config.json"), model.language_model.config.to_dict()
    keys = ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
    added = ("mm_use_im_start_end", "mm_use_im_patch_token", "added_tokens")
    if not any(theirs.get(key) for key in added):
        keys.append("vocab_size")
    differing = [
        f"{key} {theirs[key]} there, {mine[key]} here"
        for key in keys
        if key in theirs and key in mine and theirs[key] != mine[key]
    ]
    digest = theirs.get("base_fingerprint")  # LLaVA has none
    here = getattr(model.language_model, "base_fingerprint", None) or fingerprint(model.language_model)
    if not differing and digest and digest != here:
        differing = ["the same shapes, but other word embeddings"]
    if differing:
        base = _read_json(directory, ADAPTER_CONFIG).get("base_model_name_or_path")
        raise UserError(f"{directory} belongs to another language model ({base}): {'; '.join(differing)}.")


@torch.no_grad()
def _copy_all(file: Path, targets: dict[str, nn.Parameter], found: dict[str, tuple[str, torch.Tensor]]) -> None:
    if missing := [name for name in targets if name not in found]:
        raise UserError(f"{file} lacks {list_some(missing)}, which this model has.")
    if extra := [key for name, (key, _) in found.items() if name not in targets]:
        raise UserError(f"{file} also holds {list_some(extra)}, for which this model has no place.")
    for name, parameter in targets.items():
        key, tensor = found[name]
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        if list(tensor.shape) != shape:
            raise UserError(f"{file}: {key} is {list(tensor.shape)}, but this model needs {shape}.")
    for name, parameter in targets.items():
        with gathered(parameter, modified=True):
            parameter.copy_(found[name][1])


def _read_json(directory: Path, name: str) -> dict:
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except OSError:
        raise FileNotFoundError(f"{directory} has no {name}: it is not a LoRA directory.") from None
    except ValueError as error:
        raise UserError(f"{directory / name} is not valid JSON: {error}.") from None
