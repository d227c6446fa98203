"""Rows of files in, pairs and arrays of fixed shapes out."""
