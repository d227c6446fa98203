"""A run: its recipe, its stages, its directory. Every stage reads files and writes files in the run directory."""
