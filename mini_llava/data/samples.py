"""The dataset: a record becomes token ids, labels and opened pictures when it is asked for.

Replaces LLaVA's `LazySupervisedDataset`. Everything that a run does to a record is decided here, once; training,
evaluation, measuring and the tools ask the same object.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..image_files import BadImage, image_path
from .images import ImageReader
from .records import RecordStore
from .templates import Template
from .tokenization import IMAGE_TOKEN_INDEX, Sample, shorten, tokenize, tokenize_prompt

# The modules that decide how long a sample is.
MEASURED_WITH = ("records", "samples", "templates", "tokenization", "images", "../image_files", "lengths")


@dataclass
class Samples(Dataset):
    """The samples of a `RecordStore`; `samples[index]` is a `Sample` with its pictures opened.

    Attributes:
        max_length: tokens, images included; a longer sample is truncated.
        check: returns a record in the form in which it is read, or raises BadRecord if it must not be trained on
            (`guards.records.RecordCheck`).
        new_tokens: how many tokens at the end of the tokenizer get new rows in the language model.
    """

    store: RecordStore
    template: Template
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    image_reader: ImageReader
    check: Callable[[dict], dict] | None = None
    new_tokens: int = 0

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample with its pictures. Raises BadRecord, BadImage and DataFileError."""
        sample, folder = self.tokenize(index), self.store.image_folder(index)
        pictures = [self.image_reader.open(folder, name, sample.several) for name in sample.images]
        # An image in tiles got its places by the size in its header; a whole one always has as many.
        if sum(picture.tokens for picture in pictures) != np.count_nonzero(sample.input_ids == IMAGE_TOKEN_INDEX):
            names = ", ".join(map(shorten, sample.images))
            raise BadImage(f"one of its images has changed its size since it was measured: {names}.")
        return replace(sample, pictures=pictures)

    def record(self, index: int) -> dict:
        """Return a record as `check` returns it. Raises BadRecord and DataFileError."""
        record = self.store[index]
        return record if self.check is None else self.check(record)

    def tokenize(self, index: int, max_length: int | None = None) -> Sample:
        """Return the sample without opening a picture; for images in tiles this reads the headers.

        max_length: instead of the dataset's. Raises BadRecord, DataFileError, and BadImage where headers are read.
        """
        image_tokens = functools.partial(self.image_reader.tokens, self.store.image_folder(index))
        return tokenize(self.record(index), self.template, self.tokenizer, image_tokens, max_length or self.max_length)

    def prompt(self, index: int) -> np.ndarray:
        """Return the ids up to the answer of the last question, int32 [L], one for each image. Raises BadRecord."""
        return tokenize_prompt(self.record(index), self.template, self.tokenizer)

    def tiles(self, index: int, sample: Sample) -> int:
        """Return how many times the vision tower runs for the images of a record's sample. Raises BadImage."""
        folder = self.store.image_folder(index)
        return sum(self.image_reader.tiles(folder, name, sample.several) for name in sample.images)

    def missing_image(self, index: int, names: list[str]) -> str | None:
        """Return why images of a record cannot be opened, as far as their paths tell, or None."""
        folder = self.store.image_folder(index)
        if names and folder is None:
            return f"it has the image {names[0]!r}, but no {self.store.folder_flag} is given."
        try:
            for name in names:
                image_path(folder, name)
        except BadImage as error:
            return str(error)
        return None

    def describe(self, index: int) -> str:
        """Return where a record is, for messages: file, position in it, id."""
        return self.store.describe(index)

    def measurement_key(self) -> str:
        """Return a digest of all that decides a sample's length except records and images, the code included."""
        digest = hashlib.blake2b(digest_size=16)
        tiling, numbers = self.image_reader.tiling, (self.image_reader.features, self.max_length)
        parts = [part for part in (self.template, tiling, self.check) if part is not None]
        for text in (self.tokenizer.backend_tokenizer.to_str(), *map(repr, [*parts, numbers])):
            digest.update(text.encode("utf-8") + b"\0")
        files = [Path(__file__).parent / f"{module}.py" for module in MEASURED_WITH]
        for file in [*files, *(inspect.getsourcefile(type(part)) for part in parts)]:
            digest.update(Path(file).read_bytes())
        return digest.hexdigest()
