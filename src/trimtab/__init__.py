"""trimtab: post-training of text-to-image diffusion and flow models. Nothing runs on import."""

from trimtab.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load_soft_tokens", "unload_soft_tokens"]


def __getattr__(name: str):
    """Soft tokens are imported when they are asked for: diffusers takes seconds to come."""
    if name in ("load_soft_tokens", "unload_soft_tokens"):
        from trimtab.pipelines import token_files

        return getattr(token_files, name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
