"""Tiny language models of the families people train, with tokenizers of their kind and their published chat templates.

The weights are random and the vocabularies those of the fixtures; the classes, the special tokens with their flags, how
BOS is added, tied embeddings and end tokens are each family's own. Of chat templates the branches for tools are left
out.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "parity" / "fixtures"

_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
CHAT_TEMPLATES = {
    "llama_2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + _ALTERNATE + ""
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama_3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama_3_2": (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
        "    {%- else %}\n"
        '        {%- set date_string = "26 Jul 2024" %}\n'
        "    {%- endif %}\n"
        "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n"
        '    {%- set system_message = "" %}\n'
        "{%- endif %}\n"
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
        '{{- system_message + "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        "+ message['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}\n"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n\n{{- bos_token }}\n{%- for message in loop_messages %}\n" + _ALTERNATE + "\n"
        "    {%- if message['role'] == 'user' %}\n"
        "        {%- if loop.first and system_message is defined %}\n"
        "            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}\n"
        "        {%- else %}\n            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n"
        "    {%- elif message['role'] == 'assistant' %}\n        {{- ' ' + message['content'] + eos_token}}\n"
        "    {%- endif %}\n{%- endfor %}\n"
    ),
    "qwen_2": _CHATML.replace("SYSTEM", "You are a helpful assistant."),
    "qwen_2_5": _CHATML.replace("SYSTEM", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen_3": (
        "{%- if messages[0].role == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
        "{%- endif %}\n"
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and '
        "not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n"
        "        {%- set ns.multi_step_tool = false %}\n"
        "        {%- set ns.last_query_index = index %}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- for message in messages %}\n"
        "    {%- set content = message.content if message.content is string else '' %}\n"
        '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
        '    {%- elif message.role == "assistant" %}\n'
        "        {%- set reasoning_content = '' %}\n"
        "        {%- if message.reasoning_content is string %}\n"
        "            {%- set reasoning_content = message.reasoning_content %}\n"
        "        {%- elif '</think>' in content %}\n"
        "            {%- set reasoning_content = "
        "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
        "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
        "        {%- endif %}\n"
        "        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}\n"
        "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n')"
        " + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
        "        {%- else %}\n"
        "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
        "        {%- endif %}\n"
        "        {{- '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endif %}"
    ),
    "phi_3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "gemma_2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}" + _ALTERNATE + ""
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "smollm2": _CHATML.replace("SYSTEM", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
}


class Family(NamedTuple):
    """What is the family's own; `version` is the named template that its models are trained with, if there is one."""

    config: dict
    tokenizer: str
    tokenizer_config: dict
    added: tuple[str, ...]
    version: str | None
    chat_template: str | None
    generation: dict


_LLAMA_TOKENIZER = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=False)
_LLAMA_TOKENIZER |= dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
_QWEN_TOKENIZER = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>")
_LLAMA_3_TOKENIZER = dict(
    tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
)
_LLAMA_3_MARKS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THOUGHT = ("<think>", "</think>")  # tokens, but not special ones
_GEMMA_TOKENIZER = dict(tokenizer_class="GemmaTokenizer", add_bos_token=True, bos_token="<bos>", eos_token="<eos>")
_GEMMA_TOKENIZER |= dict(unk_token="<unk>", pad_token="<pad>")
_GEMMA_MARKS = ("<pad>", "<start_of_turn>", "<end_of_turn>")
_LLAMA_3_ROPE = dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_LLAMA_3_ROPE |= dict(original_max_position_embeddings=512)
# As Vicuna's: sampling values without do_sample, which transformers refuses to save.
_VICUNA_GENERATION = dict(temperature=0.9, top_p=0.6)

