"""The target writes prompts itself, given only the opening of a user's turn (Magpie, arXiv 2406.08464)."""
