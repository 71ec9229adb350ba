"""Chat templates as Jinja text: to train with the one that a tokenizer brings, and to save ours for transformers.

A tokenizer's template is a program that writes a whole conversation; where the answers stand in its text is found by
letting it write others in their place.
"""

import datetime
import itertools
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..data.templates import CHAT_TEMPLATE, IMAGE_MARK, TEMPLATES, BadRecord, Template, get_template
from ..errors import UserError

# What a chat template that asks for the date is told, so that a run has the same texts on every day.
TODAY = datetime.date(2024, 7, 26)


def find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> "Template | ChatTemplate":
    """Return a published template, or with the name `chat_template` the one that the tokenizer brings.

    Raises UserError for an unknown name, and if the tokenizer's cannot be trained with.
    """
    return own_template(tokenizer) if name == CHAT_TEMPLATE else get_template(name)


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
    system: str | None = None
    """A record's own system prompt."""

    def with_system(self, prompt: str) -> "ChatTemplate":
        """Return the template with a record's own system prompt, which `render` refuses if it is not written."""
        return replace(self, system=prompt)

    def write(self, turns: list[str], generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the spans that the template itself marks by `{% generation %}`.

        Raises BadRecord if the template refuses the conversation.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
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

    def render(
        self, questions: list[str], answers: list[str], generation_prompt: bool = False
    ) -> list[tuple[str, bool]]:
        """Return a conversation as pieces `(text, trained)`, as `Template.render` does.

        A thought in an answer (`<think>...</think>`) is trained where the template writes it. An answer whose thought
        it leaves out, as Qwen 3's does with all but the last, is context: a model is to think before it.

        Raises BadRecord if the template does something to this conversation that hides its answers.
        """
        turns = [turn for pair in itertools.zip_longest(questions, answers) for turn in pair if turn is not None]
        text, _ = self.write(turns, generation_prompt)
        whole = [("", turn) for turn in turns]
        apart = [_thought_and_rest(turn) if number % 2 else ("", turn) for number, turn in enumerate(turns)]
        changed, fault = 0, None
        for parts in (whole, apart) if apart != whole else (whole,):
            thinks = tuple(bool(thought) for thought, _ in parts[1::2])
            try:
                around, rest = _frame(self, len(questions), len(answers), generation_prompt, thinks)
            except BadRecord as error:
                fault = fault or error
                continue
            pieces, turn = _filled(text, parts, around, rest)
            if pieces is None:
                changed = max(changed, turn)
                continue
            if answers and not generation_prompt and not any(trained for _, trained in pieces):
                raise BadRecord(
                    "the tokenizer's chat template leaves out the thoughts of all its answers, so there is nothing to "
                    f"train on. {_WITH_THOUGHTS}"
                )
            return [piece for piece in pieces if piece[0]]
        advice = f" {_WITH_THOUGHTS}" if any("</think>" in answer for answer in answers) else ""
        if fault:
            raise BadRecord(f"{fault}{advice}")
        raise BadRecord(
            f"the tokenizer's chat template changes turn {changed}, and not only the blanks around it: "
            f"so it is not certain where the answers are.{advice}"
        )


_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)
_WITH_THOUGHTS = "Named templates train thoughts as they stand: --version qwen_2 is the one with Qwen's marks."
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# An expression follows: behind a block Jinja would drop a newline with which the template may begin.
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
    "{%- set messages = as_text.messages -%}"
)


def own_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    where = f"--version {CHAT_TEMPLATE}: the tokenizer {tokenizer.name_or_path}"
    try:
        jinja = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(f"{where} has no chat template. Name one of {', '.join(sorted(TEMPLATES))}.") from None
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if not isinstance(value, list)}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    template = ChatTemplate("", (), jinja, tuple(special.items()), tuple(dict.fromkeys([*added, *special.values()])))
    try:
        [_, (lead, end, _)], rest = _frame(template, 1, 1, False, (False,))
        _, mark = _end_of_answer(template, end + rest)
    except BadRecord as error:
        raise UserError(f"{where} has a chat template that cannot be trained with: {error}") from None
    return replace(template, answer_lead=lead, stop=(mark,))


def _filled(
    text: str, parts: list[tuple[str, str]], around: list[tuple[str, str, bool]], rest: str
) -> tuple[list[tuple[str, bool]] | None, int]:
    """Return the pieces of a text with its thoughts and turns in their frame; None, and the turn, where they differ."""
    changed = 0
    for trims in itertools.product((str, str.strip), repeat=2):  # of questions and answers: Llama's and Gemma's do
        pieces, written = [], 0
        for number, ((thought, turn), (before, after, trained)) in enumerate(zip(parts, around, strict=True)):
            trim = trims[number % 2]
            if thought:
                before = before.replace(f"thought{number}.", trim(thought))
            pieces.append((before + trim(turn) + after, trained))
            if not text.startswith(pieces[-1][0], written):
                changed = max(changed, number + 1)
                break
            written += len(pieces[-1][0])
        else:
            if text[written:] == rest:
                return [*pieces, (rest, False)], 0
    return None, changed or len(parts)


def _thought_and_rest(answer: str) -> tuple[str, str]:
    """Return the thought with which an answer begins, "" for none or an empty one, and what follows."""
    found = _THOUGHT.fullmatch(answer)
    return (found[1].strip("\n") if found[1].strip() else "", found[2]) if found else ("", answer)


