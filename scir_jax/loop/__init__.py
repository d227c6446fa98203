"""The stages of an iteration and their order. Every stage reads files and writes files in the run directory."""
