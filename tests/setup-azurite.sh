#!/bin/sh
# Puts Microsoft's Azurite, an Azure Blob server, where tests/object_stores.py looks for it. 3.33.0 is
# the last without a telemetry client, which is two thirds of what a later one installs.
set -eu
cd "$(dirname "$0")/.."

if [ -x .cache/azurite/node_modules/.bin/azurite-blob ]; then
    exit 0
fi
if ! command -v node > /dev/null || ! command -v npm > /dev/null; then
    echo "quantserve: no node and npm here: the tests of az:// sources will be skipped" >&2
    exit 0
fi
echo "quantserve: installing Azurite for the tests of az:// sources (once)"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix .cache/azurite azurite@3.33.0 \
    || echo "quantserve: npm could not install Azurite: the tests of az:// sources will be skipped" >&2
