"""Loading what people have: files of every kind, and one line for every mistake in naming a target."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload
from conftest import tiny_target_config, token_batch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BertConfig, PreTrainedConfig, T5Config

import deepspec.targets.loading as loading
import deepspec.targets.source as source
from deepspec.config import ConfigError, EvalRun, TrainRun, validate
from deepspec.evaluation.plan import stop_tokens
from deepspec.targets import (
    ADAPTERS,
    Target,
    TargetAdapter,
    describe_target,
    load_target,
    load_target_config,
    load_target_head,
    load_tokenizer,
    resolve_dtype,
)
from deepspec.targets.quantised import PACKAGES, linear_weights

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def sizes(**changes) -> dict:
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = tiny_target_config()
    return {name: getattr(config, name) for name in keep} | {"num_hidden_layers": 3, "pad_token_id": 0} | changes


# Families whose names in the files differ from those in the model, by renaming, merging or a wrapper around the model.
RENAMED = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**sizes()).to_dict(), vision_config=VISION
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**sizes()).to_dict(),
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8, "image_size": 14, "patch_size": 7},
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**sizes(**MOE)),
    "mixtral": lambda: transformers.MixtralConfig(**sizes(num_local_experts=4)),
}


class InnerTextModel(TargetAdapter):
    """The language model inside a wrapper, or the model itself."""

    @staticmethod
    def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
        return config.get_text_config()

    @staticmethod
    def decoder(model):
        return getattr(model.model, "language_model", model.model)


def save(folder: Path, config: PreTrainedConfig | None = None, **options) -> Path:
    torch.manual_seed(1)
    config = config or tiny_target_config(tie_word_embeddings=False)
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM if is_causal else AutoModelForImageTextToText).from_config(config)
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes) -> Path:
    """Set fields of config.json; None removes one."""
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return folder


def edit_weights(folder: Path, change) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)
    assert "Did you mean" not in str(error.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "target")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen9"},
            r"config.json: Transformers [\d.]+ does not know the model type 'qwen9'; if it is newer",
        ),
        ({"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}, "'own' brings its own code, which is not run here"),
        ({"model_type": None}, "config.json: has no model_type"),
        ({"hidden_size": "wide"}, "config.json: Validation error for field 'hidden_size': TypeError: .*expected int"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, r"Classification\) is not a causal language model"),
    ],
)
def test_config_that_is_no_target(folder, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_target_config(str(edit_config(folder, **change)))
    assert_one_line(error)


@pytest.mark.parametrize("config", [BertConfig(), T5Config()], ids=["encoder", "encoder-decoder"])
def test_model_that_predicts_no_next_token(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is not a causal language model; give one") as error:
        load_target(str(tmp_path))
    assert_one_line(error)


def test_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=r"config.json: not readable JSON .*; copy or download it again") as error:
        load_target_config(str(folder))
    assert_one_line(error)


@pytest.mark.parametrize("name", ["nobody/nothing", "a/b/c", "no-such-model"])
def test_hub_id_that_cannot_be_fetched(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (load_target_config, load_tokenizer, load_target, load_target_head):
        with pytest.raises(FileNotFoundError, match=f"target.path={name}: no such folder, and it could not") as error:
            read(name)
        assert_one_line(error)


def test_folders_and_gguf_files_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"target.path=.*absent: no such folder"):
        load_target(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=f"target.path={tmp_path} target.gguf_file=m.gguf"):
        load_target(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*; GGUF files there, .*gguf_file: m.gguf"):
        load_target(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"target.gguf_file=n.gguf: no such file"):
        load_tokenizer(str(tmp_path), gguf_file="n.gguf")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ConfigError, match=r'pip install "deepspec\[gguf\]"'):
        load_target_config(str(tmp_path), gguf_file="m.gguf")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_folder_without_a_tokenizer(tmp_path, family):
    """Transformers makes an empty tokenizer for one of them, and fails with a page of advice for the other."""
    tiny_target_config(family).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"target.path=.*: its tokenizer cannot be read") as error:
        load_tokenizer(str(tmp_path))
    assert_one_line(error)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its tokenizer cannot be read") as error:
        load_tokenizer(str(tmp_path))
    assert_one_line(error)


@pytest.mark.parametrize("load", [load_target, load_target_head])
def test_weights_that_are_missing_cut_or_of_no_known_kind(folder, load):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors: damaged or incomplete .*; copy or download") as error:
        load(str(folder))
    assert_one_line(error)
    file.rename(folder / "consolidated.pt")
    with pytest.raises(FileNotFoundError, match=r"no weights; model.safetensors or pytorch_model.bin is expected"):
        load(str(folder))


def drop_a_layer(weights):
    return {name: weight for name, weight in weights.items() if "layers.1.mlp.up_proj" not in name}


def reshape_a_layer(weights):
    return weights | {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}


def add_an_adapter(weights):
    return weights | {"model.layers.1.mlp.up_proj.lora_A.weight": torch.zeros(2, 32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_layer, r"has no weight model.layers.1.mlp.up_proj.weight \[48, 32\]"),
        (reshape_a_layer, r"has the shape \[3, 3\] for model.layers.1.mlp.up_proj.weight \[48, 32\]"),
        (add_an_adapter, r"the config does not know: model.layers.1.mlp.up_proj.lora_A.weight; .* merged"),
    ],
)
def test_weights_that_do_not_fit_the_config(folder, change, message):
    """Transformers would give missing ones random values, and drop unknown ones."""
    with pytest.raises(ConfigError, match=message) as error:
        load_target(str(edit_weights(folder, change)))
    assert_one_line(error)


def test_weights_beside_the_model_are_only_told_about(folder, caplog):
    expected = load_target_head(str(folder)).fingerprint
    edit_weights(folder, lambda weights: weights | {"value_head.weight": torch.zeros(1, 32)})
    assert load_target(str(folder)).fingerprint == expected
    assert "weights that the model does not use: value_head.weight" in caplog.text


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "before PyTorch 1.6"])
def test_pytorch_files(folder, legacy):
    """One .bin file, and two with an index; the same target as the safetensors."""
    expected = load_target(str(folder))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_same_target(folder, expected)
    (folder / "pytorch_model.bin").unlink()
    parts = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    for number, (name, weight) in enumerate(weights.items()):
        list(parts.values())[number % 2][name] = weight
    for name, part in parts.items():
        torch.save(part, folder / name, _use_new_zipfile_serialization=not legacy)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_target(folder, expected)
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(b"<!DOCTYPE html>")
    for load in (load_target, load_target_head):
        with pytest.raises(ConfigError, match=r"pytorch_model-00002-of-00002.bin: damaged, incomplete or") as error:
            load(str(folder))
        assert_one_line(error)


def assert_same_target(folder: Path, expected: Target) -> None:
    whole, head = load_target(str(folder)), load_target_head(str(folder))
    assert whole.fingerprint == head.fingerprint == expected.fingerprint
    assert torch.equal(whole.head_weight, expected.head_weight)
    assert torch.equal(head.head_weight, expected.head_weight)
    assert torch.equal(head.embedding_weight, expected.embedding_weight)


@pytest.mark.parametrize("family", RENAMED)
@pytest.mark.parametrize("shard", ["50GB", "40KB"])
def test_names_in_files_that_differ_from_those_in_the_model(family, shard, tmp_path, monkeypatch):
    config = RENAMED[family]()
    monkeypatch.setitem(ADAPTERS, config.model_type, InnerTextModel)
    folder = save(tmp_path, config, max_shard_size=shard)
    whole, head = load_target(str(folder)), load_target_head(str(folder))
    assert head.fingerprint == whole.fingerprint
    assert torch.equal(head.embedding_weight, whole.embedding_weight)
    assert torch.equal(head.head_weight, whole.head_weight)
    assert head.num_layers == whole.num_layers == 3
    ids = torch.randint(1, 60, (1, 9))
    expected = whole.model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(whole.logits(whole.hidden_states([], input_ids=ids).final), expected)


def test_fingerprint_of_merged_weights_knows_every_expert(tmp_path, monkeypatch):
    config = RENAMED["mixtral"]()
    monkeypatch.setitem(ADAPTERS, config.model_type, InnerTextModel)
    folder = save(tmp_path, config)
    before = load_target_head(str(folder)).fingerprint
    name = next(name for name in load_file(folder / "model.safetensors") if "experts.3." in name)
    edit_weights(folder, lambda weights: weights | {name: weights[name] + 1})
    assert load_target_head(str(folder)).fingerprint != before


def test_dtype_of_the_checkpoint_is_the_default(tmp_path):
    folder = save(tmp_path / "half", dtype=torch.bfloat16)
    assert load_target(str(folder)).dtype == load_target_head(str(folder)).dtype == torch.bfloat16
    assert load_target(str(folder), dtype="float32").dtype == torch.float32
    assert resolve_dtype("float16", str(folder)) == torch.float16
    assert resolve_dtype("auto", "builtin") == torch.float32
    assert resolve_dtype("auto", str(edit_config(folder, dtype=None))) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"target\.dtype=int8: must be one of auto, float32"):
        resolve_dtype("int8", str(folder))


def test_description(tmp_path):
    target = load_target(str(save(tmp_path, tiny_target_config(vocab_size=40_000, tie_word_embeddings=False))))
    count = sum(weight.numel() for weight in target.model.parameters())
    assert describe_target(target) == f"target {tmp_path}: {count / 1e6:.1f} M parameters, float32, 0.01 GiB, cpu"


def write_gguf(folder: Path, *, tied: bool) -> str:
    """A tiny Llama as llama.cpp stores it: quantised matrices, the rest in float32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, 60),
        (writer.add_eos_token_id, 7),
    ):
        add(value)
    random = np.random.default_rng(0)
    layer = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    layer |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}
    shapes = {f"blk.{number}.{name}.weight": shape for number in (0, 1) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (60, 64), "output_norm.weight": (64,)} | (
        {} if tied else {"output.weight": (60, 64)}
    )
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32) / 8
        if len(shape) == 1:
            writer.add_tensor(name, values)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "tiny.gguf"


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_file(tmp_path, tied):
    named = {"gguf_file": write_gguf(tmp_path, tied=tied)}
    whole = load_target(str(tmp_path), dtype=torch.float32, **named)
    head = load_target_head(str(tmp_path), dtype=torch.float32, **named)
    assert head.fingerprint == whole.fingerprint
    assert head.name_or_path == whole.name_or_path == f"{tmp_path}/tiny.gguf"
    assert torch.equal(head.embedding_weight, whole.embedding_weight)
    assert torch.equal(head.head_weight, whole.head_weight)
    assert (head.head_weight is head.embedding_weight) == tied
    assert whole.features(token_batch(torch.randint(60, (2, 7))), [0]).final.isfinite().all()
    assert resolve_dtype("auto", str(tmp_path), **named) == torch.bfloat16
    assert load_target_config(str(tmp_path), gguf_file="tiny.gguf").num_hidden_layers == 2
    assert stop_tokens(str(tmp_path), None, SimpleNamespace(eos_token_id=5), "tiny.gguf") == (5, 7)


