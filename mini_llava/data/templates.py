"""Chat templates as data, and the one function that renders a conversation with any of them.

Replaces LLaVA's `conversation.py` and the text half of its five `preprocess_*` functions. A template is a handful of
strings; rendering gives pieces of text that know whether they are trained, so that labels need no second tokenization.
The strings are what published models were trained with and stand verbatim, oddities included. A tokenizer's own chat
template serves as well: it is a program, and its answers are found by letting it write others in their place.
"""

import dataclasses
import datetime
import itertools
import json
import re
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE_MARK = "<image>"
CHAT_TEMPLATE = "chat_template"  # the --version that takes the tokenizer's own
# What a chat template that asks for the date is told, so that a run has the same texts on every day.
TODAY = datetime.date(2024, 7, 26)


class BadRecord(ValueError):
    """One sentence about what is wrong with a record; whoever knows them adds the file and the position."""


@dataclass(frozen=True)
class Template:
    """The strings around the questions and answers of a conversation, in the order in which they appear.

    A conversation renders as `opening`, then for each round
    `question, question_end, answer_start, answer_lead, answer, answer_end, round_end`,
    with `next_question` before every question but the first. Trained are `answer_lead`, the answer and `answer_end`:
    all that the model writes after the generation prompt, which ends with `answer_start`.
    """

    name: str
    opening: str
    """All text before the first question: system prompt and the first role."""
    next_question: str
    """All text before any later question: the human's role."""
    question_end: str
    """What closes a question, whether or not an answer follows."""
    answer_start: str
    """The assistant's role, the end of the generation prompt."""
    answer_lead: str
    """Trained text before the answer: the blank after a role that ends with a colon or a bracket."""
    answer_end: str
    """Trained text after the answer: the end marker, with the blank or newline that precedes it."""
    round_end: str = ""
    """Untrained text after the end marker."""
    stop: tuple[str, ...] = ()
    """Strings at which generation ends."""
    image_mark: str = IMAGE_MARK
    """How an image is written into the text; the mark itself becomes the image's positions."""
    captions_only: bool = False
    """Stage 1: one question, of which only the image is kept, and one answer, the caption."""


# System prompts are data that models were trained with: verbatim, with the double blank and the missing blank.
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_META_SAFETY = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n"
    "\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def _vicuna(name: str, system: str, image_mark: str = IMAGE_MARK) -> Template:
    return Template(
        name=name,
        opening=f"{system} USER: ",
        next_question="USER: ",  # no blank after </s>: Vicuna was trained so
        question_end=" ",
        answer_start="ASSISTANT:",
        answer_lead=" ",
        answer_end="</s>",
        stop=("</s>",),
        image_mark=image_mark,
    )


def _vicuna_v0(name: str, system: str, image_mark: str = IMAGE_MARK) -> Template:
    # As trained: newlines before each "###". LLaVA's own chat shows such a model text without them.
    return Template(
        name=name,
        opening=f"{system}\n\n### Human: ",
        next_question="Human: ",
        question_end="\n",
        answer_start="### Assistant:",
        answer_lead=" ",
        answer_end="\n###",
        round_end=" ",
        stop=("###",),
        image_mark=image_mark,
    )


def _llama_2(name: str, system: str, next_question: str = "<s>[INST] ") -> Template:
    return Template(
        name=name,
        opening=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] ",
        next_question=next_question,
        question_end=" [/INST]",
        answer_start="",
        answer_lead=" ",
        answer_end=" </s>",
        stop=("</s>",),
    )


def _chatml(name: str, system: str, between: str = "") -> Template:
    return Template(
        name=name,
        opening=f"<|im_start|>system\n{system}<|im_end|>{between}<|im_start|>user\n",
        next_question="<|im_start|>user\n",
        question_end=f"<|im_end|>{between}",
        answer_start="<|im_start|>assistant\n",
        answer_lead="",
        answer_end="<|im_end|>",
        round_end=between,
        stop=("<|im_end|>",),
    )


_TAGGED_IMAGE = f"<Image>{IMAGE_MARK}</Image>"

