"""How deep a model really is.

Layers in any order and grouping, transformations of spans, dependence between layers, the run.

May import: healing and above.
"""
