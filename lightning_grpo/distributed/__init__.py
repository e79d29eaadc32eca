"""How the ranks of one run talk: waiting on messages, agreeing, handing out shares.

The one package root that imports: `lightning_grpo.distributed.RankChannel` is the name others use.
"""

from lightning_grpo.distributed.channel import RankChannel

__all__ = ["RankChannel"]
