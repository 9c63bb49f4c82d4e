#!/bin/sh
# Puts Triton where tests/test_tiles.py looks for it: its interpreter runs the loops for a GPU on a
# CPU. Not into .venv, where vLLM would take it for a sign of a GPU.
set -eu
cd "$(dirname "$0")/.."

if [ -d .cache/triton/triton ]; then
    exit 0
fi
echo "quantserve: installing Triton for the tests of the GPU's loops (once)"
.venv/bin/pip install -q --no-deps --target .cache/triton triton==3.6.0 \
    || echo "quantserve: pip could not install Triton: the tests of the GPU's loops will be skipped" >&2
