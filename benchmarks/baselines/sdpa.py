"""Full attention, softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, equation 1), by torch's kernels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class FullAttention(nn.Module):
    """`scaled_dot_product_attention`, by the backend that torch chooses or by one of `BACKENDS` and no other; with
    `causal` every token attends to those up to itself.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: from torch, where the backend named does not run this problem (on CUDA flash takes no mask). No
            other one runs in its place.
    """

    def __init__(self, backend: str | None = None, causal: bool = False) -> None:
        super().__init__()
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend: {backend!r} came; accepted: {', '.join(BACKENDS)} or None")
        self.backend, self.causal = backend, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if self.causal and mask is not None:  # torch takes a mask or is_causal, not both
            mask = mask & mask.new_ones(q.shape[2], k.shape[2]).tril()
        causal = self.causal and mask is None
        if self.backend is None:
            return scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        with sdpa_kernel(BACKENDS[self.backend]):
            return scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
