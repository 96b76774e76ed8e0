"""How a forward pass is recorded call by call, and how relevance goes back over the record.

The engine knows no rule, no mapping and no attribution method: a scope tells it the rule of a call.
"""
