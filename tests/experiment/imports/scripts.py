"""Launch scripts as users have them, with the mistakes that are in documents."""

_XLLM_ENGINE = """\
./xllm --model=Qwen2-7B-Instruct \\
  --port={port} \\
  --devices="npu:{npu}" \\
  --master_node_addr="127.0.0.1:188{npu}8" \\
  --enable_prefix_cache=false \\
  --enable_chunked_prefill=false \\
  --enable_disagg_pd=true \\
  --instance_role={role} \\
  --etcd_addr="127.0.0.1:12389" \\{blank}
  --transfer_listen_port=26{npu}00 \\
  --disagg_pd_port=77{npu}7 \\
  --node_rank=0 \\
  --nnodes=1
"""
XLLM = (
    "./etcd\n"
    'ENABLE_DECODE_RESPONSE_TO_SERVICE=true ./xllm_master_serving --etcd_addr="127.0.0.1:12389" --http_server_port 28888 '
    "--rpc_server_port 28889 --tokenizer_path=/models/qwen2\n"
    + _XLLM_ENGINE.format(port=8010, npu=0, role="PREFILL", blank="").replace(
        "  --transfer_listen", "  --device_ip=xx.xx.xx.xx \\ # the machine's own\n  --transfer_listen"
    )
    + _XLLM_ENGINE.format(port=8020, npu=1, role="DECODE", blank="  ")
)
_FASTDEPLOY_SERVER = """\
export FD_LOG_DIR="log_{role}"
export CUDA_VISIBLE_DEVICES={gpus}
export ENABLE_V1_KVCACHE_SCHEDULER=0
export $(bash scripts/get_rdma_nics.sh gpu)
echo "KVCACHE_RDMA_NICS ${{KVCACHE_RDMA_NICS}}"
python -m fastdeploy.entrypoints.openai.api_server \\
  --model ERNIE-4.5-300B-A47B-BF16 \\
  --port {0} --metrics-port {1} \\
  --engine-worker-queue-port {2} --cache-queue-port {3} \\
  --tensor-parallel-size 4 --quantization wint4 \\
  --cache-transfer-protocol "rdma,ipc" \\
  --rdma-comm-ports "7671,7672,7673,7674" \\
  --pd-comm-port "2334" \\
  --scheduler-name "splitwise" --scheduler-host "127.0.0.1" --scheduler-port 6379 \\
  --scheduler-ttl 9000{goes_on}
  --splitwise-role "{role}"
"""
FASTDEPLOY = (
    "nohup redis-server > redis.log 2>&1 &\n"
    + _FASTDEPLOY_SERVER.format(8180, 8181, 8182, 8183, role="prefill", gpus="0,1,2,3", goes_on=" \\")
    + _FASTDEPLOY_SERVER.format(8184, 8185, 8186, 8187, role="decode", gpus="4,5,6,7", goes_on="")
)
LLUMNIX = """\
python -m llumnix.entrypoints.vllm.api_server --model facebook/opt-125m --initial-instances 4 --port 8000 \\
  --enable-pd-disagg True --num-available-dispatch-instances 1 --migrate-out-threshold 3.0 --pair-migration-policy defrag
"""
VLLM = """\
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
CUDA_VISIBLE_DEVICES=0 VLLM_NIXL_SIDE_CHANNEL_PORT=5600 vllm serve $MODEL --port 8100 --enforce-eager \\
  --kv-transfer-config '{"kv_connector":"NixlConnector",
     "kv_role":"kv_both"}' --max-num-seqs 64 > p.log 2>&1 &
CUDA_VISIBLE_DEVICES=1 vllm serve ${MODEL} --port 8200 -tp=1 --max-num-seqs 128 \\
  --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_both"}' &
python3 tests/toy_proxy_server.py --port 8192 --prefiller-hosts localhost --prefiller-ports 8100 \\
  --decoder-hosts localhost --decoder-ports 8200
"""
SGLANG = """\
python -m sglang.launch_server --model-path meta-llama/Llama-3.1-8B-Instruct --disaggregation-mode prefill --port 30000
python -m sglang.launch_server --model-path meta-llama/Llama-3.1-8B-Instruct --disaggregation-mode decode --port 30001 \\
  --base-gpu-id 1 --disable-radix-cache
python -m sglang_router.launch_router --pd-disaggregation --prefill http://127.0.0.1:30000 8998 --decode http://127.0.0.1:30001 \\
  --host 0.0.0.0 --port 8000 --decode-policy power_of_two
"""
DYNAMO = """\
export ETCD_ENDPOINTS=http://10.0.0.1:2379
python -m dynamo.frontend --router-mode kv --http-port 8000 &
DYN_SYSTEM_PORT=8081 CUDA_VISIBLE_DEVICES=0 python3 -m dynamo.vllm --model Qwen/Qwen3-0.6B --enforce-eager &
DYN_SYSTEM_PORT=8082 CUDA_VISIBLE_DEVICES=1 python3 -m dynamo.vllm --model Qwen/Qwen3-0.6B --is-prefill-worker
"""
