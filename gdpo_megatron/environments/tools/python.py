"""The tool `python`: runs a program of the model in the sandbox, and answers what it printed.

Every call is a fresh process: no name, file or module of one call is there in the next. What the
sandbox keeps out is in docs/sandbox.md. A program that fails is answered with the end of its
traceback; a sandbox that fails is no answer at all, and the rollout has no reward.
"""

from __future__ import annotations

from gdpo_megatron.environments.tools.base import TOOLS, Tool, ToolError
from gdpo_megatron.sandbox import Execution, Status, shared_sandbox

NO_OUTPUT = "(the program printed nothing)"
MAX_ERROR_LINES = 5
"""Of a traceback, from its end; a syntax error takes four."""

_ENDED = {
    Status.TIMEOUT: "the program took too long and was ended",
    Status.MEMORY: "the program used too much memory and was ended",
    Status.OUTPUT_LIMIT: "the program printed too much and was ended",
    Status.DENIED: "the program did something that is not allowed here",
}


def run_program(code: str) -> str:
    """Run a program; return what it printed on stdout, without trailing blanks.

    Raises:
        ToolError: it failed; what it printed, and how it ended.
        SandboxUnavailable: this machine has none.
        RuntimeError: the sandbox failed.
    """
    done = shared_sandbox().run(code)
    if done.status is Status.INFRA_ERROR:
        raise RuntimeError(f"the sandbox failed: {done.detail}")
    printed = done.stdout.rstrip()
    if done.status is Status.OK:
        return printed or NO_OUTPUT
    raise ToolError("\n".join(filter(None, (printed, _how_it_ended(done)))))


def _how_it_ended(done: Execution) -> str:
    lines = done.stderr.rstrip().splitlines()[-MAX_ERROR_LINES:]
    said = _ENDED.get(done.status) or (f"exit code {done.exit_code}" if not lines else "")
    return "\n".join(filter(None, (*lines, said)))


@TOOLS.register("python")
def python() -> Tool:
    """The tool."""
    return Tool(
        name="python",
        description="Run a Python program and read what it prints. Nothing is kept between calls.",
        parameters={
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
            "additionalProperties": False,
        },
        function=run_program,
        uses_sandbox=True,
    )
