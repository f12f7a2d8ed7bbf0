"""What a user would pick instead of CSAT, each written from its paper, with a test of its defining property.

One interface: a module takes q, k, v (B, H, N, D) and an optional key_mask (B, N) bool, True = keep, and returns
(B, H, N, D). A baseline is made for a `Budget` by its name in `BASELINES`; `parameters` counts what it learns.
The packages of these methods on the index have not been kept up; hence formulas after the papers. They were written
down from memory, without the papers at hand, so sections and equations are not cited by number; the tests hold each to
the property that defines it. What is said of fairseq's Linformer and of the Nystromformer authors' code was read there.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .budget import Budget
from .composed import ComposedStock
from .linformer import Linformer
from .longformer import SlidingWindow
from .nystromformer import Nystromformer
from .performer import Performer
from .sdpa import FullAttention

BASELINES: dict[str, Callable[[Budget], nn.Module]] = {
    "sdpa": lambda budget: FullAttention(),
    "sdpa flash": lambda budget: FullAttention("flash"),
    "sdpa efficient": lambda budget: FullAttention("efficient"),
    "sdpa math": lambda budget: FullAttention("math"),
    "linformer": Linformer,
    "performer": Performer,
    "longformer": SlidingWindow,
    "nystromformer": Nystromformer,
    "stock composition": ComposedStock,
}


def parameters(module: nn.Module) -> int:
    """Numbers that the module learns."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
