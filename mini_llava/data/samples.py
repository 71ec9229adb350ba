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
from transformers.image_processing_utils import BaseImageProcessor

from .images import BadImage, Picture, image_path, open_picture
from .records import RecordStore
from .templates import Template
from .tokenization import IMAGE_TOKEN_INDEX, Sample, shorten, tokenize, tokenize_prompt

# The modules that decide how long a sample is.
MEASURED_WITH = ("templates", "tokenization", "records", "images", "samples", "lengths")


@dataclass
class Samples(Dataset):
    """The samples of a `RecordStore`; `samples[index]` is a `Sample` with its pictures opened.

    Attributes:
        max_length: tokens, images included; a longer sample is cut.
        tokens_per_image: features that the vision tower gives for `image_size` pixels square.
        image_processor: of the vision tower, and `image_size` its size; None where no image is opened.
        image_aspect_ratio: "pad", "square", or "anyres" with a tiling.
        tiling: what splits images into tiles (`options.tiles.Tiling`); None: they stay whole.
        check: raises BadRecord for other records that shall not be trained on (`guards.records.RecordCheck`).
        new_tokens: how many tokens at the end of the tokenizer get new rows in the language model.
    """

    store: RecordStore
    template: Template
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    tokens_per_image: int
    image_processor: BaseImageProcessor | None = None
    image_aspect_ratio: str = "pad"
    image_size: int | None = None
    tiling: object | None = None
    check: Callable[[dict], None] | None = None
    new_tokens: int = 0

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample with its pictures. Raises BadRecord, BadImage and DataFileError."""
        sample, folder = self.tokenize(index), self.store.image_folder(index)
        pictures = [self.open_picture(folder, name) for name in sample.images]
        # The places of images in tiles were made from their headers.
        if sum(picture.tokens for picture in pictures) != np.count_nonzero(sample.input_ids == IMAGE_TOKEN_INDEX):
            names = ", ".join(map(shorten, sample.images))
            raise BadImage(f"one of its images has another size than a moment ago: {names}.")
        return replace(sample, pictures=pictures)

    def record(self, index: int) -> dict:
        """Return a record that `check` lets pass. Raises BadRecord and DataFileError."""
        record = self.store[index]
        if self.check is not None:
            self.check(record)
        return record

    def tokenize(self, index: int, max_length: int | None = None) -> Sample:
        """Return the sample without opening a picture; of images in tiles the headers are read.

        max_length: instead of the dataset's. Raises BadRecord, DataFileError, and BadImage where headers are read.
        """
        image_tokens = self.tokens_per_image
        if self.tiling is not None:
            image_tokens = functools.partial(self.tiling.tokens, self.store.image_folder(index))
        return tokenize(self.record(index), self.template, self.tokenizer, image_tokens, max_length or self.max_length)

    def prompt(self, index: int) -> np.ndarray:
        """Return the ids up to the answer of the last question, int32 [L], one for each image. Raises BadRecord."""
        return tokenize_prompt(self.record(index), self.template, self.tokenizer)

    def open_picture(self, folder: str, name: str) -> Picture:
        """Return an image file as the vision tower gets it. Raises BadImage."""
        tower = (self.image_size, self.tokens_per_image)
        return open_picture(folder, name, self.image_processor, self.image_aspect_ratio, *tower, self.tiling)

    def tiles(self, index: int, names: list[str]) -> int:
        """Return how many times the vision tower runs for images of a record. Raises BadImage."""
        if self.tiling is None:
            return len(names)
        return sum(self.tiling.tiles(self.store.image_folder(index), name) for name in names)

    def missing_image(self, index: int, names: list[str]) -> str | None:
        """Return why images of a record cannot be opened, as far as paths tell; None: nothing speaks against it."""
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
        parts = (self.template, self.tiling, self.check, self.tokens_per_image, self.max_length)
        for text in (self.tokenizer.backend_tokenizer.to_str(), *map(repr, parts)):
            digest.update(text.encode("utf-8") + b"\0")
        files = [Path(__file__).with_name(f"{name}.py") for name in MEASURED_WITH]
        files += [inspect.getsourcefile(type(part)) for part in (self.template, self.tiling, self.check) if part]
        for file in files:
            digest.update(Path(file).read_bytes())
        return digest.hexdigest()
