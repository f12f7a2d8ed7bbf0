"""One CSAT layer on several ranks: by tokens (`shard_sequence`), by heads (`tensor`), under DeepSpeed (`engine`).

- `sequence`: every rank measures its tokens, one all-reduce of (M, D + R) per head. `ulysses`: DeepSpeed's all-to-alls.
- `tensor`: heads over ranks, as a `parallelize_module` plan or rules of DeepSpeed's AutoTP; DTensor inputs.
- `engine`: what DeepSpeed's ZeRO stages do to the gradients of both, corrected or refused.
- `traffic`: bytes on the wire of each, and of ring attention.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from csat_ext.module import Parallel
from csat_ext.parallel.sequence import Group, SequenceParallel, parallelise, process_group, token_mean, token_range
from csat_ext.parallel.ulysses import UlyssesParallel

FORMS: dict[str, Callable[[Group, int | None], Parallel]] = {
    "measurements": SequenceParallel,
    "ulysses": UlyssesParallel,
}

__all__ = ["FORMS", "SequenceParallel", "UlyssesParallel", "shard_sequence", "token_mean", "token_range"]


def shard_sequence(model: nn.Module, group: Group, form: str = "measurements", length: int | None = None) -> list[str]:
    """Spreads the tokens of every CSAT layer of the model over the ranks of a group; the names of the layers.

    Every rank then calls the model with its own consecutive tokens (``x[:, token_range(n, rank, ranks)]``, or any other
    number of them) and their key mask. Losses: `token_mean`, or the sum of the rank's own over the tokens of all ranks.
    Gradients of parameters are to be summed over the group.

    Args:
        group: a ProcessGroup or a one-dimensional DeviceMesh.
        form: "measurements" (`SequenceParallel`) or "ulysses" (`UlyssesParallel`, needs deepspeed).
        length: tokens on all ranks, spread as `token_range` has it; when absent the ranks ask each other at every call.

    Raises:
        ValueError: another form, a model without such a layer, ranks that would measure differently; or as the form.
        TypeError: as `SequenceParallel`.
    """
    if form not in FORMS:
        raise ValueError(f"form: {form!r} came, one of {', '.join(FORMS)} is accepted")
    return parallelise(model, FORMS[form](group, length), process_group(group))
