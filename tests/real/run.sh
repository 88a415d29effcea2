#!/usr/bin/env bash
# Runs xpyd on real vLLM without a GPU, once with NIXL and once with LMCache. See README.md beside this file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$HOME/.cache/xpyd-real}
"$here/setup.sh" "$folder"
cargo build --release --locked --manifest-path "$here/../../Cargo.toml"
for connector in ${XPYD_REAL_CONNECTORS:-nixl lmcache}; do
    "$folder/venv/bin/python" "$here/check.py" "$here/../../target/release/xpyd" "$folder" "$connector"
done
