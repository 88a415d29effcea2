#!/usr/bin/env bash
# Runs xpyd on real vLLM without a GPU, once with NIXL and once with LMCache. See README.md in this folder.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$HOME/.cache/xpyd-real}
what=${2:-check}
"$here/setup.sh" "$folder"
cargo build --release --locked --manifest-path "$here/../../Cargo.toml"
target=$(cargo metadata --no-deps --format-version 1 --manifest-path "$here/../../Cargo.toml" \
    | "$folder/venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
if [[ $what == bench ]]; then
    exec "$folder/venv/bin/python" "$here/bench.py" "$target/release/xpyd" "$folder"
fi
for connector in ${XPYD_REAL_CONNECTORS:-nixl lmcache}; do
    "$folder/venv/bin/python" "$here/$what.py" "$target/release/xpyd" "$folder" "$connector"
done
