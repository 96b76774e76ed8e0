"""Recording of a forward pass call by call, and backward propagation of relevance.

The engine does not depend on rules, mappings or attribution methods. A scope provides the rule of a call.
"""
