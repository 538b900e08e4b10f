"""eval_lm_eval and eval_bfcl before and after the evaluators run: options, data, what they wrote.

The evaluators themselves: tests/e2e/test_outside_evaluators.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.completion_server import MODEL, TOKEN, completion_server

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO / "tools"))

import eval_bfcl  # noqa: E402
import eval_lm_eval  # noqa: E402
from outside import evaluator  # noqa: E402
from outside.endpoint import TOKEN_VARIABLE  # noqa: E402

from gdpo_megatron.errors import InputError  # noqa: E402
from gdpo_megatron.tiny_model import make_tiny_model  # noqa: E402

ROWS = '{"prompt": "1 + 1?", "answer": "2"}\n\n{"prompt": "2 + 2?", "answer": "4"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with rows, an export without weights, and environments that do nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GDPO_VENV", str(tmp_path / "env"))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    for name in ("url", "model", "export"):
        monkeypatch.delenv(f"GDPO_SERVED_{name.upper()}", raising=False)
    for mode in ("lm-eval", "bfcl"):
        (tmp_path / f"env-{mode}/bin").mkdir(parents=True)
        (tmp_path / f"env-{mode}/bin/python").symlink_to(sys.executable)
        (tmp_path / f"env-{mode}/.gdpo-ready").touch()
    (tmp_path / "rows.jsonl").write_text(ROWS)
    make_tiny_model(tmp_path / "export", ["a question, an answer"], vocab_size=300)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], script: Any, *arguments: str) -> str:
    """What a call that has to end with code 2 says."""
    code = evaluator.be_program("", script.add_options, script.run, arguments)
    assert code == 2
    assert not Path("out").exists() or not any(Path("out").iterdir())
    return capsys.readouterr().err


SERVED = ("--model", MODEL, "--export", "export", "--output", "out")
NOWHERE = ("--url", "http://127.0.0.1:9/v1", *SERVED)
FINAL = ("--task", "rows_final_number", "--data", "rows.jsonl")
SIMPLE = ("--category", "simple_python")


def test_without_a_server_all_that_is_missing_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = complaint(capsys, eval_bfcl, *SIMPLE, "--output", "out", "--limit", "0").splitlines()
    for line, name in zip(lines, ("url", "model", "export"), strict=False):
        assert f"neither --{name} nor GDPO_SERVED_{name.upper()} is given" in line
        assert "tools/serve_hf_export.sh EXPORT_FOLDER -- COMMAND" in line
    assert "--limit 0: must be 1 or more" in lines[3] and len(lines) == 4


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (eval_lm_eval, (*FINAL, *NOWHERE, "--export", "env"), "--export env: no model folder"),
        (eval_lm_eval, (*FINAL, *NOWHERE, "--url", "http://a:1"), "must end with /v1"),
        (eval_lm_eval, (*FINAL, *NOWHERE), "Connection refused; is it running?"),
        (eval_lm_eval, ("--task", "gsm8k", *NOWHERE), "--task gsm8k: not one of rows_answer_"),
        (eval_lm_eval, ("--task", "rows_final_number", *NOWHERE), "needs --data"),
        (eval_lm_eval, (*FINAL, *NOWHERE, "--num-fewshot", "3"), "has no examples"),
        (eval_lm_eval, (*FINAL, *NOWHERE, "--max-tokens", "0"), "--max-tokens 0: must be"),
        (eval_lm_eval, (*FINAL, *NOWHERE, "--data", "absent"), "--data absent: no such file"),
        (eval_bfcl, (*SIMPLE, *NOWHERE, "--temperature", "-1"), "--temperature -1.0: must be"),
        (eval_bfcl, (*SIMPLE, *NOWHERE), "Connection refused; is it running?"),
        (eval_bfcl, (*SIMPLE, *NOWHERE, "--concurrency", "0"), "--concurrency 0: must be 1"),
    ],
)
def test_one_line_says_what_is_wrong(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    script: Any,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    text = complaint(capsys, script, *arguments)
    assert said in text and len(text.splitlines()) == 1, text


@pytest.mark.parametrize(("script", "mode"), [(eval_lm_eval, "lm-eval"), (eval_bfcl, "bfcl")])
def test_without_the_environment(
    folder: Path, capsys: pytest.CaptureFixture[str], script: Any, mode: str
) -> None:
    (folder / f"env-{mode}/.gdpo-ready").unlink()
    text = complaint(capsys, script, *(FINAL if script is eval_lm_eval else SIMPLE), *NOWHERE)
    assert f"no environment {folder}/env-{mode}; scripts/setup.sh {mode} makes it" in text


def test_results_of_another_run_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "old").mkdir()
    (folder / "old/summary.json").write_text("{}")
    text = complaint(capsys, eval_bfcl, *SIMPLE, *NOWHERE, "--output", "old")
    assert "--output old: exists and is not empty" in text
    assert (folder / "old/summary.json").read_text() == "{}"


def test_a_server_that_is_another(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with completion_server(lambda _: "", context_length=64) as server:
        there = (*FINAL, "--url", server.url, *SERVED)
        text = complaint(capsys, eval_lm_eval, *there, "--model", "it")
        assert f"it serves {MODEL} and not it" in text
        text = complaint(capsys, eval_lm_eval, *there, "--max-tokens", "63")
        assert "--max-tokens 63: leaves no room for a prompt in the 64 tokens" in text
        monkeypatch.setenv(TOKEN_VARIABLE, "another-token-0123456789")
        assert "the token is not the one" in complaint(capsys, eval_lm_eval, *there)
        monkeypatch.delenv(TOKEN_VARIABLE)
        assert "no token: give --token-file, or set" in complaint(capsys, eval_lm_eval, *there)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "rows.jsonl:4: not JSON"),
        ('{"prompt": "a"}', "rows.jsonl:4: answer must be text, and is None"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "rows.jsonl:4: prompt must be text"),
        ('{"prompt": " ", "answer": "1"}', "rows.jsonl:4: prompt must be text, and is ' '"),
        ("7", "rows.jsonl:4: prompt must be text"),
    ],
)
def test_rows(folder: Path, line: str, said: str) -> None:
    path = folder / "rows.jsonl"
    assert eval_lm_eval.check_rows(path) == 2
    path.write_text(ROWS + line)
    with pytest.raises(InputError, match=said):
        eval_lm_eval.check_rows(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        eval_lm_eval.check_rows(path)


def test_the_evaluator_writes_under_the_output_folder_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as variables say it; and gets no token under another name than it looks for."""
    monkeypatch.setenv("HF_TOKEN", "of a person")
    monkeypatch.setenv("no_proxy", "example.org")
    endpoint = evaluator.Endpoint("http://127.0.0.1:1/v1", MODEL, TOKEN)
    found = evaluator.variables(endpoint, folder / "out/work")
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR"):
        assert Path(found[name]).is_relative_to(folder / "out/work")
    assert found["HF_HUB_OFFLINE"] == "1" and "HF_TOKEN" not in found
    assert found["NO_PROXY"] == "127.0.0.1,localhost"
    assert found["no_proxy"] == "127.0.0.1,localhost,example.org"
    assert sorted(name for name, value in found.items() if value == TOKEN) == [
        "OPENAI_API_KEY",
        "REMOTE_OPENAI_API_KEY",
    ]
    online = evaluator.variables(endpoint, folder / "other", online=True)
    assert "HF_HUB_OFFLINE" not in online


