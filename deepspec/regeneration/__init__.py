"""The target writes: answers to prompts, turn by turn, and prompts of its own. In this process or on servers."""
