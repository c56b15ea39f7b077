"""`pdlab serve`: a model over the OpenAI API, in every role of a cluster. `--help` does not wait for what serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdlab.cli.shared import CaCerts, Token, Traceback, traced
from pdlab.core.types import UsageError
from pdlab.experiment import spellings
from pdlab.real.net.credentials import from_file, registry_url
from pdlab.real.net.tls import Tls

if TYPE_CHECKING:
    from pdlab.experiment.deployment import Deployment


def serve(
    file: Annotated[
        Path | None, typer.Argument(metavar="[EXPERIMENT]", help="Its model and engine are served.", show_default=False)
    ] = None,
    role: Annotated[
        str, typer.Option(help="mixed (prefills and decodes), prefill or decode; router; all: the file's instances and their router.")
    ] = "mixed",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "--model-path", help="A Hugging Face folder or a .gguf file.", show_default="the embedded SmolLM2-135M-Instruct"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda[:i] or npu[:i].", show_default="cpu")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: auto, fp8 (e4m3), bfloat16, float16 or float32.", show_default="as --dtype")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Weight-only: wint8 or wint4.", show_default=False)] = None,
    load_format: Annotated[str | None, typer.Option(help="dummy: random weights.", show_default=False)] = None,
    kv_gib: Annotated[float | None, typer.Option(min=0.0, help="KV memory.", show_default="what fits")] = None,
    hbm_utilization: Annotated[
        float | None,
        typer.Option(
            "--hbm-utilization",
            "--gpu-memory-utilization",
            "--mem-fraction-static",
            min=0.0,
            max=1.0,
            help="The part of the memory that may be used.",
            show_default="0.9",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", "--context-length", min=1, help="Tokens of prompt and output.", show_default="the model's"),
    ] = None,
    max_seqs: Annotated[
        int | None,
        typer.Option(
            "--max-seqs", "--max-num-seqs", "--max-running-requests", min=1, help="Sequences that decode together.", show_default="256"
        ),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-batch-tokens",
            "--max-num-batched-tokens",
            "--chunked-prefill-size",
            min=1,
            help="Tokens that one step computes.",
            show_default="8192",
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option("--block-tokens", "--block-size", "--page-size", min=1, help="Tokens in a KV block.", show_default="16"),
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option("--prefix-cache/--no-prefix-cache", help="Keep KV of prompts for others that begin alike.", show_default="on"),
    ] = None,
    batching: Annotated[
        str | None,
        typer.Option(
            help="chunked, prefill_first, decode_first, delayed, online_first or slide_batching; "
            "with parameters: 'slide_batching(urgency=0.8)'.",
            show_default="chunked",
        ),
    ] = None,
    speculative_config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Drafted tokens: {"method": "ngram" or "draft_model", "num_speculative_tokens": N, "model": FOLDER}.',
            show_default="the file's, or none",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            "--tp-size",
            "--tp",
            min=1,
            help="Ranks that hold each layer together: a process each.",
            show_default="the file's, or 1",
        ),
    ] = None,
    enable_expert_parallel: Annotated[
        bool | None,
        typer.Option(
            "--enable-expert-parallel/--no-enable-expert-parallel",
            help="Each of those ranks has some of a layer's experts whole, in place of a part of all.",
            show_default="as ep of the file",
        ),
    ] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Hosts that its ranks are spread over, evenly.", show_default="1")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which of them this is; 0 answers.", show_default="0")] = None,
    master: Annotated[
        str | None,
        typer.Option(
            "--master",
            "--master-node-addr",
            "--dist-init-addr",
            metavar="HOST:PORT",
            help="Where the first of them is met by the others.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU engine.", show_default="all cores")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="/metrics here, too.", show_default="--port alone")] = 0,
    name: Annotated[str, typer.Option("--served-model-name", help="What clients call the model.", show_default=False)] = "",
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", "--tokenizer-path", help="Folder or .gguf with the vocabulary.", show_default="the model's"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PDLAB_API_KEY",
            callback=from_file("PDLAB_API_KEY"),
            help="Clients have to send it (better: PDLAB_API_KEY_FILE).",
            show_default=False,
        ),
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="In flight; more get 429.")] = 1024,
    request_timeout_s: Annotated[
        float | None, typer.Option(min=0.001, help="A router's: from arrival to the end.", show_default="limits.request_timeout_s, or 900")
    ] = None,
    drain_s: Annotated[float, typer.Option(min=0.0, help="At SIGTERM, time for running requests to end.")] = 30.0,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="How the model calls tools: hermes or llama3_json.", show_default="as its chat template shows")
    ] = None,
    auto_tool_choice: Annotated[
        bool | None,
        typer.Option(
            "--enable-auto-tool-choice/--no-enable-auto-tool-choice",
            help="Read calls of tools from the text.",
            show_default="where the chat template shows how",
        ),
    ] = None,
    idle_timeout_s: Annotated[
        float, typer.Option(min=1.0, help="A client that takes nothing of its answer for so long is hung up on.")
    ] = 300.0,
    allowed_origins: Annotated[
        str, typer.Option(metavar="ORIGINS", help="Web pages that may ask from a browser (CORS); *: all.", show_default="none")
    ] = "",
    allowed_methods: Annotated[str, typer.Option(metavar="METHODS", help="That they may use.")] = "*",
    allowed_headers: Annotated[str, typer.Option(metavar="HEADERS", help="That they may send.")] = "*",
    allow_credentials: Annotated[bool, typer.Option("--allow-credentials", help="They may send cookies and the like.")] = False,
    decisions: Annotated[Path | None, typer.Option("--log", help="File for the scheduler's decisions.", show_default=False)] = None,
    registry: Annotated[
        str,
        typer.Option(
            envvar="PDLAB_REGISTRY",
            callback=registry_url,
            help="Where instances and routers meet: etcd://, etcds://, redis:// or rediss://.",
            show_default=False,
        ),
    ] = "",
    registry_wait_s: Annotated[float, typer.Option(min=0.0, help="How long a start waits for a registry that is away.")] = 60.0,
    instance_name: Annotated[str, typer.Option(help="Of this instance or router.", show_default="role-host-pid")] = "",
    advertise: Annotated[str, typer.Option(metavar="HOST", help="What others reach it by.", show_default="--host")] = "",
    kv_transport: Annotated[str, typer.Option(help="auto, shm, tcp, cuda_ipc or nixl.")] = "auto",
    kv_port: Annotated[int, typer.Option(min=0, max=65535, help="For KV transfers; 0: any free one.")] = 0,
    token: Token = "",
    engine: Annotated[str, typer.Option(help="pdlab, or vllm: a server at --upstream is registered.")] = "pdlab",
    upstream: Annotated[str, typer.Option(metavar="URL", help="Of the vLLM server.", show_default=False)] = "",
    upstream_api_key: Annotated[
        str,
        typer.Option(
            envvar="PDLAB_UPSTREAM_API_KEY",
            callback=from_file("PDLAB_UPSTREAM_API_KEY"),
            help="Of vLLM servers; a router needs it, too.",
            show_default=False,
        ),
    ] = "",
    certfile: Annotated[str, typer.Option("--ssl-certfile", metavar="PEM", help="Serve https, with this.", show_default=False)] = "",
    keyfile: Annotated[str, typer.Option("--ssl-keyfile", metavar="PEM", help="The certificate's key.", show_default=False)] = "",
    ca_certs: CaCerts = "",
    trace_events: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The router's event log, for replay.", show_default=False)
    ] = None,
    otlp_endpoint: Annotated[
        str,
        typer.Option(
            "--otlp-endpoint",
            "--otlp-traces-endpoint",
            metavar="URL",
            help="A collector of OpenTelemetry traces (extra otel), such as http://127.0.0.1:4318.",
            show_default=False,
        ),
    ] = "",
    no_self_profile: Annotated[
        bool, typer.Option("--no-self-profile", help="An instance does not measure its own steps (2 to 3 s) before it joins a cluster.")
    ] = False,
    log_level: Annotated[str, typer.Option(envvar="PDLAB_LOG_LEVEL", help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(envvar="PDLAB_LOG_FORMAT", help="text, or json: an object a line.")] = "text",
    traceback: Traceback = False,
) -> None:
    """Serve a model over the OpenAI API, with the simulator's own scheduler and policies: one server, or a cluster's parts."""
    from pdlab.real.api.cors import cors_of
    from pdlab.real.host.logs import configured
    from pdlab.real.launch.asked import Asked
    from pdlab.real.launch.instance import Listening
    from pdlab.real.launch.serve import start

    given = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "quantization": quantization,
        "load_format": load_format,
        "kv_gib": kv_gib,
        "max_model_len": max_model_len,
        "hbm_utilization": hbm_utilization,
        "max_seqs": max_seqs,
        "max_batch_tokens": max_batch_tokens,
        "block_tokens": block_tokens,
        "prefix_cache": prefix_cache,
        "batching": batching,
        "speculative_config": speculative_config,
        "enable_expert_parallel": enable_expert_parallel,
        "tp": tensor_parallel_size,
        "nnodes": nnodes,
        "node_rank": node_rank,
        "master": master,
        "threads": threads,
        "decisions": None if decisions is None else str(decisions),
    }
    asked = Asked(
        role=role,
        file=file,
        deployment=_served(file) if file is not None else None,
        given=given,
        serving=Listening(
            host=host,
            port=port,
            metrics_port=metrics_port,
            served_name=name,
            tokenizer=tokenizer,
            api_key=api_key,
            token=token,
            max_requests=max_requests,
            drain_s=drain_s,
            tool_call_parser=tool_call_parser,
            auto_tool_choice=auto_tool_choice,
            tls=Tls(certfile, keyfile, ca_certs),
            idle_s=idle_timeout_s,
            cors=cors_of(allowed_origins, allowed_methods, allowed_headers, allow_credentials),
        ),
        registry=registry,
        registry_wait_s=registry_wait_s,
        instance_name=instance_name,
        advertise=advertise,
        kv_transport=kv_transport,
        kv_port=kv_port,
        engine=engine,
        upstream=upstream,
        upstream_api_key=upstream_api_key,
        trace_events=trace_events,
        request_timeout_s=request_timeout_s,
        traceback=traceback,
        self_profile=not no_self_profile,
        otlp_endpoint=otlp_endpoint,
    )
    with (
        configured(log_level, log_format, instance=instance_name or (role if role in ("router", "all") else "")) as say,
        traced(traceback),
    ):
        start(asked, say)


def _served(file: Path) -> Deployment:
    """The deployment in a file. Raises UsageError, also where it is a model in its place."""
    from pdlab.experiment.deployment import Deployment

    if file.suffix == ".gguf" or (file / "config.json").is_file():
        raise UsageError(f"{file} is a model: give it as --model {file}")
    if not file.exists() and spellings.of_hub(str(file)):
        raise UsageError(f"{file}: there is no such file; as for a model of that name, {spellings.download(str(file), serve=True)}")
    return Deployment.load(file)
