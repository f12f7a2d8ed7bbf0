"""Held-out bits per byte of `csat lm` with full attention and with both causal forms, equal parameters, steps and seed.

The text is real and on every machine that has Python: the topics of its reference manual that `help()` shows
(`pydoc_data`), joined in the order of their names. Each form is trained in a process of its own, one after the other;
what a step takes is not compared here.

    python benchmarks/language_model.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from machine import header

from csat_ext.language import config as configs

HERE = Path(__file__).parent
CONFIG = HERE.parent / "examples" / "language_model" / "config.yaml"
TEXT = f"topics of the reference manual of Python {sys.version_info.major}.{sys.version_info.minor}"


def trained(form: str, text: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The `evaluation.json` of one run."""
    output = arguments.runs / form
    overrides = [f"model.attention={form}", f"data.text={text.resolve()}", f"train.seed={arguments.seed}"]
    command = [sys.executable, "-m", "csat_ext.cli", "lm", "--config", CONFIG, "--output", output, *overrides]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([*map(str, command), "--steps", str(arguments.steps)], check=True, env=environment)
    result: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/language"), help="folder of the runs, new ones")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "language_model.json")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    text = arguments.runs / "topics.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)))
    results = {form: trained(form, text, arguments) for form in configs.ATTENTION}
    config = configs.to_dict(configs.load(CONFIG))
    del config["data"]["text"], config["model"]["attention"]  # those of the runs
    first = results["sdpa"]
    result = {
        "machine": header(),
        "text": {"name": TEXT, **first["bytes"]},
        "settings": {
            "steps": arguments.steps,
            "seed": arguments.seed,
            "model": config["model"],
            "data": config["data"],
        },
        "bits per byte of single bytes": round(first["bits per byte of single bytes"], 3),
        "runs": {
            form: {"parameters": own["parameters"], "bits per byte": round(own["bits per byte"], 3)}
            for form, own in results.items()
        },
    }
    print(json.dumps(result["runs"], indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
