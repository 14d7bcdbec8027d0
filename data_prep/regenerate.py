"""The target answers prompts: `python -m data_prep.regenerate target.path=FOLDER prompts=[FILE] output_dir=FOLDER`.

With urls=[http://host:port, ...] on servers (vLLM, SGLang), else in this process, or in several with `accelerate launch
-m data_prep.regenerate ...`. Interrupted at any moment, the same command goes on.
"""

from __future__ import annotations

from transformers.utils.logging import disable_progress_bar

from deepspec.arguments import run_command
from deepspec.regeneration.regenerate import RegenerateOptions, regenerate


def main(options: RegenerateOptions) -> None:
    disable_progress_bar()  # Transformers' own, of loading weights
    regenerate(options)


if __name__ == "__main__":
    run_command(main, RegenerateOptions)