def test_cut_gguf_file(tmp_path):
    file = tmp_path / write_gguf(tmp_path, tied=True)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"target.gguf_file=tiny.gguf: cannot be read") as error:
        load_target(str(tmp_path), gguf_file="tiny.gguf")
    assert_one_line(error)


def quantise_to_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stored = {}
    for name, weight in weights.items():
        if "_proj" in name:
            scale = weight.abs().max() / 448
            stored[name], stored[f"{name}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale.view(1, 1)
        else:
            stored[name] = weight
    return stored


def test_quantised_target(folder, tmp_path):
    """fp8, which Transformers dequantises where there is no GPU for it."""
    plain = load_target(str(folder))
    other = shutil.copytree(folder, tmp_path / "fp8")
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    edit_weights(edit_config(other, quantization_config=fp8), quantise_to_fp8)
    whole, head = load_target(str(other)), load_target_head(str(other))
    assert whole.fingerprint == head.fingerprint != plain.fingerprint
    assert torch.equal(whole.head_weight, plain.head_weight)
    assert torch.equal(head.head_weight, plain.head_weight)
    ids = token_batch(torch.randint(60, (2, 7)))
    torch.testing.assert_close(whole.features(ids, []).final, plain.features(ids, []).final, rtol=0.2, atol=0.2)
    edit_weights(other, lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.float8_e4m3fn)})
    with pytest.raises(ConfigError, match=r"lm_head.weight of the target is stored quantised.*features.source=online"):
        load_target_head(str(other))


