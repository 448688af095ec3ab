from __future__ import annotations

from collections.abc import Iterator

import pytest
from dialectkit import V0, V1, Control
from serverkit import Server


@pytest.fixture(scope="module")
def control(server: Server) -> Iterator[Control]:
    made = Control(server.url, server.key)
    yield made
    made.http.close()


@pytest.fixture(scope="module")
def v0(control: Control) -> Iterator[V0]:
    with control.v0() as client:
        yield client


@pytest.fixture(scope="module")
def v1(control: Control) -> Iterator[V1]:
    with control.v1() as client:
        yield client
