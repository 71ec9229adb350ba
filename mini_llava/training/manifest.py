"""What lies in a training state's directory: `manifest.json`, written last, names all files, sizes and checksums.

It is read without torch, so that a checkpoint that is torn, or in the way, is named before anything is loaded.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from ..errors import UserError
from ..files import flush_file
from ..words import counted

FORMAT = 2


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the sentence names the file and says what to do."""


def is_ours(checkpoint: Path) -> bool:
    """Return whether this program wrote a directory, whole or torn: it has our manifest, or files only we write."""
    if any(checkpoint.glob("state-rank*.safetensors")):
        return True
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "training state"


def read_manifest(directory: Path) -> dict:
    """Return the manifest of a checkpoint whose files are all there in their sizes; otherwise raise CheckpointError."""
    file = directory / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a complete checkpoint: it has no manifest.json.") from None
    except ValueError:
        raise CheckpointError(f"{file} is not readable; use an older checkpoint.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "training state":
        raise CheckpointError(f"{file} does not describe a training state of this program.")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is of format {manifest.get('format')}, and this program reads {FORMAT}.")
    if manifest.get("sha256") != manifest_checksum(manifest):
        raise CheckpointError(f"{file} has been altered; use an older checkpoint.")
    for name, expected in manifest["files"].items():
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size != expected["bytes"]:
            fault = "is missing" if size is None else f"has {counted(size, 'byte')} instead of {expected['bytes']:,}"
            raise CheckpointError(f"{directory / name} {fault}; use an older checkpoint.")
    return manifest


def digest(path: Path) -> dict:
    """Return size and checksum of a file, as the manifest has them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def manifest_checksum(manifest: dict) -> str:
    """Return the checksum of a manifest, which it holds itself under `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def hide(checkpoint: Path) -> Path:
    """Rename a checkpoint before it is deleted, because a kill while deleting must not leave half of one."""
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    os.rename(checkpoint, removed)
    flush_file(checkpoint.parent)
    return removed
