"""The training records as bytes and offsets.

Replaces LLaVA's `json.load` of the whole dataset, once per process. Files stay on disk; a record costs sixteen bytes of
offsets that forked loader workers share, and is read and parsed when it is asked for. The offsets are cached.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data_file import CHUNK_BYTES, DataFile, check_data_files
from ..errors import UserError
from ..files import atomic_write
from ..image_files import LinkedFolder
from .templates import BadRecord
from .tokenization import NO_IMAGE, shorten

INDEX_CACHED_FROM = 32 * 2**20  # bytes; a smaller file is indexed in less than a second
_WHITESPACE = b" \t\r\n"
_BLANKS = re.compile(r"[ \t\r\n]*")


class RecordStore:
    """The records of several JSON files, in the order of the files, without a Python object per record.

    Args:
        data_path: files holding one JSON array (`[` is the first byte) or one JSON object per line (`{`).
        image_folder: one folder for each file, matched by position, or none at all for text-only data.
        exclude: files that the doctor or `log_skipped` wrote; the records they list are not in the store.
        cache_folder: where the index of a large file is cached; None: nowhere.
        flag_prefix: `eval_` for held-out records: errors name the flags.
        follow_links: symbolic links may lead out of the image folders.

    Raises FileNotFoundError, NotADirectoryError or ValueError, which names the file or folder, and for broken JSON the
    byte and line.
    """

    def __init__(
        self,
        data_path: list[str],
        image_folder: list[str] | None = None,
        exclude: list[str] | None = None,
        cache_folder: str | os.PathLike | None = None,
        flag_prefix: str = "",
        follow_links: bool | None = False,
    ):
        check_data_files(data_path, image_folder, exclude, flag_prefix)
        image_folder, self.folder_flag = list(image_folder or []), f"--{flag_prefix}image_folder"
        self.data_path = [str(path) for path in data_path]
        self._image_folder = [LinkedFolder(folder) if follow_links else str(folder) for folder in image_folder]
        self.follow_links = bool(follow_links)
        self._files = [DataFile(path) for path in self.data_path]
        spans = [_index(file, cache_folder) for file in self._files]
        self._spans = np.concatenate(spans)
        self._first = np.cumsum([0, *map(len, spans)])
        self._kept_before = np.zeros(0, np.int64)  # for each excluded record, how many kept ones are before it
        if not len(self):
            raise UserError(f"No record in {', '.join(self.data_path)}.")
        if exclude:
            excluded = np.unique([position for path in exclude for position in self._listed(path)]).astype(np.int64)
            self._kept_before = excluded - np.arange(len(excluded))
            if not len(self):
                raise UserError(f"No record is left of {', '.join(self.data_path)} after --exclude.")

    def __len__(self) -> int:
        return len(self._spans) - len(self._kept_before)

    def __getitem__(self, index: int) -> dict:
        """Return a record. Raises BadRecord if it is not a JSON object, DataFileError if the file has changed."""
        try:
            record = json.loads(self._content(index).decode("utf-8"))
        except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and endless nesting
            start, end = self._spans[self.position(index)].tolist()
            raise BadRecord(f"it is not JSON: {error} (bytes {start} to {end} of the file).") from error
        if not isinstance(record, dict):
            raise BadRecord(f"it is not a JSON object but a {type(record).__name__}.")
        return record

    def _content(self, index: int) -> bytes:
        start, end = self._spans[self.position(index)].tolist()
        return self._files[self.source(index)].read(start, end)

    def position(self, index: int) -> int:
        """Return the record's number among the records of all files, from 0, excluded ones included."""
        if not 0 <= index < len(self):
            raise IndexError(f"Record {index} of {len(self)}.")
        return index + int(np.searchsorted(self._kept_before, index, side="right"))

    def source(self, index: int) -> int:
        """Return the number of the data file that holds the record, from 0."""
        return int(np.searchsorted(self._first, self.position(index), side="right")) - 1

    def source_sizes(self) -> list[int]:
        """Return how many records each data file has, excluded ones not counted."""
        excluded = self._kept_before + np.arange(len(self._kept_before))
        return (np.diff(self._first) - np.histogram(excluded, self._first)[0]).tolist()

    def source_names(self) -> list[str]:
        """Return a short name of each data file: its stem, and its number where two files have the same stem."""
        stems = [Path(path).stem for path in self.data_path]
        return [stem if stems.count(stem) == 1 else f"{stem}.{n}" for n, stem in enumerate(stems, start=1)]

    def image_folder(self, index: int) -> str | None:
        """Return the folder that the record's image names are relative to; None without `image_folder`."""
        return self._image_folder[self.source(index)] if self._image_folder else None

    def image_names(self, index: int) -> list[str]:
        """Return the image names of a record. Raises BadRecord if the record cannot be read."""
        names = self[index].get("image")
        return [] if names in NO_IMAGE else [names] if isinstance(names, str) else list(names)

    def sample(self, among: np.ndarray, most: int) -> list[int]:
        """Return up to `most` random records: the same ones for the same files, nearly the same for other exclusions.

        among: bool [records], those to choose from.
        """
        kept = np.delete(np.arange(len(self._spans)), self._kept_before + np.arange(len(self._kept_before)))
        seed = int(hashlib.blake2b(" ".join(self.digests()).encode(), digest_size=4).hexdigest(), 16)
        # Not default_rng, whose stream may differ between versions of numpy.
        place = np.random.RandomState(seed).permutation(len(self._spans))[kept]
        candidates = np.flatnonzero(among)
        return candidates[np.argsort(place[candidates])[:most]].tolist()

    def describe(self, index: int) -> str:
        """Return where a record is, for messages: file, position in the file from 0, and its id if it has one."""
        source = self.source(index)
        try:
            record_id = self[index].get("id")
        except BadRecord:
            record_id = None
        shown = shorten(record_id)
        if isinstance(record_id, str):
            shown = shown[1:-1]  # without the quotes
        suffix = "" if record_id is None else f" (id {shown})"
        return f"{self.data_path[source]}, record {self.position(index) - int(self._first[source])}{suffix}"

    def record_digest(self, index: int) -> str:
        """Return a digest of the record's bytes, by which `exclude` tells whether a list belongs to this data."""
        return hashlib.blake2b(self._content(index), digest_size=8).hexdigest()

    def _listed(self, path: str) -> list[int]:
        """Return the positions that an exclude file lists. Called before any record is excluded."""
        listed = []
        with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    entry = json.loads(line)
                    index, digest = int(entry["index"]), entry["digest"]
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    if line.startswith('{"index"') and not line.endswith(("\n", "}")):  # a kill has torn it
                        warnings.warn(f"--exclude {path}: the last line is torn and left out.", stacklevel=4)
                        continue
                    raise UserError(
                        f"--exclude {path}, line {number}: expected an object with 'index' and 'digest', as the doctor "
                        f"writes them, found {shorten(line)}."
                    ) from None
                if not 0 <= index < len(self) or self.record_digest(index) != digest:
                    raise UserError(
                        f"--exclude {path}, line {number}: record {index} of this data is not the one that was listed. "
                        f"The file belongs to other data, or the data has changed: run the doctor again."
                    )
                listed.append(index)
        return listed

    def digests(self) -> list[str]:
        """Return a digest of the content of each file, in order."""
        return [file.digest() for file in self._files]

    def digest(self) -> str:
        """Return a digest of the files' content, in order, and of what is excluded; names and dates do not count."""
        parts = " ".join(self.digests()).encode() + self._kept_before.tobytes()
        return hashlib.blake2b(parts, digest_size=16).hexdigest()


