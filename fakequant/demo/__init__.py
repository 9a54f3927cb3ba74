"""Complete, runnable examples; ``examples/`` at the top level links to them."""
