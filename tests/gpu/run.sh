#!/usr/bin/env bash
# Check and time the GPU kernels on a machine with an NVIDIA card (one command, about five minutes):
#
#     bash tests/gpu/run.sh [OUTPUT_DIRECTORY]
#
# Needs PyTorch with CUDA, Triton, numpy and safetensors; nothing of the project has to be installed.
# Without a card, to try the script itself: TRITON_INTERPRET=1 bash tests/gpu/run.sh OUT --device cpu
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-out/gpu}"
shift || true
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
"$python" -m tests.gpu.check_attention --json "$out/check_attention.json" "$@"
"$python" -m tests.gpu.time_attention --json "$out/time_attention.json" "$@"
