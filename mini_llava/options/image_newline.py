"""LLaVA-1.6's `image_newline`: a learned embedding that ends each row of the features of a picture cut into tiles.

A part of its own in the model, trained as the projector is, saved with it and read with it.
"""

from pathlib import Path

import torch
from torch import nn

from ..model.projector import PROJECTOR_FILE, read_tensors

KEY = "image_newline"


class ImageNewline(nn.Module):
    """One embedding, with LLaVA's initial values."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / width**0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[features, width] -> [features + 1, width], the embedding last."""
        return torch.cat([features, self.weight[None].to(features.dtype)])

    @torch.no_grad()
    def load_beside_projector(self, path: str | Path) -> None:
        """Takes the newline out of a projector's file; one without (tiles may begin after stage 1) changes nothing.

        Raises ValueError for another width.
        """
        path = Path(path)
        path = path / PROJECTOR_FILE if path.is_dir() else path
        for key, tensor in read_tensors(path).items():
            if key.endswith(KEY):
                if tensor.shape != self.weight.shape:
                    needed = list(self.weight.shape)
                    raise ValueError(f"{path}: {key} is {list(tensor.shape)}, but this model needs {needed}.")
                self.weight.copy_(tensor)
