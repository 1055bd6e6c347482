"""``python -m foveal`` is the command ``foveal``."""

from foveal._command import main

main()
