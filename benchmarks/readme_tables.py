"""Writes what the result files say: the tables of README.md between `<!-- name -->` and `<!-- /name -->`, and the whole
of docs/results.md with its pictures.

python benchmarks/readme_tables.py            # rewrite
python benchmarks/readme_tables.py --check    # exit 1 where a page and the files disagree (a test runs this)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import machine  # noqa: F401  (csat_ext of a checkout that was never installed)

from csat_ext.bench import report
from csat_ext.bench.tables import README as TABLES
from csat_ext.bench.tables import Results
from csat_ext.bench.tables import table as table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"


def filled(page: str) -> str:
    """The README with every marked table made anew."""
    results = Results(RESULTS, "benchmarks/results")
    for name, make in TABLES.items():
        marked = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if not marked.search(page):
            raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = f"<!-- {name} -->\n{make(results)}\n<!-- /{name} -->"
        page = marked.sub(lambda _, text=text: text, page)  # type: ignore[misc]
    return page


def check() -> None:
    wrong = report.disagreements(Results(RESULTS, "../benchmarks/results"), PAGE, PICTURES)
    if filled(README.read_text()) != README.read_text():
        wrong.append("README.md is not what the result files say")
    if wrong:
        sys.exit("; ".join(wrong) + ": run python benchmarks/readme_tables.py")


def main() -> None:
    if "--check" in sys.argv[1:]:
        return check()
    README.write_text(filled(README.read_text()))
    report.write_page(Results(RESULTS, "../benchmarks/results"), PAGE, PICTURES)


if __name__ == "__main__":
    main()
