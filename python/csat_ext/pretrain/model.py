"""A small vision-language model: image tower, text tower, caption decoder (BLIP, Li et al. 2022; CoCa, Yu et al. 2022).

Every attention is built as `SDPAttention`, softmax attention over all keys; `csat_ext.deepspeed.apply` replaces those
that the DeepSpeed JSON names. Sites: `vision.blocks.*.attn`, `text.blocks.*.attn`, `decoder.blocks.*.cross_attn`, and
`decoder.blocks.*.self_attn`, which is causal and therefore stays as it is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from csat_ext.pretrain.config import ModelConfig, TrainConfig

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's ceiling of the inverse temperature


class Losses(NamedTuple):
    """Scalars of one batch: the weighted sum, and its two terms."""

    total: Tensor
    contrastive: Tensor
    caption: Tensor


class SDPAttention(nn.Module):
    """Multi-head softmax attention with the parameter names and the signature of `csat_ext.CSATAttention`.

    Args:
        embed_dim: width of queries and outputs, a multiple of `num_heads`.
        num_heads: number of heads.
        kv_dim: width of `context`; `embed_dim` where None.
        causal: position i attends to positions <= i only.
    """

    def __init__(self, embed_dim: int, num_heads: int, kv_dim: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, causal
        self.kv_dim = embed_dim if kv_dim is None else kv_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(self.kv_dim, embed_dim)
        self.v_proj = nn.Linear(self.kv_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """x (B, Nq, embed_dim), context (B, N, kv_dim) or None for x itself, key_mask (B, N) bool, True = keep."""
        context = x if context is None else context
        query, key, value = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if self.causal and mask is not None:  # torch takes a mask or is_causal, not both
            steps = torch.ones(x.shape[1], context.shape[1], dtype=torch.bool, device=x.device).tril()
            mask = mask & steps
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal and mask is None)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class Mlp(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attn = SDPAttention(config.width, config.heads)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), key_mask=key_mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Pre-norm causal self-attention, cross-attention to the visual tokens, MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.width) for _ in range(3))
        self.self_attn = SDPAttention(config.width, config.heads, causal=True)
        self.cross_attn = SDPAttention(config.width, config.heads)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor, visual: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), visual)
        return x + self.mlp(self.norm3(x))


class VisionTower(nn.Module):
    """ViT: image (B, 3, S, S) -> tokens (B, 1 + (S / patch)^2, width), the CLS token first."""

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        if image_size % config.patch_size:
            raise ValueError(f"model.patch_size: {config.patch_size} does not divide data.image_size = {image_size}")
        patches = (image_size // config.patch_size) ** 2
        # A convolution before the patches lets a ViT learn from few steps (Xiao et al. 2021, "Early convolutions").
        half, channels = config.patch_size // 2, config.width // 4
        stem, patch = nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.Conv2d(channels, config.width, half, half)
        self.patch = nn.Sequential(stem, nn.GELU(), patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.empty(1, 1 + patches, config.width))
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch(image.to(self.cls.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(image.shape[0], -1, -1), patches], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextTower(nn.Module):
    """Bidirectional transformer: token embeddings (B, L, width) -> mean over the kept tokens (B, width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, token_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, token_mask)
        weight = token_mask.to(x.dtype).unsqueeze(-1)
        return (self.norm(x) * weight).sum(1) / weight.sum(1).clamp_min(1)


class CaptionDecoder(nn.Module):
    """Causal transformer: token embeddings (B, L, width), visual tokens (B, N, width) -> (B, L, width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, visual: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, visual)
        return self.norm(x)


class VisionLanguageModel(nn.Module):
    """Contrastive and captioning model; the token embedding is shared by both text stacks and the output layer.

    Args:
        config: sizes.
        image_size: side of the square images, in pixels.
        text_length: longest token sequence.
        vocab_size: number of tokens.
        train: loss weights and label smoothing.
    """

    def __init__(
        self, config: ModelConfig, *, image_size: int, text_length: int, vocab_size: int, train: TrainConfig
    ) -> None:
        super().__init__()
        self.weights = (train.contrastive_weight, train.caption_weight)
        self.label_smoothing = train.label_smoothing
        self.vision = VisionTower(config, image_size)
        self.text = TextTower(config)
        self.decoder = CaptionDecoder(config)
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.text_position = nn.Parameter(torch.empty(1, text_length, config.width))
        self.image_proj = nn.Linear(config.width, config.embed_dim, bias=False)
        self.text_proj = nn.Linear(config.width, config.embed_dim, bias=False)
        # Shape (1,): ZeRO rejects 0-dimensional parameters.
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(config.temperature)))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.token_embedding.weight, self.text_position, self.vision.position):
            nn.init.normal_(table, std=0.02)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, S, S) -> unit embedding (B, embed_dim) float32 and visual tokens (B, N, width)."""
        visual = self.vision(image)
        return F.normalize(self.image_proj(visual[:, 0]).float(), dim=-1), visual

    def encode_text(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """tokens (B, L) int64, token_mask (B, L) bool -> unit embedding (B, embed_dim) float32."""
        return F.normalize(self.text_proj(self.text(self._embed(tokens), token_mask)).float(), dim=-1)

    def next_token_logits(self, tokens: Tensor, visual: Tensor) -> Tensor:
        """Caption prefix (B, L) int64 and visual tokens (B, N, width) -> logits (B, L, vocab) of each next token."""
        return self._logits(self.decoder(self._embed(tokens), visual))

    def forward(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> Losses:
        """Both losses of this rank's batch; their mean over ranks is the loss of the global batch."""
        image_embedding, visual = self.encode_image(image)
        contrastive = self._contrastive(image_embedding, self.encode_text(tokens, token_mask))
        kept = token_mask[:, 1:]
        hidden = self.decoder(self._embed(tokens[:, :-1]), visual)[kept]  # padding never meets the vocabulary
        caption = self._caption(self._logits(hidden), tokens[:, 1:][kept])
        return Losses(self.weights[0] * contrastive + self.weights[1] * caption, contrastive, caption)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.text_position[:, : tokens.shape[1]]

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.token_embedding.weight)

    def _contrastive(self, image: Tensor, text: Tensor) -> Tensor:
        """InfoNCE both ways (CLIP, Radford et al. 2021) of the local rows against the columns of every rank."""
        rows = torch.arange(image.shape[0], device=image.device)
        all_image, all_text = image, text
        if _world_size() > 1:
            all_image, all_text = _Gather.apply(torch.cat([image, text], dim=-1)).chunk(2, dim=-1)
            rows = rows + dist.get_rank() * image.shape[0]
        scale = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T
        return 0.5 * (F.cross_entropy(to_text, rows) + F.cross_entropy(to_image, rows))

    def _caption(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of logits (K, vocab): the local sum over the ranks' mean number of kept tokens."""
        loss = F.cross_entropy(logits.float(), target, reduction="sum", label_smoothing=self.label_smoothing)
        count = torch.full((), float(target.numel()), device=target.device)
        if _world_size() > 1:
            dist.all_reduce(count)
            count = count / _world_size()
        return loss / count.clamp_min(1)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """(B, E) of every rank stacked to (world B, E); a row's gradient is the sum over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
