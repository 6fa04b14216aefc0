"""``python -m drumline.cli`` is the ``drumline`` command."""

from drumline.cli import main

main()
