"""bfcl-eval's own `generate` and `evaluate`, for a model that its table does not hold.

    python bfcl_main.py SPEC.json

Run by eval_bfcl.py in the environment that `scripts/setup.sh bfcl` makes, with BFCL_PROJECT_ROOT as
the folder that all is written to. The model gets an entry of its own in bfcl-eval's table, under a
handler (what writes the prompt and reads the calls) of bfcl-eval's.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bfcl_safety
import requests
from bfcl_eval.__main__ import cli
from bfcl_eval.constants import eval_config, model_config
from bfcl_eval.constants.category_mapping import ALL_SCORING_CATEGORIES, TEST_COLLECTION_MAPPING
from bfcl_eval.model_handler.local_inference import base_oss_handler
from bfcl_eval.model_handler.local_inference.base_oss_handler import OSSHandler
from bfcl_eval.model_handler.local_inference.quick_testing_oss import QuickTestingOSSHandler
from bfcl_eval.utils import load_dataset_entry

NAME = "gdpo-export"
"""In bfcl-eval's files. No underscore: it would read one as a slash."""

COUNTS = {"num_requests": 0, "num_truncated": 0}
_lock = threading.Lock()


def input_error(text: str) -> None:
    """End as eval_bfcl.py expects it of a wrong option."""
    print(f"INPUT ERROR: {text}")
    sys.exit(2)


def with_limits(handler: type[OSSHandler], context: int) -> type[OSSHandler]:
    """The handler, with the context that is served; it counts the completions that were cut off.

    By itself it asks for all tokens that the model's config leaves after the prompt, at most 4,096;
    a server may serve less than the config says, and would refuse.
    """

    class Limited(handler):
        @property
        def max_context_length(self) -> int:
            return self._context

        @max_context_length.setter
        def max_context_length(self, of_config: int) -> None:
            self._context = min(of_config, context)

    def query(self: Any, inference_data: dict) -> Any:
        answer, seconds = handler._query_prompting(self, inference_data)
        with _lock:
            COUNTS["num_requests"] += 1
            COUNTS["num_truncated"] += answer.choices[0].finish_reason == "length"
        return answer, seconds

    # Put in afterwards: their check of overridden methods does not find a base that is a variable.
    Limited._query_prompting = query  # pyright: ignore
    return Limited


def register(served: str, like: str | None, context: int) -> None:
    """Put the model into bfcl-eval's table."""
    table = model_config.MODEL_CONFIG_MAPPING
    if like is None:
        entry = model_config.ModelConfig(
            model_name=served,
            display_name=NAME,
            url="",
            org="",
            license="",
            model_handler=with_limits(QuickTestingOSSHandler, context),
            input_price=None,
            output_price=None,
            is_fc_model=False,
            underscore_to_dot=False,
        )
    else:
        local = sorted(it for it in table if issubclass(table[it].model_handler, OSSHandler))
        if like not in local:
            input_error(f"--like {like}: choices: {', '.join(local)}")
        entry = dataclasses.replace(
            table[like],
            model_name=served,
            display_name=NAME,
            model_handler=with_limits(table[like].model_handler, context),
        )
    table[NAME] = entry


def bear_token() -> None:
    """Have bfcl-eval's look at the server's list of models bear the token, as its prompts do."""
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {os.environ['REMOTE_OPENAI_API_KEY']}"
    base_oss_handler.requests = SimpleNamespace(  # pyright: ignore
        get=session.get, exceptions=requests.exceptions
    )


def main(spec: dict[str, Any]) -> None:
    """Generate and evaluate what the spec says."""
    categories: list[str] = []
    for name in spec["categories"]:
        if name not in TEST_COLLECTION_MAPPING and name not in ALL_SCORING_CATEGORIES:
            known = ", ".join([*ALL_SCORING_CATEGORIES, *TEST_COLLECTION_MAPPING])
            input_error(f"--category {name}: choices: {known}")
        categories += TEST_COLLECTION_MAPPING.get(name, [name])
    register(spec["model"], spec["like"], spec["context_length"])
    bear_token()
    bfcl_safety.install()
    generate = ["generate", "--model", NAME, "--skip-server-setup"]
    generate += [
        "--num-threads",
        str(spec["concurrency"]),
        "--temperature",
        str(spec["temperature"]),
    ]
    evaluate = ["evaluate", "--model", NAME, "--test-category", ",".join(categories)]
    if spec["limit"] is None:
        generate += ["--test-category", ",".join(categories)]
    else:
        ids = {
            it: [row["id"] for row in load_dataset_entry(it)[: spec["limit"]]] for it in categories
        }
        eval_config.TEST_IDS_TO_GENERATE_PATH.write_text(json.dumps(ids, indent=1))
        generate.append("--run-ids")
        evaluate.append("--partial-eval")
    for command in (generate, evaluate):
        print("+ bfcl", *command, flush=True)
        cli(command, standalone_mode=False)
    Path(spec["counts"]).write_text(json.dumps(COUNTS))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