_ALL = (
    # No end-of-sequence token: a caption ends with its newline, as in LLaVA's stage 1.
    Template("plain", "", "", "", "", "", "\n", stop=("\n",), captions_only=True),
    _vicuna("v1", _CURIOUS_USER),
    _vicuna("llava_v1", _CURIOUS_HUMAN),
    _vicuna("v1_mmtag", _MMTAG, image_mark=_TAGGED_IMAGE),
    _vicuna_v0("llava_v0", _CURIOUS_HUMAN),
    _vicuna_v0("v0_mmtag", _MMTAG, image_mark=_TAGGED_IMAGE),
    _llama_2("llama_2", _META_SAFETY),
    _llama_2("llava_llama_2", _LANGUAGE_AND_VISION),
    _llama_2("mistral_instruct", "", next_question="[INST] "),
    _chatml("mpt", _MPT),
    _chatml("chatml_direct", "Answer the questions."),
    _chatml("qwen_2", "You are a helpful assistant.", between="\n"),
    # LLaVA has none; this is Meta's format with the system prompt that LLaVA's own Llama 3 models use.
    Template(
        name="llama_3",
        opening=f"<|start_header_id|>system<|end_header_id|>\n\n{_LANGUAGE_AND_VISION}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        next_question="<|start_header_id|>user<|end_header_id|>\n\n",
        question_end="<|eot_id|>",
        answer_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_lead="",
        answer_end="<|eot_id|>",
        stop=("<|eot_id|>",),
    ),
)

TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
TEMPLATES["vicuna_v1"] = TEMPLATES["v1"]
TEMPLATES["v0_plain"] = TEMPLATES["plain"]
TEMPLATES["mistral_direct"] = TEMPLATES["chatml_direct"]


def get_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Template:
    """The template that LLaVA's `--version` names; `chat_template` is the one that the tokenizer brings.

    Raises ValueError for an unknown name, listing the known ones, and if the tokenizer's cannot be trained with.
    """
    if name == CHAT_TEMPLATE and tokenizer is not None:
        return _tokenizers_own(tokenizer)
    if name not in TEMPLATES:
        known = ", ".join([*sorted(TEMPLATES), f"{CHAT_TEMPLATE} (the tokenizer's own)"])
        raise ValueError(f"Unknown conversation template {name!r} (--version). Known: {known}.")
    return TEMPLATES[name]


def render(
    template: Template, questions: list[str], answers: list[str], generation_prompt: bool = False
) -> list[tuple[str, bool]]:
    """Turn a conversation into pieces `(text, trained)`, whose texts joined are the training text.

    `answers` has one entry per question, or one fewer when the last question is unanswered; `generation_prompt` then
    ends the text where the model is to write. An empty answer keeps its end marker: "say nothing" is an answer.
    Raises BadRecord if a tokenizer's own template does something to this conversation that hides its answers.
    """
    if isinstance(template, ChatTemplate):
        return _render_chat(template, questions, answers, generation_prompt)
    pieces = []
    for index, question in enumerate(questions):
        before = template.next_question if index else template.opening
        pieces.append((before + question + template.question_end, False))
        if index < len(answers):
            pieces.append((template.answer_start, False))
            pieces.append((template.answer_lead + answers[index] + template.answer_end, True))
            pieces.append((template.round_end, False))
        elif generation_prompt:
            pieces.append((template.answer_start, False))
    return [piece for piece in pieces if piece[0]]


def written_answer(template: Template, text: str) -> str:
    """The answer in what a model wrote after the generation prompt: up to the first end mark, without `answer_lead`."""
    for mark in template.stop:
        text = text.split(mark)[0]
    return text.strip().removeprefix(template.answer_lead.strip()).strip()


