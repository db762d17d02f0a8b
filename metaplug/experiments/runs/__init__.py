"""Experiments in folders of their own: trained, killed and resumed, read back, and held against one another."""

from metaplug.experiments.runs.loading import load
from metaplug.experiments.runs.reading import read_metrics, read_summary
from metaplug.experiments.runs.training import train

__all__ = ["load", "read_metrics", "read_summary", "train"]
