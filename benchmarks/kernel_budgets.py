"""Budgets of the CUDA kernels: registers as compiled, and for the published sizes bytes, FLOPs and the floor time.

python benchmarks/kernel_budgets.py check LIBRARY.so     # no spills, registers as recorded, HMMA and HGMMA, no trap
python benchmarks/kernel_budgets.py record LIBRARY.so    # write the registers, and docs/kernels.md with them; --update:
                                                         # of the kernels in a library of some of them alone
python benchmarks/kernel_budgets.py page [--check]       # docs/kernels.md from the recorded registers

cuobjdump comes with the CUDA toolkit, and with triton, which a CUDA torch brings along. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from machine import header
from readme_tables import table

from csat_ext.bench.work import Sizes, Work, causal_block, work

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "kernel_registers.json"
PAGE = ROOT / "docs" / "kernels.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_90a")  # the last of the kernels that only Hopper runs
# Instructions that a kernel of the family must show.
INSTRUCTIONS = {"_wgmma_kernel": "HGMMA", "_mma_kernel": "HMMA"}
# Their forms: the low 12 bits of the 16 bytes. `cuobjdump -sass`, which says so too, takes two minutes for the library.
OPCODES = {"HMMA": {0x23C}, "HGMMA": {0x9F0, 0xDF0}, "BPT": {0x95C}}

# ---- what the compiler made ------------------------------------------------------------------------------------------


def find_cuobjdump(given: str | None) -> str:
    """The tool given, the toolkit's or triton's. Raises SystemExit if there is none."""
    spec = find_spec("triton")
    triton = [
        Path(p) / "backends" / "nvidia" / "bin" / "cuobjdump" for p in (spec and spec.submodule_search_locations) or ()
    ]
    for candidate in (given, shutil.which("cuobjdump"), *map(str, triton)):
        if candidate and Path(candidate).exists():
            return candidate
    sys.exit("no cuobjdump: pass --cuobjdump, install the CUDA toolkit's, or run where triton is installed")


def kernel_name(mangled: str) -> str:
    """forward_mma<bf16, 64, 0> from the Itanium name of csat::forward_mma_kernel<__nv_bfloat16, 64, 0>."""
    match = re.match(r"_ZN4csat(\d+)", mangled)
    if not match:
        return mangled
    start = match.end()
    name, rest = mangled[start : start + int(match[1])], mangled[start + int(match[1]) :]
    types = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32"}
    arguments = []
    if rest.startswith("I"):
        for part in re.finditer(r"13__nv_bfloat16|6__half|L[ib](\d+)E|f(?=[LE1-9])|N\d?_?|E", rest[1:]):
            if part[0] == "E":
                break
            arguments.append(part[1] if part[1] is not None else types.get(part[0], part[0]))
    return f"{name.removesuffix('_kernel')}<{', '.join(arguments)}>" if arguments else name.removesuffix("_kernel")


def resources(library: Path, tool: str) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> mangled kernel -> registers and bytes of local memory (spills)."""
    text = subprocess.run(
        [tool, "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, dict[str, dict[str, int]]] = {}
    architecture, function = "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            registers, stack, local = map(int, match.groups())
            found.setdefault(architecture, {})[function] = {"registers": registers, "spilled": stack + local}
    return {architecture: kernels for architecture, kernels in found.items() if architecture in ARCHITECTURES}


def opcodes(cubin: bytes) -> Iterator[tuple[str, set[int]]]:
    """(mangled kernel, its opcodes) from the sections .text.* of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        section = cubin[start : cubin.index(b"\0", start)].decode()
        if section.startswith(".text."):
            words = np.frombuffer(cubin, "<u8", length // 8, offset)
            yield section.removeprefix(".text."), set(np.unique(words[::2] & 0xFFF).tolist())


def machine_code(library: Path, tool: str, architecture: str) -> Iterator[tuple[str, set[int]]]:
    """(mangled kernel, its opcodes) of every kernel in a library."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob(f"*.{architecture}.cubin")):
            yield from opcodes(cubin.read_bytes())


def wrong_code(mangled: str, found: set[int]) -> str | None:
    """What is wrong with these opcodes: none of the family's, or a trap, which stands for an instruction of Hopper
    in a file that is compiled for every device (CSAT_SM90 in prims.cuh)."""
    wanted = next((instruction for family, instruction in INSTRUCTIONS.items() if family in mangled), None)
    if wanted and not OPCODES[wanted] & found:
        return f"no {wanted}"
    return "a trap" if OPCODES["BPT"] & found else None


def faults(library: Path, tool: str, recorded: dict[str, dict[str, int]]) -> list[str]:
    """What contradicts the record: spills, more registers, kernels that nobody recorded, wrong instructions."""
    shown = resources(library, tool)
    found = [f"no kernel of {architecture}" for architecture in ARCHITECTURES if architecture not in shown]
    for architecture, kernels in shown.items():
        for mangled, used in kernels.items():
            name, registers = kernel_name(mangled), used["registers"]
            budget = recorded.get(architecture, {}).get(name)
            if used["spilled"]:
                found.append(f"{architecture} {name}: {used['spilled']} bytes spilled")
            if budget is None:
                found.append(f"{architecture} {name}: not recorded")
            elif registers > budget:
                found.append(f"{architecture} {name}: {registers} registers, {budget} recorded")
        code = dict(machine_code(library, tool, architecture))
        found += [f"{architecture} {kernel_name(mangled)}: no machine code" for mangled in kernels.keys() - code.keys()]
        for mangled, used_opcodes in code.items():
            if wrong := wrong_code(mangled, used_opcodes):
                found.append(f"{architecture} {kernel_name(mangled)}: {wrong}")
    return found


# ---- what the sizes ask for ------------------------------------------------------------------------------------------

PAIRS, HEADS, LAYERS = 64, 16, 3  # B H, H, layers of LISTA
TOKENS, WIDTHS, MEASUREMENTS = (4096, 16384, 65536), (64, 128), (128, 256, 512)
TFLOPS, TERABYTES = (
    795.0,
    3.0,
)  # a second: bf16 products and device memory of an H100, as large products and copies reach


# What `project` counts here: k and v in one pass over Phi.
_BOTH = {"project": "measure", "project_backward": "measure_backward"}

BUDGETED = (
    *("project", "attend", "attend_decode", "attend_backward", "decode_backward"),
    *("attend_causal", "attend_causal_backward", "attend_prefix", "attend_prefix_backward"),
)


def budget(op: str, n: int, m: int, d: int, psi: bool = True) -> Work:
    """Of one op over all pairs in 16 bits, P = D, Phi shared, psi a matrix or the identity; project is that of k and of
    v."""
    return work(_BOTH.get(op, op), Sizes(PAIRS, n, m, d, atoms=d, layers=LAYERS, psi=psi))


def floor_ms(asked: Work, tflops: float = TFLOPS, terabytes: float = TERABYTES) -> tuple[float, str]:
    """The least time, and which of both limits sets it."""
    products, memory = asked.flops / (tflops * 1e9), asked.moved / (terabytes * 1e9)
    return (products, "products") if products > memory else (memory, "memory")


def choices(m: int, d: int, atoms: int, capability: str) -> dict[str, tuple[str, int]]:
    """Op -> family and shared memory of a block, from the table that dispatch asks; n does not matter to it."""
    from csat_ext import SparseDecoder, explain

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    f32 = torch.float32
    decoder = SparseDecoder(
        meta(1, atoms, atoms, dtype=f32),
        meta(1, atoms, d, dtype=f32),
        meta(LAYERS, atoms, dtype=f32),
        meta(d, atoms, dtype=f32),
    )
    tokens = meta(PAIRS // HEADS, HEADS, TOKENS[0], d)
    phi = meta(m, TOKENS[0], dtype=f32)
    explained = [*explain(tokens, tokens, tokens, phi, device=capability)]
    explained += [*explain(tokens, tokens, tokens, phi, decoder=decoder, device=capability)]
    block = meta(causal_block(m), m, dtype=f32)
    explained += [*explain(tokens, tokens, tokens, block, causal="block", device=capability)]
    for recovered in (None, decoder):
        explained += [*explain(tokens, tokens, tokens, phi.mT, decoder=recovered, causal="prefix", device=capability)]
    return {choice.op: (choice.family, choice.shared_bytes) for choice in explained}


def budget_rows() -> Iterator[list[str]]:
    for d in WIDTHS:
        for m in MEASUREMENTS:
            chosen = {capability: choices(m, d, d, capability) for capability in ("sm_80", "sm_90")}
            for op in BUDGETED:
                kernels = []
                for capability in ("sm_80", "sm_90"):
                    family, shared = chosen[capability][op]
                    kernels.append(family if not shared else f"{family}, {shared / 1024:.0f} KiB")
                times = [floor_ms(budget(op, n, m, d)) for n in TOKENS]
                least = budget(op, TOKENS[0], m, d)
                counts = [
                    f"{least.flops / 1e9:.0f}",
                    f"{least.moved / 1e6:.0f}",
                    *(f"{ms:.3g}" for ms, _ in times),
                    times[0][1],
                ]
                yield [str(d), str(m), f"`{op}`", *kernels, *counts]


def page() -> str:
    record = json.loads(RECORD.read_text())
    names = sorted({name for kernels in record["registers"].values() for name in kernels})
    registers = [[f"`{name}`", *(str(record["registers"][a].get(name, "")) for a in ARCHITECTURES)] for name in names]
    head = ["D", "m", "op", "sm_80", "sm_90", "GFLOP", "MB", *(f"n = {n}, ms" for n in TOKENS), "limit"]
    text = PAGE.read_text()
    parts = {
        "budgets": table(head, budget_rows()),
        "registers": table(["kernel", *ARCHITECTURES], registers) + f"\n\n<sub>{record['compiler']}, "
        f"{record['machine']['date'][:10]}, `python benchmarks/kernel_budgets.py record`</sub>",
    }
    for name, body in parts.items():
        marked = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"docs/kernels.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = marked.sub(lambda _, b=body, n=name: f"<!-- {n} -->\n{b}\n<!-- /{n} -->", text)  # type: ignore[misc]
    return text


def record_registers(library: Path, tool: str, update: bool) -> None:
    found = {
        architecture: {kernel_name(mangled): used["registers"] for mangled, used in kernels.items()}
        for architecture, kernels in resources(library, tool).items()
    }
    if update:
        for architecture, before in json.loads(RECORD.read_text())["registers"].items():
            new = found.setdefault(architecture, {})
            built = {name.partition("<")[0] for name in new}
            new |= {name: count for name, count in before.items() if name.partition("<")[0] not in built}
    compiler = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", compiler)
    command = "python benchmarks/kernel_budgets.py record" + (" --update" if update else "")
    machine = header() | {"command": command}
    result = {"machine": machine, "compiler": f"nvcc {release[1] if release else '?'}"}
    RECORD.write_text(json.dumps(result | {"registers": found}, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "record"):
        command = commands.add_parser(name)
        command.add_argument("library", type=Path)
        command.add_argument("--cuobjdump")
        if name == "record":
            command.add_argument(
                "--update", action="store_true", help="keep kernels that the library has no instance of"
            )
    commands.add_parser("page").add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "page":
        new = page()
        if arguments.check:
            sys.exit(
                0 if new == PAGE.read_text() else "docs/kernels.md is not what the record and the limits say: run page"
            )
        PAGE.write_text(new)
        return
    tool = find_cuobjdump(arguments.cuobjdump)
    if arguments.command == "record":
        record_registers(arguments.library, tool, arguments.update)
        PAGE.write_text(page())
        return
    found = faults(arguments.library, tool, json.loads(RECORD.read_text())["registers"])
    print("\n".join(found) or "no spills, registers as recorded, HMMA and HGMMA where they belong, no trap")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
