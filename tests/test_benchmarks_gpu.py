"""The GPU session: parts in processes of their own, tables of what they found. What they measure needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_decoding import DecodingOptions, Workbench
from benchmarks.gpu_session import Part, SessionOptions, main, parts_of, run_part
from benchmarks.gpu_tables import markdown
from deepspec.config import ConfigError

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_a_part_keeps_what_it_had_found(tmp_path: Path) -> None:
    found = "print('noise'); print('{\"batch\": 1}', flush=True)"
    ok = run_part("ok", Part(["-c", found], 60), tmp_path)
    assert (ok["status"], ok["results"]) == ("ok", [{"batch": 1}])
    assert "log" not in ok
    failed = run_part("failed", Part(["-c", f"{found}; raise SystemExit('no such thing')"], 60), tmp_path)
    assert (failed["status"], failed["results"]) == ("failed", [{"batch": 1}])
    assert failed["log"].endswith("no such thing")
    late = run_part("late", Part(["-c", f"{found}; import time; time.sleep(60)"], 2), tmp_path)
    assert (late["status"], late["results"]) == ("timed out", [{"batch": 1}])


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no part test; there are ceilings, .* mean 'tests'"):
        main(SessionOptions(parts=["test"], output_dir=str(tmp_path)))


def test_rounds_of_the_built_in_target() -> None:
    bench = Workbench(DecodingOptions(model="builtin", context=16, rounds=1, heads=True, kernels=True))
    result = bench.measure(2)
    assert result["wall_ms"] > 0
    assert result["prefill_passes"] == 1
    assert {"draft_ms", "verify_ms", "head_share", "plain"} <= result.keys()
    text = markdown({"decoding": {"results": [{"batch": 2, "context": 16, **result}], "status": "ok", "seconds": 1.0}})
    assert f"| 16 | 2 | {result['wall_ms']:.2f} |" in text


@pytest.mark.parametrize("file", sorted(RESULTS.glob("gpu_session_*.json")), ids=lambda file: file.stem)
def test_tables_of_a_recorded_session(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert found.keys() <= parts_of("qwen3_4b").keys()
    text = markdown(found)
    for name in found:
        assert f"| {name} | {found[name]['status']} |" in text
