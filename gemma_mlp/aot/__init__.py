"""Compiles for accelerators that this machine does not have, and reports memory and transfers."""

from gemma_mlp.aot.compilers import Compiled, compile_for, devices

__all__ = ["Compiled", "compile_for", "devices"]
