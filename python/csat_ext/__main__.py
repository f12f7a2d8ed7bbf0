"""`python -m csat_ext info`; the other commands are those of `csat`."""

from __future__ import annotations

import sys

from csat_ext.info import info

if sys.argv[1:] != ["info"]:
    sys.exit("usage: python -m csat_ext info    (the training commands: csat --help)")
print(info())
