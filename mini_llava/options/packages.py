"""Packages that flags ask for and that need not be installed."""

import importlib.metadata
import importlib.util

from ..errors import UserError

# Those of accelerate, which imports torch when it is asked; each is a package of that name.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def check_bitsandbytes(bits: int) -> None:
    """Raise UserError if weights are to be quantised and the package is not installed."""
    if bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--bits {bits} needs the package bitsandbytes: pip install bitsandbytes.")


def check_liger_kernel(requested: bool | None) -> None:
    """Raise UserError if the kernels are requested and not installed."""
    if requested and importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel True: the package is not installed; pip install liger-kernel.")


def check_flash_attention(requested: str | None, usable: bool = True) -> None:
    """Raise UserError if FlashAttention 2 is asked for and not installed, or not `usable` as transformers says."""
    if requested == "flash_attention_2" and not (usable and _is_installed("flash-attn")):
        raise UserError("--attn_implementation flash_attention_2: the package flash-attn is not installed.")


def check_tracker(report_to: str) -> None:
    """Raise UserError if a tracker is not installed or unknown."""
    installed = installed_trackers()
    if report_to not in ("none", "all", *installed):
        # accelerate leaves out a tracker whose package is missing, and logs that at level DEBUG only.
        known = ", ".join(sorted({"none", "all", *TRACKERS} - {*installed}))
        raise UserError(
            f"--report_to {report_to}: not installed or unknown. "
            f"Installed: {', '.join(installed)}; also known: {known}."
        )


def installed_trackers() -> list[str]:
    """Return the trackers whose package is installed; a folder of that name, such as wandb's own, is none."""
    others = {"tensorboard": "tensorboardX"}
    return [name for name in TRACKERS if _is_installed(name) or _is_installed(others.get(name, name))]


def _is_installed(package: str) -> bool:
    return any(importlib.metadata.distributions(name=package))
