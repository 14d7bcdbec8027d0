"""Hot operations as pure functions on tensors. Each has a plain meaning and, where it pays, a faster equal."""
