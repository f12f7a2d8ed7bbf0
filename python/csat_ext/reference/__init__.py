"""The operator in plain torch, classical solvers and LISTA parametrisations: float64-capable, nothing compiled.

Every kernel agrees with the function of its name here; the formulas stand in these docstrings.
"""

from csat_ext.reference.attention import (
    attend,
    csat_attention,
    decode,
    project,
    project_implicit,
    renormalise_rows,
    soft_threshold,
)
from csat_ext.reference.causal import causal_block, causal_prefix
from csat_ext.reference.lista import (
    DecoderWeights,
    alista_weights,
    analytic_weight,
    coupled_start,
    coupled_weights,
    ista_weights,
    lista_untied,
)
from csat_ext.reference.solvers import Recovery, SolverDecoder, basis_pursuit, fista, ista, omp

__all__ = [
    "DecoderWeights",
    "Recovery",
    "SolverDecoder",
    "alista_weights",
    "analytic_weight",
    "attend",
    "basis_pursuit",
    "causal_block",
    "causal_prefix",
    "coupled_start",
    "coupled_weights",
    "csat_attention",
    "decode",
    "fista",
    "ista",
    "ista_weights",
    "lista_untied",
    "omp",
    "project",
    "project_implicit",
    "renormalise_rows",
    "soft_threshold",
]
