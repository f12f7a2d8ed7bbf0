"""Compressed Sensing Attention: softmax over m << n measurements of keys and values, a sparse decoder for every row.

Importing registers `torch.ops.csat.*`. The public names below are loaded on first use; in a checkout that was never
built `csat_ext.reference` works all the same, and the rest raises ImportError with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "csat_attention": "functional",
    "csat_attention_varlen": "varlen",
    "measurement_varlen": "varlen",
    "SparseDecoder": "functional",
    "LinearDecoder": "functional",
    "CSATCache": "cache",
    "MeasurementStream": "cache",
    "CSATConfig": "config",
    "CSATAttention": "module",
    "measurement": "measurements",
    "measurement_matrix": "measurements",
    "Measurement": "measurements",
    "ImplicitMeasurement": "implicit",
    "implicit_measurement": "implicit",
    "dictionary": "dictionaries",
    "explain": "info",
}
_MODULES = (
    "cache",
    "checkpoints",
    "config",
    "convert",
    "deepspeed",
    "diagnostics",
    "dictionaries",
    "functional",
    "implicit",
    "measurements",
    "module",
    "ops",
    "parallel",
    "planning",
    "reference",
    "section",
    "varlen",
)

__all__ = ["__version__", *_HOME, *_MODULES]

if TYPE_CHECKING:
    from csat_ext.cache import CSATCache as CSATCache
    from csat_ext.cache import MeasurementStream as MeasurementStream
    from csat_ext.config import CSATConfig as CSATConfig
    from csat_ext.dictionaries import dictionary as dictionary
    from csat_ext.functional import LinearDecoder as LinearDecoder
    from csat_ext.functional import SparseDecoder as SparseDecoder
    from csat_ext.functional import csat_attention as csat_attention
    from csat_ext.implicit import ImplicitMeasurement as ImplicitMeasurement
    from csat_ext.implicit import implicit_measurement as implicit_measurement
    from csat_ext.info import explain as explain
    from csat_ext.measurements import Measurement as Measurement
    from csat_ext.measurements import measurement as measurement
    from csat_ext.measurements import measurement_matrix as measurement_matrix
    from csat_ext.module import CSATAttention as CSATAttention
    from csat_ext.varlen import csat_attention_varlen as csat_attention_varlen
    from csat_ext.varlen import measurement_varlen as measurement_varlen


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"csat_ext.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"csat_ext.{name}")
    raise AttributeError(f"module 'csat_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if importlib.util.find_spec("csat_ext._C") is not None:
    importlib.import_module("csat_ext.ops")