@lru_cache(maxsize=256)
def _frame(
    template: ChatTemplate, questions: int, answers: int, generation_prompt: bool, thinks: tuple[bool, ...]
) -> tuple[list[tuple[str, str, bool]], str]:
    """What a template writes around each turn, (before, after, trained), and behind all of them.

    thinks: which answers begin with a thought; if the one of turn 1 is written, `thought1.` has its place in `before`.

    Found by letting it write a conversation whose turns are names that occur nowhere else. Trained is what follows the
    text that the model is asked with, up to the special token behind the answer; or what `{% generation %}` marks.
    Raises BadRecord if it is not certain which text that is.
    """
    names = [f"turn{number}." for number in range(questions + answers)]
    thoughts = {1 + 2 * number: f"thought{1 + 2 * number}." for number, has_one in enumerate(thinks) if has_one}
    turns = [f"<think>\n{thoughts[n]}\n</think>\n\n{name}" if n in thoughts else name for n, name in enumerate(names)]
    text, marked = template.write(turns, generation_prompt)
    if template.system and template.system.strip() not in text:
        raise BadRecord("it has a system prompt of its own, which the tokenizer's chat template leaves out.")
    places, end = [], 0
    for name in names:
        start = text.find(name, end)
        if start < 0 or text.count(name) > 1:
            raise BadRecord(f"the tokenizer's chat template leaves out or repeats some of its {len(names)} turns.")
        end = start + len(name)
        places.append((start, end))

    asked = turns[: 2 * questions - 1]
    role = template.write(asked, generation_prompt=True)[0].rpartition(asked[-1])[2]
    trained, left_out = [], set()
    for number in range(1, len(names), 2):
        (_, question_end), (start, end) = places[number - 1 : number + 1]
        limit = places[number + 1][0] if number + 1 < len(names) else len(text)
        if number in thoughts:
            if thoughts[number] not in text:
                left_out.add(number)
                trained.append((start, end + _end_of_answer(template, text[end:limit])[0]))
                continue
            if text.count(thoughts[number]) > 1 or thoughts[number] not in text[question_end:start]:
                raise BadRecord(f"the tokenizer's chat template moves or repeats the thought of turn {number + 1}.")
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
    for number, ((start, end), limit) in enumerate(zip(places, limits, strict=True)):
        around.append((text[written:start], text[end:limit], number % 2 == 1 and number not in left_out))
        written = limit
    return around, text[written:]


def _end_of_answer(template: ChatTemplate, after: str) -> tuple[int, str]:
    """Where in the text behind an answer its end mark ends, and which special token that is."""
    found = [(after.index(mark), -len(mark), mark) for mark in template.end_marks if mark in after]
    if not found:
        raise BadRecord("the tokenizer's chat template puts no special token after an answer, so nothing ends it.")
    start, _, mark = min(found)
    return start + len(mark), mark


def chat_template(template: Template | ChatTemplate, bos: str = "") -> str | None:
    """The template as the Jinja text of transformers' `apply_chat_template`; None for captions, which are no chat.

    Messages have the roles user and assistant; a user's pictures come before the text, as LLaVA places them. A first
    message from system takes the place of the template's system prompt. A tokenizer's own template is kept as it is,
    behind a line that turns messages with pictures into text. `bos` is written in front of all.
    """
    if isinstance(template, ChatTemplate):
        to_text = _MESSAGES_TO_TEXT.replace("IMAGE", json.dumps(template.image_mark + "\n"))
        if template.jinja.startswith(to_text):
            return template.jinja
        return f"{to_text}{{{{ {json.dumps(bos)} }}}}{template.jinja}"
    if template.captions_only:
        return None
    quoted = {key: json.dumps(value) for key, value in asdict(template).items()}
    quoted["opening"], quoted["image"] = json.dumps(bos + template.opening), json.dumps(template.image_mark + "\n")
    if template.system:
        before, after = map(json.dumps, (bos + template.opening).split(template.system, 1))
        quoted["with_system"] = f"set opening = {before} + system + {after}"
    else:
        sentence = "The model was trained without a system prompt: write it into the first question"
        quoted["with_system"] = f"set opening = raise_exception({json.dumps(sentence)})"
    return (
        "{{%- set opening = {opening} -%}}"
        "{{%- if messages and messages[0]['role'] == 'system' -%}}"
        "{{%- set system = messages[0]['content'] -%}}"
        "{{%- if system is not string -%}}{{%- set system = system | map(attribute='text') | join -%}}{{%- endif -%}}"
        "{{%- if system | trim -%}}{{%- {with_system} -%}}{{%- endif -%}}"
        "{{%- set messages = messages[1:] -%}}"
        "{{%- endif -%}}"
        "{{%- for message in messages -%}}"
        "{{%- if message['role'] == 'user' -%}}"
        "{{{{ opening if loop.first else {next_question} }}}}"
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
        "{{{{ raise_exception('Roles are user and assistant, and system in front, not ' + message['role']) }}}}"
        "{{%- endif -%}}"
        "{{%- endfor -%}}"
        "{{%- if add_generation_prompt -%}}{{{{ {answer_start} }}}}{{%- endif -%}}"
    ).format(**quoted)
