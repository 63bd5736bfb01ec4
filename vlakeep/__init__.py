"""vlakeep: fine-tune a vision-language-action model on new tasks and keep what it already knows."""

__version__ = "0.1.0"
