"""The experiment file's JSON schema, with what every key means: editors complete and check by it (`pdlab schema`)."""

from __future__ import annotations

from typing import Any

from pdlab import batching
from pdlab.cost import hardware_names, model_names
from pdlab.experiment.experiment import Experiment
from pdlab.policies import load as load_policy
from pdlab.workload import builtin

_BANDWIDTH = "Bandwidth in one direction, 10^9 bytes a second; by default the accelerator's."
_FOR = "Seconds until it is over; by default it lasts to the end."
DESCRIPTIONS = {
    "Experiment.name": "Names the folder of the results, out/NAME. By default the file's name.",
    "Experiment.base_dir": "Where relative paths start. By default the file's folder.",
    "Experiment.seed": "Of every random choice: arrivals, lengths, what policies draw. Same seed, same run.",
    "Experiment.model": "A name from `pdlab models`, or the path of a Hugging Face config.json.",
    "Experiment.device": "Of the engines: cpu, cuda, cuda:1, npu, npu:0.",
    "Experiment.dtype": "Of the engines' weights, activations and KV. auto: as the model is published, on a CPU float32. Simulated, "
    "weights and KV have that format where `cost` names none.",
    "Experiment.quantization": "Weight-only, of the engines' linear layers. Simulated likewise.",
    "Experiment.registry": "Where instances and routers meet: etcd://, etcds://, redis:// or rediss://. A password stays out of the "
    "file: PDLAB_REGISTRY_PASSWORD has it.",
    "Experiment.workload": "What is asked, and when.",
    "Experiment.cluster": "The instances, and what joins them.",
    "Experiment.engine": "How an instance runs its batches.",
    "Experiment.transfer": "How KV cache gets from prefill to decode.",
    "Experiment.policy": "Who decides: a name from `pdlab policies` or path/to/file.py:Class, a mapping with a name and "
    "parameters, or one for each of dispatch, handoff, migrate, resize.",
    "Experiment.slo": "The objectives that attainment and goodput are counted by.",
    "Experiment.faults": "What goes wrong, and when.",
    "Experiment.cost": "How the seconds of a step are computed; at most one of roofline, table, fitted.",
    "Experiment.plan": "Among which deployments `pdlab plan` chooses; no other command reads it.",
    "Experiment.limits": "By when every wait ends.",
    "WorkloadSpec.source": "A built-in workload (drawn anew from figures fitted to a published trace), the path of a trace file (plain, "
    ".gz, .zst, .bz2, .xz), or synthetic.",
    "WorkloadSpec.format": "Of a trace file; auto looks at its first lines.",
    "WorkloadSpec.columns": "Of a trace file: pdlab's name of a column to the file's, such as {prompt_tokens: input_tokens}. Common "
    "names are known without.",
    "WorkloadSpec.time_unit": "Of a trace file's times; by default told from their size.",
    "WorkloadSpec.requests": "How many; by default the source's.",
    "WorkloadSpec.duration_s": "For how many seconds of arrivals.",
    "WorkloadSpec.rate": "Requests a second; by default the source's. A trace is stretched as a whole, so that its bursts stay bursts; "
    "synthetic needs a rate.",
    "WorkloadSpec.arrival": "The process of arrivals, in place of the source's own times; of synthetic it is Poisson. Of sessions it "
    "draws the starts; closed gives up their delays.",
    "WorkloadSpec.prompt": "Prompt length in tokens: a number or a distribution; by default the source's, synthetic needs one. In "
    "sessions: what each turn adds.",
    "WorkloadSpec.output": "Output length in tokens: a number or a distribution; by default the source's, synthetic needs one.",
    "WorkloadSpec.max_prompt_tokens": "Longer prompts are dropped, and counted.",
    "WorkloadSpec.max_output_tokens": "Longer answers are cut.",
    "WorkloadSpec.sessions": "Of synthetic: chats of several turns that share their beginning.",
    "WorkloadSpec.hash_tokens": "Prompt tokens behind one prefix hash. By default 16 of synthetic, and what a file shows.",
    "WorkloadSpec.priorities": "The share of each priority, such as {0: 0.9, 1: 0.1}; a higher one goes first.",
    "WorkloadSpec.ttft_slo_s": "The requests' own TTFT objective: a number, one for each priority ({0: 5.0, 1: 0.5}), or drawn; by "
    "default that of `slo`.",
    "WorkloadSpec.tpot_slo_s": "The requests' own TPOT objective: a number, one for each priority, or drawn; by default that of `slo`.",
    "WorkloadSpec.tenants": "The share of each tenant, by number, such as {1: 0.9, 2: 0.1}.",
    "WorkloadSpec.offline": "The part of the requests that is in no hurry (OpenAI: service_tier flex).",
    "WorkloadSpec.n": "Answers to each prompt. They share the prompt's KV through the prefix cache; without one each computes the prompt "
    "anew.",
    "WorkloadSpec.best_of": "Candidates that the answers are chosen from; by default n.",
    "Arrival.process": "poisson: at random. "
    "constant: at equal distances. gamma: bursty or regular, by `cv`. ramp: linearly to another rate, which then "
    "stays. step: from each time on another rate. day: a sine around `rate`. closed: the next request comes when one has ended. All but "
    "closed start from `rate`.",
    "Arrival.cv": "Coefficient of variation of the gaps: bursty above 1, regular below. Also of ramp, step and day.",
    "Arrival.to_rate": "Of ramp: the rate at its end, requests a second.",
    "Arrival.over_s": "Of ramp: seconds until then.",
    "Arrival.at_s": "Of step: from which times on, seconds.",
    "Arrival.rates": "Of step: the rate from each of these times on, requests a second.",
    "Arrival.amplitude": "Of day: how far the rate swings, as a share of it.",
    "Arrival.period_s": "Of day: seconds of one swing.",
    "Arrival.concurrency": "Of closed: requests in flight.",
    "Distribution.constant": "Always that many tokens.",
    "Distribution.uniform": "Between these two, tokens.",
    "Distribution.lognormal": "Lognormal, in tokens.",
    "Distribution.empirical": "Quantiles: [share, tokens], the share from 0 to 1.",
    "Lognormal.median": "Tokens; either this or the mean.",
    "Lognormal.mean": "Tokens; either this or the median.",
    "Lognormal.cv": "Coefficient of variation; either this or sigma.",
    "Lognormal.sigma": "Of the logarithm; either this or cv.",
    "Lognormal.max": "Nothing longer, tokens.",
    "ObjectiveChoice.constant": "The same for all, seconds.",
    "ObjectiveChoice.by_priority": "Seconds for each priority.",
    "ObjectiveChoice.uniform": "Drawn between these two, seconds.",
    "ObjectiveChoice.shares": "[seconds, share of the requests], the shares adding up to 1.",
    "Sessions.turns": "Turns of a chat, on average.",
    "Sessions.fixed_turns": "Every chat has that many.",
    "Sessions.think_s": "Seconds between an answer and the next turn, on average.",
    "Sessions.system_prompt_tokens": "That all sessions of a group begin with.",
    "Sessions.groups": "How many groups of sessions share a system prompt.",
    "Sessions.max_context_tokens": "Where a session ends.",
    "ClusterSpec.instances": "Rows, each describing `count` like instances; 10,000 in all at most.",
    "ClusterSpec.network": "The paths between the hosts.",
    "ClusterSpec.reports": "How fresh the policy's view is.",
    "ClusterSpec.role_switch_s": "Seconds an instance needs to change its role, once drained.",
    "ClusterSpec.detect_s": "Seconds until the router knows that an instance is dead which breaks off, or is asked in vain.",
    "ClusterSpec.autoscale": "Whether a policy may start and stop instances.",
    "InstancesSpec.role": "What they do; mixed does both. auto: the first `prefill` of the row prefill, the others decode.",
    "InstancesSpec.count": "How many.",
    "InstancesSpec.prefill": "With role auto: how many prefill, at least 1 and below `count`.",
    "InstancesSpec.hardware": "A name from `pdlab hardware`, or of a --hardware-file; figures of your own (a mapping, or a file with one, "
    ".yaml); or the path of a profile that `pdlab calibrate` wrote (.json).",
    "InstancesSpec.tp": "Accelerators that hold each layer of one instance (tensor parallel).",
    "InstancesSpec.dp_attention": "Groups among those accelerators that attend to sequences of their own (data-parallel attention); it "
    "divides tp. MLA whose heads tp does not divide has as many as tp.",
    "InstancesSpec.ep": "Groups among those accelerators that have experts of their own (expert parallel); it divides tp.",
    "InstancesSpec.pp": "Stages of so many accelerators each, a part of the layers on each (pipeline parallel).",
    "InstancesSpec.name": "Instances are named NAME-0, NAME-1, ...; just NAME where the row counts one. By default the role, counted "
    "through all rows.",
    "InstancesSpec.device": "Of these instances' engines; by default the file's.",
    "InstancesSpec.rack": "The rack that its host stands in, for policies that go by distance.",
    "InstancesSpec.zone": "The zone of that rack.",
    "InstancesSpec.host": "Instances of the same host reach each other without the network. By default each has one to itself.",
    "InstancesSpec.nics": "Network cards of an instance, whose bandwidths add up; by default one an accelerator.",
    "InstancesSpec.engine": "Where these instances' engine differs: any of the keys of `engine`.",
    "NetworkSpec.gbytes_per_s": f"Of one NIC. {_BANDWIDTH}",
    "NetworkSpec.latency_us": "Set-up time of a transfer, microseconds.",
    "NetworkSpec.transport": "What is achieved of the line rate, and the set-up of each transfer: mooncake-roce and mooncake-efa are "
    "fitted to published measurements.",
    "NetworkSpec.intra_host": "The paths between instances of one host.",
    "PathSpec.gbytes_per_s": f"Of one accelerator's scale-up link, or PCIe. {_BANDWIDTH}",
    "PathSpec.latency_us": "Set-up time of a transfer, microseconds; within a host 5 where nothing is said.",
    "ReportsSpec.period_s": "Seconds between an instance's reports of its load. Policies see nothing fresher, besides what the router "
    "itself has assigned.",
    "ReportsSpec.delay_s": "Seconds that a report travels.",
    "AutoscaleSpec.enabled": "Whether a policy's scaling is carried out.",
    "AcceleratorSpec.like": "Of `pdlab hardware`: it has the figures that are not given. Without it name, family, bf16_tflops, hbm_gib, "
    "hbm_gbytes_per_s, pcie_gbytes_per_s and nic_gbit_per_s are needed.",
    "AcceleratorSpec.name": "What results call it; by default custom-LIKE.",
    "AcceleratorSpec.vendor": "Who makes it.",
    "AcceleratorSpec.family": "Whose achieved fractions of the peaks it is given: ampere, ada, blackwell, a100, h100, cdna, ascend.",
    "AcceleratorSpec.bf16_tflops": "Dense peak, 10^12 operations a second.",
    "AcceleratorSpec.fp8_tflops": "Dense peak of eight bits; 0: it has no such units.",
    "AcceleratorSpec.hbm_gib": "Device memory, 2^30 bytes.",
    "AcceleratorSpec.hbm_gbytes_per_s": "Device memory's bandwidth, 10^9 bytes a second.",
    "AcceleratorSpec.scaleup_gbytes_per_s": "NVLink, HCCS or Infinity Fabric, in one direction; 0: none.",
    "AcceleratorSpec.scaleup_domain": "How many reach one another over it.",
    "AcceleratorSpec.pcie_gbytes_per_s": "In one direction.",
    "AcceleratorSpec.nic_gbit_per_s": "The network card that it has to itself, 10^9 bits a second.",
    "AcceleratorSpec.tdp_w": "Watts.",
    "AcceleratorSpec.usd_per_h": "Rough price of an hour.",
    "AcceleratorSpec.source": "Where the figures come from.",
    "AutoscaleSpec.min": "Instances in all, at least.",
    "AutoscaleSpec.max": "Instances in all, at most.",
    "AutoscaleSpec.start_s": "Seconds until a new one is ready.",
    "EngineSpec.like": "Whose step overheads, front end and achieved fractions of an accelerator's peaks are taken: vllm, sglang, trtllm, "
    "pdlab. How batches are formed is `batching`.",
    "EngineSpec.version": "Of the engine that `like` names, such as '0.11.2'. Measured versions share step times, so it changes none; "
    "a run says where it is older or newer than all that were measured.",
    "EngineSpec.speculation": "Speculative decoding; by default none (vLLM: --speculative-config).",
    "SpeculationSpec.method": "What drafts: mtp, the model's own layer for it; ngram, what followed in the sequence where its last tokens "
    "were before; draft_model, a smaller model.",
    "SpeculationSpec.tokens": "Drafted in a step, for each sequence (vLLM: num_speculative_tokens).",
    "SpeculationSpec.acceptance": "Probability that a draft is right if those before it are.",
    "SpeculationSpec.model": "Of method draft_model: as the served model is named; it has the same vocabulary.",
    "SpeculationSpec.prompt_lookup_min": "Of method ngram: the last tokens that are looked for, at least; by default prompt_lookup_max.",
    "SpeculationSpec.prompt_lookup_max": "And at most, which are tried first; by default prompt_lookup_min, or 5.",
    "EngineSpec.block_tokens": "Tokens in a KV block (vLLM: --block-size; SGLang: --page-size).",
    "EngineSpec.max_batch_tokens": "Tokens that one step computes (vLLM: --max-num-batched-tokens; SGLang: --chunked-prefill-size).",
    "EngineSpec.max_seqs": "Sequences that decode at once (vLLM: --max-num-seqs; SGLang: --max-running-requests).",
    "EngineSpec.batching": "How an instance forms its next batch. chunked: decodes in every step, chunks of prompts in what is left of "
    "the budget. prefill_first: whole prompts before decodes. decode_first: prompts only when nothing decodes. "
    "delayed: new prompts are held back for `steps` steps (SGLang's --scheduler-recv-interval, TensorRT-LLM's batch_wait_timeout_iters). "
    "slide_batching: by deadlines and predicted step times (xLLM's ProServe); it wants `slo`, or requests with objectives of their own. "
    "online_first: online requests before offline ones, of which none is in a batch with them (for the policy `ooco`). "
    "Parameters stand beside its name, as a policy's do: {name: slide_batching, urgency: 0.8}.",
    "EngineSpec.prefix_cache": "Keep computed prompt blocks for later prompts that begin alike.",
    "EngineSpec.watermark": "Fraction of the blocks that admitting a prompt leaves free.",
    "EngineSpec.kv_cache_dtype": "Number format of the KV cache: narrower than `dtype`, or the same; `fp8` is `fp8_e4m3` (vLLM: "
    "--kv-cache-dtype). Sides may differ: the reader converts.",
    "EngineSpec.kv_blocks": "KV blocks of an instance; by default what memory holds beside the weights, activations and the runtime.",
    "EngineSpec.hybrid_kv": "Layers with a window keep its KV only, as vLLM's hybrid KV cache manager has it; false: all of a sequence.",
    "EngineSpec.hbm_utilization": "The part of the accelerator's memory that may be used (vLLM: --gpu-memory-utilization).",
    "EngineSpec.max_model_len": "Tokens of prompt and output together that a request may have; by default the model's.",
    "TransferSpec.mode": "pull: the decode instance reads when the prompt is computed; push: the prefill instance writes.",
    "TransferSpec.granularity": "With push: the whole request at the end, each chunk once computed, or by layer during the computation.",
    "TransferSpec.reserve": "When the decode instance sets blocks aside. A push needs them before prefill; a pull takes them after, "
    "unless told otherwise.",
    "TransferSpec.response_path": "How tokens reach the router from a decode instance: straight, or through the instance that prefilled, "
    "which is one way longer and breaks off with that instance.",
    "TransferSpec.first_token": "Who sends it: the prefill instance at once, or the decode instance after the transfer.",
    "TransferSpec.timeout_s": "Seconds from hand-off after which a transfer counts as lost.",
    "SloSpec.ttft_s": "From arrival to first token, seconds.",
    "SloSpec.tpot_s": "The mean time of each further token, seconds.",
    "FaultSpec.at_s": "When, in seconds since the run began.",
    "FaultSpec.kill": "This instance dies, with all it holds. The router knows `detect_s` after something broke off, or was asked of it "
    "in vain; of one that nobody asks, when its lease has run out.",
    "FaultSpec.stop": "This instance's process stands still: it computes, sends and says nothing. Where that takes longer than what is "
    "left of its lease (`limits.lease_s`, renewed each third of it), it has lost its place and what it served, and takes part again as a "
    "new incarnation.",
    "FaultSpec.drain": "An operator drains this instance: it takes nothing new, ends what it has, and leaves.",
    "FaultSpec.slow": "This instance computes at `factor` of its speed: each step takes 1 / `factor` times as long, what is left of one "
    "under way, too.",
    "FaultSpec.slow_link": "This instance's network runs at `factor` of its bandwidth.",
    "FaultSpec.cut_link": "Nothing gets through to or from this instance.",
    "FaultSpec.cut": "No KV gets from one of these two instances to the other, as in [prefill-0, decode-0]; the router reaches both. A "
    "push is waited for in vain.",
    "FaultSpec.lose_reports": "This instance's reports do not arrive.",
    "FaultSpec.delay_reports": "This instance's reports arrive `by_s` later.",
    "FaultSpec.restart_after_s": "Of kill: seconds until it is back; by default never.",
    "FaultSpec.factor": "Of slow and slow_link: a share of the speed, above 0 and at most 1.",
    "FaultSpec.decode_factor": "Of slow: the share for steps that only decode, which wait for memory more than for arithmetic; by "
    "default `factor`.",
    "FaultSpec.by_s": "Of delay_reports: seconds. Of cut: until a reader knows, by default when it has asked.",
    "FaultSpec.for_s": _FOR,
    "CostSpec.roofline": "The name of a shipped set of achieved fractions, or a mapping of them; by default that of `engine.like` on "
    "the accelerator's family.",
    "CostSpec.table": "The path of a table of step times, interpolated, or the name of a shipped one, such as llama-3.1-8b-h100-sxm-tp1.",
    "CostSpec.fitted": "The name of a shipped fit in DistServe's form, or a mapping of its coefficients.",
    "CostSpec.extrapolate": "Let a table go on beyond its grid instead of stopping with an error.",
    "CostSpec.weight_dtype": "Number format of the layers' weights; by default as `quantization` or `dtype` say, or as published.",
    "CostSpec.kv_dtype": "Number format of the KV cache; by default as `engine.kv_cache_dtype` or `dtype` say, or bf16.",
    "CostSpec.factors": "What the seconds are multiplied by, to see what hangs on them.",
    "CostFactors.prefill": "Of what prompts take.",
    "CostFactors.decode": "Of what decode steps take.",
    "CostFactors.link": "Of what bytes on the network, and between the instances of a host, take.",
    "CostFactors.front": "Of what the front end takes before a first token.",
    "PlanSpec.splits": "mixed: instances that prefill and decode. pd: instances of each role.",
    "PlanSpec.hardware": "Accelerators, each of which a role may run on; by default those of `cluster.instances`.",
    "PlanSpec.tp": "Accelerators of one instance, for each role apart.",
    "PlanSpec.max_batch_tokens": "Of `engine`: tokens that one step computes, which is the chunk budget.",
    "PlanSpec.max_seqs": "Of `engine`: sequences that decode together.",
    "PlanSpec.batching": "Of `engine`; by default the file's.",
    "PlanSpec.policy": "Policies, each written as `policy` is; by default the file's and least_loaded.",
    "PlanSpec.transfer": "Of `transfer`: its modes. push goes layer by layer.",
    "PlanSpec.prefix_cache": "Of `engine`; by default both where the workload's prompts share prefixes, else as the file says.",
    "PlanSpec.accelerators_per_host": "An instance stays within a host; KV between two of one host does not take the network.",
    "PlanSpec.usd_per_h": "What an hour of an accelerator costs; by default what `pdlab hardware` says.",
    "Coefficients.compute": "Share of peak arithmetic that linear layers achieve.",
    "Coefficients.compute_8bit": "The same with 8-bit weights and activations.",
    "Coefficients.memory": "Share of peak bandwidth in reading weights.",
    "Coefficients.attention_memory": "Share of peak bandwidth in reading KV.",
    "Coefficients.attention_compute": "Share of peak arithmetic that attention achieves.",
    "Coefficients.collective": "Share of the bandwidth between ranks.",
    "Coefficients.collective_latency": "Times the latencies of collectives.",
    "Coefficients.compute_4bit": "Share of peak arithmetic in four bits, where the accelerator has it.",
    "Coefficients.compute_widened": "Share of peak arithmetic in 16 bits, where four-bit weights are widened first.",
    "Coefficients.experts": "Share of what linear layers achieve that experts' grouped products do.",
    "Coefficients.experts_memory": "Share of peak bandwidth in reading experts.",
    "Coefficients.four_bit_read": "Times the time that reading four-bit weights would take by their bytes.",
    "Coefficients.activations": "Times the bytes of values between products.",
    "Coefficients.expert_activations": "The same of tokens on their way to experts and back.",
    "Coefficients.diversity": "How unlike the tokens of a step choose their experts; 1 is by chance.",
    "Coefficients.imbalance": "Times the spread of experts' load that chance brings.",
    "Coefficients.expert_layer_s": "More of a layer with experts, seconds.",
    "Coefficients.latent_layer_s": "More of a layer with MLA, seconds.",
    "Coefficients.sparse_layer_s": "More of a layer whose indexer chooses what is attended to, seconds.",
    "Coefficients.recurrent_layer_s": "More of a layer of linear attention or SSM, seconds.",
    "Coefficients.request_s": "Of the front end, before a request's first token, seconds.",
    "Coefficients.error": "TPOT: |log(measured / simulated)| in 95 % of configurations that were left out of the fit.",
    "Coefficients.ttft_error": "The same of TTFT.",
    "Coefficients.rows": "Measured rows that they were fitted to.",
    "Coefficients.step_s": "Overhead of a step, seconds.",
    "Coefficients.layer_s": "Overhead of a layer, seconds.",
    "Coefficients.sequence_s": "Overhead of a sequence in a step, seconds.",
    "Coefficients.calibrated": "Whether they were fitted to measurements.",
    "Coefficients.source": "Where they come from.",
    "FittedCoefficients.prefill": "Of a step of prompts.",
    "FittedCoefficients.decode": "Of a step of decodes.",
    "FittedCoefficients.large": "Of decodes from `large_batch` sequences on, in place of `decode`.",
    "FittedCoefficients.large_batch": "Sequences.",
    "PrefillFit.base_s": "Of a step, seconds.",
    "PrefillFit.s_per_token": "Of each prompt token, seconds.",
    "PrefillFit.s_per_token2": "Of the sum of squared prompt lengths, seconds.",
    "DecodeFit.base_s": "Of a step, seconds.",
    "DecodeFit.s_per_token": "Of each context token, seconds.",
    "DecodeFit.s_per_sequence": "Of each sequence, seconds.",
    "LimitsSpec.request_timeout_s": "From arrival, seconds; what has not ended by then is expired.",
    "LimitsSpec.max_attempts": "Losses (of an instance, of a transfer) that a request survives.",
    "LimitsSpec.lease_s": "Seconds of silence after which an instance is probed.",
    "LimitsSpec.probe_s": "Seconds that the probes take before it is suspect.",
    "LimitsSpec.suspect_s": "Seconds that it stays suspect before it is fenced and its requests go elsewhere.",
    "LimitsSpec.max_in_flight": "Requests that have arrived and not ended; more are rejected, live with 429. By default any number; a "
    "live router then takes --max-requests.",
    "LimitsSpec.grace_s": "Seconds that requests wait for an instance when the last that could serve them has left; 0: they end at once.",
}


