"""``python -m drumline`` is the ``drumline`` command."""

from drumline.early import main

main()
