"""trimtab: post-training of text-to-image diffusion and flow models. Nothing runs on import."""

from trimtab.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]
