"""Progress bars of transformers keep a monitor thread for the whole process: none of it here."""

from __future__ import annotations

from tqdm import tqdm

tqdm.monitor_interval = 0
