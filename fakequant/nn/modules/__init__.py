"""One family of quantized modules a file."""
