"""Make Q and DQ of the markers that were traced in place of quantizers.

=======  =====================================================================
rewrite  ExpandQuantizers, the pass: which of the others a marker needs
marker   one marker, and the nodes that take its place
stored   constants: codes, computed once, with a DQ
static   tensors with a known range: Q and DQ, and a clamp for narrow grids
signs    signs of tensors
dynamic  tensors whose range the graph computes
=======  =====================================================================
"""

from fakequant.export.rules.expand_quantizers.rewrite import ExpandQuantizers

__all__ = ["ExpandQuantizers"]
