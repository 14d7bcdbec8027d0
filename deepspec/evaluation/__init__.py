"""Measuring a draft: prompt sets, runner, statistics, tables and plots."""

from deepspec.evaluation.runner import evaluate

__all__ = ["evaluate"]
