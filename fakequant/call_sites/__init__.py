"""Functional ops: seen in one example forward, quantized without a change to any forward()."""

from fakequant.call_sites.custom import TRANSLATIONS, register_op
from fakequant.call_sites.hiding import hide, is_hidden
from fakequant.call_sites.interception import call_sites, intercept, is_owner, own_class, release
from fakequant.call_sites.ops import KIND_OF, RECURRENT_ROLES, Op, Role, op_named, op_of
from fakequant.call_sites.recording import record
from fakequant.call_sites.sites import CallSite, CallSites, PerCall
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value

__all__ = [
    "KIND_OF",
    "RECURRENT_ROLES",
    "TRANSLATIONS",
    "Call",
    "CallSite",
    "CallSites",
    "Op",
    "PerCall",
    "Role",
    "TensorGraph",
    "Value",
    "call_sites",
    "hide",
    "intercept",
    "is_hidden",
    "is_owner",
    "op_named",
    "op_of",
    "own_class",
    "record",
    "register_op",
    "release",
]
