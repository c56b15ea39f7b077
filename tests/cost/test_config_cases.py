"""Published models' configs, as others had trouble with them: what is in ../shared/cases/configs, and what is right of it."""

from pathlib import Path

import pytest

from pdlab.cost.capacity import kv_capacity_tokens
from pdlab.cost.catalogue import hardware, model

CONFIGS = Path(__file__).resolve().parents[2] / "../shared/cases/configs"
pytestmark = pytest.mark.skipif(not CONFIGS.is_dir(), reason="../shared/cases is not here")


def read(name):
    return model(str(CONFIGS / name))


@pytest.mark.parametrize(
    ("name", "weights_gb", "bits"),
    [
        ("qwen3-8b-plain", 16.38, 16),
        ("qwen3-8b-ct-fp8", 9.44, 8),
        ("qwen3-8b-modelopt-fp8", 9.44, 8),
        ("qwen3-8b-fbgemm", 9.44, 8),
        ("qwen3-8b-gptq8", 9.60, 8),  # with zero points and scales of 128
        ("qwen3-8b-awq", 6.10, 4),
        ("qwen3-8b-ct-w4a16", 6.07, 4),
        ("qwen3-8b-modelopt-nvfp4", 6.40, 4),  # a byte of scale for 16 weights
        ("gpt-oss-20b", 13.75, 4),
    ],
)
def test_weights_take_what_their_quantisation_says(name, weights_gb, bits):
    m = read(name)
    assert m.weights_bytes(m.weight_dtype) == m.weights_bytes() == pytest.approx(weights_gb * 1e9, rel=0.002)
    assert {"bf16": 16, "fp8": 8, "int8": 8, "wint4": 4, "nvfp4": 4, "mxfp4": 4}[m.weight_dtype] == bits


def test_seventy_billion_in_eight_bits_fit_one_accelerator():
    m = read("llama-3.3-70b-ct-fp8")
    assert kv_capacity_tokens(m, hardware("h200-sxm"), weight_dtype=m.weight_dtype) > 100_000


@pytest.mark.parametrize(
    ("name", "total_b", "kv_kib"),
    [
        ("gemma-3-4b-it", 3.88, 136),
        ("glm-4-9b-chat", 9.40, 40),
        ("command-r-35b", 34.98, 1280),
        ("gpt-j-6b", 6.05, 448),
        ("nemotron-h-8b", 8.10, 16),
        ("qwen3-next-80b", 79.67, 24),
        ("glm-4.5-air", 106.9, 184),
        ("olmoe-1b-7b", 6.92, 128),
        ("kimi-k2", 1026, 68.625),
        ("qwen2.5-vl-7b-nested", 7.62, 56),
    ],
)
def test_parameters_and_kv(name, total_b, kv_kib):
    m = read(name)
    assert m.total_params == pytest.approx(total_b * 1e9, rel=0.002)
    assert m.kv_bytes_per_token() == kv_kib * 1024


def test_experts_listed_by_layer_are_active():
    assert read("hunyuan-a13b").active_params == pytest.approx(12.8e9, rel=0.01)


@pytest.mark.parametrize(("name", "windowed", "layers"), [("gemma-2-9b", 21, 42), ("gemma-3-1b-it", 22, 26), ("gpt-oss-20b", 12, 24)])
def test_windowed_layers(name, windowed, layers):
    m = read(name)
    assert (m.window_layers, m.layers) == (windowed, layers)


@pytest.mark.parametrize("name", ["qwen3-next-80b", "nemotron-h-8b"])
def test_layers_without_kv_have_a_state(name):
    m = read(name)
    assert m.state_bytes > 50e6
    assert m.kv_bytes_per_sequence(1000) == 1000 * m.kv_bytes_per_token() + m.state_bytes
