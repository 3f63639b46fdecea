"""Programs that people put the block into. tests/test_programs.py runs each with the block and with the plain formula.

A program is a function (f, params, x) -> results. `f` computes the block, as :class:`formulas.Ours` or
:class:`formulas.Plain` do; `params` are an `MLPBlockParams`; x is [2, length, D].
"""

from tests.support.programs import exported, flax_models, inspected, on_meshes, transformed

PROGRAMS = transformed.PROGRAMS | on_meshes.PROGRAMS | exported.PROGRAMS | inspected.PROGRAMS | flax_models.PROGRAMS
