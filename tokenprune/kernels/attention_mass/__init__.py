"""Mass that tokens receive through attention, without the full attention map."""

from tokenprune.kernels.attention_mass.eager import attention_mass

__all__ = ["attention_mass"]
