"""The generated parts of docs/losses.md are those of this registry, and the committed result is that of these cases."""

import json
from pathlib import Path

import pytest

from hookdistill import losses
from parity import table
from parity.cases import CASES, KINDS
from parity.peers import PEERS

LAWS = Path(__file__).parents[1]


def test_the_page_is_up_to_date():
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.rendered(page) == page, "run: python tests/parity/table.py"


def test_the_last_result_is_that_of_these_cases():
    result = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    shown = [
        (row["loss"], row["peer"], row["theirs"], row["relation"], row["differs"], row["trouble"]) for row in result["rows"]
    ]
    cases = [(case.loss, case.peer, case.theirs, case.relation, case.differs, case.trouble) for case in CASES]
    assert shown == cases, "run with every peer installed: python tests/parity/table.py --compare"
    assert result["inputs"] == list(KINDS)
    assert list(result["versions"]) == list(PEERS)
    assert all(row["worst"] <= result["tolerance"] for row in result["rows"] if not row["differs"])


@pytest.mark.parametrize("loss", sorted(losses.registered_losses()))
def test_every_loss_has_a_row_and_a_law(loss):
    assert f"| `{loss}` |" in table.PAGE.read_text(encoding="utf-8")
    files = [*LAWS.glob("losses/test_*.py"), LAWS / "loss_cases.py"]
    assert any(
        f'"{loss}"' in text or f"losses.{loss}(" in text for text in (file.read_text(encoding="utf-8") for file in files)
    )
