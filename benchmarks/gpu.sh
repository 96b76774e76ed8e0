#!/bin/sh
# What attribution costs on a GPU, and the tests that need one: at most 8 minutes, no network.
# Without a GPU it says so and runs tiny models on the CPU.
set -e
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
timeout 360 "$PYTHON" -m benchmarks.gpu --minutes 4.5 "$@"
if "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    timeout 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests -k "cuda or gpu or device"
else
    echo "There is no GPU: the tests that need one are left out."
fi
