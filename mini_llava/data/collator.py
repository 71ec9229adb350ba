"""Samples to tensors: one micro-batch, padded to its longest sample or packed into one row without padding.

Replaces LLaVA's `DataCollatorForSupervisedDataset` and the placing part of `prepare_inputs_labels_for_multimodal`. The
image placeholders already have their full length here (see `tokenization.py`), so every index that the model needs is
computed on the CPU, and no step waits for the device to find out where the images are.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .images import NEWLINE, Picture
from .tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample

MicroBatch = dict[str, torch.Tensor | int | None]


def collate(samples: Sequence[Sample], image_size: int, packed: bool) -> MicroBatch:
    """Return one micro-batch of B rows and L columns (packed: one row) as the model's `forward` takes it.

    Args:
        samples: with their pictures; may be empty, at the end of an epoch.
        image_size: of the vision tower, pixels.
        packed: samples concatenated in one row, delimited by `position_ids` and `cu_seqlens`.

    Returns:
        input_ids      int64 [B, L], 0 at image positions and padding (both are overwritten or masked, so that no real
                       token, be it eos or unk, is ever taken for padding)
        position_ids   int64 [B, L], from 0 in each sample
        attention_mask bool [B, L], None when packed
        cu_seqlens     int32 [samples + 1], bounds of the samples in the packed row; None when padded
        max_seqlen     int, the longest sample
        pixel_values   uint8 [images or tiles, 3, image_size, image_size]; if the samples have none, one blank image of
                       float32 zeros, as in LLaVA, so that tower and projector run on every rank and all ranks call the
                       same collectives; its features are not used
        feature_rows   int64 [image tokens], which feature goes to each image position; None: they come in order
        feature_weights float32 [image tokens, 4] where some picture's features are interpolated: each image position
                       takes the sum of four, and feature_rows is [image tokens, 4]; otherwise None
        image_positions int64 [image tokens], where the features go in the B x L positions counted row by row
        logit_positions int64 [K], the columns in which some row has a token to predict
        targets        int64 [B, K], the token that follows each of these columns, IGNORE_INDEX where none is trained
    """
    ids = [sample.input_ids.astype(np.int64) for sample in samples] or [np.zeros(1, np.int64)]
    # What each position has to predict: the label of the next one of the same sample, nothing at the end of a sample.
    next_labels = [np.append(sample.labels[1:], IGNORE_INDEX).astype(np.int64) for sample in samples]
    next_labels = next_labels or [np.full(1, IGNORE_INDEX, np.int64)]
    lengths = [len(row) for row in ids]
    positions = [np.arange(length) for length in lengths]

    if packed:
        ids, next_labels, positions = (np.concatenate(rows)[None] for rows in (ids, next_labels, positions))
        attention_mask, cu_seqlens = None, torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    else:
        columns = max(lengths)
        mask = np.arange(columns)[None] < np.array(lengths)[:, None]
        ids, next_labels = _pad(ids, columns, 0), _pad(next_labels, columns, IGNORE_INDEX)
        positions = np.tile(np.arange(columns), (len(lengths), 1))
        attention_mask, cu_seqlens = torch.from_numpy(mask), None

    pictures = [picture for each in samples for picture in each.pictures]
    pixel_values, feature_rows, feature_weights = join_pictures(pictures, image_size)
    is_image = ids == IMAGE_TOKEN_INDEX
    columns_to_predict = np.flatnonzero((next_labels != IGNORE_INDEX).any(axis=0))
    if len(columns_to_predict) == 0:  # nothing is trained here, but the language model's head must run on every rank
        columns_to_predict = np.zeros(1, np.int64)
    return {
        "input_ids": torch.from_numpy(np.where(is_image, 0, ids)),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max(lengths),
        "pixel_values": pixel_values,
        "feature_rows": feature_rows,
        "feature_weights": feature_weights,
        "image_positions": torch.from_numpy(np.flatnonzero(is_image)),
        "logit_positions": torch.from_numpy(columns_to_predict),
        "targets": torch.from_numpy(np.ascontiguousarray(next_labels[:, columns_to_predict])),
    }


def sample_of_targets(batch: MicroBatch) -> torch.Tensor:
    """Return the sample of a micro-batch that each of its targets belongs to, int64 [B, K]."""
    if batch["cu_seqlens"] is None:
        rows, columns = batch["targets"].shape
        return torch.arange(rows)[:, None].expand(rows, columns)
    return torch.searchsorted(batch["cu_seqlens"][1:], batch["logit_positions"], right=True)[None]


def join_pictures(
    pictures: Sequence[Picture], image_size: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return `pixel_values`, `feature_rows` and `feature_weights` as `collate` describes them.

    A newline is the row after the last feature.
    """
    if not pictures:
        return torch.zeros(1, 3, image_size, image_size), None, None
    pixel_values = torch.cat([picture.pixels for picture in pictures])
    if pictures[0].order is None:
        return pixel_values, None, None
    first = np.cumsum([0, *(picture.features for picture in pictures)])
    rows = [
        np.where(picture.order == NEWLINE, first[-1], picture.order + start)
        for picture, start in zip(pictures, first, strict=False)
    ]
    if all(picture.weights is None for picture in pictures):
        return pixel_values, torch.from_numpy(np.concatenate(rows)), None
    # A feature that is taken as it is are four quarters of it.
    rows = [row if row.ndim == 2 else np.tile(row[:, None], 4) for row in rows]
    weights = [
        np.full((picture.tokens, 4), 1 / 4, np.float32) if picture.weights is None else picture.weights
        for picture in pictures
    ]
    return pixel_values, torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(weights))


def _pad(rows: list[np.ndarray], columns: int, value: int) -> np.ndarray:
    padded = np.full((len(rows), columns), value, np.int64)
    for row, content in zip(padded, rows, strict=True):
        row[: len(content)] = content
    return padded
