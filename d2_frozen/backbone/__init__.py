"""Backbones shared by all tasks."""
