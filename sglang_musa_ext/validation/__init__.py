"""The validation kit: what is installed on this machine, checked against attention in float64 and
SGLang's own.
"""
