"""The target writes prompts itself: `python -m data_prep.synthesize target.path=FOLDER count=2000 output_dir=FOLDER`.

Given only the opening of a user's turn (Magpie, arXiv 2406.08464), in this process or on servers (urls=[...]). Writes
train.jsonl, heldout.jsonl and manifest.json like `data_prep.prompts`. Interrupted, the same command goes on.
"""

from __future__ import annotations

from transformers.utils.logging import disable_progress_bar

from deepspec.arguments import run_command
from deepspec.synthesis.synthesize import SynthesizeOptions, synthesize


def main(options: SynthesizeOptions) -> None:
    disable_progress_bar()  # Transformers' own, of loading weights
    synthesize(options)


if __name__ == "__main__":
    run_command(main, SynthesizeOptions)
