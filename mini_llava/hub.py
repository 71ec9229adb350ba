"""Files of a model, by a directory or a name on the hub, and the refusal to run code that comes with them."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers.utils import cached_file, logging

from .errors import UserError


def find_file(path: str | os.PathLike, name: str) -> str | None:
    """Return a file of a directory or of a hub repository, or None if it has none of that name.

    Raises OSError: there is no such repository, or nothing of it is here and the hub cannot be asked; a sentence.
    """
    if os.path.isdir(path):
        file = os.path.join(path, name)
        return file if os.path.isfile(file) else None
    try:
        return cached_file(str(path), name)
    except OSError as error:
        reason = error.__cause__
        if reason is None:  # the repository is there, and has no such file
            return None
        if isinstance(reason, LocalEntryNotFoundError) and isinstance(try_to_load_from_cache(path, "config.json"), str):
            return None  # what is here is all that can be known
        raise OSError(_why_not_on_the_hub(path, error, reason)) from error


def _why_not_on_the_hub(path: str | os.PathLike, error: OSError, reason: BaseException) -> str:
    hub, elsewhere = constants.ENDPOINT, f"fetch it where there is a network (hf download {path}), or give a directory."
    if isinstance(reason, GatedRepoError):
        return f"{path} is gated on {hub}: accept its conditions on its page there, and log in with hf auth login."
    if isinstance(reason, RepositoryNotFoundError):
        return f"{path} is neither a directory here nor a model on {hub} (a private one needs hf auth login)."
    if isinstance(reason, ValueError):
        return f"{path} is neither a directory here nor a name on the hub, which is owner/name."
    if isinstance(reason, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"{path} is not here, and HF_HUB_OFFLINE keeps the hub from being asked: unset it, {elsewhere}"
    if isinstance(reason, LocalEntryNotFoundError):
        why = " ".join(str(reason.__cause__ or reason).split())
        return f"{path} is not here, and the hub {hub} cannot be reached ({why}): {elsewhere}"
    return f"{path} could not be read from {hub}: {' '.join(str(error).split())}"


def read_json(path: str | os.PathLike, name: str) -> dict:
    """Return what such a file holds, or an empty dict without one. Raises OSError as `find_file` does, or UserError."""
    file = find_file(path, name)
    if not file:
        return {}
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}). Fetch or write it again.") from error


@contextmanager
def short_bars_left_out() -> Iterator[None]:
    """Show a progress bar of transformers only when it has taken a second: a shorter one tells nothing."""
    before = logging.set_tqdm_hook(lambda bar, words, options: bar(*words, **options, delay=1))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@contextmanager
def foreign_code_refused(path: str | os.PathLike) -> Iterator[None]:
    """Turn the refusal of transformers or torch to read `path`, or to run its code, into a UserError.

    Every `from_pretrained` that could run code stands in here and is told `trust_remote_code` as True or False: with
    None transformers asks at the terminal.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The weights in {path} are damaged, or a pickle of something other than tensors, which could run code "
            f"when read. They were not loaded; take .safetensors files."
        ) from error
    except UserError:
        raise
    except (ValueError, StrictDataclassError) as error:  # the second one of a configuration that contradicts itself
        if "trust_remote_code" not in str(error):
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise UserError(f"{path} cannot be read by transformers {transformers.__version__}: {reason}") from error
        raise UserError(
            f"{path} contains its own Python code, which was not run. Read it, and if you trust it, allow it with "
            f"--trust_remote_code."
        ) from error
