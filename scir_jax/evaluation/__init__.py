"""What the field's evaluations compute, and the files that they read and write."""
