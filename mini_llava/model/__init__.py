from .. import deepspeed_accelerator  # noqa: F401  before all else
