"""Writes the generated parts of ``docs/losses.md``: the losses, and how they compare with those of other libraries.

``python tests/parity/table.py`` renders them from the registry and from the last result, ``tests/parity/results.json``;
``python tests/parity/table.py --compare`` makes that result anew, which needs every peer installed.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "losses.md"
RESULTS = Path(__file__).with_name("results.json")
FAMILIES = {
    "features": "Hidden states, feature maps, embeddings",
    "logits": "Logits",
    "logit_methods": "Logits, by method",
    "sparse": "Logits of which a store kept some",
    "attention": "Attention",
    "maps": "Whole maps",
    "samples": "Relations between samples",
    "learned": "With parameters of their own",
    "memories": "With a memory",
    "embeddings": "Retrieval",
}


def main() -> None:
    """Compare if asked to, then write the page."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if "--compare" in sys.argv[1:]:
        RESULTS.write_text(json.dumps(compare(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def compare() -> dict[str, Any]:
    """The result of every comparison on every kind of input, with the versions of the peers."""
    from parity.cases import CASES, KINDS
    from parity.peers import PEERS, version
    from parity.test_parity import TOLERANCE, compared, distance

    warnings.simplefilter("ignore")
    versions = {peer: version(peer) for peer in PEERS}
    if missing := [PEERS[peer] for peer, found in versions.items() if found is None]:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    rows = []
    for case in CASES:
        found = {kind: distance(*compared(case, kind)) for kind in KINDS}
        wrong = [kind for kind in KINDS if (found[kind] > TOLERANCE) != bool(case.differs or kind in case.trouble)]
        if wrong:
            raise SystemExit(f"{case}: not as the case says on {', '.join(wrong)}; run pytest tests/parity")
        worst = max((found[kind] for kind in KINDS if kind not in case.trouble), default=0.0)
        rows.append(
            {
                "loss": case.loss,
                "peer": case.peer,
                "theirs": case.theirs,
                "worst": None if case.differs else float(f"{worst:.0e}"),
                "relation": case.relation,
                "differs": case.differs,
                "trouble": case.trouble,
            }
        )
    return {"versions": versions, "inputs": list(KINDS), "tolerance": TOLERANCE, "rows": rows}


def rendered(page: str) -> str:
    """The page with its generated parts as they should be."""
    parts = {"losses": _losses(), "peers": _peers(json.loads(RESULTS.read_text(encoding="utf-8")))}
    for name, text in parts.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def _ours() -> dict[str, list[Any]]:
    """Our registered losses by family."""
    from hookdistill.losses import registered_losses

    families: dict[str, list[Any]] = {family: [] for family in FAMILIES}
    for spec in registered_losses().values():
        if spec.function.__module__.startswith("hookdistill.losses."):
            families[spec.function.__module__.rsplit(".", 1)[1]].append(spec)
    return families


def _losses() -> str:
    lines = []
    for family, specs in _ours().items():
        lines += ["", f"**{FAMILIES[family]}**", "", "| loss | what it is | its own arguments | paper |", "|---|---|---|---|"]
        for spec in specs:
            shared = {
                "mask",
                "reduction",
                "dim",
                "target",
                "ignore_index",
                "causal_shift",
                "vocabulary",
                "temperature",
                "samples",
                "classes",
            }
            held = set() if spec.state is None else {*spec.required, "align", "decoder", "position"} - {"index"}
            shared -= {"samples"} if "samples" in spec.state_parameters else set()
            own = [
                name for name in (*spec.parameters, *spec.state_parameters) if name not in shared - set(spec.required) - held
            ]
            own = [f"`{name}`" for name in dict.fromkeys(own) if name not in held]
            lines.append(f"| `{spec.name}` | {_first_sentence(spec.function)} | {', '.join(own)} | {_papers(spec.function)} |")
    return "\n".join(lines[1:])


def _first_sentence(function: Any) -> str:
    text = " ".join(inspect.getdoc(function).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.])[.:;] (?=[A-Z]|the )|\.$", text)[0]
    return sentence.replace("|", "\\|").replace("``", "`")


def _papers(function: Any) -> str:
    numbers = dict.fromkeys(re.findall(r"arXiv\s+(\d{4}\.\d{5})", inspect.getdoc(function)))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)


def _peers(result: dict[str, Any]) -> str:
    peers, notes = list(result["versions"]), list[str]()
    lines = [f"| loss | {' | '.join(peers)} |", f"|---|{'---|' * len(peers)}"]
    for specs in _ours().values():
        for spec in specs:
            cells = [
                _cell([row for row in result["rows"] if (row["loss"], row["peer"]) == (spec.name, peer)], notes)
                for peer in peers
            ]
            lines.append(f"| `{spec.name}` | {' | '.join(cells)} |")
    compared = [row for row in result["rows"] if not row["differs"]]
    worst = max(row["worst"] for row in compared)
    versions = ", ".join(f"{peer} {found}" for peer, found in result["versions"].items())
    lines += [
        "",
        f"Last compared with {versions}: {len(result['rows'])} pairs of implementations on {len(result['inputs'])} kinds of "
        f"input ({', '.join(result['inputs'])}), value and gradient in float64. ✓ is the same number, × the same up to a "
        f"factor or a convention, ≠ something else; the largest difference under ✓ and × is {worst:.0e} of the largest entry.",
        "",
        *(f"{number}. {note}" for number, note in enumerate(notes, 1)),
    ]
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], notes: list[str]) -> str:
    shown = []
    for row in rows:
        mark = "≠" if row["differs"] else "×" if row["relation"] else "✓"
        said = [row["differs"] or row["relation"], *(f"on {kind}: {why}" for kind, why in row["trouble"].items())]
        if any(said):
            notes.append(f"`{row['loss']}`, {row['peer']} {row['theirs']}: {'; '.join(filter(None, said))}.")
            mark += f" [{len(notes)}]"
        shown.append(mark)
    return ", ".join(dict.fromkeys(shown))


if __name__ == "__main__":
    main()
