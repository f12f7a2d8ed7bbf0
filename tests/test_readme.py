"""What the README says is what the result files say."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from csat_ext.config import CSATConfig
from csat_ext.section import CSATSection, read_section

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


def test_every_key_of_the_section_is_explained() -> None:
    page = (ROOT / "docs" / "deepspeed.md").read_text()
    table = {
        key
        for line in page.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    own = {f.name for f in dataclasses.fields(CSATSection)} - {"attention", "auto"}
    assert own | {f.name for f in dataclasses.fields(CSATConfig)} <= table
    section = re.search(r'"csat_attention": (\{.*?\n\})', page, re.DOTALL)
    assert section is not None and read_section({"csat_attention": json.loads(section[1])}).enabled


def test_every_file_that_the_docs_name_is_there() -> None:
    for name in ("docs/deepspeed.md", "examples/README.md", "docs/architecture.md", "docs/results.md", "README.md"):
        text = (ROOT / name).read_text()
        for path in re.findall(r"(?:examples|tests|docs|benchmarks)/[\w/]+\.(?:json|yaml|py|md|slurm|png)", text):
            assert (ROOT / path).is_file(), f"{name} names {path}"


def test_no_result_file_names_a_path_of_the_machine() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = path.read_text()
        assert not any(root in text for root in ("/tmp/", "/root/", "/home/", "/work/")), path.name
