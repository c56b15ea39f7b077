#!/bin/bash
# Builds the Dockerfile without a docker daemon, as root, and runs what compose.yaml runs in the image: one prefill and one decode instance and
# their router on this host's network, with this host's redis-server.
#   apt-get install buildah debootstrap redis-server && tests/containers/build.sh [FOLDER]
# FOLDER (4 GB; by default a new one under /tmp) keeps the base image and the layers for the next time. Without a way to Docker Hub the base
# is Debian 12 with its Python 3.11, under the name of the image that the Dockerfile begins with. BUILD_OPTIONS go to buildah, such as
# "--build-arg TORCH_INDEX=https://mirror.example/simple -v /etc/pip.conf:/etc/pip.conf:ro".
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-$(mktemp -d)}
base=docker.io/library/$(sed -n 's/^FROM //p' Dockerfile)
port=${PORT:-18100}
mkdir -p "$folder"
tool="buildah --root $folder/images --runroot $folder/run --storage-driver vfs"

if ! $tool inspect --type image "$base" >/dev/null 2>&1; then
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,libexpat1 bookworm "$folder/debian" http://deb.debian.org/debian
  rm -f "$folder"/debian/usr/lib/python3.*/EXTERNALLY-MANAGED
  ln -sf python3 "$folder/debian/usr/bin/python"
  container=$($tool from scratch)
  $tool add -q "$container" "$folder/debian" /
  $tool commit -q "$container" "$base"
  $tool rm "$container" >/dev/null
fi

# shellcheck disable=SC2086
$tool bud --layers --isolation chroot --network host --pull-never ${BUILD_OPTIONS:-} -t pdlab .
container=$($tool from --pull-never localhost/pdlab)
run="$tool run --isolation chroot -e PDLAB_INTERNAL_TOKEN=secret $container --"
trap 'kill $(jobs -p) 2>/dev/null; wait; $tool rm "$container" >/dev/null' EXIT
[ "$($run id -un)" = pdlab ]
$run pdlab sim experiments/quickstart.yaml >/dev/null

redis-server --port $((port + 9)) --save "" --appendonly no >/dev/null &
serve="$run pdlab serve experiments/quickstart_live.yaml --registry redis://127.0.0.1:$((port + 9)) --host 0.0.0.0"
tcp="--advertise 127.0.0.1 --kv-transport tcp"
$serve --role prefill --instance-name prefill-0 --port $((port + 1)) --kv-port $((port + 11)) $tcp &
$serve --role decode --instance-name decode-0 --port $((port + 2)) --kv-port $((port + 12)) $tcp &
$serve --role router --port "$port" &
for _ in $(seq 240); do
  sleep 1
  curl -fs "localhost:$port/ready" && break
done
# the image's own check of its health, on another port
$run python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/ready', timeout=2)"
answer=$(curl -s "localhost:$port/v1/completions" -H "Authorization: Bearer secret" -H "Content-Type: application/json" \
  -d '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}')
echo "$answer"
grep -q Paris <<<"$answer"
curl -s "localhost:$((port + 2))/metrics" | grep -q '^vllm:nixl_bytes_transferred_count{.*} 1.0' || { echo "no KV was handed over" >&2; exit 1; }
echo "the image builds, and its cluster answers"
