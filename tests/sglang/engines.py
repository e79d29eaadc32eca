"""Which servers the conformance tests run on."""

import pytest

MARKS = [pytest.mark.sglang, pytest.mark.timeout(400)]
REAL = pytest.param("sglang", marks=MARKS)
WITHOUT_PREFIXES = pytest.param("sglang-without-prefixes", marks=MARKS)
"""Its cache of prefixes keeps what a retracted request had computed, and uses it under the next
weights (0.5.19): `retract` is exact only without."""

RETRACTING = pytest.mark.parametrize(
    "shared_server", ["embedded", WITHOUT_PREFIXES], indirect=True, scope="session"
)