def _index(file: DataFile, cache_folder: str | os.PathLike | None) -> np.ndarray:
    """Return the spans of a file; for a large file from the cache, if it was indexed before and has not changed.

    The file then has a digest, which tells a changed file from one that was only touched.
    """
    if cache_folder is None or file.size < INDEX_CACHED_FROM:
        file.digest()
        return _spans(file)
    name = hashlib.blake2b(file.identity().encode() + Path(__file__).read_bytes(), digest_size=16).hexdigest()
    cache = Path(cache_folder) / f"index-{name}.npz"
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            spans, digest = arrays["spans"], str(arrays["digest"])
        file.set_digest(digest)
        return spans
    except Exception:  # there is none, or it is damaged, which raises zipfile, zlib, KeyError, ValueError or OSError
        digest, spans = file.digest(), _spans(file)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(cache, spans=spans, digest=np.array(digest))
    except OSError as error:
        warnings.warn(f"The index is not cached: {cache_folder} cannot be written ({error}).", stacklevel=3)
    return spans


def write_arrays(file: Path, **arrays: np.ndarray) -> None:
    """Write an npz file atomically. Raises OSError."""
    with atomic_write(file) as content:  # processes of several machines may be here at once
        np.savez_compressed(content, **arrays)


def _spans(file: DataFile) -> np.ndarray:
    """Return where each record of a file begins and ends, bytes, int64 [n, 2]."""
    if file.size == 0:
        raise UserError(f"The data file {file.path} is empty.")
    start = _skip_blanks(file, 3 if file.read(0, 3) == b"\xef\xbb\xbf" else 0)
    first = file.read(start, start + 1)
    if first == b"[":
        spans = _array_spans(file, start + 1)
    elif first == b"{":
        spans = _line_spans(file, start)
    else:
        raise UserError(
            f"{file.path} begins with {first!r}; expected a JSON array of records, or JSON lines with one object per "
            f"line."
        )
    # fromiter keeps sixteen bytes for each record, where a list of tuples would keep two hundred.
    return np.fromiter((value for span in spans for value in span), dtype=np.int64).reshape(-1, 2)


