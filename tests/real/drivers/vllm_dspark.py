"""vLLM's Qwen3DSparkForCausalLM given a draft: one block of several requests, without the model runner.

Everything is vLLM's: the reading of the folder, the layers, the paged attention of its CPU backend. Replaced are the
check that refuses dspark without the runner that needs Triton, and that runner's speculator, whose order of calls
(DSparkSpeculator._sample_sequential) is repeated here with its own names.
"""

from __future__ import annotations

import torch
from driving import answer
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm_repairs import key_norm_of_each_layer

PAGE = 32  # tokens
PAGES_OF_A_REQUEST = 4


def draft(target: str, path: str, tensors: str, result: str) -> dict:
    """Tensors in: context [requests, tokens, layers * hidden], positions of the anchors [requests], anchors [requests],
    prev_tokens [requests, slots]. Out: hidden, logits, bias, confidence of each slot, and the
    token that each logit proposes."""
    key_norm_of_each_layer()
    given = load_file(tensors)
    vllm_config = config_of(target, path)
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{result}.rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = loaded_model(vllm_config)
        with torch.inference_mode():
            computed = compute(vllm_config, model, **given)
    save_file({name: tensor.float().contiguous().clone() for name, tensor in computed.items()}, result)
    return {"class": type(model).__name__, "layers": len(model.model.layers)}


def config_of(target: str, path: str) -> VllmConfig:
    VllmConfig._validate_v1_model_runner = lambda self: None
    speculative = {"method": "dspark", "model": path, "num_speculative_tokens": 7}
    arguments = EngineArgs(
        model=target, dtype="float32", enforce_eager=True, max_model_len=128, speculative_config=speculative
    )
    return arguments.create_engine_config()


def loaded_model(vllm_config: VllmConfig) -> torch.nn.Module:
    torch.accelerator.empty_cache = lambda: None  # as its CPU runner does
    return get_model(vllm_config=vllm_config, model_config=vllm_config.speculative_config.draft_model_config)


def compute(
    vllm_config: VllmConfig,
    model: torch.nn.Module,
    context: torch.Tensor,
    positions: torch.Tensor,
    anchors: torch.Tensor,
    prev_tokens: torch.Tensor,
) -> dict[str, torch.Tensor]:
    config, requests, slots = model.config, len(anchors), prev_tokens.shape[1]
    names = model.get_draft_kv_cache_layer_names()
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=config.num_key_value_heads, head_size=config.head_dim, dtype=torch.float32
    )
    builder = CPUAttentionMetadataBuilder(spec, names, vllm_config, torch.device("cpu"))
    for layer in model.model.layers:
        pages = (requests * PAGES_OF_A_REQUEST, config.num_key_value_heads, PAGE, 2 * config.head_dim)
        layer.self_attn.attn.kv_cache = torch.zeros(pages)
    first = torch.arange(requests)[:, None] * PAGES_OF_A_REQUEST * PAGE  # each request has its own run of pages

    known = torch.arange(context.shape[1]).expand(requests, -1)
    seen = known < positions[:, None]
    states = model.combine_hidden_states(context[seen])
    model.precompute_and_store_context_kv(states, known[seen], (known + first)[seen])

    queries = positions[:, None] + torch.arange(slots)
    starts = torch.arange(requests + 1, dtype=torch.int32) * slots
    lengths = (positions + slots).int()
    table = torch.arange(requests * PAGES_OF_A_REQUEST, dtype=torch.int32).view(requests, -1)
    written = (queries + first).flatten()
    metadata = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            num_reqs=requests,
            num_actual_tokens=requests * slots,
            max_query_len=slots,
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=written,
            causal=any(model.get_draft_attn_causal()),
        ),
    )
    tokens = torch.full_like(prev_tokens, config.mask_token_id)
    tokens[:, 0] = anchors
    by_layer = dict.fromkeys(names, metadata)
    with set_forward_context(by_layer, vllm_config, requests * slots, slot_mapping=dict.fromkeys(names, written)):
        hidden = model(tokens.flatten(), queries.flatten(), None)
    embedding = model.markov_embed(prev_tokens.flatten())
    computed = {
        "hidden": hidden,
        "logits": model.compute_draft_logits(hidden),
        "bias": model.markov_bias(embedding),
        "confidence": model.compute_confidence(hidden, embedding),
    }
    by_slot = {name: tensor.unflatten(0, (requests, slots)) for name, tensor in computed.items()}
    return by_slot | {"proposed": model.map_draft_to_target(torch.arange(computed["logits"].shape[-1]))}


if __name__ == "__main__":
    answer(draft)
