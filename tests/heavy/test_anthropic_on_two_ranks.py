"""The client suite of `tests/ifprune_mlx/serving/http/test_anthropic.py` against a server of two ranks."""

from __future__ import annotations

import pytest

from tests.heavy import two_ranks
from tests.ifprune_mlx.serving.http.test_anthropic import *  # noqa: F403

pytestmark = pytest.mark.heavy
served = two_ranks.served  # in place of the suite's own