def test_quantised_head_is_copied_dequantised():
    """Only what the module computes is looked at."""

    class Quantised(nn.Module):
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
            super().__init__()
            self.scales = nn.Buffer(weight.abs().amax(1, keepdim=True) / 127)
            self.packed = nn.Buffer((weight / self.scales).round().to(torch.int8))
            self.bias = nn.Buffer(bias)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states @ (self.packed * self.scales).T + self.bias

    head = Quantised(torch.randn(61, 1100), torch.randn(61))
    weight, bias = linear_weights(head, 1100, torch.float32)
    torch.testing.assert_close(weight, head.packed * head.scales)
    torch.testing.assert_close(bias, head.bias)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("awq", {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}),
        ("gptq", {"bits": 4, "group_size": 128, "desc_act": False}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("compressed-tensors", {"format": "pack-quantized"}),
        ("torchao", {}),
    ],
)
def test_package_of_a_quantised_target_is_named(folder, method, settings):
    if importlib.util.find_spec(PACKAGES[method].split()[-1].replace("-", "_")):
        pytest.skip(f"{PACKAGES[method]} is installed")
    edit_config(folder, quantization_config={"quant_method": method} | settings)
    with pytest.raises(ConfigError, match=f"quantised with {method}, .*pip install {PACKAGES[method]}") as error:
        load_target(str(folder))
    assert_one_line(error)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(folder, device_map):
    expected, target = load_target(str(folder)), load_target(str(folder), device_map=device_map)
    ids = token_batch(torch.randint(60, (2, 7)))
    assert torch.equal(target.features(ids, [-1, 2]).context, expected.features(ids, [-1, 2]).context)
    assert target.fingerprint == expected.fingerprint


def test_device_map_that_does_not_hold_the_target(folder):
    model = load_target(str(folder)).model
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ConfigError, match=r"target.device_map=auto: the GPUs cannot hold the target, \d+ weights are"):
        loading._check_placement(model, "auto")


def test_device_map_that_cannot_be_used():
    run = EvalRun(checkpoint="x")
    run.target.device_map = "auto"
    with pytest.raises(ConfigError, match=r"target\.device_map=auto: decoding keeps its caches on one device"):
        validate(run)
    training = TrainRun()
    training.data.train_files = ["x"]
    training.target.device_map, training.features.target_device = "auto", "own"
    with pytest.raises(ConfigError, match=r"target.device_map=auto and features.target_device=own: both say"):
        validate(training)
