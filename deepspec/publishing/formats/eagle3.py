"""The layout of EAGLE-3 drafts of Llama shape that SGLang and vLLM load: `LlamaForCausalLMEagle3`, with a `midlayer`.

The two count captured layers differently. SGLang 0.5.23, and SpecForge, which trains such drafts, name a layer whose
output is read, from 0, in `eagle_config`. vLLM 0.32 names how many layers are before it, so one more, at the top level;
where nothing is there, it takes what `eagle_config` holds for the same. Both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepspec.drafts.eagle3_configuration import EAGLE3, LLAMA_EAGLE3
from deepspec.drafts.engines import DraftKind
from deepspec.publishing.errors import PublishError
from deepspec.publishing.formats.base import SLIDING, Config, DraftFolder, Format, Verifier, complete
from deepspec.publishing.layout import EMBEDDING, HEAD

ARCHITECTURE = "LlamaForCausalLMEagle3"
SAME_TO_VLLM = "Eagle3LlamaForCausalLM"
SECTION, LAYERS, COUNT = "eagle_config", "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"
DEFAULT_COUNT = 3
PAPERS_STEPS = 7  # of the training-time test (arXiv 2503.01840), where a config does not say
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
OTHER_SWITCHES = ("use_aux_norm", "bias", "attention_bias", "mlp_bias", "qkv_bias")
LAYER_TENSORS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *("input_layernorm", "hidden_norm", "post_attention_layernorm"),
)


class Eagle3Format(Format):
    """Holds Eagle3 of Llama shape, of whole or pruned vocabularies. The embedding is the target's, the head is stored.

    Readers of it ignore our own fields, so they stay at the top level.
    """

    name = "eagle3"
    description = "EAGLE-3 drafts' of Llama shape: LlamaForCausalLMEagle3, without embedding"
    left_out = frozenset({EMBEDDING})
    needed = frozenset({HEAD})
    renamed: ClassVar[Mapping[str, str]] = {
        f"layers.0.{name}.weight": f"midlayer.{name}.weight" for name in LAYER_TENSORS
    }

    def recognises(self, folder: DraftFolder) -> bool:
        return bool({ARCHITECTURE, SAME_TO_VLLM} & set(folder.architectures))

    def limits(self, kind: DraftKind) -> list[str]:
        if kind.architecture == LLAMA_EAGLE3:
            return []
        return [f"holds Eagle3 of Llama shape (draft.architecture={LLAMA_EAGLE3}), and this is {kind.architecture}"]

    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        kind = DraftKind.of_fields(config)
        layers = list(kind.target_layer_ids)
        return config | {
            "architectures": [ARCHITECTURE],
            "draft_vocab_size": kind.head_rows,
            SECTION: {LAYERS: layers, "use_aux_hidden_state": True},
            LAYERS: [layer + 1 for layer in layers],
            COUNT: len(layers),
        }

    def from_config(self, config: Config) -> Config:
        section = config.get(SECTION) or {}
        if config.get("model_type", "llama") != "llama":
            raise PublishError(f"model_type={config['model_type']}: DeepSpec reads such drafts with Llama layers")
        if section.get("use_aux_hidden_state") is False:
            raise PublishError("use_aux_hidden_state=false: DeepSpec has no Eagle3 that reads the last layer alone")
        if config.get("tie_word_embeddings"):
            raise PublishError(
                "tie_word_embeddings=true: SGLang takes the embedding for the head then, vLLM does not; set it to "
                "false if the draft has a head of its own"
            )
        given = {name: value for name, value in config.items() if name not in (SECTION, LAYERS, COUNT)}
        fields = complete(given, "config.json", "llama")
        refuse_other_eagle3(fields, section)
        if fields.pop("target_hidden_size", None) not in (None, fields["hidden_size"]):
            raise PublishError(
                f"target_hidden_size={config['target_hidden_size']}: DeepSpec has drafts of the target's hidden size "
                f"only, and this draft's is {fields['hidden_size']}"
            )
        if fields.get("draft_vocab_size") in (None, fields["vocab_size"]):
            fields.pop("draft_vocab_size", None)
        return {"ttt_length": PAPERS_STEPS} | fields | our_eagle3(LLAMA_EAGLE3, _captured(config, section))


def our_eagle3(architecture: str, layers: list[int]) -> Config:
    """The fields of our layout that no other has."""
    return {
        "architectures": [architecture],
        "draft_algorithm": EAGLE3,
        "target_layer_ids": layers,
        "draft_num_hidden_layers": 1,
    }


def refuse_other_eagle3(fields: Mapping[str, Any], *sections: Mapping[str, Any]) -> None:
    """Raises PublishError where the draft computes what no Eagle3 of DeepSpec does.

    Args:
        fields: of the layers, complete.
        sections: where switches may be, too.
    """
    places = (fields, *sections)
    if switched := [name for name in (*SWITCHES, *OTHER_SWITCHES) if any(place.get(name) for place in places)]:
        raise PublishError(f"{', '.join(switched)}=true: DeepSpec has no Eagle3 with that")
    if fields["num_hidden_layers"] != 1:
        raise PublishError(f"num_hidden_layers={fields['num_hidden_layers']}: DeepSpec has Eagle3 of one layer")
    if SLIDING in (fields.get("layer_types") or ()):
        raise PublishError(f"layer_types={fields['layer_types']}: DeepSpec has no Eagle3 with a window")
    rope = fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if "mrope_section" in rope or kind not in (*ROPE_INIT_FUNCTIONS, "default"):
        raise PublishError(f"rope_parameters={dict(rope)}: DeepSpec has no such RoPE")
    if rope.get("partial_rotary_factor", 1) != 1 or not fields.get("rope_is_neox_style", True):
        raise PublishError("DeepSpec has no RoPE of a part of each head, or of interleaved pairs")


def default_layers(depth: int) -> list[int]:
    """The layers of a target whose outputs both engines capture where a config names none."""
    return [1, depth // 2 - 1, depth - 4]


def _captured(config: Config, section: Mapping[str, Any]) -> list[int]:
    """As engines do, in the target's order."""
    sglangs, vllms = section.get(LAYERS), config.get(LAYERS)
    if sglangs and vllms and sorted(vllms) != sorted(layer + 1 for layer in sglangs):
        raise PublishError(
            f"{SECTION}.{LAYERS}={sglangs}, which SGLang counts from 0, and {LAYERS}={vllms}, which vLLM counts from "
            "the embedding, are not the same layers: set the second to the first plus 1, or remove the wrong one"
        )
    if sglangs:
        return sorted(sglangs)
    if vllms:
        return sorted(layer - 1 for layer in vllms)
    if config.get("target_layer_ids"):
        return list(config["target_layer_ids"])
    depth = config.get("num_target_layers")
    if not depth:
        raise PublishError(
            "does not name the layers that it reads, so engines choose three by the depth of the target: import it "
            "with target="
        )
    layers = default_layers(depth)
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise PublishError(f"does not name the layers that it reads, and a target of {depth} layers has no usual ones")
    return layers
