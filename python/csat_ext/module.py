"""`CSATAttention`: multi-head self- and cross-attention whose keys and values are measured, attended and decoded."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from csat_ext import philox
from csat_ext.cache import CSATCache
from csat_ext.config import CSATConfig
from csat_ext.dictionaries import dictionary
from csat_ext.functional import (
    CausalState,
    Decoder,
    LinearDecoder,
    Phi,
    SparseDecoder,
    autocasts,
    checked_mask,
    continue_causal,
    measure,
    no_autocast,
    recover,
)
from csat_ext.implicit import IMPLICIT, ImplicitMeasurement, implicit_measurement
from csat_ext.measurements import ENSEMBLES, Measurement, Part, columns_by_position, measurement
from csat_ext.philox import GENERATOR_VERSION
from csat_ext.reference.attention import fakes_tensors, has_values
from csat_ext.reference.lista import (
    DecoderWeights,
    analytic_weight,
    coupled_start,
    coupled_weights,
    lipschitz_constant,
)

_INDEPENDENT_PHI_V = 1 << 32
"""Offset of the seed of Phi_V when K and V do not share one (config seeds are used as they are for Phi_K)."""

_FEATURE_SENSING = 2 << 32
"""Offset of the seed that F starts from."""

_CONTENT = 3 << 32
"""Offset of the seed that W of phi_s = softmax(W k_s) starts from."""


class Parallel(Protocol):
    """How several ranks compute one layer together: `CSATCore.parallel`, set by `csat_ext.parallel`."""

    def heads(self, count: int) -> range:
        """Which of ``count`` heads, those of the queries or of the keys, this rank computes."""

    def own(self, weight: Tensor) -> Tensor:
        """The rows of a weight with a leading head axis that belong to this rank's heads."""

    def attend(
        self, core: CSATCore, queries: Callable[[], Tensor], k: Tensor, v: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        """What `CSATCore.attend` returns, of this rank's tokens and heads; the queries are projected when called."""


class CSATCore(nn.Module):
    """Attention over m measurements of the keys and values (`csat_attention`): what lies between the projections of an
    attention module, of ours (`CSATAttention`) or of another framework (`csat_ext.convert`).

    A fixed Phi is never stored: the state dict holds ``measurement_key`` = (generator version, ensemble, seed, layer)
    as int64, which a cast to bfloat16 leaves alone, and Phi is made in float32 from it, for any length and on any
    device; a fixed Phi of `csat_ext.implicit.IMPLICIT` without a grid is not made at all (`ImplicitMeasurement`). Its
    parameters, each with a leading axis of H heads or Hk key heads (no parameter is 0-dimensional):

    - ``gain`` (H,): factor on the score scale;
    - ``phi`` (Hk, M, N), ``score_bias`` (Hk, M): with ``config.learned``; N is the block size of the block form;
    - ``content_weight`` (Hk, M, D): W of the prefix form with ``config.content``;
    - ``feature_sensing`` (H, R, Dv): with ``config.feature_rank``; random orthonormal rows until `calibrate`, to be
      called once before training, puts the principal components in their place;
    - ``threshold`` (H, T, P), ``step`` (H, T) and the weights of the decoder: ``decoder_w`` (H, R, P) of the coupled
      form, ``decoder_s`` (H, T, P, P) and ``decoder_b`` (H, T, P, R) of the untied one, ``linear_weight`` (H, R, Dv)
      of the control.

    ``parallel``, None by default, spreads the layer over ranks: by tokens or by heads (`csat_ext.parallel`); not the
    causal forms.

    Args:
        num_heads: H.
        head_dim: width of a head.
        config: what is computed.
        kv_heads: Hk, heads of the keys and values, a divisor of H (grouped queries); H when absent.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
    """

    measurement_key: Tensor

    def __init__(self, num_heads: int, head_dim: int, config: CSATConfig, kv_heads: int | None = None) -> None:
        super().__init__()
        if not isinstance(config, CSATConfig):
            raise TypeError(f"config must be a CSATConfig (CSATConfig.from_dict makes one), got {config!r}")
        kv_heads = num_heads if kv_heads is None else kv_heads
        _check_counts(num_heads=num_heads, head_dim=head_dim, kv_heads=kv_heads)
        if num_heads % kv_heads:
            raise ValueError(f"kv_heads = {kv_heads} must divide num_heads = {num_heads}")
        self.num_heads, self.head_dim, self.kv_heads, self.config = num_heads, head_dim, kv_heads, config
        key = (GENERATOR_VERSION, _ensemble_code(config.ensemble), config.seed, config.layer)
        self.register_buffer("measurement_key", torch.tensor(key, dtype=torch.int64))
        self._fixed: dict[tuple[Any, ...], Any] = {}
        self._captured: set[tuple[Any, ...]] = set()
        self._key_seen: tuple[int, int] | None = None
        self._parallel: Parallel | None = None
        self._create_parameters()

    # ---- what this rank computes ------------------------------------------------------------------------------------

    @property
    def parallel(self) -> Parallel | None:
        return self._parallel

    @parallel.setter
    def parallel(self, parallel: Parallel | None) -> None:
        if parallel is not None and self.config.causal is not None:
            raise ValueError(f"a layer with causal = {self.config.causal!r} runs on one rank; accepted: causal=None")
        self._parallel = parallel
        self._fixed.clear()  # made for other heads

    @property
    def heads(self) -> range:
        """The heads of the queries that are computed here."""
        return range(self.num_heads) if self._parallel is None else self._parallel.heads(self.num_heads)

    @property
    def key_heads(self) -> range:
        """The heads of the keys, those of Phi, that are computed here."""
        return range(self.kv_heads) if self._parallel is None else self._parallel.heads(self.kv_heads)

    def _own(self, weight: Tensor) -> Tensor:
        return weight if self._parallel is None else self._parallel.own(weight)

    # ---- parameters -------------------------------------------------------------------------------------------------

    def _create_parameters(self) -> None:
        config, heads = self.config, self.num_heads
        if config.gain:
            self.gain = nn.Parameter(torch.ones(heads))
        if config.learned:
            assert config.length is not None
            start = self._draw(config.length, torch.device("cpu"), None)
            self.phi = nn.Parameter(start.phi.expand(self.kv_heads, -1, -1).clone())
            bias = torch.zeros(1, config.measurements) if start.score_bias is None else start.score_bias
            self.score_bias = nn.Parameter(bias.expand(self.kv_heads, -1).clone())
        if config.causal == "prefix" and config.content:
            self.content_weight = nn.Parameter(self._random_content())
        if config.feature_rank is not None:
            if config.feature_rank > self.head_dim:
                raise ValueError(f"feature_rank = {config.feature_rank} exceeds the head width {self.head_dim}")
            self.feature_sensing = nn.Parameter(self._random_rows(config.feature_rank))
        if config.dictionary == "learned" and config.decoder not in ("none", "linear"):
            psi = dictionary("learned", self.head_dim, config.atoms, seed=config.seed)
            self.psi = nn.Parameter(psi.expand(heads, -1, -1).clone())
        self._create_decoder()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every parameter and the `measurement_key` as construction makes them: after `to_empty` of a layer that was
        made on the meta device, sharded or not."""
        with torch.device("cpu"):
            fresh = CSATCore(self.num_heads, self.head_dim, self.config, self.kv_heads)
        for name, start in (*fresh.named_parameters(), *fresh.named_buffers()):
            own = getattr(self, name)
            if hasattr(own, "device_mesh"):  # a DTensor of FSDP2
                from torch.distributed.tensor import distribute_tensor

                start = distribute_tensor(start.detach().to(own.device), own.device_mesh, own.placements)
            own.copy_(start)
        self._fixed.clear()

    def _random_content(self) -> Tensor:
        """(Hk, M, D), entries N(0, 1 / D): logits that spread as the keys' features do."""
        head, row, feature = (torch.arange(n) for n in (self.kv_heads, self.config.measurements, self.head_dim))
        place = head[:, None, None], row[:, None], feature
        words = philox.philox_bits(self.config.seed + _CONTENT, self.config.layer, *place)
        return (philox.normal(words) * self.head_dim**-0.5).float()

    def _random_rows(self, rank: int) -> Tensor:
        """(H, R, Dv), orthonormal rows: no coordinate is preferred, so that F Psi has no zero column."""
        seed = self.config.seed + _FEATURE_SENSING
        rows = measurement("gaussian", rank, self.head_dim, seed=seed, layer=self.config.layer, heads=self.num_heads)
        return torch.linalg.qr(rows.phi.mT).Q.mT.contiguous()

    def _create_decoder(self) -> None:
        config, heads, rank = self.config, self.num_heads, self.config.feature_rank or self.head_dim
        if config.decoder == "none":
            return
        if config.decoder == "linear":
            start = torch.eye(rank, self.head_dim) if config.feature_rank is None else self.feature_sensing.detach()
            self.linear_weight = nn.Parameter(start.expand(heads, -1, -1).clone())
            return
        w, sensing, _, _ = coupled_start(self._sensing_matrix().detach().float(), 0.0, config.iterations)
        atoms, layers = sensing.shape[-1], config.iterations
        self.threshold = nn.Parameter(torch.full((heads, layers, atoms), config.threshold))
        if config.decoder == "lista_untied":
            s = torch.eye(atoms) - w.mT @ sensing
            self.decoder_s = nn.Parameter(s.unsqueeze(1).repeat(1, layers, 1, 1))
            self.decoder_b = nn.Parameter(w.mT.unsqueeze(1).repeat(1, layers, 1, 1))
            return
        if config.decoder == "lista":
            self.decoder_w = nn.Parameter(w.clone())
        if config.decoder in ("lista", "alista"):
            self.step = nn.Parameter(torch.ones(heads, layers))

    def _psi(self) -> Tensor:
        """The dictionary, (1 or H, Dv, P)."""
        config, dtype, device = self.config, self._decoder_dtype, self.measurement_key.device
        if config.dictionary == "learned":
            return self._wide(self._own(self.psi))

        def make() -> Tensor:
            kind, seed = config.dictionary, config.seed
            return dictionary(kind, self.head_dim, config.atoms, seed=seed, dtype=dtype, device=device).unsqueeze(0)

        return self._remember(("psi", dtype, device), make)

    @property
    def _decoder_dtype(self) -> torch.dtype:
        own = next(self.parameters(recurse=False), None)
        return torch.float64 if own is not None and own.dtype == torch.float64 else torch.float32

    def _wide(self, weight: Tensor) -> Tensor:
        return weight.to(self._decoder_dtype)

    def _sensing_matrix(self) -> Tensor:
        """A = F Psi, (H, R, P)."""
        psi, f = self._psi().expand(len(self.heads), -1, -1), self._f()
        return psi if f is None else self._wide(f) @ psi

    def decoder(self) -> Decoder | None:
        """The decoder at the parameters' present values, or None; its weights are in float32 (float64 for float64),
        under autocast too."""
        with no_autocast(self.measurement_key.device.type):
            return self._decoder()

    def _decoder(self) -> Decoder | None:
        config = self.config
        if config.decoder == "none":
            return None
        if config.decoder == "linear":
            return LinearDecoder(self._own(self.linear_weight))
        # The forward clamps at 0, the backward passes: a threshold pushed below 0 can come back.
        raw = self._wide(self._own(self.threshold))
        theta = raw + (raw.clamp(min=0) - raw).detach()
        s, b, theta, psi, step = (weight.contiguous() for weight in self._decoder_weights(theta))
        identity = config.dictionary == "identity" and config.atoms in (None, self.head_dim)
        return SparseDecoder(s, b, theta, None if identity else psi, step, check_values=False)

    def _decoder_weights(self, theta: Tensor) -> DecoderWeights:
        config, a = self.config, self._sensing_matrix()
        psi = self._psi().expand(len(self.heads), -1, -1)
        ones = torch.ones_like(theta[..., 0])
        if config.decoder == "lista_untied":
            s, b = self._wide(self._own(self.decoder_s)), self._wide(self._own(self.decoder_b))
            return DecoderWeights(s, b, theta, psi, ones)
        w = self._wide(self._own(self.decoder_w)) if config.decoder == "lista" else self._unlearned_weight(a)
        step = ones if config.decoder == "ista" else self._wide(self._own(self.step))
        return coupled_weights(w, a, theta, step, psi)

    def _unlearned_weight(self, a: Tensor) -> Tensor:
        """W of ISTA, A / L, and of ALISTA, the analytic one over L, so that step 1 is ISTA's; computed once where A is
        fixed."""

        def make() -> Tensor:
            if self.config.decoder == "ista":
                return a / lipschitz_constant(a)[:, None, None]
            with torch.no_grad():
                return analytic_weight(a) / lipschitz_constant(a)[:, None, None]

        if self.config.dictionary == "learned" or self.config.feature_rank is not None:
            return make()
        return self._remember(("w", a.dtype, a.device), make)

    # ---- measurement ------------------------------------------------------------------------------------------------

    def _remember(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A fixed tensor, made once for every key; made anew while a compiler traces: its graph must not depend on a
        length. What a captured CUDA graph reads stays for good: the graph knows its address alone."""
        if not has_values(self.measurement_key) or fakes_tensors():
            return make()
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        kept = self._fixed.pop(key, None)
        if kept is None:
            if capturing:
                raise RuntimeError(
                    f"{key[0]} of {type(self).__name__} is made at the first call of a length, but a CUDA graph is "
                    "being captured: call the module once with inputs of these sizes before the capture"
                )
            passing = [other for other in list(self._fixed) if other not in self._captured]
            for other in passing[:-15]:  # many lengths in one run: keep memory bounded
                self._fixed.pop(other, None)
            with torch.inference_mode(False), torch.no_grad():  # training may need it after an evaluation
                kept = make()
        self._fixed[key] = kept  # the latest used is the last; other threads at worst make it once more
        if capturing:
            self._captured.add(key)
        return kept

    def _draw(
        self,
        n: int,
        device: torch.device,
        key_mask: Tensor | None,
        part: Part | None = None,
        seed_offset: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Measurement:
        return measurement(
            self.config.ensemble,
            self.config.measurements,
            n,
            dtype=dtype,
            device=device,
            grid=self.config.grid,
            key_mask=key_mask,
            part=part,
            **self._draw_options(seed_offset),
        )

    def _draw_options(self, seed_offset: int) -> dict[str, Any]:
        config = self.config
        return {
            "seed": config.seed + seed_offset,
            "layer": config.layer,
            "heads": self.kv_heads,
            "anchors": config.anchors,
            "head_shift": "head_shift" in ENSEMBLES[config.ensemble].options and config.head_shift,
        }

    def measurement(
        self, n: int, device: torch.device, key_mask: Tensor | None = None, part: Part | None = None
    ) -> Measurement:
        """Phi (and the score bias) that keys of length n meet, in float32; with a key mask one for each batch
        element; with a part its columns and heads."""
        self._follow_key()
        if self.config.learned:
            phi = self._own(self.phi)
            columns = phi if part is None else phi[..., part.start : part.stop].contiguous()
            return Measurement(columns, self._own(self.score_bias))
        return self._drawn(n, device, key_mask, part, 0, torch.float32)

    def _drawn(
        self,
        n: int,
        device: torch.device,
        key_mask: Tensor | None,
        part: Part | None,
        seed_offset: int,
        dtype: torch.dtype,
    ) -> Measurement:
        if key_mask is not None:
            return self._draw(n, device, key_mask, part, seed_offset, dtype)
        key = ("phi", seed_offset, n, device, part, dtype)
        return self._remember(key, lambda: self._draw(n, device, None, part, seed_offset, dtype))

    @property
    def _has_matrix(self) -> bool:
        """Whether the forward pass multiplies by a Phi in memory."""
        config = self.config
        return config.learned or config.grid is not None or config.ensemble not in IMPLICIT

    def _implicit(
        self, n: int, device: torch.device, key_mask: Tensor | None, seed_offset: int = 0
    ) -> ImplicitMeasurement:
        def make() -> ImplicitMeasurement:
            options = self._draw_options(seed_offset)
            config = self.config
            return implicit_measurement(
                config.ensemble, config.measurements, n, device=device, key_mask=key_mask, **options
            )

        return make() if key_mask is not None else self._remember(("implicit", seed_offset, n, device), make)

    def _phis(
        self, n: int, k: Tensor, key_mask: Tensor | None, part: Part | None
    ) -> tuple[Phi, Phi | None, Tensor | None]:
        """Phi_K, Phi_V (None: Phi_K) and the score bias. A part of an implicit one has a matrix, as exact as that."""
        shared, device = self.config.share_kv, k.device
        if part is None and not self._has_matrix:
            implicit = self._implicit(n, device, key_mask)
            of_v = None if shared else self._implicit(n, device, key_mask, _INDEPENDENT_PHI_V)
            return implicit, of_v, implicit.score_bias
        if self.config.learned:
            drawn = self.measurement(n, device, key_mask, part)
            return drawn.phi, None, drawn.score_bias
        dtype = torch.float64 if k.dtype == torch.float64 and not self._has_matrix else torch.float32
        drawn = self._drawn(n, device, key_mask, part, 0, dtype)
        phi_v = None if shared else self._drawn(n, device, key_mask, part, _INDEPENDENT_PHI_V, dtype).phi
        bias = drawn.score_bias
        return drawn.phi, phi_v, bias if bias is None else bias.float()  # as an implicit one has it

    def measured(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None, n: int, part: Part | None = None, sensed: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kc, Vc (F applied unless ``sensed=False``) and the score bias of `functional.measure` from the keys and
        values (B, Hk, N, D).

        With a part they are those of its heads and tokens out of n; measurements of the parts of one sequence add up to
        those of the whole, and the bias is that of the whole already.
        """
        config, f = self.config, self._f() if sensed else None
        if key_mask is not None:
            checked_mask(key_mask, k)
        if config.learned and n != config.length:
            raise ValueError(
                f"a learned Phi takes keys of length {config.length}, got {n}; learned=False takes any length"
            )
        if n <= config.measurements and not config.learned:
            if not config.exact_when_short:
                raise ValueError(
                    f"keys of length {n} are no longer than the {config.measurements} measurements "
                    "and exact_when_short is False"
                )
            return self._exact(k, v, key_mask, n, part, f)
        phi_k, phi_v, bias = self._phis(n, k, key_mask, part)
        if not (config.log_mass or config.learned or key_mask is not None):
            bias = None
        if bias is not None and not (config.log_mass or config.learned):
            bias = torch.zeros_like(bias).masked_fill(bias == -torch.inf, -torch.inf)
        heads, whole = len(self.heads), None
        if bias is not None and bias.shape[-2] not in (1, heads):
            bias = self._per_query_head(bias, axis=-2)
        if part is not None and config.learned and key_mask is not None:
            whole = self._own(self.phi).unsqueeze(0), part.all_columns(key_mask)
        return measure(k, v, phi_k, phi_v, f, bias, key_mask, heads=heads, renormalise=config.learned, whole=whole)

    def _exact(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None, n: int, part: Part | None, f: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Phi = I: the tokens are their own measurements, masked ones zeroed and silenced."""
        bias = None
        if key_mask is not None:
            keep = key_mask[:, None, :, None]
            k, v = torch.where(keep, k, 0), torch.where(keep, v, 0)
            mask = key_mask if part is None else part.all_columns(key_mask)
            bias = torch.zeros(mask.shape, device=k.device).masked_fill(~mask, -torch.inf).unsqueeze(1)
        if part is not None:
            k, v = (nn.functional.pad(t, (0, 0, part.start, n - part.stop)) for t in (k, v))
        if f is None:
            return k, v, bias
        k, v = self._per_query_head(k), self._per_query_head(v)
        return k, v @ f.to(v.dtype).mT, bias

    def _per_query_head(self, x: Tensor, axis: int = 1) -> Tensor:
        """One entry for every query head along an axis that has one for every key head."""
        groups = self.num_heads // self.kv_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=axis)

    def _f(self) -> Tensor | None:
        return None if self.config.feature_rank is None else self._own(self.feature_sensing)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Attend with the heads of q over the measurements of k and v.

        Args:
            q: (B, H, Nq, D).
            k, v: (B, Hk, N, D).
            key_mask: (B, N) bool, True = keep.

        Returns:
            (B, Nq, H D): the rows of all heads side by side.

        Raises:
            TypeError, ValueError: naming the argument, what came and what is accepted.
        """
        return self._attend(lambda: q, k, v, key_mask)

    def _attend(self, queries: Callable[[], Tensor], k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        self._follow_key()
        if self.config.causal is not None:
            rows, _ = self._continue(None, 0, queries(), k, v, key_mask, self.decoder())
            return rows.transpose(1, 2).flatten(2)
        if self._parallel is not None:
            return self._parallel.attend(self, queries, k, v, key_mask)
        return self.rows(queries(), *self.measured(k, v, key_mask, k.shape[2]))

    def _continue(
        self,
        state: CausalState | None,
        length: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        decoder: Decoder | None,
    ) -> tuple[Tensor, CausalState]:
        """The rows (B, H, n, Dv) of tokens that come after ``length`` others, and the state after them."""
        config = self.config
        if config.gain:
            q = q * self.gain[:, None, None].to(q.dtype)
        options: dict[str, Any] = {"decoder": decoder, "feature_sensing": self._f(), "key_mask": key_mask}
        if config.causal == "prefix":
            signed = not (config.content or ENSEMBLES[config.ensemble].averaging)
            phi = self._content(k, key_mask) if config.content else self._columns(length, k)
            return continue_causal(state, q, k, v, phi, causal="prefix", signed=signed, **options)
        size = config.block_size
        assert size is not None

        def measure_blocks(k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return self.measured(k, v, keep, size, sensed=False)

        window = config.window_blocks
        return continue_causal(
            state, q, k, v, measure_blocks, causal="block", block_size=size, window_blocks=window, **options
        )

    def _content(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """phi_s = softmax(W k_s), (B, Hk, n, M), float32 (float64)."""
        if key_mask is not None:
            k = k.masked_fill(~checked_mask(key_mask, k)[:, None, :, None], 0)
        with no_autocast(k.device.type):
            dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
            return torch.softmax(k.to(dtype) @ self.content_weight.to(dtype).mT, -1)

    def _columns(self, start: int, k: Tensor) -> Tensor:
        """phi of n tokens from ``start`` on by their positions, (Hk, n, M)."""
        c, stop = self.config, start + k.shape[2]

        def make() -> Tensor:
            return columns_by_position(
                c.ensemble, c.measurements, start, stop,
                seed=c.seed, layer=c.layer, heads=self.kv_heads, device=k.device,
            )  # fmt: skip

        return self._remember(("columns", stop, k.device), make) if start == 0 else make()

    @torch.no_grad()
    def new_cache(self) -> CSATCache:
        """A cache for `CSATAttention.forward`, or by its own `step` for the heads of q, k, v; its decoder is that of
        the parameters at its first tokens. Raises ValueError for a layer that is not causal."""
        c = self.config
        if c.causal is None:
            raise ValueError("causal = None came; a cache is for causal='block' or 'prefix'")
        made: list[Decoder | None] = []  # in a forward pass, where the parameters of a sharded layer are whole

        def continuation(
            state: CausalState | None, length: int, q: Tensor, k: Tensor, v: Tensor, _: object, mask: Tensor | None
        ) -> tuple[Tensor, CausalState]:
            self._follow_key()
            if not made:
                made.append(self.decoder())
            return self._continue(state, length, q, k, v, mask, made[0])

        sizes = {"measurements": c.measurements, "block_size": c.block_size, "window_blocks": c.window_blocks}
        return CSATCache.over(c.causal, continuation, self, ensemble=c.ensemble, content=c.content, **sizes)

    def rows(self, q: Tensor, kc: Tensor, vc: Tensor, bias: Tensor | None) -> Tensor:
        """What `attend` returns, from what `measured` returned."""
        gain = self._own(self.gain)[:, None, None] if self.config.gain else None
        if gain is not None and kc.shape[1] == q.shape[1]:
            kc = kc * gain.to(kc.dtype)
        elif gain is not None:
            q = q * gain.to(q.dtype)
        rows = recover(q, kc, vc, decoder=self.decoder(), score_bias=bias)
        return rows.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def calibrate_values(self, values: Tensor) -> None:
        """Start F at the principal directions of ``values`` (B, Hk, N, D) (random F always lost).

        The decoder that inverts F Psi starts anew at its analytic weights.

        Raises:
            ValueError: the config has no ``feature_rank``, or the layer is spread over ranks.
        """
        if self.config.feature_rank is None:
            raise ValueError("calibrate sets the feature sensing F: the config has feature_rank = None")
        if self._parallel is not None:
            raise ValueError("calibrate needs all tokens and heads: call it before the layer is spread over ranks")
        values = self._per_query_head(values).float().transpose(0, 1).flatten(1, 2)
        _, directions = torch.linalg.eigh(values.mT @ values)
        principal = directions[..., -self.config.feature_rank :].flip(-1).mT
        self.feature_sensing.copy_(principal)
        if self.config.decoder == "linear":
            self.linear_weight.copy_(principal)
        elif self.config.decoder in ("lista", "lista_untied"):
            w, sensing, _, _ = coupled_start(self._sensing_matrix(), 0.0, self.config.iterations)
            if self.config.decoder == "lista":
                self.decoder_w.copy_(w)
            else:
                self.decoder_b.copy_(w.mT.unsqueeze(1).expand_as(self.decoder_b))
                self.decoder_s.copy_(
                    (torch.eye(sensing.shape[-1], device=w.device) - w.mT @ sensing)
                    .unsqueeze(1)
                    .expand_as(self.decoder_s)
                )

    # ---- state ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "measurement_key")
        if stored is not None:
            self._take_key(prefix, stored)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_key(self, prefix: str, key: Tensor) -> None:
        """The seed of the checkpoint wins over that of the config: the weights were trained with its Phi."""
        version, ensemble, seed, layer = (int(v) for v in key)
        if version != GENERATOR_VERSION or ensemble != _ensemble_code(self.config.ensemble):
            raise ValueError(
                f"{prefix}measurement_key: the checkpoint was made with generator version {version} and ensemble "
                f"{_ensemble_name(ensemble)!r}; this module has version {GENERATOR_VERSION} "
                f"and {self.config.ensemble!r}. After to_empty, reset_parameters() comes first"
            )
        if (seed, layer) != (self.config.seed, self.config.layer):
            self.config = self.config.replace(seed=seed, layer=layer)
            self._fixed.clear()

    def _follow_key(self) -> None:
        """Takes what a loader that bypasses `load_state_dict` has put into the buffer's place, or on a CPU into it. A
        device is not waited for at every forward pass: DDP writes buffers before each."""
        key = self.measurement_key
        if not has_values(key) or fakes_tensors():
            return
        seen = key.data_ptr(), key._version if key.is_cpu and not key.is_inference() else 0
        if seen != self._key_seen:
            self._take_key("", key)
            self._key_seen = seen

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fixed": {}, "_captured": set(), "_key_seen": None}

    def extra_repr(self) -> str:
        c, width = self.config, self.num_heads * self.head_dim
        return f"{width}, heads={self.num_heads}, m={c.measurements}, ensemble={c.ensemble}, decoder={c.decoder}"


class CSATAttention(CSATCore):
    """Multi-head self- and cross-attention: a `CSATCore` between the projections q_proj, k_proj, v_proj and out_proj.

    Args:
        embed_dim: width of the queries and the output; a multiple of ``num_heads``.
        num_heads: H.
        config: what is computed.
        kv_dim: width of the context of cross-attention; ``embed_dim`` when absent.
        bias: the projections have biases.
        kv_heads: Hk, heads of the keys and values, a divisor of H (grouped queries); H when absent.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        config: CSATConfig,
        kv_dim: int | None = None,
        *,
        bias: bool = True,
        kv_heads: int | None = None,
    ) -> None:
        kv_dim = embed_dim if kv_dim is None else kv_dim
        _check_counts(embed_dim=embed_dim, num_heads=num_heads, kv_dim=kv_dim)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim = {embed_dim} must be a positive multiple of num_heads = {num_heads}")
        super().__init__(num_heads, embed_dim // num_heads, config, kv_heads)
        kv_width = self.kv_heads * self.head_dim
        self._between(
            nn.Linear(embed_dim, embed_dim, bias=bias),
            nn.Linear(kv_dim, kv_width, bias=bias),
            nn.Linear(kv_dim, kv_width, bias=bias),
            nn.Linear(embed_dim, embed_dim, bias=bias),
        )

    def _between(self, q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear, out_proj: nn.Linear) -> None:
        self.embed_dim, self.kv_dim = q_proj.in_features, k_proj.in_features
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj

    @classmethod
    def from_projections(
        cls,
        q_proj: nn.Linear,
        k_proj: nn.Linear,
        v_proj: nn.Linear,
        out_proj: nn.Linear,
        *,
        num_heads: int,
        config: CSATConfig,
    ) -> CSATAttention:
        """An attention around projections that exist: the very modules, so that their Parameter objects keep what an
        optimizer or ZeRO-3 knows of them. The head width is q_proj's output over ``num_heads``, Hk is k_proj's over it.

        Raises:
            ValueError: widths that do not fit together.
        """
        width, kv_width = q_proj.out_features, k_proj.out_features
        if width % num_heads or kv_width % (width // num_heads):
            raise ValueError(
                f"q_proj gives {width} features and k_proj {kv_width}; accepted: whole heads of one width, "
                f"num_heads = {num_heads}"
            )
        expected = {
            "v_proj": (v_proj, k_proj.in_features, kv_width),
            "out_proj": (out_proj, width, out_proj.out_features),
        }
        for name, (linear, inputs, outputs) in expected.items():
            if (linear.in_features, linear.out_features) != (inputs, outputs):
                raise ValueError(
                    f"{name} maps {linear.in_features} features to {linear.out_features}; "
                    f"accepted: {inputs} to {outputs}"
                )
        head_dim = width // num_heads
        new = cls.__new__(cls)
        CSATCore.__init__(new, num_heads, head_dim, config, kv_width // head_dim)
        new.to(device=q_proj.weight.device, dtype=q_proj.weight.dtype)
        new._between(q_proj, k_proj, v_proj, out_proj)
        return new

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cache: CSATCache | None = None,
    ) -> Tensor:
        """Attend from x to ``context`` (to x itself when absent).

        Args:
            x: (B, Nq, embed_dim).
            context: (B, N, kv_dim); absent where the layer is causal.
            key_mask: (B, N) bool, True = keep.
            cache: of `new_cache`: x are the next tokens, which it takes up; without gradients of the attention.

        Returns:
            (B, Nq, embed_dim).

        Raises:
            TypeError, ValueError: naming the argument, what came and what is accepted.
        """
        if context is not None and self.config.causal is not None:
            raise ValueError("context came, None is accepted: a causal layer attends from x to x itself")
        context = x if context is None else context
        self._check_inputs(x, context)
        k, v = self._heads(self.k_proj(context)), self._heads(self.v_proj(context))
        if cache is not None:
            self._check_cache(cache)
            rows = cache.step(self._heads(self.q_proj(x)), k, v, key_mask=key_mask)
            return self.out_proj(rows.transpose(1, 2).flatten(2))
        # Queries are projected while measurements of other ranks are on their way.
        return self.out_proj(self._attend(lambda: self._heads(self.q_proj(x)), k, v, key_mask))

    def _check_cache(self, cache: CSATCache) -> None:
        if not isinstance(cache, CSATCache):
            raise TypeError(f"cache must be a CSATCache of this layer's new_cache, got {type(cache).__name__}")
        if cache.owner is not self:
            came = "that no layer made" if cache.owner is None else "of another layer"
            accepted = "None, as causal is None" if self.config.causal is None else "what the layer's new_cache made"
            raise ValueError(f"cache came {came}; accepted: {accepted}")

    def _check_inputs(self, x: Tensor, context: Tensor) -> None:
        weight = self.q_proj.weight
        casts = autocasts(weight.device.type) or not weight.is_floating_point()
        for name, tensor, width in (("x", x, self.embed_dim), ("context", context, self.kv_dim)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if not tensor.is_floating_point() or not (casts or tensor.dtype == weight.dtype):
                raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: {weight.dtype}, that of the projections")
            if tensor.dim() != 3 or tensor.shape[-1] != width:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: (batch, tokens, {width})")
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch size {context.shape[0]}, x has {x.shape[0]}: they must agree")

    @torch.no_grad()
    def calibrate(self, context: Tensor) -> None:
        """`calibrate_values` on the values that ``context`` (B, N, kv_dim) gives."""
        self.calibrate_values(self._heads(self.v_proj(context)))


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _ensemble_code(name: str) -> int:
    """A number for the ensemble in `measurement_key` that no reordering of the registry changes."""
    return zlib.crc32(name.encode())


def _ensemble_name(code: int) -> str:
    return {_ensemble_code(name): name for name in ENSEMBLES}.get(code, f"unknown (code {code})")


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, threshold_lr_scale: float = 10.0
) -> list[dict[str, Any]]:
    """Optimizer groups: matrices with weight decay; biases, norms, gains, Phi without; soft thresholds with a rate of
    their own.

    With the common rate thresholds barely move, so theirs is ``threshold_lr_scale`` times ``lr``.
    """
    thresholds, undecayed = set(), set()
    for module in model.modules():
        if isinstance(module, CSATCore):
            thresholds |= {id(p) for p in _named(module, ("threshold",))}
            undecayed |= {id(p) for p in _named(module, ("gain", "step", "phi", "score_bias"))}
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "threshold": []}
    for p in model.parameters():
        if p.requires_grad:
            kind = "threshold" if id(p) in thresholds else "no_decay" if id(p) in undecayed or p.dim() < 2 else "decay"
            groups[kind].append(p)
    rates = {"decay": (lr, weight_decay), "no_decay": (lr, 0.0), "threshold": (lr * threshold_lr_scale, 0.0)}
    return [
        {"params": params, "lr": rates[kind][0], "weight_decay": rates[kind][1], "name": kind}
        for kind, params in groups.items()
        if params
    ]


def _named(module: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Parameter]:
    return (p for name, p in module.named_parameters(recurse=False) if name in names)
