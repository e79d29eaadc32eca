"""A session, or nothing that is left of the attempt."""

from __future__ import annotations

from lightning_grpo.distributed import RankChannel
from lightning_grpo.session.session import RolloutSession
from lightning_grpo.session.settings import SessionSettings


def open_session(settings: SessionSettings, channel: RankChannel) -> RolloutSession:
    """Open the prompts and so on; the ranks' channel is closed where that is refused."""
    try:
        return RolloutSession(settings, channel)
    except BaseException:
        channel.close()
        raise
