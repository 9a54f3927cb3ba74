"""Rewrites of a Q/DQ graph, one a file."""