FAMILIES = {
    "llama_2": Family(
        dict(model_type="llama"), "llama", _LLAMA_TOKENIZER, (), "llava_llama_2", CHAT_TEMPLATES["llama_2"], {}
    ),
    "vicuna": Family(dict(model_type="llama"), "llama", _LLAMA_TOKENIZER, (), "v1", None, _VICUNA_GENERATION),
    "llama_3": Family(
        dict(model_type="llama", rope_parameters=_LLAMA_3_ROPE),
        *("bytes", _LLAMA_3_TOKENIZER, _LLAMA_3_MARKS, "llama_3", CHAT_TEMPLATES["llama_3"]),
        dict(eos_token_id=[701, 704], do_sample=True, temperature=0.6, top_p=0.9),
    ),
    "llama_3_2": Family(
        dict(model_type="llama", rope_parameters=_LLAMA_3_ROPE, tie_word_embeddings=True),
        *("bytes", _LLAMA_3_TOKENIZER, _LLAMA_3_MARKS, "llama_3", CHAT_TEMPLATES["llama_3_2"]),
        dict(eos_token_id=[701, 704], do_sample=True, temperature=0.6, top_p=0.9),
    ),
    "mistral": Family(
        dict(model_type="mistral", sliding_window=48),
        *("llama", {**_LLAMA_TOKENIZER, "legacy": True}, (), "mistral_instruct", CHAT_TEMPLATES["mistral"], {}),
    ),
    "qwen_2": Family(
        dict(model_type="qwen2"),
        *("bytes", _QWEN_TOKENIZER, _CHATML_MARKS, "qwen_2", CHAT_TEMPLATES["qwen_2"]),
        dict(eos_token_id=[702, 700], do_sample=True, top_k=20, repetition_penalty=1.05),
    ),
    "qwen_2_5": Family(
        dict(model_type="qwen2", tie_word_embeddings=True, use_sliding_window=False),
        *("bytes", _QWEN_TOKENIZER, _CHATML_MARKS, "qwen_2", CHAT_TEMPLATES["qwen_2_5"]),
        dict(eos_token_id=[702, 700], do_sample=True, top_k=20),
    ),
    "qwen_3": Family(
        dict(model_type="qwen3", tie_word_embeddings=True),
        *("bytes", _QWEN_TOKENIZER, (*_CHATML_MARKS, *_THOUGHT), "qwen_2", CHAT_TEMPLATES["qwen_3"]),
        dict(eos_token_id=[702, 700], do_sample=True, top_k=20),
    ),
    "phi_3": Family(
        dict(model_type="phi3", sliding_window=48, partial_rotary_factor=1.0),
        "llama",
        {**_LLAMA_TOKENIZER, "add_bos_token": False, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        *(None, CHAT_TEMPLATES["phi_3"], dict(eos_token_id=[800, 803])),
    ),
    "gemma_2": Family(
        dict(model_type="gemma2", sliding_window=48, query_pre_attn_scalar=8, tie_word_embeddings=True),
        *("gemma", _GEMMA_TOKENIZER, _GEMMA_MARKS, None, CHAT_TEMPLATES["gemma_2"], {}),
    ),
    "gemma_3": Family(
        dict(model_type="gemma3_text", sliding_window=48, query_pre_attn_scalar=8, tie_word_embeddings=True)
        | dict(layer_types=["sliding_attention", "full_attention"]),
        *("gemma", _GEMMA_TOKENIZER, _GEMMA_MARKS, None, CHAT_TEMPLATES["gemma_2"]),
        dict(eos_token_id=[1, 802], do_sample=True, top_k=64, top_p=0.95),
    ),
    "smollm2": Family(
        dict(model_type="llama", tie_word_embeddings=True, rope_theta=100_000.0),
        "bytes",
        dict(tokenizer_class="GPT2Tokenizer", bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"),
        *(_CHATML_MARKS, "qwen_2", CHAT_TEMPLATES["smollm2"], {}),
    ),
}


def write_family(family: Family, folder: Path, initializer_range: float = 0.1) -> Path:
    """A directory as one downloads it: weights, configurations, tokenizer and chat template."""
    bos, eos, pad = write_tokenizer(family, folder)
    sizes = dict(vocab_size=832, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, initializer_range=initializer_range)
    config = dict(family.config)
    ids = dict(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **sizes, **ids, **config))
    model.save_pretrained(folder)
    generation = {"bos_token_id": bos, "eos_token_id": eos, "transformers_version": "4.40.0", **family.generation}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_tokenizer(family: Family, folder: Path) -> tuple[int | None, int, int | None]:
    """Writes tokenizer.json and its configuration; returns the ids of BOS, EOS and padding."""
    folder.mkdir(parents=True)
    source = "tokenizer_qwen" if family.tokenizer == "bytes" else "tokenizer_llama"
    text = (FIXTURES / source / "tokenizer.json").read_text(encoding="utf-8")
    if family.tokenizer == "gemma":
        text = text.replace('"<s>"', '"<bos>"').replace('"</s>"', '"<eos>"')
    pipeline = json.loads(text)
    config = dict(family.tokenizer_config)
    vocabulary = pipeline["model"]["vocab"]
    if family.tokenizer == "bytes":
        pipeline["added_tokens"] = []
        vocabulary = {token: number for token, number in vocabulary.items() if number < 700}
        pipeline["model"]["vocab"] = vocabulary
    if family.tokenizer == "gemma":  # blanks are written as U+2581, none is put in front
        pipeline["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        pipeline["pre_tokenizer"] = None
    first = max(vocabulary.values()) + 1
    flags = dict(single_word=False, lstrip=False, rstrip=config.get("eos_token") == "<|endoftext|>", normalized=False)
    for number, mark in enumerate(family.added, start=first):  # Phi-3's marks swallow the blanks behind them
        pipeline["added_tokens"].append({"id": number, "content": mark, "special": mark not in _THOUGHT, **flags})
    ids = {token["content"]: token["id"] for token in pipeline["added_tokens"]}
    bos = config.get("bos_token")
    if family.tokenizer != "llama":
        pipeline["post_processor"] = None
    if family.tokenizer != "llama" and bos and bos != "<|im_start|>":
        pieces = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}
        pipeline["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
        pipeline["post_processor"] |= {"special_tokens": special}
        pipeline["post_processor"]["pair"] = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    (folder / "tokenizer.json").write_text(json.dumps(pipeline, ensure_ascii=False), encoding="utf-8")
    if family.chat_template:
        config["chat_template"] = family.chat_template
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in pipeline["added_tokens"]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return ids.get(bos), ids[config["eos_token"]], ids.get(config.get("pad_token"))
