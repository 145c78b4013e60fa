"""What a plan buys.

Models timed in turn on an engine, collectives counted, layers timed, a token's time predicted.

May import: planning, conversion, inspection and above.
"""
