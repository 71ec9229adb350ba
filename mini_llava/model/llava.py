"""The model: encode the images, project them, place them among the word embeddings, sum the token losses.

Replaces `LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal` and `LlavaLlamaForCausalLM.forward`, which split
and stack every sample. Here tokenization gives placeholders their full length, so placing the features is one
`index_copy`. Any causal language model of transformers fits.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.tokenization import IGNORE_INDEX
from .vision_tower import VisionTower

# Logits are cast to fp32 this many at a time: with a vocabulary of 150,000 all of them would take gigabytes.
LOGITS_IN_FP32_AT_ONCE = 64 * 2**20


class LlavaModel(nn.Module):
    """Vision tower, projector and language model; `forward` takes what `collate` returns."""

    def __init__(
        self,
        vision_tower: VisionTower,
        projector: nn.Module,
        language_model: nn.Module,
        image_newline: nn.Module | None = None,
        tiling: object | None = None,
    ):
        """
        Args:
            image_newline: appends the embedding that ends a row of features, [n, width] -> [n + 1, width].
            tiling: how images are split into tiles (`options.tiles.Tiling`); None: they are whole.
        """
        super().__init__()
        self.vision_tower, self.projector, self.language_model = vision_tower, projector, language_model
        self.image_newline, self.tiling = image_newline, tiling
        self.base: str | None = None  # what it was read from, for files of a projector or of adapters
        # Set by options/image_tokens.py, for LLaVA's older models.
        self.use_im_start_end = self.use_im_patch_token = False
        self.added_tokens, self.first_image_token = 0, None
        self.new_tokens: nn.Embedding | None = None  # stands in for single rows (options/token_rows.py)

    def train(self, mode: bool = True) -> "LlavaModel":
        """Set the mode of all parts but bitsandbytes' quantised layers, which stay in training mode; return the model.

        On CPUs with AVX512-BF16 a 4-bit layer repacks its weights at its first forward in eval mode, and `train()` does
        not undo it: from then on no gradient passes the layer. On any CPU an 8-bit layer in eval mode also rounds its
        inputs to 8 bits. Neither layer has dropout to switch off.
        """
        super().train(mode)
        for module in self.modules():
            if type(module).__module__.startswith("bitsandbytes."):
                module.training = True
        return self

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        image_positions: torch.Tensor,
        feature_rows: torch.Tensor | None = None,
        feature_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return word embeddings [B, L, width] with the projected image features at `image_positions`.

        The features of all images or tiles, followed by a newline if the model has one, are a table whose rows
        `feature_rows` assigns to the positions; None: in order. With `feature_weights` a position gets the sum of its
        four rows, so weighted.

        A micro-batch without images has one blank image and no position: tower and projector still run, so that every
        rank makes the same collective calls, and the projector's gradient is zero rather than absent (AdamW still
        decays its moments, as in LLaVA). Features are not scaled where Gemma scales its word embeddings, as in
        transformers' own LLaVA, PaliGemma and Gemma 3.
        """
        features = self.vision_tower(pixel_values)
        features = self.projector(features.to(_dtype(self.projector, features)))
        embeddings = self.embed_words(input_ids)
        features = features.flatten(0, 1)
        if self.image_newline is not None:
            features = self.image_newline(features)
        if feature_rows is not None:  # index_select's backward would sum the newlines' gradients in half precision
            features = F.embedding(feature_rows, features)
        if feature_weights is not None:
            features = (features * feature_weights[..., None]).sum(1)  # in fp32, as torch interpolates
        if image_positions.numel() == 0:
            features = features[:0]  # of the blank image, which has no place
        elif len(features) != image_positions.numel():
            raise RuntimeError(f"{len(features)} image features for {image_positions.numel()} positions.")
        features = features.to(embeddings.dtype)
        return embeddings.flatten(0, 1).index_copy(0, image_positions, features).view_as(embeddings)

    def embed_words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens that are not an image's: [B, L] -> [B, L, width]."""
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if torch.is_autocast_enabled(embeddings.device.type):
            # fp32 masters give fp32 embeddings, and every layer's activations would take twice the memory.
            embeddings = embeddings.to(torch.get_autocast_dtype(embeddings.device.type))
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        image_positions: torch.Tensor,
        logit_positions: torch.Tensor,
        targets: torch.Tensor,
        max_seqlen: int,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        feature_rows: torch.Tensor | None = None,
        feature_weights: torch.Tensor | None = None,
        reduction: str = "sum",
    ) -> torch.Tensor:
        """Return the sum of the losses of all trained tokens, fp32 scalar; shapes of the inputs are in `collate`.

        With reduction "none" return the loss of each target, fp32 [B, K], 0 where none is trained.
        """
        packing = {}  # a padded row needs no positions, which some families (MPT, BLOOM) do not accept
        if cu_seqlens is not None:
            packing = {
                "position_ids": position_ids,
                "cu_seq_lens_q": cu_seqlens,
                "cu_seq_lens_k": cu_seqlens,
                "max_length_q": max_seqlen,
                "max_length_k": max_seqlen,
            }
        logits = self.language_model(
            inputs_embeds=self.embed(input_ids, pixel_values, image_positions, feature_rows, feature_weights),
            attention_mask=attention_mask,
            # With a cache transformers treats a packed row as one long sequence, and samples attend to each other.
            use_cache=False,
            # Only positions with a target, through the model's own head (some families scale the logits of lm_head).
            logits_to_keep=logit_positions,
            **packing,
        ).logits
        losses = token_losses(logits, targets)
        return losses if reduction == "none" else losses.sum()

    def gradient_checkpointing_enable(self, share: float = 1.0) -> None:
        """Recompute layers of the language model in backward instead of keeping their activations.

        share: of the layers, spread evenly over the model: 0.5 is every other one.
        """
        model = self.language_model  # transformers 5.23 renamed the method and warns of the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        layers = [module for module in self.language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = int((number + 1) * share) > int(number * share)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy in fp32, 0 where the target is IGNORE_INDEX: [B, K, V], [B, K] -> [B, K]."""
    shape, logits, targets = targets.shape, logits.flatten(0, 1), targets.flatten()
    rows = max(1, LOGITS_IN_FP32_AT_ONCE // logits.shape[-1])
    if len(logits) <= rows:
        return _cross_entropy(logits, targets).view(shape)
    pieces = zip(logits.split(rows), targets.split(rows), strict=True)
    recompute = functools.partial(checkpoint, _cross_entropy, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([recompute(*piece) for piece in pieces]).view(shape)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # The one place that sees the logits in fp32: where another term of the loss would go.
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")


def _dtype(module: nn.Module, default: torch.Tensor) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), default.dtype)
