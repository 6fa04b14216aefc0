"""``python -m drumline.cli`` is the ``drumline`` command."""

from drumline.early import main

main()
