# SPDX-License-Identifier: Apache-2.0
"""The server against its own OpenAPI schema: whatever is sent, no status or answer that it does not declare."""

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode, checks

from tests.serve.conftest import Running, running
from tests.serve.engine import NAME

OPERATIONS = (
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /tokenize",
    "POST /v1/documents",
    "GET /v1/documents",
    "GET /v1/documents/{id}",
    "PATCH /v1/documents/{id}",
    "DELETE /v1/documents/{id}",
    "GET /health",
    "GET /ready",
    "GET /metrics",
)
# A text that is no known model or document is in order by the schema, and refused all the same.
BEYOND_THE_SCHEMA = [checks.positive_data_acceptance]
EXAMPLES = 40


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def operations(server: Running) -> dict[str, schemathesis.APIOperation]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = [one.ok() for one in schema.get_all_operations()]
    return {operation.label: operation for operation in found}


def test_all_operations_are_tried(operations: dict[str, schemathesis.APIOperation]):
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
    + [(label, GenerationMode.NEGATIVE) for label in OPERATIONS if not label.startswith(("GET", "DELETE"))],
)
def test_every_answer_is_declared(server: Running, operations, label: str, mode: GenerationMode):
    operation = operations[label]

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def sent(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            limits = ("max_tokens", "max_completion_tokens")  # of which most are beyond the context
            case.body = {name: value for name, value in case.body.items() if name not in limits} | {"model": NAME}
        case.call_and_validate(excluded_checks=BEYOND_THE_SCHEMA, timeout=10)

    sent()
    # Behind each operation, since workers share them out.
    if label.endswith("completions") and mode is GenerationMode.POSITIVE:
        assert len(server.engine.requests) > 5  # not all of it was refused
    with server.http() as http:
        assert http.get("/ready").status_code == 200
        assert 'status="500"' not in http.get("/metrics").text
