#!/usr/bin/env bash
# Compile the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests under them:
#
#     bash tests/side/sanitize.sh [CASES]
#
# CASES: hostile arguments tried per operator and pass (default 1000). Needs g++ with its sanitizer runtimes. Any
# overrun, overflow or misuse ends the run with a report; leaks are not looked for, since Python never frees all.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export TORCHREC_SID_CACHE="$folder" HOSTILE_CASES="${1:-1000}" OMP_NUM_THREADS=2
# Not for the compiler itself, which takes many minutes under it.
export CXX="env -u LD_PRELOAD g++ -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
export ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
"$python" -c "from torchrec_sid.side.kernels.compiler import load_library; found = load_library(); assert not found.reason, found"
"$python" -m pytest -q -x -p no:cacheprovider tests/side/test_arguments.py tests/side/test_requests.py \
    tests/side/test_similarity.py tests/side/test_attention.py -k "not compile and not export and not library_checks"