def chat_template(template: Template) -> str | None:
    """The template as the Jinja text of transformers' `apply_chat_template`; None for captions, which are no chat.

    Messages have the roles user and assistant; a user's pictures come before the text, as LLaVA places them. A
    tokenizer's own template is kept as it is, behind a line that turns messages with pictures into text.
    """
    if isinstance(template, ChatTemplate):
        to_text = _MESSAGES_TO_TEXT.replace("IMAGE", json.dumps(template.image_mark + "\n"))
        return template.jinja if template.jinja.startswith(to_text) else to_text + template.jinja
    if template.captions_only:
        return None
    quoted = {key: json.dumps(value) for key, value in dataclasses.asdict(template).items()}
    quoted["image"] = json.dumps(template.image_mark + "\n")
    return (
        "{{%- for message in messages -%}}"
        "{{%- if message['role'] == 'user' -%}}"
        "{{{{ {opening} if loop.first else {next_question} }}}}"
        "{{%- if message['content'] is string -%}}{{{{ message['content'] }}}}"
        "{{%- else -%}}"
        "{{%- for part in message['content'] if part['type'] == 'image' -%}}{{{{ {image} }}}}{{%- endfor -%}}"
        "{{%- for part in message['content'] if part['type'] == 'text' -%}}{{{{ part['text'] }}}}{{%- endfor -%}}"
        "{{%- endif -%}}"
        "{{{{ {question_end} }}}}"
        "{{%- elif message['role'] == 'assistant' -%}}"
        "{{{{ {answer_start} + {answer_lead} }}}}"
        "{{%- if message['content'] is string -%}}{{{{ message['content'] }}}}"
        "{{%- else -%}}"
        "{{%- for part in message['content'] -%}}{{{{ part['text'] }}}}{{%- endfor -%}}"
        "{{%- endif -%}}"
        "{{{{ {answer_end} + {round_end} }}}}"
        "{{%- else -%}}"
        "{{{{ raise_exception('Roles are user and assistant, not ' + message['role']) }}}}"
        "{{%- endif -%}}"
        "{{%- endfor -%}}"
        "{{%- if add_generation_prompt -%}}{{{{ {answer_start} }}}}{{%- endif -%}}"
    ).format(**quoted)


# ---------------------------------------------------------------------------------------------------------------------
# A tokenizer's own chat template
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template that a tokenizer brings: Jinja text, a program that writes a whole conversation.

    It adds what it likes (a system prompt, the date, an empty thought before the last answer), trims blanks or not, and
    may treat the last round unlike the others. The first fields are those of `Template` that the model's side needs.
    """

    answer_lead: str
    stop: tuple[str, ...]
    jinja: str
    special_tokens: tuple[tuple[str, str], ...]
    """(name, text) as the program knows them: `bos_token` and so on."""
    end_marks: tuple[str, ...]
    """All special tokens: the first one after an answer ends it."""
    name: str = CHAT_TEMPLATE
    image_mark: str = IMAGE_MARK
    captions_only: bool = False

    def write(self, turns: list[str], generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the spans that the template itself marks by `{% generation %}`.

        Raises BadRecord if the template refuses the conversation.
        """
        messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        jinja = _DATE.sub(lambda call: json.dumps(TODAY.strftime(call[2])), self.jinja)
        marked = bool(_GENERATION.search(jinja))
        try:
            [text], spans = render_jinja_template(
                [messages],
                chat_template=jinja,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marked,
                **dict(self.special_tokens),
            )
        except Exception as error:  # whatever a foreign program raises
            raise BadRecord(f"the tokenizer's chat template fails on it: {error}") from None
        return text, spans[0] if marked else []


_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Ends with an expression: behind a block Jinja would drop a newline with which the template may begin.
_MESSAGES_TO_TEXT = (
    "{%- set as_text = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set content = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set content.text = message['content'] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}"
    "{%- set content.text = content.text + IMAGE -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set content.text = content.text + part['text'] -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set as_text.messages = as_text.messages + [dict(message, content=content.text)] -%}"
    "{%- endfor -%}"
    "{%- set messages = as_text.messages -%}{{ '' }}"
)


def _tokenizers_own(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    where = f"--version {CHAT_TEMPLATE}: the tokenizer {tokenizer.name_or_path}"
    try:
        jinja = tokenizer.get_chat_template()
    except ValueError:
        raise ValueError(f"{where} has no chat template. Name one of {', '.join(sorted(TEMPLATES))}.") from None
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if not isinstance(value, list)}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    template = ChatTemplate("", (), jinja, tuple(special.items()), tuple(dict.fromkeys([*added, *special.values()])))
    try:
        [_, (lead, end)], rest = _frame(template, 1, 1, False)
        _, mark = _end_of_answer(template, end + rest)
    except BadRecord as error:
        raise ValueError(f"{where} has a chat template that cannot be trained with: {error}") from None
    return dataclasses.replace(template, answer_lead=lead, stop=(mark,))


