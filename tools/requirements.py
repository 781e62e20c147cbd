"""Prints the Python packages that pyproject.toml names: `build` (what building needs) and any extra.

Usage: requirements.py GROUP [GROUP ...], for example `requirements.py build cpu dev | pip install -r /dev/stdin`.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: the reader that pip carries
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main(groups: list[str]) -> int:
    """Prints one requirement a line; returns the exit status."""
    data = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    known = {"build": data["build-system"]["requires"] + data["project"]["dependencies"]}
    known.update(data["project"]["optional-dependencies"])
    unknown = [group for group in groups if group not in known]
    if unknown or not groups:
        print(f"requirements.py: expected groups among {', '.join(known)}; got {unknown or 'none'}", file=sys.stderr)
        return 2
    requirements = [requirement for group in groups for requirement in known[group]]
    print("\n".join(dict.fromkeys(requirements)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
