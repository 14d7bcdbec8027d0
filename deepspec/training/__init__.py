"""Training: anchors, objective, loop, exact resume, metrics."""
