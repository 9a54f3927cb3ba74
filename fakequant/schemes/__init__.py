"""Schemes: quantizers whose scale comes from the tensor itself, by a paper's formula.

=======  ==============================================================
scheme   Scheme, the base class, and the registry that a descriptor names
twn      "twn": ternary weights
bnn      "bnn": signs of weights or activations
xnor     "xnor": signs of weights, times their mean magnitude
dorefa   "dorefa": weights of 1 to 8 bits through tanh
=======  ==============================================================

DoReFa's activations need no scheme: ``QuantDescriptor(k, unsigned=True, amax=1.0)`` is the paper's
``quantize_k(clip(x, 0, 1))``; see ``arithmetic.dorefa``. XNOR-Net's signs of activations are "bnn";
their scale, the paper's K, is left out.
"""

from fakequant.schemes.bnn import BinarySigns
from fakequant.schemes.dorefa import DoReFaWeights
from fakequant.schemes.scheme import Scheme, register_scheme, scheme_for
from fakequant.schemes.twn import TernaryWeights
from fakequant.schemes.xnor import ScaledBinaryWeights

__all__ = [
    "BinarySigns",
    "DoReFaWeights",
    "ScaledBinaryWeights",
    "Scheme",
    "TernaryWeights",
    "register_scheme",
    "scheme_for",
]
