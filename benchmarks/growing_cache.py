"""The usual loop of training repositories: one prompt at a time, caches that grow by concatenation and are cropped."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from deepspec.decoding import Request
from deepspec.decoding.proposers import draw_block
from deepspec.decoding.sampling import SamplingSettings, UniformStream, draw, probabilities
from deepspec.decoding.verification import verify_greedy, verify_tokens
from deepspec.drafts import DSparkModel
from deepspec.drafts.backbone import KeyValue
from deepspec.targets import Target


@torch.inference_mode()
def decode(target: Target, draft: DSparkModel, request: Request) -> tuple[list[int], int]:
    """One request's output tokens and its number of rounds."""
    settings = SamplingSettings.of_requests([request], target.vocab_size, target.device)
    stream = UniformStream(request.seed, 2 * draft.draft_length + 1)
    cache = DynamicCache()
    prompt = torch.tensor([request.prompt_ids], device=target.device)
    logits, context = _forward(target, draft, prompt, 0, cache, [])
    uniform = stream.draw().to(target.device)
    output = draw(logits[:, -1:], settings, uniform[None, -1:])[0][0].tolist()
    length, rounds = prompt.shape[1], 0
    while len(output) < request.max_new_tokens and not set(output) & set(request.stop_token_ids):
        uniform = stream.draw().to(target.device)
        anchors, position = torch.tensor([output[-1:], [length]], device=target.device)
        hidden = draft.draft_block(anchors, position, context)
        tokens, distribution = draw_block(draft, anchors, hidden, settings, uniform[None])
        ids = torch.cat([anchors[:, None], tokens], dim=1)
        logits, context = _forward(target, draft, ids, length, cache, context)
        if distribution is None:
            verdict = verify_greedy(tokens, logits.argmax(-1), None)
        else:
            accept = uniform[None, draft.draft_length : -1]
            verdict = verify_tokens(tokens, distribution, probabilities(logits, settings), None, accept, uniform[-1:])
        accepted = int(verdict.accepted)
        output += [*tokens[0, :accepted].tolist(), int(verdict.next_token)]
        length, rounds = length + accepted + 1, rounds + 1
        if accepted < draft.draft_length:
            cache.crop(accepted - draft.draft_length)  # tokens to remove, as a negative number
        context = [(keys[:, :, :length], values[:, :, :length]) for keys, values in context]
    stop = next((i + 1 for i, token in enumerate(output) if token in request.stop_token_ids), request.max_new_tokens)
    return output[: min(stop, request.max_new_tokens)], rounds


def _forward(
    target: Target, draft: DSparkModel, ids: Tensor, start: int, cache: DynamicCache, context: list[KeyValue]
) -> tuple[Tensor, list[KeyValue]]:
    """Logits of new tokens [1, tokens] and the draft's context with them."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    features = target.hidden_states(
        draft.target_layer_ids,
        input_ids=ids,
        position_ids=positions,
        use_cache=True,
        **{target.cache_argument: cache},
    )
    new = draft.context_key_values(draft.project_context(features.context), positions)
    if context:
        new = [
            (torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2))
            for (old_keys, old_values), (keys, values) in zip(context, new, strict=True)
        ]
    return target.logits(features.final), new