def schema() -> dict[str, Any]:
    """Draft 2020-12, of what `Experiment.load` takes."""
    whole = Experiment.model_json_schema(mode="validation")
    strategies = {"enum": sorted(batching.names())}
    whole["$defs"]["EngineSpec"]["properties"]["batching"] = {
        "anyOf": [strategies, {"type": "object", "properties": {"name": strategies}, "required": ["name"]}],
        "default": "chunked",
    }
    named = {
        "Experiment.model": {"examples": model_names()},
        "Experiment.policy": {"examples": load_policy.names()},
        "InstancesSpec.hardware": {"examples": hardware_names()},
        "WorkloadSpec.source": {"examples": [*sorted(builtin.NAMES), "synthetic"]},
    }
    for name, kind in {"Experiment": whole, **whole["$defs"]}.items():
        for key, of in kind.get("properties", {}).items():
            path = f"{name}.{key}"
            of.pop("title", None)
            of.update(named.get(path, {}))
            if path in DESCRIPTIONS:
                of["description"] = DESCRIPTIONS[path]
    whole["required"] = ["model"]  # all that `pdlab serve` asks for
    whole.pop("description", None)
    whole = _standard(whole)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "pdlab experiment",
        "description": "What `pdlab sim`, `serve` and `bench` read. A simulation needs `workload`, and `hardware` of its instances. "
        "docs/reference/experiment-file.md explains it.",
    }


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_SHORT: dict[str, list[dict[str, Any]]] = {  # what may stand for a mapping
    "#/$defs/Distribution": [{"type": "number"}],
    "#/$defs/ObjectiveChoice": [
        {"type": "number"},
        {"type": "object", "patternProperties": {"^-?[0-9]+$": {"type": "number"}}, "additionalProperties": False},
    ],
    "#/$defs/Arrival": [{"type": "string"}],
}


def _standard(part: Any) -> Any:
    """pydantic's words for bounds as JSON schema has them, and the short forms that validators take."""
    if isinstance(part, list):
        return [_standard(one) for one in part]
    if not isinstance(part, dict):
        return part
    if (short := _SHORT.get(str(part.get("$ref")))) is not None:
        return {"anyOf": [*short, part]}
    bounds = part.get("type") in ("integer", "number")
    return {_BOUNDS.get(key, key) if bounds else key: _standard(value) for key, value in part.items()}
