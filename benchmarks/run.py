"""What ``make bench`` runs: the benchmarks, then their tables in Markdown, as README quotes them.

Usage: python benchmarks/run.py [--quick] [--only cpu|linear|mlx] [--out build/bench] [--build PATH] [--peers LIST]

Keeps ``attention_cpu.json``, ``linear_cpu.json``, ``linear_mlx.json``, ``attention_mlx.json`` and ``tables.md`` in the
output folder; ``--only linear`` runs both of linear layers.
docs/benchmarks.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = "openblas,torch,onnxruntime"


def find_binary(name: str, folder: Path | None) -> Path | None:
    """The benchmark ``name`` in ``folder``, or the newest among the build trees."""
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    built = [path for path in ROOT.glob(f"build/*/benchmarks/{name}") if path.is_file()]
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def markdown(rows: list[list[str]]) -> str:
    """A table whose source is aligned too; the first column is text, the others figures."""
    widths = [max(3, *(len(row[c]) for row in rows)) for c in range(len(rows[0]))]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def figure(value: float | None, unit: str) -> str:
    """A fraction or factor with its unit; empty if there is none."""
    if value is None:
        return ""
    return f"{value:.2f}x" if unit == "x" else f"{value:.1f} %"


def goal(value: float | None, unit: str) -> str:
    """A goal as it was set."""
    if value is None:
        return ""
    return f"{value:g}x" if unit == "x" else f"{value:g} %"


def ceilings_table(result: dict[str, Any], work: str) -> str:
    """The rows of attention_cpu.json or linear_cpu.json."""
    rows = [[work, "one thread", "all threads", "must reach", "aim", "of", "reached"]]
    for row in result["rows"]:
        unit = row["unit"]
        values = [figure(row[column]["value"], unit) for column in ("one_thread", "all_threads")]
        goals = [goal(row[name], unit) for name in ("must", "aim")]
        rows.append([f"{row['group']}: {row['work']}", *values, *goals, row["ceiling"], row["reached"]])
    return markdown(rows)


def cpu_section(result: dict[str, Any], title: str, work: str) -> str:
    """Heading, machine and table of attention_cpu.json or linear_cpu.json."""
    machine = result["machine"]
    peaks = [row["peak_one_core_gflops"] for row in result["rows"] if row["ceiling"] == "float32 peak"]
    reads = [row["memory_read_gbps"] for row in result["rows"] if row["memory_read_gbps"]]
    facts = [machine["cpu"], f"{machine['cores']} cores", f"kernels {machine['isa']}", machine["compiler"]]
    facts.append(f"{result['threads']} threads, median of {result['repeats']}")
    if peaks:
        facts.append(f"float32 peak {sorted(peaks)[len(peaks) // 2]:.0f} GFLOP/s a core")
    if reads:
        facts.append(f"memory read {max(reads):.1f} GB/s")
    return f"### {title}\n\n{', '.join(facts)}.{noise(machine)}\n\n{ceilings_table(result, work)}\n"


def noise(machine: dict[str, Any]) -> str:
    """A warning where other work was running."""
    return " **Noisy run: other work was running.**" if machine["noisy"] else ""


def mlx_section(result: dict[str, Any]) -> str:
    """Heading, machine, table and call overhead of attention_mlx.json."""
    from mlx_mfa.bench import comparison_rows

    machine, overhead = result["machine"], result["overhead"]
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["results"]))
    versions = [f"mlx-mfa {machine['mlx_mfa']}", f"MLX {machine['mlx']} with {machine['blas_of_mlx']}"]
    versions += [f"{name} {version}" for name, version in machine["peers"].items()]
    text = f"### Beside other libraries\n\n{machine['cpu']}, {machine['threads']} threads, {', '.join(versions)}. "
    text += "A library's column is its time over ours; MiB is the growth of the peak memory in one call."
    text += "".join(f" {note}." for note in result["notes"])
    text += f"{noise(machine)}\n\n{markdown(comparison_rows(result['rows'], names))}\n\n"
    return text + (
        f"A tiny call takes {overhead['ours_us']:.1f} us, one `mx.add` {overhead['add_us']:.1f} us: "
        f"{overhead['beyond_one_op_us']:.1f} us beyond an MLX eval of one op (must reach 10, aim 3).\n"
    )


def linear_section(result: dict[str, Any]) -> str:
    """Heading, versions and table of linear_mlx.json."""
    text = f"### Matrix products beside other libraries\n\n{', '.join(result['facts'])}. "
    text += "A library's column is its time over ours."
    text += "".join(f" {note}." for note in result["notes"])
    return f"{text}\n\n{markdown([result['header'], *result['rows']])}\n"


def run(command: list[str]) -> int:
    """Runs one benchmark; its own table is not shown, its progress and errors are."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "python"), environment.get("PYTHONPATH")]))
    return subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False).returncode


def main() -> int:
    """Runs the chosen benchmarks and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rows: a look, not a measurement")
    parser.add_argument("--only", choices=("cpu", "linear", "mlx"), help="one of the benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder of the results")
    parser.add_argument("--build", type=Path, help="folder of the programs to run (default: the newest in build/)")
    parser.add_argument("--peers", default=PEERS, help="optional libraries to compare with, or 'none'")
    args = parser.parse_args()
    quick = ["--quick"] if args.quick else []
    sys.path.insert(0, str(ROOT / "python"))
    args.out.mkdir(parents=True, exist_ok=True)

    sections = []
    for only, name, title, work in (
        ("cpu", "attention_cpu", "Attention against this machine's ceilings", "work (B 1, H 8)"),
        ("linear", "linear_cpu", "Matrix products against this machine's ceilings", "work (rows x columns x terms)"),
    ):
        if args.only not in (None, only):
            continue
        binary = find_binary(name, args.build)
        if binary is None:
            print(f"run.py: no {name}; build with -DMFA_BUILD_BENCHMARKS=ON or give --build", file=sys.stderr)
            return 2
        target = args.out / f"{name}.json"
        if status := run([str(binary), "--json", str(target), *quick]):
            return status
        sections.append(cpu_section(json.loads(target.read_text()), title, work))
        print(sections[-1], flush=True)
    peers = ["--peers", args.peers]
    for only, name, section in (("linear", "linear_mlx", linear_section), ("mlx", "attention_mlx", mlx_section)):
        if args.only not in (None, only):
            continue
        target = args.out / f"{name}.json"
        script = str(ROOT / "benchmarks" / f"{name}.py")
        if status := run([sys.executable, script, "--json", str(target), *peers, *quick]):
            return status
        sections.append(section(json.loads(target.read_text())))
        print(sections[-1], flush=True)
    (args.out / "tables.md").write_text("\n".join(sections))
    print(f"JSON and tables.md are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
