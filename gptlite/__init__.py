"""GPTlite: the package behind the book on making a GPT small and fast."""

__version__ = "0.1.0"
