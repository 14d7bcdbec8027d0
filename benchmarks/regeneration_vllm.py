"""vLLM's side of `benchmarks.regeneration`, run by the Python of vLLM's own environment: nothing of ours is imported.

The only argument is a JSON object with the keywords of `vllm.LLM`. The first line of output has the versions. Then each
line of input, a JSON object with `prompts` (lists of token ids) and the keywords of `SamplingParams`, is answered by
one with `tokens` and `seconds`. What vLLM itself prints goes to standard error.
"""

import importlib.metadata
import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(sys.argv[1]))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    found = [name for name in ("vllm-cpu", "vllm") if any(importlib.metadata.distributions(name=name))]
    versions |= {name: importlib.metadata.version(name) for name in found}
    print(json.dumps({"versions": versions, "torch_threads": torch.get_num_threads()}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked.pop("prompts")]
        sampling = SamplingParams(detokenize=False, **asked)
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=answers)


if __name__ == "__main__":
    main()
