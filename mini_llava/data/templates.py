"""Chat templates as data, and the one method that renders a conversation with any of them.

Replaces LLaVA's `conversation.py` and the text half of its five `preprocess_*` functions. A template is a handful of
strings; rendering gives pieces of text that know whether they are trained, so that labels need no second tokenization.
The strings are verbatim those that published models were trained with. `options/chat_template.py` has the other kind,
a tokenizer's own template.
"""

from dataclasses import dataclass, replace

IMAGE_MARK = "<image>"
CHAT_TEMPLATE = "chat_template"  # the --version that takes the tokenizer's own


class TemplateError(ValueError):
    """A conversation template is unknown, or cannot be trained with."""


class BadRecord(ValueError):
    """A record cannot be trained on, in one sentence that names neither file nor position."""


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
    system: str = ""
    """The system prompt in `opening`, which a record's own system prompt replaces."""

    def with_system(self, prompt: str) -> "Template":
        """Return the template with another system prompt. Raises BadRecord if it has none."""
        if not self.system:
            known = ", ".join(sorted(name for name, template in TEMPLATES.items() if template.system))
            raise BadRecord(
                f"it has its own system prompt, and the template {self.name} has no place for one: choose a "
                f"--version that has ({known}), or train without it: --leave_unread system."
            )
        return replace(self, opening=self.opening.replace(self.system, prompt, 1), system=prompt)

    def render(
        self, questions: list[str], answers: list[str], generation_prompt: bool = False
    ) -> list[tuple[str, bool]]:
        """Return a conversation as pieces `(text, trained)`, whose texts joined are the training text.

        `answers` has one entry per question, or one fewer when the last question is unanswered; `generation_prompt`
        then ends the text where the model is to write. An empty answer keeps its end marker.
        """
        pieces = []
        for index, question in enumerate(questions):
            before = self.next_question if index else self.opening
            pieces.append((before + question + self.question_end, False))
            if index < len(answers):
                pieces.append((self.answer_start, False))
                pieces.append((self.answer_lead + answers[index] + self.answer_end, True))
                pieces.append((self.round_end, False))
            elif generation_prompt:
                pieces.append((self.answer_start, False))
        return [piece for piece in pieces if piece[0]]


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
        system=system,
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
        system=system,
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
        system=system,
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
        system=system,
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
        system=_LANGUAGE_AND_VISION,
    ),
)

TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
TEMPLATES["vicuna_v1"] = TEMPLATES["v1"]
TEMPLATES["v0_plain"] = TEMPLATES["plain"]
TEMPLATES["mistral_direct"] = TEMPLATES["chatml_direct"]


def get_template(name: str) -> Template:
    """Return the published template that LLaVA's `--version` names. Raises ValueError with the known names."""
    if name not in TEMPLATES:
        known = ", ".join([*sorted(TEMPLATES), f"{CHAT_TEMPLATE} (the tokenizer's own)"])
        raise TemplateError(f"Unknown conversation template {name!r} (--version). Known: {known}.")
    return TEMPLATES[name]


def written_answer(template: Template, text: str) -> str:
    """Return the answer in what a model wrote after the prompt: up to the first end mark, without `answer_lead`."""
    for mark in template.stop:
        text = text.split(mark)[0]
    return text.strip().removeprefix(template.answer_lead.strip()).strip()
