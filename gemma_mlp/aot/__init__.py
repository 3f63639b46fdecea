"""Compiles for accelerators that this machine does not have, and reports memory and transfers between chips."""

from gemma_mlp.aot.compilers import H200S_PER_HOST, Compiled, DoesNotFit, compile_for, devices
from gemma_mlp.aot.hlo import Collective

__all__ = ["H200S_PER_HOST", "Collective", "Compiled", "DoesNotFit", "compile_for", "devices"]
