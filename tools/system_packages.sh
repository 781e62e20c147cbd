#!/usr/bin/env bash
# system_packages.sh PYTHON build|test|bench: makes sure that the system packages a command needs are installed.
# As root on Debian or Ubuntu it installs what is missing; otherwise it says in one line what is missing, and fails if
# the command cannot do without it.
set -euo pipefail

python=$1
command=$2

has_header() { [ -e "/usr/include/$1" ] || [ -e "/usr/local/include/$1" ]; }
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
has_python_header() {
  "$python" -c 'import os, sysconfig as s; exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' \
    2>/dev/null
}

needed=()    # the command fails without these
optional=()  # CMake fetches these, or what uses them is left out
command -v g++ >/dev/null || command -v c++ >/dev/null || needed+=(g++)
command -v "$python" >/dev/null || needed+=(python3)
has_venv || needed+=(python3-venv)
has_python_header || needed+=(python3-dev)
has_header hwy/highway.h || optional+=(libhwy-dev)
if [ "$command" = test ]; then has_header gtest/gtest.h || needed+=(libgtest-dev); fi
if [ "$command" = bench ]; then has_header benchmark/benchmark.h || optional+=(libbenchmark-dev); fi

missing=("${needed[@]}" "${optional[@]}")
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing ${missing[*]}"
  install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends)
  "${install[@]}" "${missing[@]}" >/dev/null 2>&1 || {
    apt-get update -qq
    "${install[@]}" "${missing[@]}" >/dev/null
  }
elif [ ${#needed[@]} -gt 0 ]; then
  echo "make: missing system packages: ${missing[*]} (Debian names). Install them as root: apt-get install ${missing[*]}" >&2
  exit 1
else
  echo "make: not installed and not strictly needed: ${optional[*]} (Debian names)" >&2
fi
