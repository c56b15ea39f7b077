from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdlab.core.types import UNKNOWN, Report, Role, StepTime, UsageError
from pdlab.real.net.http import Broken
from pdlab.real.registry.records import encode, read_report
from pdlab.real.router.vllm import Vllm, VllmMetrics
from tests.support.fake_instance import Fake

HEAD = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",cache_dtype="auto",enable_prefix_caching="True",engine="0",num_gpu_blocks="50"} 1.0
"""
NOW = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="fake"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="fake"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="fake"} 0.2
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="fake"} 4.0
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="fake"} 10.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf",model_name="fake"} 10.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="fake"} 10.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="fake"} 0.5
"""
ONCE = """\
vllm:num_requests_running{model_name="fake"} 3.0
vllm:num_requests_waiting{model_name="fake"} 2.0
vllm:gpu_cache_usage_perc{model_name="fake"} 0.2
vllm:num_preemptions{model_name="fake"} 4.0
vllm:time_per_output_token_seconds_count{model_name="fake"} 10.0
vllm:time_per_output_token_seconds_sum{model_name="fake"} 0.5
"""


def world(test: Callable[[Fake, Vllm], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with Fake(vllm=True, **options) as fake:
            server = Vllm(fake.url, "key")
            try:
                async with asyncio.timeout(60):
                    await test(fake, server)
            finally:
                server.close()
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_probe_tells_the_model_and_its_kv_memory() -> None:
    async def test(fake: Fake, server: Vllm) -> None:
        spec, context_tokens = await server.probe("vllm-0", Role.PREFILL)
        assert (spec.model, spec.engine, spec.url, spec.role) == ("fake", "vllm", fake.url, Role.PREFILL)
        assert (spec.kv_blocks, spec.block_tokens, spec.prefix_cache, spec.capabilities) == (50, 128, True, ("pull",))
        assert context_tokens == spec.context_tokens == 4096
        assert await server.healthy()
        assert all(headers["authorization"] == "Bearer key" for _, headers, _ in fake.asked)
        with pytest.raises(UsageError, match="serves fake, not 'other'"):
            await server.probe("vllm-0", Role.PREFILL, "other")

    world(test, metrics=HEAD + NOW)


@pytest.mark.parametrize("metrics", [NOW, ONCE])
def test_a_report_reads_new_and_old_names(metrics: str) -> None:
    async def test(fake: Fake, server: Vllm) -> None:
        spec, _ = await server.probe("vllm-0", Role.DECODE)
        report = Report(
            "vllm-0",
            0,
            7.0,
            waiting=2,
            waiting_tokens=UNKNOWN,
            running=3,
            context_tokens=UNKNOWN,
            used_blocks=10,
            free_blocks=40,
            waiting_head_blocks=UNKNOWN,
            waiting_blocks=UNKNOWN,
            preempted=4,
            decode_steps=10,
            decode_s=0.5,
            steps=(StepTime(3, 10 * 128, 0, 0, 0.05),),
        )
        assert await server.report(spec, 7.0) == report == read_report("vllm-0", encode(report))

    world(test, metrics=HEAD + metrics)


def test_the_step_is_that_since_the_last_report() -> None:
    async def test(fake: Fake, server: Vllm) -> None:
        spec, _ = await server.probe("vllm-0", Role.DECODE)
        steps = []
        for tokens, seconds in ((10, 0.5), (20, 0.7), (20, 0.7), (5, 0.1)):  # the last after a restart
            fake.metrics = HEAD + f"vllm:inter_token_latency_seconds_count {tokens}\nvllm:inter_token_latency_seconds_sum {seconds}\n"
            report = await server.report(spec, 0.0)
            assert (report.decode_steps, report.decode_s) == (tokens, seconds)
            steps.append([step.seconds for step in report.steps])
        assert steps == [pytest.approx([0.05]), pytest.approx([0.02]), [], pytest.approx([0.02])]

    world(test, metrics=HEAD)


def test_the_mean_prompt_since_the_last_report_is_told_without_what_was_cached_or_received() -> None:
    async def test(fake: Fake, server: Vllm) -> None:
        spec, _ = await server.probe("vllm-0", Role.PREFILL)
        told = []
        for requests, seconds, tokens, hits, received in ((2, 1.0, 400, 0, 0), (6, 2.0, 1600, 600, 300), (7, 2.1, 1700, 700, 300)):
            fake.metrics = HEAD + (
                f"vllm:request_prefill_time_seconds_count {requests}\nvllm:request_prefill_time_seconds_sum {seconds}\n"
                f"vllm:request_prompt_tokens_count {requests}\nvllm:request_prompt_tokens_sum {tokens}\n"
                f"vllm:prefix_cache_queries_total {tokens}\nvllm:prefix_cache_hits_total {hits}\n"
                f"vllm:external_prefix_cache_hits_total {received}\n"
            )
            told.append([(step.prompt_tokens, step.seconds) for step in (await server.report(spec, 0.0)).steps])
        assert told == [[(200, 0.5)], [(75, 0.25)], []]

    world(test, metrics=HEAD)


def test_several_engines_behind_one_server_count_together() -> None:
    async def test(fake: Fake, server: Vllm) -> None:
        spec, _ = await server.probe("vllm-0", Role.DECODE)
        report = await server.report(spec, 0.0)
        assert (spec.kv_blocks, report.running, report.used_blocks, report.free_blocks) == (100, 3, 50, 50)

    lines = (f'vllm:num_requests_running{{engine="{i}"}} {i + 1}\nvllm:kv_cache_usage_perc{{engine="{i}"}} {i}\n' for i in range(2))
    world(test, metrics=HEAD + HEAD.replace('engine="0"', 'engine="1"') + "".join(lines))


def test_a_server_that_is_no_vllm_is_broken_and_one_that_refuses_the_key_the_users_matter() -> None:
    async def test(fake: Fake, server: Vllm) -> None:
        with pytest.raises(Broken, match="num_gpu_blocks"):
            await server.probe("vllm-0", Role.DECODE)
        fake.metrics = "{{{ no metrics"
        with pytest.raises(Broken, match="cannot be read"):
            await server.probe("vllm-0", Role.DECODE)
        fake.refuse = (503, "engine_down")
        assert not await server.healthy()
        fake.refuse = (401, "invalid_api_key")
        with pytest.raises(UsageError, match="API key"):
            await server.probe("vllm-0", Role.DECODE)

    world(test)


def test_nobody_there_is_broken_and_not_healthy() -> None:
    async def test(fake: Fake, server: Vllm) -> None:
        fake.server.close()
        await fake.server.wait_closed()
        assert not await server.healthy()
        with pytest.raises(Broken, match="cannot connect"):
            await server.probe("vllm-0", Role.DECODE)

    world(test)


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert VllmMetrics("vllm:num_requests_running NaN\n").total(("vllm:num_requests_running",)) == 0
