"""How much faster a plan makes a model.

Models timed in turn on an engine, collectives counted, layers timed, time per token predicted.

May import: planning, conversion, inspection and above.
"""