def _render_chat(
    template: ChatTemplate, questions: list[str], answers: list[str], generation_prompt: bool
) -> list[tuple[str, bool]]:
    """`render` for a tokenizer's own template: its frame filled with the turns, if that is the text that it writes."""
    turns = [turn for pair in itertools.zip_longest(questions, answers) for turn in pair if turn is not None]
    text, _ = template.write(turns, generation_prompt)
    around, rest = _frame(template, len(questions), len(answers), generation_prompt)
    changed = 0
    for trims in itertools.product((str, str.strip), repeat=2):  # of questions and answers: Llama's and Gemma's do
        pieces, written = [], 0
        for number, (turn, (before, after)) in enumerate(zip(turns, around, strict=True)):
            pieces.append((before + trims[number % 2](turn) + after, number % 2 == 1))
            if not text.startswith(pieces[-1][0], written):
                changed = max(changed, number + 1)
                break
            written += len(pieces[-1][0])
        else:
            if text[written:] == rest:
                return [piece for piece in [*pieces, (rest, False)] if piece[0]]
    raise BadRecord(
        f"the tokenizer's chat template changes turn {changed or len(turns)}, and not only the blanks around it: where "
        f"the answers stand is not known for sure."
    )


@lru_cache(maxsize=256)
def _frame(
    template: ChatTemplate, questions: int, answers: int, generation_prompt: bool
) -> tuple[list[tuple[str, str]], str]:
    """What a template writes around each turn, (before, after), and behind all of them; around answers it is trained.

    Found by letting it write a conversation whose turns are names that occur nowhere else. Trained is what follows the
    text that the model is asked with, up to the special token behind the answer; or what `{% generation %}` marks.
    Raises BadRecord if it is not certain which text that is.
    """
    names = [f"turn{number}." for number in range(questions + answers)]
    text, marked = template.write(names, generation_prompt)
    places, end = [], 0
    for name in names:
        start = text.find(name, end)
        if start < 0 or text.count(name) > 1:
            raise BadRecord(f"the tokenizer's chat template leaves out or repeats some of its {len(names)} turns.")
        end = start + len(name)
        places.append((start, end))

    asked = names[: 2 * questions - 1]
    role = template.write(asked, generation_prompt=True)[0].rpartition(asked[-1])[2]
    trained = []
    for number in range(1, len(names), 2):
        (_, question_end), (start, end) = places[number - 1 : number + 1]
        limit = places[number + 1][0] if number + 1 < len(names) else len(text)
        if not text[question_end:start].startswith(role):
            raise BadRecord(
                f"the tokenizer's chat template asks for an answer with {role!r}, but before the answers of a whole "
                f"conversation it writes {text[question_end:start]!r}: a model would not be asked as it was trained."
            )
        span = (question_end + len(role), end + _end_of_answer(template, text[end:limit])[0])
        if marked:
            spans = [(a, b) for a, b in marked if question_end <= a <= start and end <= b <= limit]
            if not spans:
                raise BadRecord("the tokenizer's chat template marks answers by {% generation %}, but not all of them.")
            span = spans[0]
        trained.append(span)
    if len({text[places[2 * n + 1][1] : end] for n, (_, end) in enumerate(trained)}) > 1:
        raise BadRecord("the tokenizer's chat template does not end all answers alike.")

    # Up to where the text behind a turn is the turn's: a question's to its answer, an answer's to its end mark.
    limits = [edge for span in trained for edge in span] + [len(text)] * (questions - answers)
    around, written = [], 0
    for (start, end), limit in zip(places, limits, strict=True):
        around.append((text[written:start], text[end:limit]))
        written = limit
    return around, text[written:]


def _end_of_answer(template: ChatTemplate, after: str) -> tuple[int, str]:
    """Where in the text behind an answer its end mark ends, and which special token that is."""
    found = [(after.index(mark), -len(mark), mark) for mark in template.end_marks if mark in after]
    if not found:
        raise BadRecord("the tokenizer's chat template puts no special token behind an answer, so nothing ends it.")
    start, _, mark = min(found)
    return start + len(mark), mark
