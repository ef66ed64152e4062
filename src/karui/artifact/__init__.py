"""Save, load, pack, export and verify."""
