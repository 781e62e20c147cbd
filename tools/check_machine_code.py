"""Reads the machine code of the CUDA kernels: matrix instructions where they must be, and nothing in local memory.

usage: check_machine_code.py FOLDER [--cuobjdump PATH]    FOLDER holds the .fatbin files of a build

Needs cuobjdump (CUDA toolkit, or the package nvidia-cuda-cuobjdump); says in one line if there is none.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# Kernels whose products must be matrix instructions, and which: by the file and the kernel's dtype.
MATRIX = (
    (re.compile(r"^hopper_(forward.*_f32|(forward|dq|dkv|backward_fused).*_(bf16|f16))$"), "HGMMA"),
    (re.compile(r".*_(bf16|f16)_\d+$"), "HMMA"),
)


def find_cuobjdump() -> str | None:
    """The program's path."""
    package = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"
    for candidate in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump", str(package)):
        if candidate and Path(candidate).exists():
            return candidate
    return None


def resources(cuobjdump: str, fatbin: Path) -> dict[str, dict[str, int]]:
    """Of each kernel: REG, STACK, LOCAL and so on."""
    text = subprocess.run([cuobjdump, "-res-usage", str(fatbin)], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Function (\S+):\s*\n\s*(.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def instructions(cuobjdump: str, fatbin: Path) -> dict[str, str]:
    """Of each kernel: its listing."""
    environment = {"PATH": f"{Path(cuobjdump).parent}:/usr/local/cuda/bin:/usr/bin:/bin"}  # nvdisasm is beside it
    command = [cuobjdump, "-sass", str(fatbin)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    parts = re.split(r"Function : (\S+)", listing)
    return dict(zip(parts[1::2], parts[2::2]))


def faults(cuobjdump: str, fatbin: Path) -> tuple[int, list[str]]:
    """The number of kernels of a file and what is wrong with them."""
    wrong = []
    usage, listing = resources(cuobjdump, fatbin), instructions(cuobjdump, fatbin)
    for name, used in usage.items():
        if used.get("LOCAL", 0) or used.get("STACK", 0):
            wrong.append(f"{name}: {used.get('STACK', 0)} bytes of stack, {used.get('LOCAL', 0)} of local memory")
        if re.search(r"\b(LDL|STL)\b", listing.get(name, "")):
            wrong.append(f"{name}: registers are spilled (LDL or STL)")
        for pattern, instruction in MATRIX:
            if pattern.match(name):
                if instruction not in listing.get(name, ""):
                    wrong.append(f"{name}: no {instruction}")
                break
    if not usage:
        wrong.append(f"{fatbin.name}: no machine code")
    return len(usage), wrong


def main() -> int:
    """Checks every file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuobjdump", default=find_cuobjdump())
    options = parser.parse_args()
    fatbins = sorted(options.folder.glob("*.fatbin"))
    if not fatbins:
        print(f"check_machine_code.py: no CUDA kernels in {options.folder}: that part was not built")
        return 0
    if not options.cuobjdump:
        print("check_machine_code.py: could not run, cuobjdump is not installed")
        return 0
    total, wrong = 0, []
    for fatbin in fatbins:
        count, found = faults(options.cuobjdump, fatbin)
        total += count
        wrong += found
    print("\n".join(wrong) or f"{total} kernels in {len(fatbins)} files: matrix instructions present, nothing spilled")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
