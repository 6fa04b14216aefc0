"""What drumline costs, against floors measured in the same run: ``python -m bench`` (see ``--help``)."""
