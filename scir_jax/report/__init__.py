"""The HTML page of a run, made of the files in its directory."""
