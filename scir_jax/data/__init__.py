"""Files of rows in, arrays of fixed shapes out."""
