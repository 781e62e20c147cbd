"""A real language model run through this package's attention: ``mlx-mfa demo``.

``gguf`` reads the model file, ``convert`` turns it into a folder that mlx-lm loads, ``chat`` generates text with it and
``compare`` measures stock MLX against this package. ``run`` ties them together for the command line.
"""


class DemoError(Exception):
    """Something the demo needs is missing or unusable. The message is one line that says what to do."""
