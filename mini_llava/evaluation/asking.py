"""How held-out questions are asked: their losses and greedy answers, with as little computed twice as can be.

LLaVA's `llava/eval/model_vqa.py` asks one question at a time. Here what begins alike, system prompt and images, is read
once (`Beginning`) and kept in a cache, from which each question about these images goes on (`Asked`), in place or
shuffled. One forward over what follows gives the loss and, at the same positions, the likeliest tokens. As far as these
are the expected answer they are the greedy answer too, for greedy decoding would have gone on from the same tokens;
from the first other one on, the answer is generated token by token.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..data.collator import join_pictures
from ..data.images import Picture
from ..data.samples import Samples
from ..data.templates import BadRecord
from ..data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, expand_images
from ..data_file import DataFileError
from ..image_files import BadImage
from ..model.llava import LlavaModel, token_losses
from .questions import Question

MOST_ASKED = 16  # of one beginning; others begin anew, so that ranks share the work


@dataclass
class Asked:
    """What follows a beginning.

    Attributes:
        place: of the question.
        shuffled: whether the images are another question's.
        with_loss: whether the loss is the record's; otherwise only the answer is asked.
        rest: ids, none of an image, int32 [S].
        trained: which of them the loss counts, bool [S].
        start: where in `rest` the answer starts, beyond which `rest` is the expected one; None: only the loss is asked.
    """

    place: int
    shuffled: bool
    with_loss: bool
    rest: np.ndarray
    trained: np.ndarray
    start: int | None

    def predicted(self) -> list[int]:
        """Return the places in `rest` whose token is to be predicted; place S is that of the token behind it."""
        answer = [] if self.start is None else range(self.start, len(self.rest) + 1)
        return [*np.flatnonzero(self.trained), *answer]


@dataclass
class Beginning:
    """A prompt up to its last image, or the first token of one without images.

    Attributes:
        record: which has the images.
        ids: int32 [n], one for each image.
        trained: which of them the loss counts, bool [n].
        length: in tokens, those of images included.
    """

    record: int
    ids: np.ndarray
    trained: np.ndarray
    length: int
    asked: list[Asked] = field(default_factory=list)


def find_beginnings(
    questions: Sequence[Question], shuffled: Sequence[Question], folder_of: Callable[[int], str], shares: bool
) -> list[Beginning]:
    """Return all that is to be computed, longest first.

    Args:
        shuffled: the same questions with other images; empty: they are not asked so.
        folder_of: of a record's images.
        shares: see `Asker`; if not, each question and each record is a beginning of its own, and nothing follows.
    """
    found: dict[tuple, list[Beginning]] = {}

    def add(place: int, question: Question, ids: np.ndarray, prompt: int | None, with_loss: bool = False) -> None:
        end, trained = len(ids), question.trained if with_loss else np.zeros(len(ids), bool)
        if shares:
            end = 1 + max(np.flatnonzero(ids == IMAGE_TOKEN_INDEX), default=0)
        files = tuple((folder_of(index), name) for index, name in question.images)
        alike = found.setdefault((files, ids[:end].tobytes(), trained[:end].tobytes(), shares or len(found)), [])
        if not alike or len(alike[-1].asked) == MOST_ASKED:
            images = np.count_nonzero(ids[:end] == IMAGE_TOKEN_INDEX)
            record = question.images[0][0] if images else question.index
            alike.append(
                Beginning(record, ids[:end], trained[:end], end - images + sum(question.image_tokens[:images]))
            )
        start = None if prompt is None else prompt - end
        of_question = (place, question is not questions[place], with_loss)
        alike[-1].asked.append(Asked(*of_question, ids[end:], trained[end:], start))

    for place, question in enumerate(questions):
        others = [other for other in shuffled[place : place + 1] if other is not question]
        ids, prompt = question.record_ids, question.input_ids
        if shares and np.array_equal(ids[: len(prompt)], prompt):
            add(place, question, ids, len(prompt), with_loss=True)
        else:  # also where the record was cut, or one token has the end of the prompt and the start of the answer
            add(place, question, ids, None, with_loss=True)
            others, ids = [question, *others], prompt
        for other in others:
            add(place, other, ids, len(prompt))
    every = itertools.chain.from_iterable(found.values())
    return sorted(every, key=lambda each: (each.length, max(len(asked.rest) for asked in each.asked)), reverse=True)


def asked_in_all(found: Iterable[Beginning]) -> int:
    """Return how many answers are asked for."""
    return sum(asked.start is not None for each in found for asked in each.asked)


def deal_beginnings(found: Sequence[Beginning], ranks: int, most: int, tokens: int) -> list[list[list[Beginning]]]:
    """Return `[round][rank] -> beginnings` that are read at once; the last round may lack ranks.

    Args:
        most: beginnings at once.
        tokens: that a rank's caches may hold, of which beginnings may take a half.
    """
    most = min(most, math.ceil(len(found) / ranks))
    units: list[list[Beginning]] = []
    for each in found:
        if not units or len(units[-1]) == most or (len(units[-1]) + 1) * units[-1][0].length > tokens // 2:
            units.append([])
        units[-1].append(each)
    return [units[first : first + ranks] for first in range(0, len(units), ranks)]


def group_asked(
    unit: Sequence[Beginning], limits: Sequence[int], tokens: int, shares: bool
) -> list[list[tuple[int, Asked]]]:
    """Return what is asked at once, with the number of its beginning: of similar length, as much as `tokens` allow.

    limits: tokens of an answer to each question at most; tokens: see `deal_beginnings`.
    """
    every = [(number, asked) for number, each in enumerate(unit) for asked in each.asked]
    if not shares:
        return [every]
    left, longest = tokens - len(unit) * unit[0].length, 0
    found: list[list[tuple[int, Asked]]] = []
    for number, asked in sorted(every, key=lambda pair: len(pair[1].rest), reverse=True):
        length = unit[0].length + len(asked.rest) + limits[asked.place]
        longest = max(longest, length)
        if not found or (len(found[-1]) + 1) * longest > left:
            found.append([])
            longest = length
        found[-1].append((number, asked))
    return found


@dataclass
class Opened:
    """The images of each beginning, or why one cannot be opened."""

    pictures: list[list[Picture]]
    fault: Exception | None = None


class HeldOutPictures(Dataset):
    """Maps `[records]` to the images of these records; runs in the loader's workers."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, records: Sequence[Sequence[int]]) -> Opened:
        store, opened = self.samples.store, Opened([])
        for index in itertools.chain.from_iterable(records):
            try:
                folder, names = store.image_folder(index), store.image_names(index)
                several = len(names) > 1
                opened.pictures.append([self.samples.image_reader.open(folder, name, several) for name in names])
            except (BadRecord, BadImage) as error:
                return Opened([], BadRecord(f"--eval_data_path: {store.describe(index)}: {error}"))
            except DataFileError as error:
                return Opened([], error)
        return opened


