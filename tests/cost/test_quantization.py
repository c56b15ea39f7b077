"""What each quantiser writes, in bytes a weight of the layers, and what it leaves alone."""

import json

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import model
from pdlab.cost.huggingface import parse
from pdlab.cost.shapes import Part

DENSE = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def ct(weights, inputs=None, form="pack-quantized", ignore=("lm_head",), targets=("Linear",)):
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": list(ignore)}


def quark(weight, inputs=None, **more):
    return {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs}, "exclude": ["lm_head"], **more}


def ao(kind, **fields):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 1, "_data": fields}}}


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
QUARK_MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
PRESET = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
AUTO_MXFP4 = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}, "skip_modules": ["lm_head"]}
WRITTEN = {
    "fp8, blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}, 1.0, "fp8"),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, 1.0, "fp8"),
    "ct fp8": (ct(FP8, FP8, "float-quantized"), 1.0, "fp8"),
    "ct fp8, weights only": (ct(FP8, None, "naive-quantized"), 1.0, "bf16"),
    "ct fp8 of old": ({"compression": 1, **ct(FP8, FP8, "float-quantized")}, 1.0, "fp8"),
    "ct int8": (ct(INT8, INT8, "int-quantized"), 1.0, "int8"),
    "ct w8a16": (ct(INT8 | {"strategy": "group", "group_size": 128}), 1 + 2 / 128, "bf16"),
    "ct w4a16": (ct(INT4), 0.5 + 2 / 128, "bf16"),
    "ct w4a16, zero points": (ct(INT4 | {"symmetric": False, "group_size": 32}), 0.5 + 2.5 / 32, "bf16"),
    "ct w4a8": (ct(INT4, FP8), 0.5 + 2 / 128, "fp8"),
    "ct nvfp4": (ct(NVFP4, NVFP4, "nvfp4-pack-quantized"), 0.5625, "nvfp4"),
    "ct nvfp4, weights only": (ct(NVFP4, None, "nvfp4-pack-quantized"), 0.5625, "bf16"),
    "ct nvfp4, presets": (PRESET | {"config_groups": {"NVFP4": ["Linear"]}}, 0.5625, "nvfp4"),
    "ct nvfp4a16, presets": (PRESET | {"config_groups": {"NVFP4A16": ["Linear"]}}, 0.5625, "bf16"),
    "ct mxfp4": (ct(MXFP4, MXFP4, "mxfp4-pack-quantized"), 0.53125, "mxfp4"),
    "ct mxfp4, weights only": (ct(MXFP4, None, "mxfp4-pack-quantized"), 0.53125, "bf16"),
    "ct mxfp4, activations in 8 bits": (ct(MXFP4, FP8, "mxfp4-pack-quantized"), 0.53125, "fp8"),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, 1.0, "fp8"),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, 0.5625, "nvfp4"),
    "modelopt w4a16": ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]}, 0.5625, "bf16"),
    "modelopt w4a8": ({"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8", "ignore": ["lm_head"]}, 0.5625, "fp8"),
    "modelopt awq": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128}, 0.5 + 2 / 128, "bf16"),
    "modelopt of old": ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, 1.0,
        "fp8"),
    "modelopt by groups": ({"quant_method": "modelopt", "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8}}}, 1.0,
        "bf16"),
    "bnb nf4": (NF4, 0.5 + 4 / 64, "bf16"),
    "bnb nf4, twice": (NF4 | {"bnb_4bit_use_double_quant": True}, 0.5 + 1 / 64 + 4 / 16384, "bf16"),
    "bnb int8": ({"quant_method": "bitsandbytes", "_load_in_8bit": True, "_load_in_4bit": False}, 1.0, "int8"),
    "quark fp8": (quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}), 1.0, "fp8"),
    "quark int8": (quark({"dtype": "int8", "qscheme": "per_channel", "symmetric": True}, {"dtype": "int8"}), 1.0, "int8"),
    "quark uint4": (quark({"dtype": "uint4", "qscheme": "per_group", "group_size": 128}), 0.5 + 2.5 / 128, "bf16"),
    "quark mxfp4": (quark(QUARK_MXFP4, QUARK_MXFP4), 0.53125, "mxfp4"),
    "quark mxfp4, weights only": (quark(QUARK_MXFP4), 0.53125, "bf16"),
    "quark mxfp6": (quark({"dtype": "fp6_e2m3", "qscheme": "per_group", "group_size": 32}), 0.78125, "bf16"),
    "torchao int4": ({"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 128}},
        0.5 + 2.5 / 128, "bf16"),
    "torchao int8": ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, 1.0, "bf16"),
    "torchao int8 dynamic": ({"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int8_weight"}, 1.0, "int8"),
    "torchao fp8": (ao("Float8DynamicActivationFloat8WeightConfig"), 1.0, "fp8"),
    "torchao fp8, weights only": (ao("Float8WeightOnlyConfig"), 1.0, "bf16"),
    "torchao int4, serialised": (ao("Int4WeightOnlyConfig", group_size=64), 0.5 + 2.5 / 64, "bf16"),
    "torchao int8 x int4": (ao("Int8DynamicActivationInt4WeightConfig", group_size=32), 0.5 + 2 / 32, "int8"),
    "torchao intx": (
        ao("Int8DynamicActivationIntxWeightConfig", weight_dtype={"_type": "torch.dtype", "_data": "int4"},
           weight_granularity={"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}), 0.5 + 2.5 / 32, "int8",
    ),
    "torchao nvfp4": (ao("NVFP4InferenceConfig"), 0.5625, "nvfp4"),
    "torchao nvfp4, weights only": (ao("NVFP4WeightOnlyConfig"), 0.5625, "bf16"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}, 0.5 + 2.5 / 128, "bf16"),
    "auto-round mxfp4": (AUTO_MXFP4 | {"act_bits": 4}, 0.53125, "mxfp4"),
    "auto-round mxfp4, weights only": (AUTO_MXFP4, 0.53125, "bf16"),
    "auto-round of intel": ({"quant_method": "intel/auto-round", "bits": 2, "group_size": 32, "sym": True}, 0.25 + 2.25 / 32, "bf16"),
    "gptq": (GPTQ, 0.5 + 2.5 / 128, "bf16"),
    "gptq, 3 bits": (GPTQ | {"bits": 3}, 0.375 + 2.375 / 128, "bf16"),
    "gptq, whole channels": (GPTQ | {"group_size": -1}, 0.5, "bf16"),
    "gptq_marlin": (GPTQ | {"quant_method": "gptq_marlin", "bits": 8}, 1 + 3 / 128, "bf16"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, 0.5 + 2.5 / 128, "bf16"),
    "awq of old": ({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}, 0.5 + 2.5 / 64, "bf16"),
    "hqq": (HQQ, 0.5 + 2.5 / 64, "bf16"),
    "quanto": ({"quant_method": "quanto", "weights": "int8", "activations": None}, 1.0, "bf16"),
    "eetq": ({"quant_method": "eetq", "weights": "int8"}, 1.0, "bf16"),
    "higgs": ({"quant_method": "higgs", "bits": 4, "group_size": 256, "p": 2}, 0.5 + 2 / 256, "bf16"),
    "bitnet": ({"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}, 0.25, "int8"),
    "fp_quant": ({"quant_method": "fp_quant", "forward_dtype": "mxfp4"}, 0.53125, "mxfp4"),
    "nvfp4": ({"quant_method": "nvfp4"}, 0.5625, "nvfp4"),
}  # fmt: skip


def of(config, quantization):
    return parse(config | {"quantization_config": quantization}, "m").model


def held(m):
    """Format by part."""
    return {w.part: w.format for w in m.weights}


@pytest.mark.parametrize("name", WRITTEN)
def test_each_method_takes_its_bytes_in_the_layers_and_leaves_embedding_and_head(name):
    written, size, compute = WRITTEN[name]
    formats = held(of(DENSE, written))
    assert formats[Part.ATTENTION] == formats[Part.MLP]
    assert formats[Part.MLP].bytes_per_value == pytest.approx(size, abs=1e-9)
    assert formats[Part.MLP].compute == compute
    assert formats[Part.EMBEDDING].dtype == formats[Part.HEAD].dtype == "bf16"


def share(m, part, dtype):
    """Of a part's parameters, how many are in that format?"""
    of_part = [w for w in m.weights if w.part is part]
    return sum(w.params for w in of_part if w.format.dtype == dtype) / sum(w.params for w in of_part)


@pytest.mark.parametrize(
    ("listed", "part", "wide"),
    [
        (["lm_head", "model.layers.0.self_attn", "model.layers.7.self_attn"], Part.ATTENTION, 2 / 8),
        (["lm_head", "re:.*self_attn.*"], Part.ATTENTION, 1),
        (["lm_head", "re:model\\.layers\\.[0-3]\\..*"], Part.EXPERTS, 4 / 8),
        (["lm_head", "model.layers.*.mlp.gate"], Part.ROUTER, 1),
        (["lm_head", "re:.*mlp.gate$"], Part.ROUTER, 1),
        (["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(8))], Part.ROUTER, 1),
        (["mlp.gate"], Part.ROUTER, 1),
        (["lm_head", "model.layers.1.mlp.experts.5.down_proj", "model.layers.10.self_attn"], Part.ATTENTION, 0),
        (["model.layers.1"], Part.ATTENTION, 1 / 8),
        (["lm_head", "*self_attn*"], Part.ATTENTION, 1),
    ],
)
@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert", "exclude", "ignored_layers"])
def test_modules_listed_stay_wide(listed, part, wide, key):
    if key == "ignore":
        written = ct(FP8, FP8, "float-quantized", ignore=listed)
    elif key == "exclude":
        written = quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor"}) | {"exclude": listed}
    else:
        written = {"quant_method": "fp8", key: listed}
    m = of(MOE, written)
    assert share(m, part, "bf16") == pytest.approx(wide)
    assert share(m, Part.EXPERTS, "fp8") > 0.4


def test_a_router_is_not_a_gate_projection():
    m = of(DENSE, {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["mlp.gate"]})
    assert share(m, Part.MLP, "wint4") == 1


def test_groups_have_formats_of_their_own():
    groups = {
        "group_0": {"targets": ["re:.*self_attn.*"], "weights": FP8, "input_activations": FP8},
        "group_1": {"targets": ["re:.*mlp.*"], "weights": INT4, "input_activations": None},
    }
    m = of(DENSE, {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ["lm_head"]})
    formats = held(m)
    assert (formats[Part.ATTENTION].dtype, formats[Part.MLP].dtype, formats[Part.HEAD].dtype) == ("fp8", "wint4", "bf16")
    listed = {f"model.layers.{i}.mlp.{p}_proj": {"quant_algo": "NVFP4", "group_size": 16} for i in range(8) for p in ("gate", "up", "down")}
    listed |= {f"model.layers.{i}.self_attn.{p}_proj": {"quant_algo": "FP8"} for i in range(7) for p in "qkvo"}
    m = of(DENSE, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": listed})
    assert share(m, Part.MLP, "nvfp4") == 1
    assert share(m, Part.ATTENTION, "fp8") == pytest.approx(7 / 8)
    m = of(DENSE, GPTQ | {"dynamic": {"-:.*down_proj.*": {}, "+:.*self_attn.*": {"bits": 8, "group_size": 32}}})
    assert share(m, Part.MLP, "bf16") == pytest.approx(1 / 3)
    assert share(m, Part.ATTENTION, "int8") == 1
    rounded = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "extra_config": {"model.layers.0.self_attn.q_proj": {"bits": 16}},
    }
    assert 0 < share(of(DENSE, rounded), Part.ATTENTION, "bf16") < 1 / 8


@pytest.mark.parametrize(
    "written",
    [
        ct(FP8, FP8, "float-quantized", ignore=()),
        GPTQ | {"lm_head": True},
        ao("Int8WeightOnlyConfig") | {"include_input_output_embeddings": True},
    ],
)
def test_a_head_is_quantised_where_the_method_says_so(written):
    assert share(of(DENSE, written), Part.HEAD, "bf16") == 0


def test_mlx_quantises_embedding_and_head_too():
    mlx = {
        "group_size": 64,
        "bits": 4,
        "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 8},
        "model.layers.1.mlp.down_proj": False,
    }
    m = parse(DENSE | {"quantization": mlx, "quantization_config": mlx}, "m").model
    formats = held(m)
    assert (
        formats[Part.EMBEDDING].bytes_per_value == formats[Part.HEAD].bytes_per_value == formats[Part.ATTENTION].bytes_per_value == 0.5625
    )
    assert share(m, Part.MLP, "int8") == share(m, Part.MLP, "bf16") == pytest.approx(1 / 24)


@pytest.mark.parametrize("extra", [{"quantization": "fp8"}, {"quant_config": {"bits": 4}}, {"weight_quantization": "int4"}])
def test_quantisation_said_elsewhere_is_not_passed_over(extra):
    with pytest.raises(UsageError, match=f"{next(iter(extra))}"):
        parse(DENSE | extra, "m")


def test_mxfp4_and_int8_of_experts_is_of_experts_only():
    for method, dtype in (("mxfp4", "mxfp4"), ("experts_int8", "int8")):
        m = of(MOE, {"quant_method": method})
        assert share(m, Part.EXPERTS, dtype) == 1
        assert share(m, Part.ATTENTION, "bf16") == share(m, Part.ROUTER, "bf16") == 1


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"quant_method": "fp7"}, "unknown quant_method 'fp7'"),
        ({"quant_method": "gptqq", "bits": 4}, "unknown quant_method 'gptqq'; nearest is gptq"),
        ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "'aqlm' is not supported"),
        ({"foo": 1}, "lacks 'quant_method'"),
        ({"quant_method": "gptq", "group_size": 128}, "lacks 'bits'"),
        ({"quant_method": "gptq", "bits": 4}, "lacks 'group_size'"),
        ({"quant_method": "awq", "bits": "four", "group_size": 128}, "bits must be a whole number"),
        ({"quant_method": "gptq", "bits": 40, "group_size": 128}, "40 bits"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        (ct(FP8, None, "float-quantised"), "unknown quantization_config.format 'float-quantised'; nearest is float-quantized"),
        (ct({"num_bits": 5, "type": "float"}), "floating-point weights of 5 bits"),
        (ct({"num_bits": 4, "type": "float", "strategy": "channel"}), "floating-point weights of 4 bits in groups of 0"),
        (ct({"type": "int"}), "lacks 'num_bits'"),
        (ct({"num_bits": 4, "type": "int", "strategy": "group"}), "lacks 'group_size'"),
        (ct({"num_bits": 4, "type": "complex"}), "type 'complex'"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "lacks 'config_groups'"),
        (ct(INT8) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not supported"),
        (ct(FP8, ignore=["re:(("]), "is no regular expression"),
        ({"quant_method": "modelopt", "quant_algo": "FP9"}, "unknown quant_algo 'FP9'"),
        ({"quant_method": "modelopt"}, "lacks 'quant_algo'"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "lacks 'quantized_layers'"),
        (quark({"dtype": "bfp99"}), "unknown dtype 'bfp99'"),
        ({"quant_method": "quark"}, "lacks 'global_quant_config'"),
        ({"quant_method": "torchao"}, "lacks 'quant_type'"),
        (ao("SecretConfig"), "unknown quant_type 'SecretConfig'"),
        ({"quant_method": "quanto", "weights": "int5"}, "weights 'int5' is not one of"),
        ({"quant_method": "hqq"}, "lacks 'quant_config'"),
        ({"quant_method": "fp8", "fmt": "posit"}, "unknown kind 'posit'"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "data_type": "log"}, "data_type 'log'"),
        (["fp8"], "must be a mapping"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named(written, says):
    with pytest.raises(UsageError, match="model config m") as caught:
        of(DENSE, written)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "dtype"),
    [
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}},
            "nvfp4",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "wint4"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "wint4"),
    ],
)
def test_a_quantisers_own_file_beside_the_config_counts(tmp_path, file, content, dtype):
    (tmp_path / "config.json").write_text(json.dumps(DENSE), encoding="utf-8")
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    assert model(str(tmp_path)).weight_dtype == dtype


def test_a_wrappers_quantisation_is_its_texts(tmp_path):
    wrapped = {"model_type": "llava", "text_config": DENSE, "quantization_config": {"quant_method": "fp8"}}
    m = parse(wrapped, "m").model
    assert m.weight_dtype == "fp8"
    assert share(m, Part.MLP, "fp8") == 1


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("torch.float16", 2), (None, 2)])
def test_unquantised_weights_take_what_their_dtype_says(dtype, size):
    m = parse(DENSE | {"torch_dtype": dtype}, "m").model
    assert m.weights_bytes() == size * m.total_params


def test_an_unknown_dtype_is_named():
    with pytest.raises(UsageError, match="unknown dtype 'float15'; nearest is float16"):
        parse(DENSE | {"torch_dtype": "float15"}, "m")


def test_asked_for_in_another_format_all_layers_are():
    m = of(MOE, ct(FP8, FP8, "float-quantized", ignore=["lm_head", "re:.*self_attn.*"]))
    assert m.weights_bytes("fp8") == m.weights_bytes() > m.weights_bytes("wint4")
    assert m.weights_bytes("bf16") == 2 * m.total_params
