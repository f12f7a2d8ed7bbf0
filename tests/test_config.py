"""`CSATConfig` accepts what it documents and refuses everything else by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from csat_ext import CSATConfig


def test_round_trip_through_json() -> None:
    config = CSATConfig(measurements=17, anchors=("first", -1), grid=(4, 4), seed=7, decoder="none")
    assert CSATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values,error,message",
    [
        ({"measurments": 8}, ValueError, "did you mean 'measurements'"),
        ({"measurements": 0}, ValueError, "measurements must be at least 1"),
        ({"measurements": 2.0}, TypeError, "measurements must be an int"),
        ({"measurements": True}, TypeError, "measurements must be an int"),
        ({"measurements": 2}, ValueError, "anchors: 2 exact tokens"),
        ({"ensemble": "pol"}, ValueError, "did you mean 'pool'"),
        ({"decoder": "fista"}, ValueError, "decoder: unknown value"),
        ({"dictionary": "wavelet"}, ValueError, "dictionary: unknown value"),
        ({"anchors": ["middle"]}, ValueError, "'middle' is not a position"),
        ({"anchors": "first"}, TypeError, "anchors must be a tuple"),
        ({"grid": [4, 4, 4, 4]}, ValueError, "grid must have 1 to 3"),
        ({"grid": [4, 4], "ensemble": "srht"}, ValueError, "grid is an option"),
        ({"threshold": -0.1}, ValueError, "threshold must be finite"),
        ({"threshold": float("nan")}, ValueError, "threshold must be finite"),
        ({"learned": True}, ValueError, "learned=True needs length"),
        ({"learned": True, "length": 9, "share_kv": False}, ValueError, "share_kv=False"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\)"),
        ({"seed": 2**63}, ValueError, r"seed must be in \[0, 2\*\*63\)"),
        ({"layer": 2**32}, ValueError, r"layer must be in \[0, 2\*\*32\)"),
        ({"length": 9}, ValueError, "length = 9 belongs to learned=True"),
        ({"ensemble": "learned"}, ValueError, "it needs learned=True and length"),
        ({"decoder": "none", "feature_rank": 4}, ValueError, "feature_rank needs a decoder"),
        ([("measurements", 8)], TypeError, "a mapping is accepted"),
        ({"zzz": 8}, ValueError, "unknown key 'zzz'. Accepted: measurements"),
        ({"head_shift": 1}, TypeError, "head_shift must be a bool"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CSATConfig.from_dict(values)
