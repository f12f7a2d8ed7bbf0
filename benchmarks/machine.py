"""The header of result files, from its home in the package; in a checkout that was never installed as well."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from csat_ext.bench.machine import header as header
