"""Its tests have the sizes of those of cross_entropy."""

from ops.cross_entropy.conftest import small

__all__ = ["small"]
