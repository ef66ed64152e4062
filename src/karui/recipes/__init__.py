"""Pipelines of techniques, planned before anything runs."""