def _skip_blanks(file: DataFile, position: int) -> int:
    """Return the position of the first byte from `position` on that is no white space, or the end of the file."""
    for chunk in file.chunks(position):
        rest = chunk.lstrip(_WHITESPACE)
        position += len(chunk) - len(rest)
        if rest:
            break
    return position


def _array_spans(file: DataFile, position: int) -> Iterator[tuple[int, int]]:
    """Yield where each element of the JSON array begins and ends whose bracket is before `position`.

    The text is decoded as latin-1, one character per byte, so that the decoder's positions are file offsets. At most a
    chunk, or twice the longest record, is in memory.
    """
    # Numbers stay texts: Python refuses to convert very long ones, which is an error of one record, not of the file.
    decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
    offset, window, here = position, "", 0
    expected = "an element or the closing bracket"
    progress = tqdm(
        total=file.size, desc=f"indexing {os.path.basename(file.path)}", unit="B", unit_scale=True, delay=2, leave=False
    )

    def broken(message: str, byte: int) -> UserError:
        where = f"at byte {byte}, line {_line(file, byte)}"
        return UserError(f"{file.path} is not a whole JSON array: {message} {where}.")

    while True:
        here = _BLANKS.match(window, here).end()
        at_end = offset + len(window) >= file.size
        if here < len(window):
            if window[here] == "]" and expected != "an element":
                break
            if expected == "a comma or the closing bracket":
                if window[here] != ",":
                    raise broken(f"expected {expected}, found {window[here]!r}", offset + here)
                expected, here = "an element", here + 1
                continue
            try:
                _, end = decode(window, here)
                # A number at the end of the window may go on beyond it.
                if at_end or end < len(window) - 2:
                    yield offset + here, offset + end
                    expected, here = "a comma or the closing bracket", end
                    continue
            except RecursionError:
                raise broken("an element is nested too deeply", offset + here) from None
            except json.JSONDecodeError as error:
                # Near the end of the window, or in a string that goes beyond it, the element may be incomplete.
                incomplete = error.pos > len(window) - 16 or error.msg.startswith("Unterminated string")
                if at_end or not incomplete:
                    raise broken(error.msg.removesuffix(" at"), offset + error.pos) from None
        elif at_end:
            raise broken(f"the file ends where {expected} should be,", file.size)
        offset, size = offset + here, max(CHUNK_BYTES, 2 * (len(window) - here))
        window, here = file.read(offset, offset + size).decode("latin-1"), 0
        progress.update(offset - progress.n)

    progress.close()
    if (byte := _skip_blanks(file, offset + here + 1)) < file.size:
        raise broken("something follows the closing bracket", byte)


def _line_spans(file: DataFile, offset: int) -> Iterator[tuple[int, int]]:
    """Yield where each line begins and ends that is not blank; one that is not JSON is a bad record once it is read."""
    window, here, is_first = b"", 0, True
    while True:
        end = window.find(b"\n", here)
        at_end = offset + len(window) >= file.size
        if end < 0 and not at_end:
            offset, size = offset + here, max(CHUNK_BYTES, 2 * (len(window) - here))
            window, here = file.read(offset, offset + size), 0
            continue
        line = window[here : end if end >= 0 else len(window)]
        if is_first:
            _check_first_line(file, offset, line)
            is_first = False
        if line.strip():
            yield offset + here, offset + here + len(line)
        if end < 0:
            break
        here = end + 1


def _check_first_line(file: DataFile, start: int, line: bytes) -> None:
    try:
        json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file.path} begins with an object, so it should have one whole JSON object per line, but line "
            f"{_line(file, start)} is not ({error}). Otherwise the records must be elements of one JSON array."
        ) from error


def _line(file: DataFile, byte: int) -> int:
    return 1 + sum(chunk.count(b"\n") for chunk in file.chunks(0, byte))
