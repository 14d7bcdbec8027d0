"""Transformers decodes with our fill-in DFlash and says what our engine says, accepting the same tokens in each round:
`python -m pytest -m real -s tests/real/test_real_transformers.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from counts import chat_prompts, counts_of, ours, survival
from engines import HERE, run
from trained_drafts import corpus, trained_draft
from transformers import AutoModel
from transformers.generation import DFlashTokenCandidateGenerator
from worlds import BUILTIN

from deepspec.decoding import proposer_of
from deepspec.drafts import load_draft
from deepspec.targets import load_target

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
PROMPTS, NEW_TOKENS, LONGEST = 20, 64, 192


def test_greedy_text_and_accepted_tokens_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    builtin, dflash = load_target("builtin", dtype=torch.float32), trained_draft("dflash")
    exported = tmp_path / "assistant"
    words = [f"checkpoint={dflash}", "format=transformers", f"output_dir={exported}", f"target={BUILTIN}"]
    run(HERE, "-m", "deepspec.publishing", "export", *words)
    assistant = AutoModel.from_pretrained(exported, dtype=torch.float32).eval()
    matches: list[int] = []
    get_candidates = DFlashTokenCandidateGenerator.get_candidates

    def counting(self, *args, **kwargs):
        matches.append(kwargs["n_last_matches"])
        return get_candidates(self, *args, **kwargs)

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", counting)
    draft = load_draft(dflash, target=builtin)
    prompts = chat_prompts(BUILTIN, corpus() / "heldout.jsonl", PROMPTS, LONGEST)
    completions = ours(builtin, proposer_of(draft, builtin), prompts, NEW_TOKENS)
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        matches.clear()
        output = builtin.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            assistant_model=assistant,
            speculation_type="dflash",
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            use_cache=True,
        )
        assert output[0, len(prompt) :].tolist() == completion.output_ids, f"prompt {number}"
        # It asks once before the prefill, once before each round; the last round is cut at max_new_tokens.
        accepted = [each.accepted for each in completion.rounds]
        assert matches[2:] == accepted[: len(matches) - 2], f"prompt {number}"
        assert len(matches) - 2 >= len(accepted) - 2
    tau = survival(list(map(counts_of, completions)), draft.draft_length)[-1]
    print(
        f"Transformers {transformers.__version__}: {PROMPTS} prompts, tau {tau:.3f}, the same text and accepted tokens"
    )
