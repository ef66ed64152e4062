"""Modules used by more than one room."""