def test_prompts_that_lm_eval_cuts_are_counted(folder: Path) -> None:
    """Each once, though two filters write it twice: of a context of 40 tokens 39 are to be had."""
    options = argparse.Namespace(export=folder / "export")
    samples = []
    for index, (length, answer) in enumerate([(29, "x"), (30, " "), (29, ""), (3, "x")]):
        arguments = [("1" * length, {"max_gen_toks": 10})]  # a digit is a token
        row = {"task": "a", "doc_id": index, "arguments": arguments, "resps": [[answer]]}
        samples += [{**row, "filter": "strict"}, {**row, "filter": "flexible"}]
    for index, answer in enumerate(["1" * 9, "1" * 10]):
        arguments = [("1" * 30, answer)]
        samples.append({"task": "b", "doc_id": index, "arguments": arguments, "resps": [[-1]]})
    counts = eval_lm_eval.count(samples, options, context=40)
    assert counts == {"num_requests": 6, "num_empty": 2, "num_prompts_cut": 2}


def test_figures_of_bfcl(tmp_path: Path) -> None:
    """Accuracy, its error, kinds of mistakes; failed requests apart."""
    scores, results = tmp_path / "score/it/non_live", tmp_path / "result/it/non_live"
    scores.mkdir(parents=True)
    results.mkdir(parents=True)
    head = {"accuracy": 0.6, "correct_count": 3, "total_count": 5}
    wrong = [{"error_type": "ast_decoder:decoder_failed"}, {"error_type": "value_error:string"}]
    lines = "\n".join(json.dumps(it) for it in [head, *wrong])
    (scores / "BFCL_v4_simple_python_score.json").write_text(lines)
    answers = [{"id": "1", "result": "[f()]"}, {"id": "2", "result": [["Error during"]]}]
    answers.append({"id": "3", "result": "Error during inference: 500"})
    lines = "\n".join(json.dumps(it) for it in answers)
    (results / "BFCL_v4_simple_python_result.json").write_text(lines)
    rows, failed = eval_bfcl.figures(tmp_path)
    assert rows == [
        {
            "task": "simple_python",
            "metric": "accuracy",
            "value": 0.6,
            "stderr": pytest.approx((0.6 * 0.4 / 4) ** 0.5),
            "num_samples": 5,
            "num_correct": 3,
            "errors": {"ast_decoder:decoder_failed": 1, "value_error:string": 1},
        }
    ]
    assert [it["id"] for it in failed] == ["3"]
    assert eval_bfcl.standard_error(1.0, 1) is None