class Asker:
    """Reads beginnings, then asks what follows them. Under ZeRO-3 all ranks must call both equally often.

    shares: whether what follows several beginnings can go on from copies of their caches. It can where a cache is keys
    and values by position, and cannot where a state sums up what was read (Mamba).
    """

    def __init__(
        self,
        model: LlavaModel,
        device: torch.device,
        ends: Sequence[int],
        limits: Sequence[int],
        anywhere: Callable[[torch.Tensor], bool],
    ):
        """
        Args:
            model: in evaluation mode; its attention takes a cache (`attention_with_cache`).
            ends: tokens that end an answer.
            limits: tokens of an answer to each question at most.
            anywhere: says whether a bool is true on any of the ranks that must go on together.
        """
        self.model, self.device, self.limits, self.anywhere = model, device, limits, anywhere
        self.ends, self.end_tokens = set(ends), torch.tensor(ends, device=device)
        causal_model = next(part for part in model.language_model.modules() if isinstance(part, PreTrainedModel))
        self.config = causal_model.config
        self.takes_positions = "position_ids" in inspect.signature(type(causal_model).forward).parameters
        layers = DynamicCache(config=self.config).layers
        self.shares = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def begin(self, unit: Sequence[Beginning], pictures: Sequence[Sequence[Picture]]) -> None:
        """Read beginnings into a new cache. `pictures`: of the record of each."""
        ids, labels, opened = [], [], []
        for each, of_record in zip(unit, pictures, strict=True):
            is_image = each.ids == IMAGE_TOKEN_INDEX
            of_record = of_record[: np.count_nonzero(is_image)]
            counts = [picture.tokens for picture in of_record]
            ids.append(expand_images(each.ids, counts))
            labels.append(expand_images(np.where(each.trained | is_image, each.ids, IGNORE_INDEX), counts))
            opened += of_record
        self.lengths = [len(row) for row in ids]
        columns = max(self.lengths)
        ids, labels = (_rows(rows, columns, value, left=True) for rows, value in ((ids, 0), (labels, IGNORE_INDEX)))
        is_image = ids == IMAGE_TOKEN_INDEX
        mask = np.arange(columns) >= columns - np.array(self.lengths)[:, None]
        pixel_values, *placement = join_pictures(opened, self.model.vision_tower.image_size)
        embeddings = self.model.embed(
            self._to_device(np.where(is_image, 0, ids)),
            pixel_values.to(self.device),
            self._to_device(np.flatnonzero(is_image)),
            *(None if tensor is None else tensor.to(self.device) for tensor in placement),
        )
        # A cache for sliding windows would forget what others still ask for; attention masks keep to the window anyway.
        self.cache = DynamicCache(**({} if self.shares else {"config": self.config}))
        self.mask = self._to_device(mask)
        targets = np.where(labels == IMAGE_TOKEN_INDEX, IGNORE_INDEX, labels)[:, 1:]
        seen = np.flatnonzero((targets != IGNORE_INDEX).any(axis=0))
        logits = self._forward(embeddings, self.cache, self.mask, [*seen, columns - 1])
        self.last = logits[:, -1:]  # predicts the first token that follows
        self.losses = token_losses(logits[:, :-1], self._to_device(targets[:, seen])).double().sum(dim=1)

    def ask(self, group: Sequence[tuple[int, Asked]]) -> tuple[torch.Tensor, list[list[int]]]:
        """Return the summed loss of each row, its beginning's included, fp64 [rows], and the tokens of its answer.

        group: from `group_asked`, of the beginnings that were read last. An answer includes its end token, if it came
        to one, and is empty where none is asked.
        """
        numbers = self._to_device(np.array([number for number, _ in group]))
        every = [asked for _, asked in group]
        places = sorted({place for asked in every for place in asked.predicted()} - {0})
        lengths = np.array([len(asked.rest) for asked in every])
        width = max(1, lengths.max())  # at least a forward over padding, since no rank may leave it out
        targets = [np.where(asked.trained, asked.rest, IGNORE_INDEX) for asked in every]
        targets = self._to_device(_rows(targets, width + 1, IGNORE_INDEX))
        first = self.last[numbers]
        losses = self.losses[numbers] + token_losses(first, targets[:, :1]).double().sum(dim=1)
        likeliest, cache, mask = first.argmax(dim=-1), self.cache, self.mask
        if self.shares:
            ids = self._to_device(_rows([asked.rest for asked in every], width, 0))
            cache = _taken(cache, numbers)
            mask = torch.cat([mask[numbers], self._to_device(np.arange(width) < lengths[:, None])], dim=1)
            places = places or [1]
            logits = self._forward(self.model.embed_words(ids), cache, mask, [place - 1 for place in places])
            losses += token_losses(logits, targets[:, places]).double().sum(dim=1)
            likeliest = torch.cat([likeliest, logits.argmax(dim=-1)], dim=1)
        column = {place: number for number, place in enumerate([0, *places])}
        answers, goes_on = [], []
        for asked, row in zip(every, likeliest.tolist(), strict=True):
            answer, is_open = [], asked.start is not None
            for place in range(asked.start, len(asked.rest) + 1) if is_open else ():
                answer.append(row[column[place]])
                if answer[-1] in self.ends or len(answer) == self.limits[asked.place]:
                    is_open = False
                    break
                if place < len(asked.rest) and answer[-1] != asked.rest[place]:
                    break
            answers.append(answer)
            goes_on.append(is_open)
        self._go_on(group, answers, goes_on, cache, mask)
        return losses, answers

    def _go_on(
        self,
        group: Sequence[tuple[int, Asked]],
        answers: list[list[int]],
        goes_on: list[bool],
        cache: DynamicCache,
        mask: torch.Tensor,
    ) -> None:
        """Generate until each answer that goes on has an end or its limit; all ranks generate as long as one does."""
        if not self.anywhere(any(goes_on)):
            return
        rows = list(range(len(group)))
        if self.shares:  # caches of those alone, without what was expected and not written, moved to the right
            rows = [row for row in rows if goes_on[row]] or [0]
            before = np.array([self.lengths[group[row][0]] for row in rows])
            written = [goes_on[row] and group[row][1].start + len(answers[row]) - 1 for row in rows]
            ends = (max(self.lengths) + np.array(written))[:, None]
            columns = np.arange((before + written).max())
            mask = self._to_device(columns >= len(columns) - (before + written)[:, None])
            columns = self._to_device((ends - len(columns) + columns).clip(min=0))
            cache = _taken(cache, self._to_device(np.array(rows)), columns)
        limits = [self.limits[group[row][1].place] if goes_on[row] else 0 for row in rows]
        left = self._to_device(np.array([limit - len(answers[row]) for row, limit in zip(rows, limits, strict=True)]))
        tokens = self._to_device(np.array([answers[row][-1] if answers[row] else 0 for row in rows]))
        is_open, generated = left > 0, []
        while self.anywhere(is_open.any()):
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            tokens = self._forward(self.model.embed_words(tokens[:, None]), cache, mask, [0])[:, 0].argmax(dim=-1)
            generated.append(tokens)
            is_open = is_open & (left > len(generated)) & ~torch.isin(tokens, self.end_tokens)
        for row, limit, new in zip(rows, limits, torch.stack(generated, dim=1).tolist(), strict=True):
            while goes_on[row]:
                answers[row].append(new.pop(0))
                goes_on[row] = answers[row][-1] not in self.ends and len(answers[row]) < limit

    def _forward(
        self, embeddings: torch.Tensor, cache: DynamicCache, mask: torch.Tensor, columns: Sequence[int]
    ) -> torch.Tensor:
        """Append [B, S, width] to a cache; return logits [B, columns, V]. `mask`: bool [B, cached + S]."""
        options = {}
        if self.takes_positions:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        return self.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._to_device(np.array(columns)),
            **options,
        ).logits

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _rows(rows: Sequence[np.ndarray], columns: int, value: int, left: bool = False) -> np.ndarray:
    """Return rows of ids or labels filled up to so many columns, on the right or on the left, int64 [rows, columns]."""
    padded = np.full((len(rows), columns), value, np.int64)
    for row, content in zip(padded, rows, strict=True):
        row[columns - len(content) if left else 0 :][: len(content)] = content
    return padded


def _taken(cache: DynamicCache, rows: torch.Tensor, columns: torch.Tensor | None = None) -> DynamicCache:
    """Return a copy of rows [R] of a cache. With columns [R, L] of each, the cache is given up meanwhile."""

    def take(states: torch.Tensor) -> torch.Tensor:
        if columns is None:
            return states.index_select(0, rows)
        _, heads, length, size = states.shape  # take_along_dim takes ten times as long
        head = rows[:, None] * heads + torch.arange(heads, device=rows.device)
        places = head[:, :, None] * length + columns[:, None]
        return states.reshape(-1, size).index_select(0, places.flatten()).view(*places.shape, size)

    taken = DynamicCache()
    for layer in cache.layers:
        taken.layers.append(copy.copy(layer))
        if layer.is_initialized:  # not where layers share keys and values
            taken.layers[-1].keys, taken.layers[-1].values = take(layer.keys), take(layer.values)
            if columns is not None:
                layer.keys = layer.values = None
    return taken
