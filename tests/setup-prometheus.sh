#!/bin/sh
# Puts Debian's Prometheus (the binaries `prometheus` and `promtool`) where the deployment tests look
# for it. Starts no service. Does nothing when both are there already.
set -eu

if command -v prometheus > /dev/null && command -v promtool > /dev/null; then
    exit 0
fi
if ! command -v apt-get > /dev/null; then
    echo "quantserve: install Prometheus 2.42 or newer (prometheus and promtool on PATH): this is not Debian" >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif sudo -n true 2> /dev/null; then
    as_root="sudo -n"
else
    echo "quantserve: run once as root: apt-get install --no-install-recommends prometheus" >&2
    exit 1
fi

echo "quantserve: installing Debian's prometheus for the deployment tests (once)"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    # 101 is Debian's word for "do not start the service now".
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" > /dev/null
    $as_root chmod +x "$policy"
    trap '$as_root rm -f "$policy"' EXIT
fi
install="$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends prometheus"
if ! $install > /dev/null 2>&1; then # the package lists of a fresh container are empty or old
    $as_root apt-get update -qq
    $install > /dev/null
fi
command -v prometheus > /dev/null && command -v promtool > /dev/null
