"""What the operator costs, on a real control plane, beside a plain client that makes the same objects.

``python -m bench.operator`` (see ``--help``).
"""
