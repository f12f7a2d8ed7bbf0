"""The text of `python -m csat_ext info`: what to paste into an issue."""

from __future__ import annotations


def info() -> str:
    """`build_facts()` as aligned lines; the reason in one line when the compiled library is missing."""
    try:
        from csat_ext._library import build_facts
    except ImportError as error:
        return str(error)
    facts = build_facts()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
