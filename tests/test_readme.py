"""What the README says is what the result files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_tables_of_the_readme_come_from_the_result_files() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "readme_tables.py", "--check"], check=True)


def test_the_kernels_page_is_what_the_limits_and_the_recorded_registers_say() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "kernel_budgets.py", "page", "--check"], check=True)


def test_the_published_run_beats_chance_clearly() -> None:
    """CSAT's default run: at least ten times chance at R@10, both ways."""
    run = json.loads((ROOT / "benchmarks" / "results" / "pretrain.json").read_text())["runs"]["csat"]
    assert len(run["retrieval"]) == 2
    for direction in run["retrieval"].values():
        assert direction["R@10"]["score"] > 10 * direction["R@10"]["chance"]


def test_no_result_file_names_a_path_of_the_machine() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = path.read_text()
        assert not any(root in text for root in ("/tmp/", "/root/", "/home/", "/work/")), path.name
